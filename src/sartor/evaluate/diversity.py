"""How alike the answers are: alignment narrows a model, so every comparison shows this beside its score."""

from collections import Counter
from collections.abc import Sequence


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Share of distinct word n-grams among all n-grams of ``texts`` (Li et al. 2016, arXiv 1510.03055).

    It falls as texts grow in number and length, so compare sets of like size only.

    >>> distinct_n(["a b c", "a b d"])
    0.75
    """
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.lower().split()
        grams.update(zip(*(words[i:] for i in range(n)), strict=False))
    return len(grams) / grams.total() if grams else 0.0
