"""What a search may claim: winners against what was known, where the search never was, corrected for multiplicity."""

from collections.abc import Sequence
from dataclasses import dataclass

from sartor.discover.archive import Archive, Result
from sartor.discover.budget import BASELINES
from sartor.discover.rungs.outcome import Outcome
from sartor.discover.state import State
from sartor.evaluate.statistics import Estimate, Sample, crossed
from sartor.report.words import verdict


@dataclass(frozen=True)
class Comparison:
    """A winner less a known loss on the retrial, and what its interval allows to say."""

    winner: str
    other: str
    difference: Estimate

    @property
    def verdict(self) -> str:
        """better, worse, no difference shown, or no interval."""
        return verdict(self.difference, 0.0)


def retrial_results(archive: Archive) -> dict[int, list[Result]]:
    """Results of the retrial by candidate, each with as many seeds as all of them have."""
    by_candidate: dict[int, list[Result]] = {}
    for result in archive.results():
        if result.rung == "retrial":
            by_candidate.setdefault(result.candidate, []).append(result)
    common = set.intersection(*({r.seed for r in rows} for rows in by_candidate.values())) if by_candidate else set()
    return {n: [r for r in rows if r.seed in common] for n, rows in by_candidate.items() if common}


def comparisons(state: State, finalists: Sequence[int]) -> list[Comparison]:
    """Every finalist against every known loss of the retrial, prompts and seeds as units.

    The search saw nothing of the retrial, so a finalist is picked without looking at it; what is left to correct for is
    that several comparisons are made: intervals hold all at 95 % together (Bonferroni).
    """
    found = retrial_results(state.archive)
    pairs = [
        (a, state.named(name)) for a in finalists for name in BASELINES if a in found and state.named(name) in found
    ]
    return [
        Comparison(
            state.candidates[a].title,
            state.candidates[b].title,
            _difference(found[a], found[b], 1 - 0.05 / len(pairs)),
        )
        for a, b in pairs
    ]


def mean_over_seeds(results: Sequence[Result]) -> Estimate:
    """A candidate's score on the retrial, with prompts and seeds as units."""
    return crossed([_sample(results)], [_seeds(results)])


def _difference(a: Sequence[Result], b: Sequence[Result], confidence: float) -> Estimate:
    return crossed([_sample(a), _sample(b, -1.0)], [_seeds(a), _seeds(b)], confidence)


def _sample(results: Sequence[Result], weight: float = 1.0) -> Sample:
    outcomes: list[Outcome] = [result.outcome for result in results]
    values = [value for outcome in outcomes for value in outcome.values]
    return Sample(values, [i for outcome in outcomes for i in range(len(outcome.values))], weight)


def _seeds(results: Sequence[Result]) -> list[int]:
    return [result.seed for result in results for _ in result.outcome.values]
