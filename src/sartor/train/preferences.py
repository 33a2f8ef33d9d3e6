"""Preference data on its way to training: read, split by prompt, encoded, with the reference beside it."""

import hashlib
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sartor.config import DpoConfig
from sartor.console import progress, say
from sartor.data.chat import as_conversation, encode_preferences
from sartor.data.files import Where
from sartor.data.formats import load_examples
from sartor.data.trees import TokenTree, pack
from sartor.errors import UserError
from sartor.evaluate.preferences import gather_pairs
from sartor.model.forward import token_logps
from sartor.model.load import LanguageModel
from sartor.model.logprobs import sum_by_branch
from sartor.model.reference import key_of, read_shard, reference_logps, write_shard
from sartor.types import Comparison, PairLogps, Ranking, Text

Preference = Comparison | Ranking


@dataclass(frozen=True)
class Rows:
    """Preferences as read, each with its place in the file, and what to tell the reader about them."""

    examples: list[Preference]
    where: list[Where]
    kind: str
    notes: list[str] = field(default_factory=list)

    def take(self, index: Sequence[int]) -> "Rows":
        """Some of them; the notes stay with all."""
        return Rows([self.examples[i] for i in index], [self.where[i] for i in index], self.kind)


@dataclass(frozen=True)
class Preferences:
    """Token trees with their prompts and the reference log-probs of their completion tokens."""

    trees: list[TokenTree]
    prompts: list[Text]
    notes: list[str]
    reference: list[Tensor] = field(default_factory=list)

    def sizes(self, model: LanguageModel) -> list[int]:
        """Tokens that a forward pass computes for each tree, by whether the model shares prompts."""
        return [tree.size if model.shares_prompts else tree.repeated_size for tree in self.trees]

    @cached_property
    def prompt_numbers(self) -> list[int]:
        """For each tree the first one with the same prompt: the independent units of every interval."""
        first: dict[Text, int] = {}
        return [first.setdefault(prompt, i) for i, prompt in enumerate(self.prompts)]

    @property
    def counts(self) -> list[int]:
        """Pairs of each tree."""
        return [len(tree.pairs) for tree in self.trees]

    def pair_logps(self, model: LanguageModel, group: Sequence[int], at_start: bool = False) -> PairLogps:
        """The four log-probs of every pair in the trees of ``group``, in the order of ``pack``.

        ``at_start`` the policy still is the reference, and no forward pass is needed to know it.
        """
        batch = pack([self.trees[i] for i in group]).to(model.device)
        reference = torch.cat([self.reference[i] for i in group]).to(model.device)
        policy = reference if at_start else token_logps(model, batch)
        branches = len(batch.lengths)
        return gather_pairs(
            sum_by_branch(policy, batch.branch, branches),
            sum_by_branch(reference, batch.branch, branches),
            batch.lengths,
            batch.pairs,
        )


def read_preferences(config: DpoConfig) -> tuple[Rows, Rows]:
    """Training and held-out preferences: two files, or one split by prompt so that no prompt is in both.

    Raises:
        UserError: whatever ``load_examples`` refuses, or too few prompts to hold any out.
    """
    rows = _read(config.data, config)
    if config.eval_data is not None:
        held_out = _read(config.eval_data, replace(config, split=config.eval_split or config.split))
        training = _without(rows, {example.prompt for example in held_out.examples}, config.data)
    else:
        wanted = max(1, min(round(config.eval_fraction * len(rows.examples)), config.eval_limit or len(rows.examples)))
        aside: list[int] = []
        for group in _by_prompt(rows, config.seed):
            if len(aside) >= wanted:
                break
            aside += group
        rest = sorted(set(range(len(rows.examples))) - set(aside))
        if not rest:
            raise UserError(f"{config.data}: no prompt is left to train on once one is held out; name --eval-data")
        training, held_out = replace(rows.take(rest), notes=rows.notes), rows.take(sorted(aside))
    return _limited(training, config.limit, config.seed), _limited(held_out, config.eval_limit, config.seed)


def _without(rows: Rows, prompts: Set[Text], source: str) -> Rows:
    """Rows whose prompt is not held out: what was trained on proves nothing."""
    kept = [i for i, example in enumerate(rows.examples) if example.prompt not in prompts]
    if not kept:
        raise UserError(f"{source}: all its prompts are in --eval-data too, so none is left to train on")
    seen = len(rows.examples) - len(kept)
    note = [f"{source}: {seen} rows left out of training: their prompts are held out in --eval-data"] if seen else []
    return replace(rows.take(kept), notes=[*rows.notes, *note])


def _limited(rows: Rows, limit: int | None, seed: int) -> Rows:
    if limit is None or limit >= len(rows.examples):
        return rows
    chosen = sorted(np.random.default_rng([seed, 3]).permutation(len(rows.examples))[:limit].tolist())
    return replace(rows.take(chosen), notes=rows.notes)


def _read(source: str, config: DpoConfig) -> Rows:
    loaded = load_examples(source, wanted=(Comparison, Ranking), split=config.split, on_bad_row=config.on_bad_row)
    say(f"data    {loaded}")
    notes = [f"{source}: {s.count} rows left out: {reason} (first: {s.where})" for reason, s in loaded.skipped.items()]
    examples = [example for example in loaded.examples if isinstance(example, Comparison | Ranking)]
    paired = [not (isinstance(example, Comparison) and example.tie) for example in examples]
    ties = paired.count(False)
    if ties == len(examples):
        raise UserError(f"{source}: all {ties} comparisons are ties: there is nothing to prefer")
    if ties:
        notes.append(f"{source}: {ties} tied comparisons left out: DPO has no use for them")
    kept = [i for i, has_pair in enumerate(paired) if has_pair]
    return replace(Rows(examples, loaded.where, loaded.format).take(kept), notes=notes)


def _by_prompt(rows: Rows, seed: int) -> list[list[int]]:
    groups: dict[Text, list[int]] = {}
    for i, example in enumerate(rows.examples):
        groups.setdefault(example.prompt, []).append(i)
    prompts = list(groups.values())
    return [prompts[i] for i in np.random.default_rng([seed, 1]).permutation(len(prompts))]


def encode(model: LanguageModel, rows: Rows, config: DpoConfig) -> Preferences:
    """Token trees of ``rows``, with notes on what was cut or left out.

    Raises:
        UserError: no row fits ``max_length``.
    """
    as_chat = model.reads_as_chat(config.as_chat)
    plain = sum(isinstance(example.prompt, str) for example in rows.examples)
    how = "as turns of the chat template" if as_chat else "continued as they stand, without a chat template"
    notes = [f"{plain} prompts are plain strings, read {how} (--as-chat always|never decides)"] if plain else []
    longest = min(config.max_length, model.context or config.max_length)
    found = encode_preferences(model.tokenizer, rows.examples, longest, as_chat, rows.where)
    if not found.trees:
        raise UserError(f"no completion fits --max-length {longest}; raise it")
    prompts = [rows.examples[i].prompt for i in found.index]
    if as_chat:
        prompts = [as_conversation(prompt, "user") for prompt in prompts]
    return Preferences(found.trees, prompts, [*rows.notes, *notes, *found.notes(longest)])


def with_reference(model: LanguageModel, parts: Sequence[Preferences], budget: int, kept: Path) -> list[Preferences]:
    """Each part with its reference log-probs: from ``kept``, the run's own copy, else from the cache or computed.

    The run keeps its copy so that it has the same reference for ever, whatever happens to the cache.
    """
    trees = [tree for part in parts for tree in part.trees]
    if kept.is_file():
        known = read_shard(kept)
        values = [torch.from_numpy(known[key_of(tree)]) for tree in trees]
    else:
        with progress("reference log-probs", len(trees)) as advance:
            values = reference_logps(model, trees, token_budget=budget, progress=advance)
        write_shard(kept, {key_of(tree): value.numpy() for tree, value in zip(trees, values, strict=True)})
    rest = iter(values)
    return [replace(part, reference=[next(rest) for _ in part.trees]) for part in parts]


def digest(*parts: Preferences) -> str:
    """Hash of all token ids and pairs, in order: what a run is about."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        for tree in part.trees:
            found.update(key_of(tree) + repr(tree.pairs).encode())
        found.update(b"|")
    return found.hexdigest()
