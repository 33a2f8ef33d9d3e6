"""The local sampler: batched decoding with a key-value cache, prompts computed once for all their samples.

Prompts are prefilled packed flat, like trees without branches, and their keys and values copied into one cache row per
sample. A decoding step is again a flat batch: one token per row, each at its own position, so rows of unlike length
need no padding on the left. A row whose sample ended takes the next one that waits; when none waits it leaves.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from sartor.data.trees import TokenIds, split_by_budget
from sartor.errors import UserError
from sartor.machine import available_memory, physical_memory, resident_memory
from sartor.model.forward import check, head_of, stand_in, use_attention, use_lean_layers
from sartor.model.load import LanguageModel
from sartor.model.tree_attention import NAME
from sartor.rollout.cache import KeyValueCache, Prefill
from sartor.rollout.packed import packed_weights

PREFILL_TOKENS = 4096
REFILL = 8  # waiting samples come in when an eighth of the rows is free: a few prompts at a time prefill slowly
PACK_STEPS = 48  # laying out the weights costs as much as it saves in thirty steps
TOP_P_WORDS = 1024  # candidates that top-p looks at first; sorting the whole vocabulary takes ten times as long
BLOCK = 512  # words whose weights are summed together before one of them is looked for


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled completion. ``finished``: it ended by itself, with ``tokens`` closing on an end-of-turn token."""

    text: str
    tokens: TokenIds
    finished: bool


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. ``temperature`` 0 is greedy; ``top_p`` keeps the likeliest words that make up that much mass.

    ``packs`` says whether to lay out the weights for decoding, which adds products up in another order; None leaves
    that to the memory that is free now.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 64
    seed: int = 0
    packs: bool | None = None


def has_room_to_pack(model: LanguageModel) -> bool:
    """Whether to lay weights out, by the memory that the machine has and not by what is free now: a run that is resumed
    must draw the same answers.
    """
    return 8 * sum(p.nbytes for p in model.core.parameters()) < physical_memory()


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
        check(model, stand_in(longest, sampling.max_new_tokens))
    uniform = torch.rand(
        len(prompts) * n, sampling.max_new_tokens, generator=torch.Generator().manual_seed(sampling.seed)
    )
    # Lean layers belong to the packed road; a lean LoRA layer goes past its base layer, which here may be packed.
    use_lean_layers(model, bool(model.shares_prompts) and not model.is_adapted)
    if model.shares_prompts:
        steps = len(uniform) * sampling.max_new_tokens / sampling.batch_size
        room = sampling.packs
        if room is None:
            room = available_memory() - resident_memory() > 2 * sum(p.nbytes for p in model.core.parameters())
        packs = steps >= PACK_STEPS and room
        with packed_weights(model.core, sampling.batch_size) if packs else nullcontext():
            tokens = _Decoder(model, prompts, n, uniform, sampling, progress).run()
    else:
        tokens = _generate(model, prompts, n, uniform, sampling, progress)
    ends, decode = model.end_tokens, model.tokenizer.decode
    samples = [Sample(decode(ids, skip_special_tokens=True), tuple(ids), ids[-1] in ends) for ids in tokens]
    return [samples[i : i + n] for i in range(0, len(samples), n)]


class _Decoder:
    """Samples in the rows of a cache. A sample is known by its place: prompt·n + its number among the prompt's."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[TokenIds],
        n: int,
        uniform: Float[Tensor, "samples steps"],
        sampling: Sampling,
        progress: Callable[[int], None],
    ) -> None:
        use_attention(model, NAME)
        self.model, self.prompts, self.n, self.sampling, self.progress = model, prompts, n, sampling, progress
        self.uniform, self.head, self.ends = uniform.to(model.device), head_of(model), model.end_tokens
        self.output = model.core.get_output_embeddings()
        self.tokens: list[list[int]] = [[] for _ in uniform]
        # Prompts of like length run together: a step attends as far back as its longest row.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        self.waiting = deque(i * n + copy for i in order for copy in range(n))
        self.rows: list[int | None] = [None] * min(sampling.batch_size, len(uniform))  # place of each row's sample
        capacity = max(map(len, prompts)) + sampling.max_new_tokens
        self.cache = KeyValueCache(len(self.rows), capacity, model.device)
        self.chosen = torch.zeros(len(self.rows), dtype=torch.long, device=model.device)  # each row's newest token

    def run(self) -> list[list[int]]:
        """The tokens of every sample, by place."""
        while True:
            idle = [row for row, place in enumerate(self.rows) if place is None]
            if self.waiting and len(idle) * REFILL >= len(self.rows):
                self._admit(idle)
            elif self.waiting or not idle:
                self._step()
            elif len(idle) < len(self.rows):
                self._drop()
            else:
                return self.tokens

    def _admit(self, idle: Sequence[int]) -> None:
        """Prefill the prompts of the samples next in line, each once, and choose their first tokens."""
        rows = idle[: len(self.waiting)]
        for row in rows:
            self.rows[row] = self.waiting.popleft()
        shared = [list(group) for _, group in groupby(rows, key=lambda row: self._place(row) // self.n)]
        prompts = [self.prompts[self._place(group[0]) // self.n] for group in shared]
        for part in split_by_budget([len(prompt) for prompt in prompts], PREFILL_TOKENS):
            into = [shared[i] for i in part]
            attends = Prefill([prompts[i] for i in part], into, self.cache)
            hidden = self._hidden(attends.batch.ids, attends.batch.positions, attends)
            copies = torch.tensor([len(group) for group in into], device=self.model.device)
            last = torch.tensor([bound[1] - 1 for bound in attends.batch.bounds], device=self.model.device)
            self._choose(hidden[last.repeat_interleave(copies)], [row for group in into for row in group])

    def _step(self) -> None:
        """One more token in every row; those without a sample run along."""
        self.cache.advance([place is not None for place in self.rows])
        hidden = self._hidden(self.chosen, self.cache.positions, self.cache)
        self._choose(hidden, range(len(self.rows)))

    def _drop(self) -> None:
        order = self.cache.keep([row for row, place in enumerate(self.rows) if place is not None])
        self.rows, self.chosen = [self.rows[row] for row in order], self.chosen[order]

    def _hidden(self, ids: Tensor, positions: Tensor, attends: Prefill | KeyValueCache) -> Float[Tensor, "T H"]:
        return self.model.core.base_model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=torch.ones_like(ids)[None],  # as in ``forward.packed_hidden``: nothing to look for
            use_cache=False,
            attends=attends,
        ).last_hidden_state[0]

    def _choose(self, hidden: Float[Tensor, "rows H"], rows: Sequence[int]) -> None:
        """Choose these rows' next tokens; a row whose sample ended becomes idle."""
        places = [self.rows[row] or 0 for row in rows]
        uniform = self.uniform[places, [min(len(self.tokens[place]), self.uniform.shape[1] - 1) for place in places]]
        chosen = choose(self._logits(hidden), uniform, self.sampling.temperature, self.sampling.top_p)
        self.chosen[list(rows)] = chosen
        ended = 0
        for row, token in zip(rows, chosen.tolist(), strict=True):  # the step's one wait for the device
            if self.rows[row] is None:
                continue
            tokens = self.tokens[self._place(row)]
            tokens.append(token)
            if token in self.ends or len(tokens) == self.sampling.max_new_tokens:
                self.rows[row], ended = None, ended + 1
                self.cache.idle(row)
        self.progress(ended)

    def _logits(self, hidden: Tensor) -> Float[Tensor, "rows V"]:
        """What ``Head.logits`` gives, by way of the model's own output layer, whose weights may be packed."""
        return self.head.shaped(self.output(hidden))

    def _place(self, row: int) -> int:
        place = self.rows[row]
        assert place is not None
        return place


def choose(
    logits: Float[Tensor, "rows V"], uniform: Float[Tensor, " rows"], temperature: float, top_p: float
) -> Int[Tensor, " rows"]:
    """One word per row by inverting the cumulative distribution at ``uniform``.

    >>> choose(torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([0.1]), temperature=0.0, top_p=1.0)
    tensor([2])
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits if temperature == 1 else logits / temperature, -1)
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
    """The first word at which the running sum of the weights passes ``uniform`` of the whole.

    First the block of words is looked for, then the word in it: a running sum over a whole vocabulary is slow.
    """
    words, blocks = weights.shape[-1], weights.shape[-1] // BLOCK
    whole = weights[:, : blocks * BLOCK].unflatten(-1, (blocks, BLOCK)).sum(-1)
    sums = torch.cat([whole, weights[:, blocks * BLOCK :].sum(-1, keepdim=True)], -1)
    block, rest = _passing(sums, uniform * sums.sum(-1))
    index = block[:, None] * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(1, index.clamp_max(words - 1)) * (index < words)
    return block * BLOCK + _passing(inside, rest)[0]


def _passing(
    weights: Float[Tensor, "rows W"], target: Float[Tensor, " rows"]
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Where the running sum passes the target, and how much of the target is left there."""
    sums = weights.cumsum(-1)
    place = torch.searchsorted(sums, target[:, None], right=True)
    # Where rounding carries the target past the end, the last one with any weight is meant.
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).int().argmax(-1, keepdim=True)
    place = torch.minimum(place, last)
    before = sums.gather(1, place) - weights.gather(1, place)
    return place[:, 0], (target - before[:, 0]).clamp_min(0)


def _generate(
    model: LanguageModel,
    prompts: Sequence[TokenIds],
    n: int,
    uniform: Float[Tensor, "samples steps"],
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
    for place in [i * n + done for i in range(len(prompts)) for done in range(0, n, sampling.batch_size)]:
        prompt, copies = prompts[place // n], min(sampling.batch_size, n - place % n)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(uniform[place, 0] * 2**31))
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
