"""VADER, a sentiment lexicon: a scorer whose verdicts are known exactly, to stand in for a person in experiments."""

from collections.abc import Sequence
from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from sartor.rewards.scoring import content


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def vader(prompts: Sequence[object], completions: Sequence[object], **columns: object) -> list[float]:
    """Compound sentiment of each completion, from -1 (most negative) to 1 (most positive).

    Sentiment is the controlled task of the DPO paper (arXiv 2305.18290, section 6.1), which used a trained classifier;
    a lexicon needs no download and can be read (Hutto & Gilbert 2014, ICWSM).

    >>> vader(["How was it?"] * 2, ["Wonderful, I loved it.", "Dull and disappointing."])
    [0.8225, -0.7096]
    """
    return [_analyzer().polarity_scores(content(completion))["compound"] for completion in completions]  # type: ignore[arg-type]
