"""What the model says: sampled answers before and after, who wins, and how alike they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from sartor.data.trees import TokenIds
from sartor.evaluate.diversity import distinct_n
from sartor.evaluate.statistics import Estimate, mean, proportion
from sartor.model.load import LanguageModel
from sartor.rewards.scoring import Scorer, as_rows, from_rows, score_texts
from sartor.rollout.local import Sample, Sampling, sample
from sartor.types import Text


@dataclass(frozen=True)
class Answers:
    """n sampled answers to each prompt, their lengths in tokens, and their scores where there is a scorer."""

    prompts: list[Text]
    texts: list[list[str]]
    lengths: list[list[int]]
    scores: list[list[float]] | None = None

    def rows(self) -> list[dict[str, Any]]:
        """As they stand in ``samples_before.jsonl``."""
        scores: Sequence[list[float] | None] = self.scores or [None] * len(self.prompts)
        return [
            {"prompt": as_rows(prompt), "completions": texts, "lengths": lengths, "scores": score}
            for prompt, texts, lengths, score in zip(self.prompts, self.texts, self.lengths, scores, strict=True)
        ]

    def rankings(self) -> list[dict[str, Any]]:
        """The feedback that their scores are: rows of the format ``prompt, completions, ranks``.

        Empty answers are left out, and prompts whose answers are all alike or worth the same.
        """
        found = []
        for prompt, texts, scores in zip(self.prompts, self.texts, self.scores or [], strict=True):
            said = [(text, score) for text, score in zip(texts, scores, strict=True) if text]
            kept, worth = [text for text, _ in said], [score for _, score in said]
            if len(set(kept)) > 1 and len(set(worth)) > 1:
                found.append({"prompt": as_rows(prompt), "completions": kept, "ranks": ranks_of(worth)})
        return found

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]]) -> "Answers":
        """What :meth:`rows` wrote."""
        scores = [row["scores"] for row in rows]
        return cls(
            [from_rows(row["prompt"]) for row in rows],
            [row["completions"] for row in rows],
            [row["lengths"] for row in rows],
            None if None in scores else scores,
        )


def answer(
    model: LanguageModel,
    prompts: Sequence[Text],
    ids: Sequence[TokenIds],
    n: int,
    sampling: Sampling,
    scorer: Scorer | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Sample ``n`` answers to each prompt, and score them."""
    return answers_of(prompts, sample(model, ids, n, sampling, progress), scorer)


def answers_of(prompts: Sequence[Text], drawn: Sequence[Sequence[Sample]], scorer: Scorer | None = None) -> Answers:
    """What was sampled as answers, with their scores where there is a scorer."""
    texts = [[one.text.strip() for one in row] for row in drawn]
    answers = Answers(list(prompts), texts, [[len(one.tokens) for one in row] for row in drawn])
    if scorer is None:
        return answers
    asked = [prompt for prompt, row in zip(prompts, texts, strict=True) for _ in row]
    flat = iter(score_texts(scorer, asked, [text for row in texts for text in row]))
    return replace(answers, scores=[[next(flat) for _ in row] for row in texts])


def compare(before: Answers, after: Answers) -> dict[str, Estimate | int | None]:
    """Before against after on the same prompts. The prompt is the unit of every interval."""
    scored = before.scores is not None and after.scores is not None
    return {
        "score_before": _by_prompt(before.scores) if scored else None,
        "score_after": _by_prompt(after.scores) if scored else None,
        "win_rate": win_rate(before.scores or [], after.scores or []) if scored else None,
        "distinct_2_before": mean([distinct_n(texts) for texts in before.texts]),
        "distinct_2_after": mean([distinct_n(texts) for texts in after.texts]),
        "length_before": _by_prompt(before.lengths),
        "length_after": _by_prompt(after.lengths),
        "prompts": len(after.prompts),
        "samples": max(map(len, after.texts), default=0),
    }


def win_rate(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Estimate:
    """Chance that a fresh answer of ``after`` scores higher than one of ``before`` to the same prompt, ties half.

    All pairs of one prompt's answers meet; prompts are the independent units of the interval.

    >>> win_rate([[0.0, 1.0], [0.0, 0.0]], [[1.0, 2.0], [1.0, 1.0]]).value
    0.9375
    """
    wins, prompt = [], []
    for i, (row_before, row_after) in enumerate(zip(before, after, strict=True)):
        meetings = [(a > b) + 0.5 * (a == b) for b, a in product(row_before, row_after)]
        wins += meetings
        prompt += [i] * len(meetings)
    return proportion(wins, prompt)


def _by_prompt(rows: Sequence[Sequence[float]] | None) -> Estimate:
    rows = rows or []
    return mean([value for row in rows for value in row], [i for i, row in enumerate(rows) for _ in row])


def ranks_of(scores: Sequence[float]) -> tuple[float, ...]:
    """Places by score: 1 the highest, equal ones share a place.

    >>> ranks_of([0.5, 2.0, 0.5])
    (2.0, 1.0, 2.0)
    """
    places = sorted(set(scores), reverse=True)
    return tuple(float(places.index(score) + 1) for score in scores)
