"""What a search knows: its archive in memory, and what follows from it: who leads, who may go up, how true a rung is.

Nothing here is measured in seconds, and nothing is drawn: the same archive gives the same answers.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from sartor.discover.archive import Archive, Candidate, Result
from sartor.discover.language.expression import Expression
from sartor.discover.propose.parents import ISLANDS
from sartor.discover.propose.proposal import Failure, Member, Population
from sartor.discover.rungs.outcome import Outcome
from sartor.discover.screens import Seen, screen
from sartor.evaluate.statistics import Estimate, rank_correlation

RUNGS = ("tabular", "linear", "adapter")
NAMED, CANARY = "named", "canary"  # origins of what the search begins with
ENOUGH = 8  # candidates on two rungs, before the one is trusted to foretell the other
ALIKE = 0.01  # of what training does to a score: candidates that differ by less are taken to train alike
REMEMBERED = 20  # failures that a proposer may be told of


@dataclass
class State:
    """Candidates and results so far; ``add`` and ``record`` keep it in step with the archive that they write to."""

    archive: Archive
    beta: float
    unit: str = "bits per pair"
    candidates: dict[int, Candidate] = field(default_factory=dict)
    results: dict[tuple[str, int], Outcome] = field(default_factory=dict)  # of the first seed, by rung and number
    seen: Seen = field(default_factory=Seen)
    _kinds: dict[int, int] = field(default_factory=dict)  # what ``kinds`` found so far

    def __post_init__(self) -> None:
        for candidate in self.archive.candidates():
            self._remember(candidate)
        for result in self.archive.results():
            if result.rung in RUNGS:
                self.results[result.rung, result.candidate] = result.outcome

    def _remember(self, candidate: Candidate) -> None:
        self.candidates[candidate.number] = candidate
        # What has a behaviour was new when it came, though the tabular rung may have stopped it since.
        if candidate.behaviour and candidate.tree is not None:
            self.seen.add(candidate.number, screen(candidate.tree, self.beta))

    def add(self, candidates: Iterable[Candidate]) -> None:
        """New candidates, within a transaction of the archive."""
        for candidate in candidates:
            self.archive.add(candidate)
            self.candidates[candidate.number] = candidate

    def record(self, rung: str, numbers: Sequence[int], outcomes: Sequence[Outcome], seed: int = 0) -> None:
        """What some candidates got on a rung, and what it cost, within a transaction of the archive."""
        outcomes = [outcome.kept() for outcome in outcomes]
        for number, outcome in zip(numbers, outcomes, strict=True):
            self.archive.record(Result(number, rung, seed, outcome))
        self.archive.spend(rung, sum(outcome.seconds for outcome in outcomes))
        if rung in RUNGS:
            self.results |= {(rung, number): found for number, found in zip(numbers, outcomes, strict=True)}

    @property
    def next_number(self) -> int:
        """The number of the next candidate."""
        return max(self.candidates, default=0) + 1

    @property
    def generation(self) -> int:
        """The newest generation; 0 is what the search began with, -1 that there is none."""
        return max((candidate.generation for candidate in self.candidates.values()), default=-1)

    def on(self, rung: str) -> list[int]:
        """Numbers of the candidates that have a result on a rung, in their order."""
        return sorted(number for at, number in self.results if at == rung)

    def started(self) -> list[int]:
        """What the search began with: named losses and canaries."""
        return [number for number, one in self.candidates.items() if one.origin in (NAMED, CANARY)]

    def canaries(self) -> list[int]:
        """Numbers of the canaries."""
        return [number for number, one in self.candidates.items() if one.origin == CANARY]

    def named(self, name: str) -> int:
        """The number of a loss that the search began with, or was told of for the retrial."""
        return next(number for number, one in self.candidates.items() if one.name == name and one.origin == NAMED)

    def correlation(self, lower: str, upper: str, of: Callable[[Outcome], float] = lambda one: one.fitness) -> Estimate:
        """Spearman's ρ between two rungs, over the candidates that have been on both; canaries would flatter it."""
        canaries = set(self.canaries())
        both = [n for n in self.on(upper) if (lower, n) in self.results and n not in canaries]
        pairs = [(of(self.results[lower, n]), of(self.results[upper, n])) for n in both]
        finite = [pair for pair in pairs if np.isfinite(pair).all()]
        return rank_correlation([a for a, _ in finite], [b for _, b in finite])

    def expected(self) -> dict[int, float]:
        """The fitness that each candidate may be expected to have on the top rung, were it judged without noise there.

        The linear rung tells it by regression over those that were on both, canaries left out, and never with a
        negative slope: the less it foretells, the nearer all are to the mean. What was really trained is expected
        between that and what it showed, by the reliability of the top rung (Kelley's formula): the best of many judged
        by few prompts owes most of its lead to them.
        """
        top = {n: self.results["adapter", n].fitness for n in self.on("adapter")}
        linear = {n: self.results["linear", n].fitness for n in self.on("linear")}
        canaries = set(self.canaries())
        both = [n for n in top if n in linear and n not in canaries and np.isfinite([top[n], linear[n]]).all()]
        if len(both) < ENOUGH or len({linear[n] for n in both}) < 2:
            # Too few to tell: as the linear rung has it, moved to where the top rung is, whose unit may be another.
            shift = float(np.mean([top[n] - linear[n] for n in both])) if both else 0.0
            return {n: value + shift for n, value in linear.items()} | top
        fit = stats.linregress([linear[n] for n in both], [top[n] for n in both])
        slope = max(0.0, float(fit.slope))
        centre = np.mean([linear[n] for n in both]), np.mean([top[n] for n in both])
        told = {n: float(centre[1] + slope * (value - centre[0])) for n, value in linear.items() if np.isfinite(value)}
        trust = _reliability([self.results["adapter", n].values for n in both], [top[n] - told[n] for n in both])
        seen = {n: told[n] + trust * (top[n] - told[n]) if n in both else top[n] for n in top}
        return told | seen

    def leaders(self) -> list[int]:
        """All candidates but canaries by expected fitness, best first."""
        expected, canaries = self.expected(), set(self.canaries())
        return sorted((n for n in expected if n not in canaries), key=lambda n: (-expected[n], n))

    def kinds(self) -> dict[int, int]:
        """For each candidate on the linear rung the first one that trains as it does there.

        Their scores differ by less than a hundredth of what training does to them. Formulas may differ all the same,
        where these data never come, or where a part of them does nothing.
        """
        idle = [self.results["linear", n].values for n in self.canaries() if ("linear", n) in self.results][:1]
        firsts = [n for n, kind in self._kinds.items() if n == kind]
        table = np.array([self.results["linear", n].values for n in firsts])
        for n in [n for n in self.on("linear") if n not in self._kinds]:
            scores = np.array(self.results["linear", n].values)
            done = np.abs(scores - (idle or 0.0)).max()
            near = np.abs(table - scores).max(1) < ALIKE * done if firsts and np.isfinite(done) else np.array([])
            if near.any():
                self._kinds[n] = firsts[int(near.argmax())]
            else:
                self._kinds[n] = n
                firsts.append(n)
                table = np.vstack([table, scores]) if len(firsts) > 1 else scores[None]
        return self._kinds

    def shortest(self) -> dict[int, int]:
        """For each candidate on the linear rung the one with the shortest formula of those that train as it does."""
        kinds, sizes = self.kinds(), {n: one.tree.size for n, one in self.candidates.items() if one.tree is not None}
        best: dict[int, int] = {}
        for n, kind in kinds.items():
            if kind not in best or sizes[n] < sizes[best[kind]]:
                best[kind] = n
        return {n: best[kind] for n, kind in kinds.items()}

    def population(self) -> Population:
        """What a proposer is shown: of those that train alike the one with the shortest formula."""
        expected, shortest = self.expected(), self.shortest()
        fitness: dict[int, float] = {}
        for n in self.leaders():
            fitness.setdefault(shortest.get(n, n), expected[n])
        members = [self._member(n, value) for n, value in fitness.items()]
        failed = [one for one in self.candidates.values() if one.refusal and not one.behaviour][-REMEMBERED:]
        return Population(members, [Failure(one.text, one.refusal) for one in failed], self.beta, self.unit)

    def _member(self, number: int, fitness: float) -> Member:
        candidate = self.candidates[number]
        rung = next(r for r in reversed(RUNGS) if (r, number) in self.results)
        assert candidate.tree is not None
        return Member(
            number=number,
            name=candidate.title,
            tree=candidate.tree,
            fitness=fitness,
            score=self.results[rung, number].score,
            rung=rung,
            island=number % ISLANDS,
            behaviour=candidate.behaviour,
            likeness=candidate.likeness,
            parents=candidate.parents,
        )

    def faults(self) -> list[str]:
        """Why the search must not be believed: canaries as good as half of the known losses that it began with."""
        found = []
        for rung in RUNGS[1:]:
            here = [n for n in self.started() if (rung, n) in self.results]
            canaries = [n for n in here if n in self.canaries()]
            named = [n for n in here if n not in canaries]
            if not canaries or not named:
                continue
            fitness = {n: self.results[rung, n].fitness for n in here}
            best = max(canaries, key=fitness.__getitem__)
            beaten = sum(fitness[best] >= fitness[n] for n in named)
            if 2 * beaten >= len(named):
                found.append(
                    f"on the {rung} rung the canary {self.candidates[best].name} is no worse than {beaten} of "
                    f"{len(named)} known losses"
                )
        return found


def _reliability(values: Sequence[Sequence[float]], residuals: Sequence[float]) -> float:
    """The share of the residuals' variance that is not noise of the prompts.

    Args:
        values: each candidate's score on each prompt; what is left of them without the means of candidates and of
            prompts is noise (the two-way layout of Hoyt 1941).
        residuals: each candidate's mean score less what was foretold.
    """
    table = np.array(values)
    left = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    candidates, prompts = table.shape
    noise = (left**2).sum() / max(1, (candidates - 1) * (prompts - 1)) / prompts
    spread = np.square(residuals).sum() / (candidates - 2)
    return float(np.clip(1 - noise / spread, 0.0, 1.0)) if spread > 0 else 0.0


def behaviour_of(tree: Expression, slope: float, convex: bool) -> str:
    """The cell of the archive over behaviour: what it reads, and what its curve is like."""
    reads = [
        ("reference", bool(tree.inputs & {"reference_chosen", "reference_rejected", "chosen_logratio", "margin"})),
        ("lengths", bool(tree.inputs & {"chosen_length", "rejected_length"})),
        ("sides", bool(tree.inputs & {"chosen_logratio", "rejected_logratio", "policy_chosen", "policy_rejected"})),
        ("batch", any(node.op.startswith("batch_") for node in tree.walk())),
        ("lowers at 0", slope > 0),
        ("slope falls", not convex),
    ]
    return ", ".join(word for word, true in reads if true) or "margin alone"
