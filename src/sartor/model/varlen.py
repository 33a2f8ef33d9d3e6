"""Flash attention over a flat batch of trees: one variable-length call per layer, on CUDA.

Flash kernels know segments of a flat sequence, each with queries and keys of its own, and align the causal mask to the
bottom right where keys outnumber queries. That is just a branch after its prompt::

    flat      p p p c c r r r | q q d         queries  [p p p c c] [r r r]       [q q d]
                                              keys     [p p p c c] [p p p r r r] [q q d]

The prompt lies beside its first branch already, so the two are one segment; before every further branch the prompt's
keys and values are repeated, and the backward pass adds the gradients of the copies. Queries and outputs stay where
they are. Since prompt and branch are contiguous among the keys, a sliding window counts positions along the branch.

Repeatability: the forward pass is, bit for bit, and so is the sum over copies. Flash's backward adds dQ with atomics
and so is not, unless ``torch.use_deterministic_algorithms(True)`` holds while it runs, ``warn_only`` off
(``aten/src/ATen/native/transformers/cuda/attention_backward.cu``).
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sartor.data.trees import TreeBatch
from sartor.model.tree_attention import Attends, TreeAttention

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Segments:
    """G segments with T query rows and T' key rows in all, on the host.

    ``rows`` says which flat row each key row copies. A row that one key row copies already is copied again in round 1,
    2 ...: ``first`` holds where the T first copies lie, in flat order, and ``again`` the key rows of each round and the
    flat rows that they copy, none twice.
    """

    query_starts: Ints  # [G+1], from 0 to T
    key_starts: Ints  # [G+1], from 0 to T'
    longest_query: int
    longest_key: int
    rows: Ints  # [T']
    first: Ints  # [T]
    again: tuple[tuple[Ints, Ints], ...]


def segments(batch: TreeBatch) -> Segments:
    """Segments of a batch: each tree's prompt with its first branch, then every other branch; empty ones left out.

    >>> from sartor.data.trees import TokenTree, pack
    >>> found = segments(pack([TokenTree((1, 2), ((3,), (4, 5, 6)))]))
    >>> found.query_starts.tolist(), found.key_starts.tolist(), found.rows.tolist()
    ([0, 3, 6], [0, 3, 8], [0, 1, 2, 0, 1, 3, 4, 5])
    """
    queries: list[int] = []
    keys: list[int] = []
    rows = [_no_rows()]
    rounds = [_no_rows()]
    for start, prompt_end, *ends in batch.bounds:
        # Without a branch that has tokens the prompt stands alone: its rows need some output.
        filled = [high for low, high in pairwise((prompt_end, *ends)) if high > low] or [prompt_end]
        for number, (low, high) in enumerate(pairwise((start, *filled))):
            if high > low:
                copied = prompt_end - start if number else 0
                queries.append(high - low)
                keys.append(copied + high - low)
                rows += [_arange(start, start + copied), _arange(low, high)]
                rounds += [np.repeat(np.array([number, 0], dtype=np.int32), [copied, high - low])]
    row, round_ = np.concatenate(rows), np.concatenate(rounds)
    at = [np.flatnonzero(round_ == number).astype(np.int32) for number in range(round_.max(initial=0) + 1)]
    return Segments(
        _starts(queries),
        _starts(keys),
        max(queries, default=0),
        max(keys, default=0),
        row,
        at[0],
        tuple((places, row[places]) for places in at[1:]),
    )


def _arange(low: int, high: int) -> Ints:
    return np.arange(low, high, dtype=np.int32)


def _no_rows() -> Ints:
    return _arange(0, 0)


def _starts(lengths: Sequence[int]) -> Ints:
    return np.cumsum([0, *lengths], dtype=np.int32)


class VarlenAttention:
    """Flash attention inside each tree of a batch: a branch sees its prompt and itself, never another branch.

    Built once per batch and used by every layer: lengths are counted on the host, indices cross to the device in one
    copy, and no layer waits for the device.
    """

    def __init__(self, batch: TreeBatch) -> None:
        self.segments = found = segments(batch)
        arrays = [
            found.query_starts,
            found.key_starts,
            found.rows,
            found.first,
            *(a for pair in found.again for a in pair),
        ]
        self.query_starts, self.key_starts, self.rows, *self.copies = _moved(arrays, batch.ids.device)

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
        """See :class:`sartor.model.tree_attention.Attends`."""
        if softcap is not None:
            raise NotImplementedError("flash attention with capped scores")
        flat, keys, values = (heads[0].transpose(0, 1) for heads in (query, key, value))  # [T, heads, d]
        if self.segments.again:
            keys, values = (_Repeat.apply(x, self.rows, *self.copies) for x in (keys, values))
        output = _flash()(
            flat,
            keys,
            values,
            self.query_starts,
            self.key_starts,
            self.segments.longest_query,
            self.segments.longest_key,
            scale=scaling,
            # Flash counts how far back a query looks beyond itself, transformers how many keys it sees.
            window_size=(-1 if window is None else window - 1, 0),
        )
        return output[None]


def _moved(arrays: Sequence[Ints], device: torch.device) -> tuple[Tensor, ...]:
    """The arrays on the device, by one copy that nothing waits for."""
    host = torch.from_numpy(np.concatenate(arrays))
    host = host.pin_memory() if device.type == "cuda" else host
    return host.to(device, non_blocking=True).split([len(array) for array in arrays])


class _Repeat(torch.autograd.Function):
    """Rows [T, h, d] copied to [T', h, d]; the gradients of a row's copies add up in a fixed order.

    ``index_select`` alone would add them with atomics, in the tensor's own precision.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, first: Tensor, *again: Tensor) -> Tensor:
        ctx.save_for_backward(first, *again)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, *again = ctx.saved_tensors
        total = grad.index_select(0, first)
        if len(again) > 2:  # a sum of two is rounded once anyway
            total = total.to(torch.promote_types(total.dtype, torch.float32))
        for places, rows in zip(again[::2], again[1::2], strict=True):
            total.index_add_(0, rows, grad.index_select(0, places).to(total.dtype))  # no row twice: nothing races
        return total.to(grad.dtype), *[None] * (len(again) + 2)


@cache
def _flash() -> Callable[..., Any]:
    """torch's ``varlen_attn``. Its kernels take grouped-query heads as they are; from 2.12 on it wants to be told."""
    from torch.nn.attention.varlen import varlen_attn  # on first use: it takes the time to import dynamo

    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        raise NotImplementedError(f"varlen_attn of torch {torch.__version__}, without scale or window")
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in known else varlen_attn


def head_width(config: Any) -> int:
    """Width of one attention head of a text model."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def suits(config: Any, dtype: torch.dtype) -> bool:
    """Whether flash kernels exist for this precision and a text model's heads."""
    width = head_width(config)
    return (
        dtype in (torch.bfloat16, torch.float16)
        and width <= 256
        and width % 8 == 0
        and getattr(config, "attn_logit_softcapping", None) is None
        and getattr(config, "kv_lora_rank", None) is None  # latent attention: keys wider than values
    )


def fits(device: torch.device) -> bool:
    """Whether flash kernels exist for this device."""
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def attention_for(batch: TreeBatch, core: Any) -> Attends:
    """How the layers of Hugging Face model ``core`` attend: by flash where it fits, else densely, tree by tree."""
    by_flash = fits(core.device) and suits(core.config.get_text_config(), core.dtype)
    return VarlenAttention(batch) if by_flash else TreeAttention(batch)
