"""Keys and values of past tokens, one row per running sample, allocated once and written in place."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sartor.data.trees import TokenIds, TokenTree, pack
from sartor.model.tree_attention import TreeAttention, masked_scores


class KeyValueCache:
    """Keys and values of every layer for a batch of rows; ``attend`` decodes one token per row.

    Keys stand transposed, [rows, kv_heads, d, capacity], values as they come, [rows, kv_heads, capacity, d]: so both
    products of attention read a slice of the cache where it lies. ``lengths`` is known to the host, so that no layer
    has to ask the device for it; a row that runs nothing has length 1.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.lengths = [1] * rows
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._row = torch.arange(rows, device=device)
        self._bias: dict[Any, Tensor] = {}
        self._index: dict[torch.Size, Tensor] = {}
        self._count()

    @property
    def rows(self) -> int:
        """Rows in use, the first of those allocated."""
        return len(self.lengths)

    def fill(self, layer: int, rows: Sequence[int], key: Tensor, value: Tensor) -> None:
        """Copy the keys and values [kv_heads, L, d] of one prompt into its rows."""
        if layer not in self.layers:
            heads, _, width = key.shape
            # Zeros and not empty: what the mask hides is multiplied by 0, and 0·NaN would show.
            keys = key.new_zeros(self.rows, heads, width, self.capacity)
            self.layers[layer] = keys, value.new_zeros(self.rows, heads, self.capacity, value.shape[-1])
        keys, values = self.layers[layer]
        for row in rows:
            keys[row, :, :, : key.shape[1]] = key.transpose(1, 2)
            values[row, :, : value.shape[1]] = value

    def advance(self, running: Sequence[bool]) -> None:
        """Make room for one more token in the rows that run."""
        self.lengths = [length + run for length, run in zip(self.lengths, running, strict=True)]
        self._count()

    def idle(self, row: int) -> None:
        """Forget what a row held."""
        self.lengths[row] = 1

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop all rows but these, moving the last into the gaps; returns which old row each row now is."""
        count, kept = len(rows), set(rows)
        gaps = [row for row in range(count) if row not in kept]
        movers = [row for row in rows if row >= count]
        if movers:
            source, target = (torch.tensor(index, device=self.device) for index in (movers, gaps))
            for keys, values in self.layers.values():
                keys[target], values[target] = keys[source], values[source]
        moved = dict(zip(gaps, movers, strict=True))
        order = [moved.get(row, row) for row in range(count)]
        self.lengths = [self.lengths[row] for row in order]
        self._count()
        return order

    def _count(self) -> None:
        self._bias.clear()
        self._index.clear()
        self.longest = max(self.lengths, default=0)
        self.positions = torch.tensor(self.lengths, device=self.device) - 1

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
        """One token per row against its own past; see :class:`sartor.model.tree_attention.Attends`."""
        keys, values = (part[: self.rows] for part in self.layers[layer])
        rows, kv_heads, width = self.rows, key.shape[1], value.shape[-1]
        groups = query.shape[1] // kv_heads
        keys.view(-1).index_copy_(0, self._places(keys), key[0].transpose(0, 1).reshape(-1))
        values[self._row[:rows], :, self.positions] = value[0].transpose(0, 1)
        flat = query[0].transpose(0, 1).reshape(rows * kv_heads, groups, -1)
        past = keys.flatten(0, 1)[:, :, : self.longest].transpose(1, 2)  # masked_scores transposes it back
        bias = self._mask(window, kv_heads, groups, query.dtype)
        weights = masked_scores(flat, past, bias, scaling, softcap).softmax(-1)
        mixed = torch.bmm(weights, values.flatten(0, 1)[:, : self.longest])
        return mixed.view(1, rows, kv_heads * groups, width)

    def _places(self, keys: Tensor) -> Int[Tensor, " elements"]:
        """Where in the flat keys this step's stand; the transposed layout scatters them, and indexing is slower."""
        if keys.shape not in self._index:
            columns = torch.arange(0, keys.numel(), self.capacity, device=self.device).view(self.rows, -1)
            self._index[keys.shape] = (columns + self.positions[:, None]).flatten()
        return self._index[keys.shape]

    def _mask(
        self, window: int | None, kv_heads: int, groups: int, dtype: torch.dtype
    ) -> Float[Tensor, "rows_kv_heads groups L"]:
        """The additive mask of this step, the same in all layers of a kind."""
        kind = window, kv_heads, groups, dtype
        if kind not in self._bias:
            place, last = torch.arange(self.longest, device=self.device), self.positions[:, None]
            seen = place <= last
            if window is not None:
                seen &= place > last - window
            bias = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, float("-inf"))
            whole = bias[:, None, None].expand(self.rows, kv_heads, groups, self.longest)
            self._bias[kind] = whole.reshape(self.rows * kv_heads, groups, self.longest)
        return self._bias[kind]


class Prefill(TreeAttention):
    """Attention over packed prompts that keeps what each layer computed, in the cache rows of every sample."""

    def __init__(self, prompts: Sequence[TokenIds], rows: Sequence[Sequence[int]], cache: KeyValueCache) -> None:
        super().__init__(pack([TokenTree(prompt, ()) for prompt in prompts]).to(cache.device))
        self.rows, self.cache = rows, cache
        for prompt, into in zip(prompts, rows, strict=True):
            for row in into:
                cache.lengths[row] = len(prompt)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """See :class:`sartor.model.tree_attention.Attends`."""
        for rows, bound in zip(self.rows, self.batch.bounds, strict=True):
            prompt = slice(bound[0], bound[1])
            self.cache.fill(layer, rows, key[0, :, prompt], value[0, :, prompt])
        return super().attend(layer, query, key, value, **options)
