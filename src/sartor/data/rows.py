"""Examples on their way to training: read with their places, split so that no prompt is on both sides, limited."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sartor.config import TrainingConfig
from sartor.console import say
from sartor.data.files import Where
from sartor.data.formats import load_examples
from sartor.errors import UserError
from sartor.types import Document, Text


@dataclass(frozen=True)
class Rows:
    """Examples as read, each with its place in the file, and what to tell the reader about them."""

    examples: list[Any]
    where: list[Where]
    kind: str
    notes: list[str] = field(default_factory=list)

    def take(self, index: Sequence[int]) -> "Rows":
        """Some of them; the notes stay with all."""
        return Rows([self.examples[i] for i in index], [self.where[i] for i in index], self.kind)

    @property
    def prompts(self) -> list[Text]:
        """What each answers; a document, which answers nothing, stands for itself."""
        return [one.text if isinstance(one, Document) else one.prompt for one in self.examples]


def read_rows(source: str, split: str, wanted: tuple[type, ...], config: TrainingConfig) -> Rows:
    """Examples of a source, what is read of it said to the user.

    Raises:
        UserError: whatever ``load_examples`` refuses.
    """
    loaded = load_examples(source, wanted=wanted, split=split, on_bad_row=config.on_bad_row)
    say(f"data    {loaded}")
    notes = [f"{source}: {s.count} rows left out: {reason} (first: {s.where})" for reason, s in loaded.skipped.items()]
    return Rows(list(loaded.examples), loaded.where, loaded.format, notes)


def hold_out(
    config: TrainingConfig,
    read: Callable[[str, str], Rows],
    labels: Callable[[Rows], Set[object]] = lambda rows: frozenset(),
) -> tuple[Rows, Rows]:
    """Training and held-out examples: two sources, or one split by prompt so that no prompt is in both.

    Args:
        config: names the sources, what share to hold out, and limits.
        read: from a source and its split to rows.
        labels: kinds of examples that both parts must have all of.

    Raises:
        UserError: too few prompts to hold any out.
    """
    rows = read(config.data, config.split)
    if config.eval_data is not None:
        held_out = read(config.eval_data, config.eval_split or config.split)
        training = _without(rows, set(held_out.prompts), config.data)
    else:
        training, held_out = _by_share(config, rows, labels)
    return limited(training, config.limit, config.seed), limited(held_out, config.eval_limit, config.seed)


def _by_share(config: TrainingConfig, rows: Rows, labels: Callable[[Rows], Set[object]]) -> tuple[Rows, Rows]:
    wanted = max(1, min(round(config.eval_fraction * len(rows.examples)), config.eval_limit or len(rows.examples)))
    aside: list[int] = []
    missing = labels(rows)
    for group in _groups_of_a_prompt(rows, config.seed):
        here = labels(rows.take(group))
        if len(aside) < wanted or here & missing:  # a rare label must not be missing from what is held out
            aside += group
            missing -= here
    rest = sorted(set(range(len(rows.examples))) - set(aside))
    if not rest:
        raise UserError(f"{config.data}: no prompt is left to train on once one is held out; name --eval-data")
    if labels(rows.take(rest)) != labels(rows):
        raise UserError(f"{config.data}: too few prompts of one label to train on some and hold out others")
    return replace(rows.take(rest), notes=rows.notes), rows.take(sorted(aside))


def _without(rows: Rows, prompts: Set[Text], source: str) -> Rows:
    """Rows whose prompt is not held out: what was trained on proves nothing."""
    kept = [i for i, prompt in enumerate(rows.prompts) if prompt not in prompts]
    if not kept:
        raise UserError(f"{source}: all its prompts are in --eval-data too, so none is left to train on")
    seen = len(rows.examples) - len(kept)
    note = [f"{source}: {seen} rows left out of training: their prompts are held out in --eval-data"] if seen else []
    return replace(rows.take(kept), notes=[*rows.notes, *note])


def limited(rows: Rows, limit: int | None, seed: int) -> Rows:
    """At most ``limit`` of the rows, drawn by the seed, in their order."""
    if limit is None or limit >= len(rows.examples):
        return rows
    chosen = sorted(np.random.default_rng([seed, 3]).permutation(len(rows.examples))[:limit].tolist())
    return replace(rows.take(chosen), notes=rows.notes)


def _groups_of_a_prompt(rows: Rows, seed: int) -> list[list[int]]:
    groups: dict[Text, list[int]] = {}
    for i, prompt in enumerate(rows.prompts):
        groups.setdefault(prompt, []).append(i)
    prompts = list(groups.values())
    return [prompts[i] for i in np.random.default_rng([seed, 1]).permutation(len(prompts))]
