"""Where the data of a search come from: four parts with no prompt in two of them, kept in the run folder.

``search`` is what candidates train on and ``search-held-out`` what they are judged by; ``retrial`` and
``retrial-held-out`` are for winners alone, and nothing of the search ever sees them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from sartor import plugins
from sartor.config import DiscoverConfig, DpoConfig
from sartor.console import duration, progress, say
from sartor.data.chat import as_conversation, encode_prompts
from sartor.data.trees import TokenIds, TokenTree
from sartor.discover.material import Part, best_and_worst
from sartor.errors import UserError
from sartor.evaluate.answers import answers_of, ranks_of
from sartor.model.load import LanguageModel, load
from sartor.model.reference import folder_of
from sartor.objectives.specs import parse_objective
from sartor.rewards.scoring import as_rows, from_rows, score_texts
from sartor.rollout.local import Sampling, has_room_to_pack, sample
from sartor.tasks.task import task_named
from sartor.train.preferences import Preference, Preferences, encode, read_source, with_reference
from sartor.train.run import RunFolder
from sartor.types import Comparison, Ranking, Text

PARTS = ("search", "search-held-out", "retrial", "retrial-held-out")


@dataclass(frozen=True)
class Sizes:
    """Prompts of each part, at most."""

    train: int
    held_out: int

    @property
    def all(self) -> int:
        """Prompts of the four parts."""
        return 2 * (self.train + self.held_out)


SIZES = {"sentiment": Sizes(32, 32), "summary": Sizes(32, 32), "preferences": Sizes(96, 96)}
FEWEST = 16


def write_parts(
    config: DiscoverConfig, run: RunFolder, loaded: Mapping[str | None, LanguageModel] = MappingProxyType({})
) -> None:
    """Write the parts that are not there yet: the rows of --data, or answers of the model that the task's score ranks.

    Args:
        config: the options.
        run: the folder.
        loaded: models by name, with or without a fresh adapter; others are loaded.

    Raises:
        UserError: too few prompts, or nothing to prefer.
    """
    wanted = PARTS if config.seeds else PARTS[:2]
    if not all((run.path / f"{name}.jsonl").is_file() for name in wanted):
        parts = _rows_by_part(config) if config.task == "preferences" else _drawn_by_part(config, wanted, loaded)
        for name in wanted:
            run.write_jsonl(f"{name}.jsonl", parts[name])


def _rows_by_part(config: DiscoverConfig) -> dict[str, list[dict[str, Any]]]:
    rows = rows_given(config)
    prompts = _split(config, list(dict.fromkeys(repr(row["prompt"]) for row in rows)))
    return {name: [row for row in rows if repr(row["prompt"]) in own] for name, own in prompts.items()}


def _drawn_by_part(
    config: DiscoverConfig, wanted: Sequence[str], loaded: Mapping[str | None, LanguageModel]
) -> dict[str, list[dict[str, Any]]]:
    task = task_named(config.task)
    everything = [*task.train, *task.held_out]
    some = np.random.default_rng([config.seed, 12]).permutation(len(everything))[: sizes(config).all]
    prompts = [everything[i] for i in sorted(some)]
    own = {name: prompts for name, prompts in _split(config, prompts).items() if name in wanted}
    found = {}
    for model in dict.fromkeys(_model_of(config, name) for name in own):
        names = [name for name in own if _model_of(config, name) == model]
        asked = [p for p in prompts if any(p in own[name] for name in names)]
        rows = _drawn(config, loaded.get(model) or load(model, config.dtype), asked)
        for name in names:
            ranked = [row for prompt, row in rows.items() if prompt in own[name]]
            if not ranked:
                raise UserError(
                    f"--model {model}: {task.score} scores the answers to all {len(own[name])} prompts of {name} alike "
                    "(more --prompts or --answers, or a longer --max-new-tokens, may help)"
                )
            found[name] = ranked if name.endswith("held-out") else [_extremes(row) for row in ranked]
    return found


def _split(config: DiscoverConfig, prompts: Sequence[Any]) -> dict[str, set[Any]]:
    """The prompts of each part: as many as are wanted at most, and of few a share to each."""
    order = np.random.default_rng([config.seed, 11]).permutation(len(prompts))
    size = sizes(config)
    most = [size.train, size.held_out] * 2
    ends = np.round(np.cumsum(most[:-1]) / size.all * len(prompts)).astype(int)
    shares = zip(PARTS, np.split(order, ends), most, strict=True)
    return {name: {prompts[i] for i in some[:count]} for name, some, count in shares}


def _model_of(config: DiscoverConfig, part: str) -> str:
    """The model that a part is for."""
    return config.model if part.startswith("retrial") else config.proxy or config.model


def sizes(config: DiscoverConfig) -> Sizes:
    """Prompts of each part, at most."""
    usual = SIZES[config.task]
    return Sizes(config.prompts or usual.train, config.held_out_prompts or usual.held_out)


def rows_given(config: DiscoverConfig) -> list[dict[str, Any]]:
    """The preferences of --data.

    Raises:
        UserError: whatever ``read_source`` refuses, or too few prompts.
    """
    assert config.data is not None
    source = read_source(config.data, "train", _reading(config, config.data), parse_objective(["dpo"]))
    rows = [_row(example) for example in source.examples]
    prompts = len({repr(row["prompt"]) for row in rows})
    if prompts < FEWEST:
        raise UserError(
            f"--data {config.data}: {prompts} prompts with preferences; wanted {FEWEST} or more, since a search and "
            "its retrial each train on some and are judged by others"
        )
    return rows


def _row(example: Preference) -> dict[str, Any]:
    match example:
        case Comparison():
            return {name: as_rows(getattr(example, name)) for name in ("prompt", "chosen", "rejected")}
        case Ranking():
            completions = [as_rows(text) for text in example.completions]
            return {"prompt": as_rows(example.prompt), "completions": completions, "ranks": list(example.ranks)}
    raise UserError("--data holds judged completions, and a search compares pairwise objectives; wanted comparisons")


def _drawn(config: DiscoverConfig, model: LanguageModel, texts: Sequence[Text]) -> dict[Text, dict[str, Any]]:
    """For each prompt of the task the answers that a model drew, ranked by the task's score; their tokens as drawn.

    Tokens and not texts are what is trained on: an answer that was cut at the limit did not end there, and what the
    model said it would not always be tokenised into again. So the gradients of log-probs average to 0 over answers.
    """
    score, count = task_named(config.task).score, config.answers
    as_chat = model.reads_as_chat("auto")
    prompts = [as_conversation(text, "user") if as_chat else text for text in texts]
    with progress("answers to rank", len(prompts) * count) as advance:
        sampling = Sampling(config.max_new_tokens, seed=config.seed + 1, packs=has_room_to_pack(model))
        drawn = sample(model, _prompt_ids(config, model, prompts), count, sampling, advance)
    answers = answers_of(prompts, drawn, plugins.resolve("rewards", score))
    assert answers.scores is not None
    found = {
        text: {
            "prompt": as_rows(prompt),
            "completions": completions,
            "ranks": list(ranks_of(scores)),
            "tokens": [one.tokens for one in row],
        }
        for text, prompt, completions, scores, row in zip(
            texts, prompts, answers.texts, answers.scores, drawn, strict=True
        )
        if len(set(scores)) > 1
    }
    alike = len(prompts) - len(found)
    left = f"; {alike} whose answers all score alike are left out" if alike else ""
    say(f"ranked  {len(found)} of {len(prompts)} prompts by {score}{left}")
    return found


def _prompt_ids(config: DiscoverConfig, model: LanguageModel, prompts: Sequence[Text]) -> list[TokenIds]:
    room = max(1, (model.context or 2**31) - config.max_new_tokens)
    return encode_prompts(model.tokenizer, prompts, min(config.max_length, room))


def _extremes(row: Mapping[str, Any]) -> dict[str, Any]:
    at = best_and_worst(row["ranks"])
    return {**row, "ranks": [1.0, 2.0]} | {name: [row[name][i] for i in at] for name in ("completions", "tokens")}


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
    data = _given(config, run, model, name) if config.task == "preferences" else _as_drawn(config, run, model, name)
    kept = run.path / f"reference-{name}.safetensors"
    known = with_reference(model, data, config.token_budget, kept, folder_of(weights))
    return Part(known, _scores(config, run, model, name, known), extremes=config.task != "preferences")


def _given(config: DiscoverConfig, run: RunFolder, model: LanguageModel, name: str) -> Preferences:
    reading, objective = _reading(config, str(run.path / f"{name}.jsonl")), parse_objective(["dpo"])
    return encode(model, read_source(reading.data, "train", reading, objective), reading, objective)


def _as_drawn(config: DiscoverConfig, run: RunFolder, model: LanguageModel, name: str) -> Preferences:
    rows = run.read_jsonl(f"{name}.jsonl")
    prompts = [from_rows(row["prompt"]) for row in rows]
    trees = [
        TokenTree(ids, tuple(map(tuple, row["tokens"])), tuple(row["ranks"]))
        for ids, row in zip(_prompt_ids(config, model, prompts), rows, strict=True)
    ]
    return Preferences(trees, prompts, [])


def scorer_of(config: DiscoverConfig) -> str | None:
    """What tells the true score of an answer, where anything does."""
    return config.score if config.task == "preferences" else task_named(config.task).score


def _scores(
    config: DiscoverConfig, run: RunFolder, model: LanguageModel, name: str, data: Preferences
) -> list[float] | None:
    """The true score of every branch to judge by; kept, since a scorer may be slow, or never say the same twice."""
    scorer = scorer_of(config)
    if scorer is None or not name.endswith("held-out"):
        return None
    kept = f"scores-{name}.json"
    if (known := run.read_json(kept)) is not None:
        return known
    said = [(prompt, branch) for prompt, tree in zip(data.prompts, data.trees, strict=True) for branch in tree.branches]
    texts = [model.tokenizer.decode(branch, skip_special_tokens=True).strip() for _, branch in said]
    found = score_texts(plugins.resolve("rewards", scorer), [prompt for prompt, _ in said], texts)
    run.write_json(kept, found)
    return found


def in_words(parts: Mapping[str, Part], seconds: float) -> str:
    """How much there is of each, for people."""
    counts: Sequence[str] = [f"{len(part.data.trees)} ({name.replace('-', ' ')})" for name, part in parts.items()]
    return f"{', '.join(counts)} prompts, in {duration(seconds)}"
