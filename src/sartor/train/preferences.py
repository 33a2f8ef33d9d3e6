"""Preference data on its way to training: read, split by prompt, encoded, with the reference beside it."""

import hashlib
from collections.abc import Iterable, Sequence, Set
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
from sartor.model.forward import token_scores
from sartor.model.load import LanguageModel
from sartor.model.reference import key_of, read_shard, reference_logps, write_shard
from sartor.objectives.logps import TreeLogps
from sartor.objectives.objective import Objective
from sartor.types import Comparison, Judged, Ranking, Text

Preference = Comparison | Ranking | Judged


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

    @property
    def verdicts(self) -> set[bool]:
        """The labels of judged completions that occur."""
        return {example.good for example in self.examples if isinstance(example, Judged)}


@dataclass(frozen=True)
class Preferences:
    """Token trees with their prompts, and the reference log-probs of their completion tokens where they are known."""

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
    def size(self) -> str:
        """How much there is to learn from, in words."""
        counts = {
            "pairs": self.count_pairs(range(len(self.trees))),
            "tied pairs": sum(bool(tree.ranks) and not tree.pairs for tree in self.trees),
            "judged completions": sum(len(tree.good) for tree in self.trees),
        }
        return " and ".join(f"{count} {what}" for what, count in counts.items() if count)

    def count_pairs(self, group: Iterable[int]) -> int:
        """Pairs in the trees of ``group``."""
        return sum(len(self.trees[i].pairs) for i in group)

    @property
    def unit(self) -> str:
        """What there are so many of: pairs, or judged completions."""
        return "pairs" if any(tree.ranks for tree in self.trees) else "completions"

    @property
    def labels(self) -> list[tuple[bool, ...]]:
        """Verdicts of each tree, to spread good and bad ones over the batches; none where nothing was judged."""
        labels = [tree.good for tree in self.trees]
        return labels if any(labels) else []

    def logps(
        self,
        model: LanguageModel,
        group: Sequence[int],
        objective: Objective,
        rival: LanguageModel | None = None,
        at_start: bool = False,
    ) -> TreeLogps:
        """What ``objective`` depends on, for the trees of ``group``; with gradient where the caller has gradients on.

        ``rival`` is the reference model itself, for objectives that compare whole distributions. ``at_start`` the
        policy still is the reference, and no forward pass is needed to know it.
        """
        batch = pack([self.trees[i] for i in group]).to(model.device)
        if at_start and not objective.wpo:
            start = torch.cat([self.reference[i] for i in group]).to(model.device)
            return TreeLogps(batch.trees, batch.lengths, start, start, torch.zeros_like(start), start * torch.nan)
        scores = token_scores(model, batch, objective.wpo, rival if objective.needs_kl else None)
        unknown = torch.full_like(scores.logps, torch.nan, requires_grad=False)
        reference = torch.cat([self.reference[i] for i in group]).to(model.device) if self.reference else unknown
        kl = unknown if scores.kl is None else scores.kl
        certainty = unknown if scores.certainty is None else scores.certainty
        return TreeLogps(batch.trees, batch.lengths, scores.logps, reference, kl, certainty)


def read_preferences(config: DpoConfig, objective: Objective) -> tuple[Rows, Rows]:
    """Training and held-out preferences: two files, or one split by prompt so that no prompt is in both.

    Raises:
        UserError: whatever ``load_examples`` refuses, or too few prompts to hold any out.
    """
    rows = _read(config.data, config, objective)
    if config.eval_data is not None:
        held_out = _read(config.eval_data, replace(config, split=config.eval_split or config.split), objective)
        training = _without(rows, {example.prompt for example in held_out.examples}, config.data)
    else:
        wanted = max(1, min(round(config.eval_fraction * len(rows.examples)), config.eval_limit or len(rows.examples)))
        aside: list[int] = []
        missing = rows.verdicts
        for group in _by_prompt(rows, config.seed):
            here = rows.take(group).verdicts
            if len(aside) < wanted or here & missing:  # a rare label must not be missing from what is held out
                aside += group
                missing -= here
        rest = sorted(set(range(len(rows.examples))) - set(aside))
        if not rest:
            raise UserError(f"{config.data}: no prompt is left to train on once one is held out; name --eval-data")
        if rows.take(rest).verdicts != rows.verdicts:
            raise UserError(f"{config.data}: too few prompts of one label to train on some and hold out others")
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


def _read(source: str, config: DpoConfig, objective: Objective) -> Rows:
    # Verdicts are read in any case: what is wrong then is the loss, and the data need no other name.
    loaded = load_examples(
        source, wanted=(Comparison, Ranking, Judged), split=config.split, on_bad_row=config.on_bad_row
    )
    others = [term.name for term in objective.terms if term.traits.kind != "completions"]
    if others and any(isinstance(example, Judged) for example in loaded.examples):
        raise UserError(
            f"{source} holds {loaded.format}, and loss {others[0]} learns from comparisons; "
            "--loss kto, bco or apo_zero_unpaired learn from verdicts"
        )
    say(f"data    {loaded}")
    notes = [f"{source}: {s.count} rows left out: {reason} (first: {s.where})" for reason, s in loaded.skipped.items()]
    examples = [example for example in loaded.examples if isinstance(example, Comparison | Ranking | Judged)]
    rows = Rows(examples, loaded.where, loaded.format, notes)
    if len(rows.verdicts) == 1:
        word = "good" if rows.verdicts == {True} else "bad"
        raise UserError(f"{source}: all {len(examples)} completions are judged {word}: wanted both labels")
    tied = [_is_tie(example) for example in examples]
    ties = tied.count(True)
    if ties == len(examples):
        raise UserError(f"{source}: all {ties} rows are ties: there is nothing to prefer")
    if not ties or objective.reads_ties:
        return rows
    notes.append(f"{source}: {ties} tied rows left out: {objective} has no use for them")
    return replace(rows.take([i for i, is_tie in enumerate(tied) if not is_tie]), notes=notes)


def _is_tie(example: Preference) -> bool:
    """Whether nothing in it is preferred to anything."""
    match example:
        case Ranking():
            return len(set(example.ranks)) == 1
        case Judged():
            return False
    return example.tie


def _by_prompt(rows: Rows, seed: int) -> list[list[int]]:
    groups: dict[Text, list[int]] = {}
    for i, example in enumerate(rows.examples):
        groups.setdefault(example.prompt, []).append(i)
    prompts = list(groups.values())
    return [prompts[i] for i in np.random.default_rng([seed, 1]).permutation(len(prompts))]


def encode(model: LanguageModel, rows: Rows, config: DpoConfig, objective: Objective) -> Preferences:
    """Token trees of ``rows``, with notes on what was cut or left out.

    Raises:
        UserError: no row fits ``max_length``.
    """
    as_chat = model.reads_as_chat(config.as_chat)
    plain = sum(isinstance(example.prompt, str) for example in rows.examples)
    how = "as turns of the chat template" if as_chat else "continued as they stand, without a chat template"
    notes = [f"{plain} prompts are plain strings, read {how} (--as-chat always|never decides)"] if plain else []
    longest = min(config.max_length, model.context or config.max_length)
    others = _mismatched(rows.examples, config.seed) if objective.needs_mismatched else None
    found = encode_preferences(model.tokenizer, rows.examples, longest, as_chat, rows.where, others)
    if not found.trees:
        raise UserError(f"no completion fits --max-length {longest}; raise it")
    prompts = [rows.examples[i].prompt for i in found.index]
    if as_chat:
        prompts = [as_conversation(prompt, "user") for prompt in prompts]
    return Preferences(found.trees, prompts, [*rows.notes, *notes, *found.notes(longest)])


def _mismatched(examples: Sequence[Preference], seed: int) -> list[Text] | None:
    """For each example an answer to some other prompt; None where all have the same prompt.

    The KTO paper shifts completions by one within each batch. Here the partner is drawn once, so that its reference
    log-prob can be kept like all others, and a batch of one row has a baseline too.
    """
    rng = np.random.default_rng([seed, 4])
    order = rng.permutation(len(examples)).tolist()
    prompts = [examples[i].prompt for i in order]
    # Where the last places share a prompt, they go round to the first that has another.
    partner = next((place for place, prompt in enumerate(prompts) if prompt != prompts[-1]), None)
    if partner is None:
        return None
    found: dict[int, Text] = {}
    for place in reversed(range(len(order))):
        if place + 1 < len(order) and prompts[place + 1] != prompts[place]:
            partner = place + 1
        answers = _answers(examples[order[partner]])
        found[order[place]] = answers[rng.integers(len(answers))]
    return [found[i] for i in range(len(examples))]


def _answers(example: Preference) -> tuple[Text, ...]:
    match example:
        case Ranking():
            return example.completions
        case Judged():
            return (example.completion,)
    return (example.chosen, example.rejected)


def with_reference(
    model: LanguageModel, parts: Sequence[Preferences], budget: int, kept: Path, cache: Path | None = None
) -> list[Preferences]:
    """Each part with its reference log-probs: from ``kept``, the run's own copy, else from the cache or computed.

    The run keeps its copy so that it has the same reference for ever, whatever happens to the cache.
    """
    trees = [tree for part in parts for tree in part.trees]
    if kept.is_file():
        known = read_shard(kept)
        values = [torch.from_numpy(known[key_of(tree)]) for tree in trees]
    else:
        with progress("reference log-probs", len(trees)) as advance:
            values = reference_logps(model, trees, token_budget=budget, folder=cache, progress=advance)
        write_shard(kept, {key_of(tree): value.numpy() for tree, value in zip(trees, values, strict=True)})
    rest = iter(values)
    return [replace(part, reference=[next(rest) for _ in part.trees]) for part in parts]


def digest(*parts: Preferences) -> str:
    """Hash of all token ids and pairs, in order: what a run is about."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        for tree in part.trees:
            found.update(key_of(tree) + repr((tree.ranks, tree.good, tree.strength)).encode())
        found.update(b"|")
    return found.hexdigest()
