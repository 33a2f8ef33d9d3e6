"""Sample completions for reading side by side."""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sartor.report.words import as_float, number

CLIP = 700  # characters of a text before the fold


@dataclass(frozen=True, slots=True)
class Text:
    """A text in two parts, the second behind a fold; its score as printed, and the score's rank in percent."""

    head: str
    rest: str
    score: str
    rank: int | None


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out prompt as (role, text) turns, with its completions from both models."""

    prompt: list[tuple[str, Text]]
    before: list[Text]
    after: list[Text]


def read_samples(rows: list[dict[str, Any]]) -> list[Sample]:
    """Rows of ``samples.jsonl``, in file order: nothing is chosen by its score."""
    scores = [s for row in rows for side in ("before", "after") for s in _scores(row, side) if math.isfinite(s)]
    ordered = sorted(scores)
    return [
        Sample(_prompt(row.get("prompt")), _side(row, "before", ordered), _side(row, "after", ordered)) for row in rows
    ]


def clip(text: str, limit: int = CLIP) -> tuple[str, str]:
    """``text`` cut in two near ``limit``, at a space if there is one, and only if the second part is worth a fold.

    >>> clip("one two three four", limit=8), clip("one two", limit=8)
    (('one two', ' three four'), ('one two', ''))
    """
    if len(text) <= 1.25 * limit:
        return text, ""
    cut = text.rfind(" ", int(0.8 * limit), limit)
    cut = limit if cut < 0 else cut
    return text[:cut], text[cut:]


def _scores(row: Mapping[str, Any], side: str) -> list[float]:
    raw = row.get(f"score_{side}")
    return [as_float(s) for s in raw] if isinstance(raw, list) else []


def _side(row: Mapping[str, Any], side: str, ordered: list[float]) -> list[Text]:
    raw, scores = row.get(side), _scores(row, side)
    texts = raw if isinstance(raw, list) else []
    scores += [math.nan] * (len(texts) - len(scores))
    return [
        Text(*clip(str(text)), number(score, 2) if math.isfinite(score) else "", _rank(score, ordered))
        for text, score in zip(texts, scores, strict=False)
    ]


def _rank(score: float, ordered: list[float]) -> int | None:
    """Mid-rank in percent: it colours rewards of any scale alike."""
    if not math.isfinite(score) or ordered[0] == ordered[-1]:
        return None
    return round(50 * (bisect.bisect_left(ordered, score) + bisect.bisect_right(ordered, score)) / len(ordered))


def _prompt(raw: object) -> list[tuple[str, Text]]:
    turns = raw if isinstance(raw, list) else [{"content": raw}]
    pairs = [(str(t.get("role") or ""), t.get("content")) for t in turns if isinstance(t, Mapping)]
    named = len(pairs) > 1  # one turn is the user's; to say so would be noise
    return [(role if named else "", Text(*clip(str(text or "")), "", None)) for role, text in pairs]
