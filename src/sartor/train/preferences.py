"""Preference data on its way to training: read, split by prompt, encoded, with the reference beside it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sartor.config import TrainingConfig
from sartor.console import progress
from sartor.data.chat import as_conversation, encode_preferences
from sartor.data.rows import Rows, hold_out, read_rows
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


def read_preferences(config: TrainingConfig, objective: Objective) -> tuple[Rows, Rows]:
    """Training and held-out preferences: two files, or one split by prompt so that no prompt is in both.

    Raises:
        UserError: whatever ``load_examples`` refuses, or too few prompts to hold any out.
    """
    return hold_out(config, lambda source, split: read_source(source, split, config, objective), _verdicts)


def _verdicts(rows: Rows) -> set[object]:
    """The labels of judged completions that occur."""
    return {example.good for example in rows.examples if isinstance(example, Judged)}


def read_source(source: str, split: str, config: TrainingConfig, objective: Objective) -> Rows:
    """The preferences of one source that ``objective`` has a use for.

    Raises:
        UserError: whatever ``load_examples`` refuses, or nothing in it that prefers anything.
    """
    # Verdicts are read in any case: what is wrong then is the loss, and the data need no other name.
    rows = read_rows(source, split, (Comparison, Ranking, Judged), config)
    others = [term.name for term in objective.terms if term.traits.kind != "completions"]
    if others and any(isinstance(example, Judged) for example in rows.examples):
        raise UserError(
            f"{source} holds {rows.kind}, and loss {others[0]} learns from comparisons; "
            "--loss kto, bco or apo_zero_unpaired learn from verdicts"
        )
    if len(verdicts := _verdicts(rows)) == 1:
        word = "good" if verdicts == {True} else "bad"
        raise UserError(f"{source}: all {len(rows.examples)} completions are judged {word}: wanted both labels")
    tied = [_is_tie(example) for example in rows.examples]
    ties = tied.count(True)
    if ties == len(tied):
        raise UserError(f"{source}: all {ties} rows are ties: there is nothing to prefer")
    if not ties or objective.reads_ties:
        return rows
    note = f"{source}: {ties} tied rows left out: {objective} has no use for them"
    return replace(rows.take([i for i, is_tie in enumerate(tied) if not is_tie]), notes=[*rows.notes, note])


def _is_tie(example: Preference) -> bool:
    """Whether nothing in it is preferred to anything."""
    match example:
        case Ranking():
            return len(set(example.ranks)) == 1
        case Judged():
            return False
    return example.tie


def encode(model: LanguageModel, rows: Rows, config: TrainingConfig, objective: Objective) -> Preferences:
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
    model: LanguageModel, data: Preferences, budget: int, kept: Path, cache: Path | None = None
) -> Preferences:
    """The data with their reference log-probs: from ``kept``, the run's own copy, else from the cache or computed.

    The run keeps its copy so that it has the same reference for ever, whatever happens to the cache.
    """
    if kept.is_file():
        known = read_shard(kept)
        values = [torch.from_numpy(known[key_of(tree)]) for tree in data.trees]
    else:
        with progress("reference log-probs", len(data.trees)) as advance:
            values = reference_logps(model, data.trees, token_budget=budget, folder=cache, progress=advance)
        write_shard(kept, {key_of(tree): value.numpy() for tree, value in zip(data.trees, values, strict=True)})
    return replace(data, reference=values)


def digest(*parts: Preferences) -> str:
    """Hash of all token ids and pairs, in order: what a run is about."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        for tree in part.trees:
            found.update(key_of(tree) + repr((tree.ranks, tree.good, tree.strength)).encode())
        found.update(b"|")
    return found.hexdigest()
