"""The local sampler: batched decoding with a key-value cache, prompts computed once for all their samples.

Prompts are prefilled packed flat, like trees without branches, and their keys and values copied into one row per
sample. A decoding step is again a flat batch: one token per row, each at its own position, so rows of unlike length
need no padding on the left. Rows that ended leave the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from sartor.data.trees import TokenIds, TokenTree, pack, split_by_budget
from sartor.errors import UserError
from sartor.model.forward import check, head_of, use_attention
from sartor.model.load import LanguageModel
from sartor.model.tree_attention import NAME, TreeAttention, masked_scores

PREFILL_TOKENS = 4096
TOP_P_WORDS = 1024  # candidates that top-p looks at first; sorting the whole vocabulary takes ten times as long


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled completion. ``finished``: it ended by itself, with ``tokens`` closing on an end-of-turn token."""

    text: str
    tokens: TokenIds
    finished: bool


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. ``temperature`` 0 is greedy; ``top_p`` keeps the likeliest words that make up that much mass."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 64
    seed: int = 0


class KeyValueCache:
    """Keys and values of every layer for a batch of rows, in place; ``attend`` decodes one token per row."""

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.rows, self.capacity = rows, capacity
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._bias: dict[int | None, Tensor] = {}

    def fill(self, layer: int, row: slice, key: Tensor, value: Tensor) -> None:
        """Copy the keys and values [kv_heads, L, d] of one prompt into its rows."""
        if layer not in self.layers:
            shape = (self.rows, key.shape[0], self.capacity)
            self.layers[layer] = (key.new_zeros(*shape, key.shape[-1]), value.new_zeros(*shape, value.shape[-1]))
        keys, values = self.layers[layer]
        keys[row, :, : key.shape[1]] = key
        values[row, :, : value.shape[1]] = value

    def advance(self) -> None:
        """Make room for one more token per row."""
        self.lengths += 1
        self._bias.clear()

    def keep(self, index: Int[Tensor, " rows"]) -> None:
        """Drop all rows but these."""
        self.rows, self.lengths = len(index), self.lengths[index]
        self.layers = {layer: (keys[index], values[index]) for layer, (keys, values) in self.layers.items()}
        self._bias.clear()

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
        keys, values = self.layers[layer]
        rows, kv_heads, width = self.rows, key.shape[1], value.shape[-1]
        groups, longest = query.shape[1] // kv_heads, int(self.lengths.max())
        row = torch.arange(rows, device=query.device)
        keys[row, :, self.lengths - 1] = key[0].transpose(0, 1)
        values[row, :, self.lengths - 1] = value[0].transpose(0, 1)
        flat = query[0].transpose(0, 1).reshape(rows * kv_heads, groups, -1)
        past = keys[:, :, :longest].reshape(rows * kv_heads, longest, -1)
        bias = self._mask(window, longest, query.dtype)[:, None, None].expand(rows, kv_heads, groups, longest)
        scores = masked_scores(flat, past, bias.reshape(rows * kv_heads, groups, longest), scaling, softcap)
        mixed = torch.bmm(scores.softmax(-1), values[:, :, :longest].reshape(rows * kv_heads, longest, -1))
        return mixed.view(1, rows, kv_heads * groups, width)

    def _mask(self, window: int | None, longest: int, dtype: torch.dtype) -> Float[Tensor, "rows L"]:
        if window not in self._bias:
            place = torch.arange(longest, device=self.lengths.device)
            seen = place < self.lengths[:, None]
            if window is not None:
                seen &= place >= self.lengths[:, None] - window
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            self._bias[window] = bias.masked_fill_(~seen, float("-inf"))
        return self._bias[window]


class _Prefill(TreeAttention):
    """Attention over packed prompts that keeps what each layer computed, one cache row per sample."""

    def __init__(self, prompts: Sequence[TokenIds], rows: Sequence[slice], cache: KeyValueCache) -> None:
        super().__init__(pack([TokenTree(prompt, ()) for prompt in prompts]).to(cache.lengths.device))
        self.rows, self.cache = rows, cache

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        for row, bound in zip(self.rows, self.batch.bounds, strict=True):
            prompt = slice(bound[0], bound[1])
            self.cache.fill(layer, row, key[0, :, prompt], value[0, :, prompt])
        return super().attend(layer, query, key, value, **options)


@torch.no_grad()
def sample(
    model: LanguageModel,
    prompts: Sequence[TokenIds],
    n: int,
    sampling: Sampling,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[Sample]]:
    """``n`` completions of each prompt. ``progress`` is called with the number of completions that ended.

    Every sample draws from random numbers of its own, fixed by the seed and its place: the batch size changes them by
    rounding at most. Models that cannot run packed are sampled by transformers' own ``generate``.

    Raises:
        UserError: prompt and completion need more positions than the model has.
    """
    longest = max(prompts, key=len)
    if model.context is not None and len(longest) + sampling.max_new_tokens > model.context:
        raise UserError(
            f"a prompt of {len(longest)} and an answer of up to {sampling.max_new_tokens} tokens exceed the "
            f"{model.context} positions of {model.name}; lower --max-length or --max-new-tokens"
        )
    if model.shares_prompts is None:
        check(model, TokenTree(longest, (longest[-1:],)))
    decode = _decode if model.shares_prompts else _generate
    uniform = torch.rand(
        len(prompts) * n, sampling.max_new_tokens, generator=torch.Generator().manual_seed(sampling.seed)
    )
    results: list[list[Sample]] = [[] for _ in prompts]
    ends = model.end_tokens
    for group, copies in _waves(prompts, n, sampling.batch_size):
        place = torch.cat([torch.arange(i * n + len(results[i]), i * n + len(results[i]) + copies) for i in group])
        tokens = decode(model, [prompts[i] for i in group], copies, uniform[place], sampling, progress)
        for row, ids in enumerate(tokens):
            finished = bool(ids) and ids[-1] in ends
            text = model.tokenizer.decode(ids, skip_special_tokens=True)
            results[group[row // copies]].append(Sample(text, tuple(ids), finished))
    return results


def _waves(prompts: Sequence[TokenIds], n: int, batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Prompts of like length together, as many as fill a batch; more samples than a batch holds come in turns."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    copies = min(n, batch_size)
    per_wave = max(1, batch_size // copies)
    for start in range(0, len(order), per_wave):
        for done in range(0, n, copies):
            yield order[start : start + per_wave], min(copies, n - done)


def _decode(
    model: LanguageModel,
    prompts: Sequence[TokenIds],
    copies: int,
    uniform: Float[Tensor, "rows steps"],
    sampling: Sampling,
    progress: Callable[[int], None],
) -> list[list[int]]:
    use_attention(model, NAME)
    ends = torch.tensor(sorted(model.end_tokens), device=model.device)
    head, uniform = head_of(model), uniform.to(model.device)
    cache = KeyValueCache(len(uniform), max(map(len, prompts)) + sampling.max_new_tokens, model.device)
    hidden = _prefill(model, prompts, copies, cache)
    tokens: list[list[int]] = [[] for _ in range(len(uniform))]
    alive = torch.arange(len(uniform), device=model.device)  # the output row of each cache row
    running = torch.ones_like(alive, dtype=torch.bool)
    for step in range(sampling.max_new_tokens):
        chosen = choose(head.logits(hidden), uniform[alive, step], sampling.temperature, sampling.top_p)
        for row, token in zip(alive[running].tolist(), chosen[running].tolist(), strict=True):
            tokens[row].append(token)
        ended = running & torch.isin(chosen, ends)
        progress(int(ended.sum()))
        running &= ~ended
        if not running.any() or step + 1 == sampling.max_new_tokens:
            break
        if running.sum() <= 0.75 * len(running):  # moving the cache costs more than a few idle rows
            index = running.nonzero()[:, 0]
            cache.keep(index)
            alive, chosen, running = alive[index], chosen[index], running[index]
        cache.advance()
        hidden = model.core.base_model(
            input_ids=chosen[None], position_ids=cache.lengths[None] - 1, use_cache=False, attends=cache
        ).last_hidden_state[0]
    progress(int(running.sum()))
    return tokens


def _prefill(model: LanguageModel, prompts: Sequence[TokenIds], copies: int, cache: KeyValueCache) -> Tensor:
    """Fill the cache and return the last hidden state of each row's prompt, shape [rows, hidden]."""
    last: list[Tensor | None] = [None] * len(prompts)
    for group in split_by_budget([len(p) for p in prompts], PREFILL_TOKENS):
        rows = [slice(i * copies, (i + 1) * copies) for i in group]
        attends = _Prefill([prompts[i] for i in group], rows, cache)
        batch = attends.batch
        hidden = model.core.base_model(
            input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False, attends=attends
        ).last_hidden_state[0]
        for i, row, bound in zip(group, rows, batch.bounds, strict=True):
            cache.lengths[row] = len(prompts[i])
            last[i] = hidden[bound[1] - 1]
    return torch.stack([state for state in last if state is not None]).repeat_interleave(copies, 0)


def choose(
    logits: Float[Tensor, "rows V"], uniform: Float[Tensor, " rows"], temperature: float, top_p: float
) -> Int[Tensor, " rows"]:
    """One word per row by inverting the cumulative distribution at ``uniform``.

    >>> choose(torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([0.1]), temperature=0.0, top_p=1.0)
    tensor([2])
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits / temperature, -1)
    if top_p >= 1:
        return _invert(probs, uniform)
    for words in (min(TOP_P_WORDS, probs.shape[-1]), probs.shape[-1]):
        top, index = probs.topk(words, -1)
        if words == probs.shape[-1] or bool((top.sum(-1) >= top_p).all()):
            break
    # A word is in as long as the likelier ones before it do not make up top_p by themselves.
    kept = top * (top.cumsum(-1) - top < top_p)
    return index.gather(1, _invert(kept, uniform)[:, None])[:, 0]


def _invert(weights: Float[Tensor, "rows V"], uniform: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    cumulative = weights.cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Where rounding carries the target past the end, the last word with any weight is meant.
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(place, last)


def _generate(
    model: LanguageModel,
    prompts: Sequence[TokenIds],
    copies: int,
    uniform: Float[Tensor, "rows steps"],
    sampling: Sampling,
    progress: Callable[[int], None],
) -> list[list[int]]:
    """The same by transformers, for models that cannot run packed: prompt by prompt, since not all take padding.

    Seeded by the first sample of each call, so here the batch size does change the samples.
    """
    use_attention(model, model.own_attention)
    ends, tokens = model.end_tokens, []
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, eos_token_id=sorted(ends), pad_token_id=min(ends), **options
    )
    for i, prompt in enumerate(prompts):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(uniform[i * copies, 0] * 2**31))
            ids = torch.tensor([prompt] * copies, device=model.device)
            rows = model.core.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
            )
        for row in rows[:, len(prompt) :].tolist():
            end = next((j + 1 for j, token in enumerate(row) if token in ends), len(row))
            tokens.append(row[:end])
        progress(copies)
    return tokens
