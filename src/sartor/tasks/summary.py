"""Summarise a report in one sentence: reports made of our own parts, and a score that can be computed.

Summarisation is where learning from people's preferences began for language models (Stiennon et al. 2020, arXiv
2009.01325). Here the facts of a report are known: its names and its numbers. A good summary names many of them in few
words of its own.
"""

import random
import re
from collections.abc import Sequence
from importlib.resources import files

from sartor.rewards.scoring import content

WORDS, TOO_MANY = 25, 60  # a sentence of so many words has full credit, one of so many none
COPIED, TOO_MUCH = 6, 16  # so long a run of words may be the report's own; one so long has no credit
ASK = "Summarise this report in one short sentence, in your own words:\n\n"

PEOPLE = (
    "Amara Lind",
    "Jonas Petrov",
    "Mei Tanaka",
    "Carlos Whitmore",
    "Ingrid Osei",
    "Farid Novak",
    "Lucia Brandt",
    "Samuel Okafor",
)
TOWNS = (
    "Harrow Bay",
    "Millbrook",
    "Easton",
    "Port Lindley",
    "Greyfield",
    "Ashcombe",
    "Norwell",
    "Tamsin Point",
    "Westerley",
    "Oakham Ridge",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def prompts(count: int, seed: int) -> list[str]:
    """So many reports with the request to summarise them; the same seed gives the same ones."""
    draw = random.Random(seed)
    reports = (files("sartor.data") / "prompts" / "reports.txt").read_text(encoding="utf-8").splitlines()
    found = []
    for i in range(count):
        values = {
            "person": draw.choice(PEOPLE),
            "town": draw.choice(TOWNS),
            "day": draw.choice(DAYS),
            "few": draw.randint(2, 12),
            "many": draw.randint(13, 95),
            "money": 100 * draw.randint(4, 90),
        }
        found.append(ASK + reports[i % len(reports)].format(**values))
    return found


def summary(prompts: Sequence[object], completions: Sequence[object], **columns: object) -> list[float]:
    """Score of each summary, 0 to 1: the share of the report's facts that it names, times what its length and its own
    words earn.

    >>> report = ASK + "Amara Lind opened a free library in Millbrook on Friday with 40 books that neighbours gave."
    >>> good, long = "In Millbrook, Amara Lind started a library of 40 donated books.", report.removeprefix(ASK)
    >>> [round(score, 2) for score in summary([report] * 3, [good, long, "A library opened."])]
    [0.8, 0.0, 0.0]
    """
    return [
        _score(content(prompt).removeprefix(ASK), content(completion))  # type: ignore[arg-type]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _score(report: str, text: str) -> float:
    facts = facts_of(report)
    words = _words(text)
    if not facts or not words:
        return 0.0
    said = set(words)
    coverage = sum(fact in said for fact in facts) / len(facts)
    return (
        coverage
        * _credit(len(words), WORDS, TOO_MANY)
        * _credit(_longest_copy(_words(report), words), COPIED, TOO_MUCH)
    )


def facts_of(report: str) -> set[str]:
    """Names of people, towns and days, word by word, and numbers."""
    names = {word for name in (*PEOPLE, *TOWNS, *DAYS) if name in report for word in _words(name)}
    return names | set(re.findall(r"\d+", report))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def _longest_copy(report: Sequence[str], text: Sequence[str]) -> int:
    """Length of the longest run of words that both have."""
    longest, row = 0, [0] * (len(report) + 1)
    for word in text:
        row = [0] + [row[j] + 1 if word == report[j] else 0 for j in range(len(report))]
        longest = max(longest, *row)
    return longest


def _credit(value: int, free: int, none: int) -> float:
    return min(1.0, max(0.0, (none - value) / (none - free)))
