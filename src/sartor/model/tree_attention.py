"""Attention that knows the tree, plugged into Hugging Face models from outside.

A model under ``attn_implementation="sartor"`` calls :func:`attention` in every layer. What each query may see is up to
the object passed to the model as ``attends=...``: a :class:`TreeAttention` for a flat batch of trees, or the
sampler's key-value cache for one decoding step. Everything else (projections, rotary positions, norms) is untouched.

The matching mask entry matters as much: without it transformers builds its own mask and, seeing positions jump from one
branch back to the prompt's end, takes the second branch for a new sequence and silently cuts it off from its prompt.
Ours returns only the layer's sliding window, which is all that a layer has to add.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface

from sartor.data.trees import TokenTree, TreeBatch

NAME = "sartor"
# Tokens up to which a tree is one product, with its scores kept for the backward pass; queries in a block of a longer
# one, whose scores are computed again; and bytes that the scores of a layer may keep in all.
SHORT, ROWS, KEPT = 512, 256, 2**26


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
        value: Float[Tensor, "1 kv_heads T v"],
        *,
        window: int | None,
        scaling: float,
        softcap: float | None,
    ) -> Float[Tensor, "1 T heads v"]:
        """Attention output for the flat queries of one layer."""
        ...


@dataclass(frozen=True)
class Block:
    """Some queries of one tree, the keys they may see, and which of those are still hidden from which query.

    Places are counted from the tree's first token.
    """

    rows: slice
    keys: tuple[slice, ...]
    bias: Float[Tensor, "rows keys"]


class TreeAttention:
    """Dense attention inside each tree of a batch: a branch sees its prompt and itself, never another branch.

    One batched matrix product per tree, grouped by key-value head, runs faster on a CPU than a flash kernel with a mask
    (`docs/log.md`, 2026-11-21). Most of a *long* tree's square is hidden, what comes later and what is in other
    branches, so it is computed in blocks of queries, each with the keys that it may see.
    """

    def __init__(self, batch: TreeBatch) -> None:
        self.batch = batch
        self._blocks: dict[tuple[int | None, torch.dtype], list[list[Block]]] = {}

    def blocks(self, window: int | None, dtype: torch.dtype) -> list[list[Block]]:
        """Per tree what is computed at once: all of it, or its blocks."""
        if (window, dtype) not in self._blocks:
            self._blocks[window, dtype] = [
                [Block(rows, keys, self._bias(bound, rows, keys, window, dtype)) for rows, keys in _cut(bound, window)]
                for bound in self.batch.bounds
            ]
        return self._blocks[window, dtype]

    def _bias(
        self, bound: Sequence[int], rows: slice, keys: Sequence[slice], window: int | None, dtype: torch.dtype
    ) -> Tensor:
        """What is added to scores: 0 where the row's token sees the column's, -inf elsewhere."""
        tree = slice(bound[0], bound[-1])
        position, branch = self.batch.positions[tree], self.batch.branch_of_token[tree]
        key_position, key_branch = (_gather(of_token[None], keys)[0] for of_token in (position, branch))
        # The window counts positions along a branch, not places in the flat sequence.
        distance = position[rows, None] - key_position[None, :]
        seen = (distance >= 0) & ((key_branch[None, :] == 0) | (key_branch[None, :] == branch[rows, None]))
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
        heads, kv_heads = query.shape[1], key.shape[1]
        sizes = [bound[-1] - bound[0] for bound in self.batch.bounds]
        grouped = query.view(kv_heads, heads // kv_heads, *query.shape[2:]), key.squeeze(0), value.squeeze(0)
        # split and not slices: its backward is one copy, that of each slice fills a whole flat tensor with zeros.
        by_tree = zip(*(t.split(sizes, -2) for t in grouped), strict=True)
        trees = self.blocks(window, query.dtype)
        whole = sum(blocks[0].bias.numel() for blocks in trees if len(blocks) == 1)
        keeps = heads * whole * query.element_size() <= KEPT
        outputs = []
        for blocks, (q, k, v) in zip(trees, by_tree, strict=True):
            if len(blocks) == 1 and keeps:
                mixed = _mix(q, k, v, blocks[0].bias, scaling, softcap)
            else:
                mixed = _InBlocks.apply(q, k, v, blocks, scaling, softcap)
            outputs.append(mixed.flatten(0, 1).transpose(0, 1))
        return torch.cat(outputs)[None]


def scores_of(tree: TokenTree) -> int:
    """How many scores a head computes for a tree without a window."""
    bound = tuple(accumulate((0, len(tree.prompt), *map(len, tree.branches))))
    return sum(_length(rows) * sum(map(_length, keys)) for rows, keys in _cut(bound))


def scores_kept(tree: TokenTree) -> int:
    """How many of them stay for the backward pass."""
    return tree.size**2 if tree.size <= SHORT else 0


def _cut(bound: Sequence[int], window: int | None = None) -> Iterator[tuple[slice, tuple[slice, ...]]]:
    """Rows and keys of a tree's blocks: all of a short tree at once; of a long one each segment in even parts."""
    prompt, *ends = (end - bound[0] for end in bound[1:])
    size = bound[-1] - bound[0]
    if size <= SHORT:
        yield slice(0, size), (slice(0, size),)
        return
    back = size if window is None else window - 1  # how far a query looks back
    begin = 0
    for end in (prompt, *ends):
        count = -(-(end - begin) // ROWS)
        for part in range(count):
            low, high = (begin + (end - begin) * place // count for place in (part, part + 1))
            if begin <= prompt:  # the prompt itself, and the first branch, which follows it without a gap
                keys: tuple[slice, ...] = (slice(max(0, low - back), high),)
            else:
                gap = begin - prompt  # its siblings stand between the prompt and this branch
                keys = slice(min(prompt, max(0, low - gap - back)), prompt), slice(max(begin, low - back), high)
            yield slice(low, high), keys
        begin = end


def _mix(
    query: Float[Tensor, "kv_heads groups rows d"],
    key: Float[Tensor, "kv_heads keys d"],
    value: Float[Tensor, "kv_heads keys v"],
    bias: Float[Tensor, "rows keys"],
    scaling: float,
    softcap: float | None,
) -> Float[Tensor, "kv_heads groups rows v"]:
    """softmax(scores)·v, all queries of a key-value head in one product."""
    groups, rows = query.shape[1:3]
    scores = masked_scores(query.flatten(1, 2), key, bias.repeat(groups, 1), scaling, softcap)
    return torch.bmm(scores.softmax(-1), value).unflatten(1, (groups, rows))


class _InBlocks(torch.autograd.Function):
    """Attention block after block. No scores are kept: backward computes those of a block again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Sequence[Block],
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Attention output, shaped as the query, its last axis as the value's."""
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.options = blocks, (scaling, softcap)
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        for block in blocks:
            keys, values = _gather(key, block.keys), _gather(value, block.keys)
            output[:, :, block.rows] = _mix(query[:, :, block.rows], keys, values, block.bias, scaling, softcap)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """By query, key and value."""
        query, key, value = ctx.saved_tensors
        by_query = torch.empty_like(query)
        # Every later block adds to a prompt's keys: in bf16 each addition would round.
        wide = torch.promote_types(key.dtype, torch.float32)
        by_key, by_value = (torch.zeros_like(tensor, dtype=wide) for tensor in (key, value))
        for block in ctx.blocks:
            parts = query[:, :, block.rows], _gather(key, block.keys), _gather(value, block.keys)
            leaves = [part.detach().requires_grad_() for part in parts]
            with torch.enable_grad():
                mixed = _mix(*leaves, block.bias, *ctx.options)  # type: ignore[call-arg, arg-type]
            by_query[:, :, block.rows], *by_keys = torch.autograd.grad(mixed, leaves, slope[:, :, block.rows])
            lengths = [_length(part) for part in block.keys]
            for total, found in zip((by_key, by_value), by_keys, strict=True):
                for part, piece in zip(block.keys, found.split(lengths, 1), strict=True):
                    total[:, part] += piece
        return by_query, by_key.to(key.dtype), by_value.to(value.dtype), None, None, None


def _length(part: slice) -> int:
    return part.stop - part.start


def _gather(tensor: Tensor, parts: Sequence[slice]) -> Tensor:
    return torch.cat([tensor[:, part] for part in parts], 1) if len(parts) > 1 else tensor[:, parts[0]]


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
