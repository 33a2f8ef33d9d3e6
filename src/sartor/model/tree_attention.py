"""Attention that knows the tree, plugged into Hugging Face models from outside.

A model under ``attn_implementation="sartor"`` calls :func:`attention` in every layer. What each query may see is up to
the object passed to the model as ``attends=...``: a :class:`TreeAttention` for a flat batch of trees, or the
sampler's key-value cache for one decoding step. Everything else (projections, rotary positions, norms) is untouched.

The matching mask entry matters as much: without it transformers builds its own mask and, seeing positions jump from one
branch back to the prompt's end, takes the second branch for a new sequence and silently cuts it off from its prompt.
Ours returns only the layer's sliding window, which is all that a layer has to add.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from sartor.data.trees import TreeBatch
from sartor.model.checkpointing import run_again

NAME = "sartor"
KEPT = 2**24  # bytes of scores that a layer keeps for its backward pass; of long trees they are computed again


@dataclass(frozen=True)
class Window:
    """What transformers' mask factory tells a layer: how many positions back it may look (None: all)."""

    size: int | None


@runtime_checkable
class Attends(Protocol):
    """Decides which keys a query sees, and returns the attention output."""

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "1 heads T d"],
        key: Float[Tensor, "1 kv_heads T d"],
        value: Float[Tensor, "1 kv_heads T d"],
        *,
        window: int | None,
        scaling: float,
        softcap: float | None,
    ) -> Float[Tensor, "1 T heads d"]:
        """Attention output for the flat queries of one layer."""
        ...


class TreeAttention:
    """Dense attention inside each tree of a batch: a branch sees its prompt and itself, never another branch.

    Trees are short beside a training batch, so one batched matrix product per tree, grouped by key-value head, runs
    faster on a CPU than a flash kernel with a mask (`docs/log.md`, 2026-11-21).
    """

    def __init__(self, batch: TreeBatch) -> None:
        self.batch = batch
        self._bias: dict[tuple[int | None, torch.dtype], list[Tensor]] = {}

    def bias(self, window: int | None, dtype: torch.dtype) -> list[Tensor]:
        """Per tree an additive mask [L, L]: 0 where the row's token sees the column's, -inf elsewhere."""
        if (window, dtype) not in self._bias:
            self._bias[window, dtype] = [self._tree_bias(b[0], b[-1], window, dtype) for b in self.batch.bounds]
        return self._bias[window, dtype]

    def _tree_bias(self, start: int, end: int, window: int | None, dtype: torch.dtype) -> Tensor:
        position = self.batch.positions[start:end]
        branch = self.batch.branch_of_token[start:end]
        # The window counts positions along a branch, not places in the flat sequence.
        distance = position[:, None] - position[None, :]
        seen = (distance >= 0) & ((branch[None, :] == 0) | (branch[None, :] == branch[:, None]))
        if window is not None:
            seen &= distance < window
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        window: int | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """See :class:`Attends`."""
        bias = self.bias(window, query.dtype)
        scores = query.shape[1] * query.element_size() * sum(mask.numel() for mask in bias)
        if torch.is_grad_enabled() and scores > KEPT:
            return run_again(self._attend, query, key, value, bias, scaling, softcap)
        return self._attend(query, key, value, bias, scaling, softcap)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        biases: Sequence[Tensor],
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        heads, kv_heads, width = query.shape[1], key.shape[1], value.shape[-1]
        groups = heads // kv_heads
        sizes = [bound[-1] - bound[0] for bound in self.batch.bounds]
        # split and not slices: its backward is one copy, that of each slice fills a whole flat tensor with zeros.
        by_tree = zip(*(t.squeeze(0).split(sizes, 1) for t in (query, key, value)), strict=True)
        outputs = []
        for size, bias, (q, k, v) in zip(sizes, biases, by_tree, strict=True):
            grouped = q.reshape(kv_heads, groups * size, -1)  # [kv_heads, groups·L, d]
            scores = masked_scores(grouped, k, bias.repeat(groups, 1), scaling, softcap)
            mixed = torch.bmm(scores.softmax(-1), v)
            outputs.append(mixed.view(heads, size, width).transpose(0, 1))
        return torch.cat(outputs)[None]


def masked_scores(query: Tensor, key: Tensor, bias: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """scaling·q·kᵀ, capped as cap·tanh(·/cap) where the model does so (Gemma 2), plus the mask."""
    if softcap is None:
        return torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scaling)
    scores = torch.bmm(query, key.transpose(1, 2)) * (scaling / softcap)
    return torch.tanh(scores) * softcap + bias


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Window | None,
    *,
    attends: Attends | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer."""
    if attends is None or not isinstance(attention_mask, Window):
        raise NotImplementedError("the model does not pass the tree's layout down to its attention layers")
    if others.get("s_aux") is not None:
        raise NotImplementedError("attention sinks")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise NotImplementedError("attention layers without an index")
    output = attends.attend(layer, query, key, value, window=attention_mask.size, scaling=scaling, softcap=softcap)
    return output, None


def _window(*_: Any, local_size: int | None = None, **__: Any) -> Window:
    return Window(local_size)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _window)
