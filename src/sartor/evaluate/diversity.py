"""How alike the answers are: alignment narrows a model, so every comparison shows this beside its score."""

import math
from collections import Counter
from collections.abc import Sequence

Grams = Counter[tuple[str, ...]]


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Share of distinct word n-grams among all n-grams of ``texts`` (Li et al. 2016, arXiv 1510.03055).

    It falls as texts grow in number and length, so compare sets of like size only.

    >>> distinct_n(["a b c", "a b d"])
    0.75
    """
    grams: Grams = Counter()
    for text in texts:
        grams += _grams(text.lower().split(), n)
    return len(grams) / grams.total() if grams else 0.0


def self_bleu(texts: Sequence[str], longest: int = 4) -> float:
    """Mean BLEU of each text with the others as its references (Zhu et al. 2018, arXiv 1802.01886): 1 where all are
    the same, 0 where no two share a word. Higher is narrower.

    BLEU as of Papineni et al. 2002, on lower-cased words, n-grams up to ``longest``; where none is found, half
    of one counts, then a quarter (Chen & Cherry 2014, technique 3; sacrebleu's default). Two texts or more.

    >>> self_bleu(["the cat sat on the mat"] * 2), self_bleu(["one two", "three four"], longest=1) < 0.3
    (1.0, True)
    """
    words = [text.lower().split() for text in texts]
    return sum(_bleu(words[i], words[:i] + words[i + 1 :], longest) for i in range(len(words))) / len(words)


def _bleu(text: list[str], references: Sequence[list[str]], longest: int) -> float:
    longest = min(longest, len(text))
    if not longest:
        return float(any(not reference for reference in references))
    logs, smoothed = 0.0, 1.0
    for n in range(1, longest + 1):
        grams, most = _grams(text, n), Counter[tuple[str, ...]]()
        for reference in references:
            most |= _grams(reference, n)
        found = (grams & most).total()
        if not found:
            smoothed *= 2
        logs += math.log((found or 1 / smoothed) / grams.total()) / longest
    nearest = min((abs(len(reference) - len(text)), len(reference)) for reference in references)[1]
    return math.exp(logs + min(0.0, 1 - nearest / len(text)))


def _grams(words: Sequence[str], n: int) -> Grams:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))
