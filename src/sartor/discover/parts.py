"""Where the data of a search come from: four parts with no prompt in two of them, kept in the run folder.

``search`` is what candidates train on and ``search-held-out`` what they are judged by; ``retrial`` and
``retrial-held-out`` are for winners alone, and nothing of the search ever sees them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sartor import plugins
from sartor.config import DiscoverConfig, DpoConfig
from sartor.console import duration, say
from sartor.discover.material import Part
from sartor.errors import UserError
from sartor.model.load import LanguageModel, load
from sartor.model.reference import folder_of
from sartor.objectives.specs import parse_objective
from sartor.rewards.scoring import as_rows, score_texts
from sartor.rollout.local import Sampling
from sartor.tasks.task import task_named
from sartor.train.feedback import collect
from sartor.train.preferences import Preference, Preferences, encode, read_source, with_reference
from sartor.train.run import RunFolder
from sartor.types import Comparison, Ranking

PARTS = ("search", "search-held-out", "retrial", "retrial-held-out")


@dataclass(frozen=True)
class Sizes:
    """Prompts of each part, at most."""

    train: int
    held_out: int


# Prompts of the tasks are few: 160 of sentiment make 56, 28, 44 and 32.
SIZES = {"sentiment": Sizes(56, 28), "summary": Sizes(56, 28), "preferences": Sizes(96, 96)}
SHARES = (0.35, 0.175, 0.275, 0.2)
FEWEST = 16


def write_parts(config: DiscoverConfig, run: RunFolder) -> None:
    """Write the parts that are not there yet: the rows of --data, or answers of the model that the task's score ranks.

    Raises:
        UserError: too few prompts, or nothing to prefer.
    """
    if all((run.path / f"{name}.jsonl").is_file() for name in PARTS):
        return
    rows = rows_given(config) if config.task == "preferences" else _collected(config)
    prompts = list(dict.fromkeys(repr(row["prompt"]) for row in rows))
    if len(prompts) < FEWEST:
        raise UserError(
            f"{len(prompts)} prompts with preferences: wanted {FEWEST} or more, since a search and its retrial each "
            "train on some and are judged by others"
        )
    order = np.random.default_rng([config.seed, 11]).permutation(len(prompts))
    ends = np.cumsum([round(share * len(prompts)) for share in SHARES[:-1]]).tolist()
    size = sizes(config)
    for name, some, most in zip(
        PARTS, np.split(order, ends), (size.train, size.held_out, size.train, size.held_out), strict=True
    ):
        wanted = {prompts[i] for i in some[:most]}
        run.write_jsonl(f"{name}.jsonl", [row for row in rows if repr(row["prompt"]) in wanted])


def sizes(config: DiscoverConfig) -> Sizes:
    """Prompts of each part, at most."""
    usual = SIZES[config.task]
    return Sizes(config.prompts or usual.train, config.held_out_prompts or usual.held_out)


def rows_given(config: DiscoverConfig) -> list[dict[str, Any]]:
    """The preferences of --data.

    Raises:
        UserError: whatever ``read_source`` refuses.
    """
    assert config.data is not None
    rows = read_source(config.data, "train", _reading(config, config.data), parse_objective(["dpo"]))
    return [_row(example) for example in rows.examples]


def _row(example: Preference) -> dict[str, Any]:
    match example:
        case Comparison():
            return {name: as_rows(getattr(example, name)) for name in ("prompt", "chosen", "rejected")}
        case Ranking():
            completions = [as_rows(text) for text in example.completions]
            return {"prompt": as_rows(example.prompt), "completions": completions, "ranks": list(example.ranks)}
    raise UserError("--data holds judged completions, and a search compares pairwise objectives; wanted comparisons")


def _collected(config: DiscoverConfig) -> list[dict[str, Any]]:
    task = task_named(config.task)
    scorer = plugins.resolve("rewards", task.score)
    prompts = [*task.train, *task.held_out]
    model = load(config.model, config.dtype)
    sampling = Sampling(config.max_new_tokens, seed=config.seed + 1)
    rows = collect(model, prompts, config.answers, sampling, scorer, "answers to rank").rankings()
    if not rows:
        raise UserError(f"--model {config.model}: {task.score} scores its answers to each prompt alike")
    say(f"ranked  {len(rows)} of {len(prompts)} prompts by {task.score}")
    return rows


def _reading(config: DiscoverConfig, data: str) -> DpoConfig:
    """The options of ``sartor dpo`` that say how data is read and encoded."""
    return DpoConfig(
        model=config.model,
        data=data,
        output=config.output,
        max_length=config.max_length,
        seed=config.seed,
        token_budget=config.token_budget,
    )


def read_part(config: DiscoverConfig, run: RunFolder, model: LanguageModel, weights: str, name: str) -> Part:
    """One part as token trees, with the reference's log-probs.

    Args:
        config: the options.
        run: the folder that holds it.
        model: whose tokenizer and reference.
        weights: its fingerprint.
        name: one of ``PARTS``.
    """
    reading, objective = _reading(config, str(run.path / f"{name}.jsonl")), parse_objective(["dpo"])
    rows = read_source(reading.data, "train", reading, objective)
    data = encode(model, rows, reading, objective)
    kept = run.path / f"reference-{name}.safetensors"
    known = with_reference(model, data, config.token_budget, kept, folder_of(weights))
    return Part(known, _scores(model, known, scorer_of(config)))


def scorer_of(config: DiscoverConfig) -> str | None:
    """What tells the true score of an answer, where anything does."""
    return config.score if config.task == "preferences" else task_named(config.task).score


def _scores(model: LanguageModel, data: Preferences, scorer: str | None) -> list[float] | None:
    """The true score of every branch."""
    if scorer is None:
        return None
    said = [(prompt, branch) for prompt, tree in zip(data.prompts, data.trees, strict=True) for branch in tree.branches]
    texts = [model.tokenizer.decode(branch, skip_special_tokens=True).strip() for _, branch in said]
    return score_texts(plugins.resolve("rewards", scorer), [prompt for prompt, _ in said], texts)


def in_words(parts: Mapping[str, Part], seconds: float) -> str:
    """How much there is of each, for people."""
    counts: Sequence[str] = [f"{len(part.data.trees)} ({name.replace('-', ' ')})" for name, part in parts.items()]
    return f"{', '.join(counts)} prompts, in {duration(seconds)}"
