"""The race: proposals, screens, and rungs of which each is dearer and truer than the last.

Asynchronous successive halving (ASHA, Li et al. 2018, arXiv 1810.05934): whenever there is room, the most advanced
candidate that deserves it goes up, else new ones come in at the bottom. Different from the paper: a candidate goes up
by the fitness that it may be expected to have on the top rung (``State.expected``), so that a rung that foretells
nothing decides nothing; and one in ten goes up by lot, so that what a rung foretells is measured on all kinds.

All decisions follow from the archive and the seed, and where several jobs run at a time from the order in which they
end. One after the other, a search that was killed goes on as if it had not been.
"""

import math
import time
from bisect import bisect, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median_low

import numpy as np

from sartor.config import DiscoverConfig
from sartor.console import duration
from sartor.discover.archive import Candidate
from sartor.discover.budget import BASELINES, PER_ADAPTER, SPARE, Budget, Clock
from sartor.discover.language.known import CANARIES, KNOWN, known
from sartor.discover.language.printing import to_python
from sartor.discover.propose.bandit import TOP, Record, choose
from sartor.discover.propose.proposal import Proposal, Proposer
from sartor.discover.rungs.outcome import Outcome
from sartor.discover.rungs.tabular import run_tabular
from sartor.discover.runner import Runner
from sartor.discover.screens import curve_of, screen
from sartor.discover.source import STABLE
from sartor.discover.state import CANARY, NAMED, State, behaviour_of
from sartor.discover.workbench import Job, job_of
from sartor.errors import UserError
from sartor.evaluate.statistics import Estimate

GENERATION, ASKED = 32, 8  # proposals of a generation, and how many each proposer that is chosen makes of it
FRUITLESS = 5  # generations in a row without anything new, after which no more is asked for
BATCH = 16  # candidates of a job on the linear rung
BY_LOT = 10  # every so manieth goes up whatever is expected of it
KEPT = {0.3: 0.5, 0.0: 0.75}  # what the tabular rung lets through, where its correlation is shown to be above this


class Race:
    """One search, from what it begins with to the last real training."""

    def __init__(
        self,
        config: DiscoverConfig,
        state: State,
        runner: Runner,
        proposers: Sequence[Proposer],
        told: Callable[[str], None] = lambda words: None,
    ) -> None:
        self.config, self.state, self.runner, self.told = config, state, runner, told
        self.proposers = {proposer.name: proposer for proposer in proposers}
        self.budget: Budget | None = None
        self.open: list[Job] = []
        self.fruitless = False  # whether nothing new comes any more
        self._left: Callable[[], float] = lambda: math.inf

    def begin(self, clock: Clock) -> None:
        """Known losses and canaries on all rungs: what everything else is measured by, and what it costs.

        Raises:
            UserError: by what the first one took, the time that is left does not pay for all of them.
        """
        if self.state.generation < 0:
            self._found()

        def affordable(job: Job) -> bool:
            done = [self.state.results["adapter", n].seconds for n in self.state.on("adapter")]
            missing = len(self.state.started()) - len(done)
            if done and missing * min(done) > clock.left:
                raise UserError(
                    f"--budget {self.config.budget}: a real training takes {duration(min(done))} here, and {missing} "
                    f"known losses and canaries wait for theirs with {duration(max(0.0, clock.left))} left; --resume "
                    "goes on with a longer --budget; fewer --prompts, shorter answers or fewer to --start take less"
                )
            return True

        self._work(self._beginning, affordable)

    def run(self, budget: Budget, clock: Clock) -> None:
        """New candidates, until the plan is worked off or the time for the race is over."""
        self.budget = budget
        arms = self.config.finalists + len(BASELINES)
        self._left = lambda: clock.left - SPARE * budget.seeds * arms * self.unit(budget)["retrial"]
        self._work(self._next, lambda job: self._left() > _cost([*self.open, job], self.unit(budget)))

    def retry(self, budget: Budget, clock: Clock) -> None:
        """Winners and what they are compared with, with fresh seeds, where the search never was."""
        done = {(r.candidate, r.seed) for r in self.state.archive.results() if r.rung == "retrial"}
        jobs = [job for job in self._retrial(budget) if (job.candidates[0], job.seed) not in done]
        waiting = iter(jobs)

        def affordable(job: Job) -> bool:
            # A seed counts once all arms have it, so it is begun only if there is time for all of them.
            rest = [other for other in jobs[jobs.index(job) :] if other.seed == job.seed]
            return clock.left > _cost([*self.open, *rest], self.unit(budget))

        self._work(lambda: next(waiting, None), affordable)

    def unit(self, budget: Budget) -> dict[str, float]:
        """Seconds of one candidate by rung: as planned, or more where the real trainings since turn out dearer."""
        planned = budget.unit["adapter"]
        new = set(self.state.on("adapter")) - set(self.state.started())
        # The plan counts as one of them, and of two middle ones the lower: a single slow training changes nothing.
        seen = median_low([planned, *(self.state.results["adapter", n].seconds for n in new)])
        dearer = max(1.0, seen / planned)
        return {**budget.unit, "adapter": dearer * planned, "retrial": dearer * budget.unit["retrial"]}

    def _work(self, following: Callable[[], Job | None], affordable: Callable[[Job], bool] = lambda job: True) -> None:
        """Have jobs done until there is none, or none that can be afforded."""
        stopped = False
        while True:
            while not stopped and len(self.open) < self.runner.slots:
                job = following()
                if job is None:
                    break
                if not affordable(job):
                    stopped = True
                    break
                self.open.append(job)
                self.runner.submit(job)
            if not self.open:
                return
            job, outcomes = self.runner.wait()
            with self.state.archive.writing():
                self.state.record(job.rung, job.candidates, outcomes, job.seed)
            self.open = [other for other in self.open if other is not job]
            self.told(job.rung)

    def _found(self) -> None:
        began = time.perf_counter()
        names = dict.fromkeys([*self.config.start, *(BASELINES if self.config.seeds else ())])
        found = [
            self._screened(Proposal(known(name), origin, name=name), number, generation=0)
            for number, (name, origin) in enumerate(
                [*((name, NAMED) for name in names), *((name, CANARY) for name in CANARIES)], start=1
            )
        ]
        outcomes, spent = _tabular(found, self.config.seed)
        self._keep(found, outcomes, time.perf_counter() - began - spent)

    def _screened(self, proposal: Proposal, number: int, generation: int) -> Candidate:
        """A proposal with what the screens say of it; what a search begins with is trained whatever they say."""
        candidate = Candidate(
            number=number,
            generation=generation,
            origin=proposal.origin,
            name=proposal.name if generation == 0 else self._own_name(proposal.name, number),
            parents=proposal.parents,
            tree=proposal.tree,
            text=proposal.text or (to_python(proposal.tree) if proposal.tree else ""),
            thought=proposal.thought,
            exchange=proposal.exchange,
            refusal=proposal.refusal,
        )
        if candidate.tree is None or candidate.refusal:
            return candidate
        found = screen(candidate.tree, self.state.beta)
        begun = proposal.origin in (NAMED, CANARY)
        if found.refusal and not begun:
            return replace(candidate, refusal=found.refusal)
        if not found.refusal:
            twin = self.state.seen.twin(found)
            if twin is not None and not begun:
                return replace(candidate, twin=twin[0], cosine=twin[1])
            self.state.seen.add(number, found)
            candidate = replace(candidate, behaviour=behaviour_of(candidate.tree, *curve_of(found)))
        cosine = None if found.likeness is None else found.likeness.cosine
        return replace(candidate, likeness=str(found.likeness or ""), cosine=cosine)

    def _own_name(self, name: str, number: int) -> str:
        """A name that nothing else has: neither a known loss nor an earlier candidate nor what a loss file imports."""
        taken = {*KNOWN, *CANARIES, *STABLE, "torch", *(one.name for one in self.state.candidates.values())}
        return f"{name}_{number}" if name in taken - {""} else name

    def _keep(self, found: Sequence[Candidate], outcomes: Mapping[int, Outcome], seconds: float) -> None:
        """A generation in one transaction: proposals, screens, tabular rung."""
        state = self.state
        with state.archive.writing():
            state.add(found)
            state.archive.spend("propose and screen", seconds)
            state.record("tabular", list(outcomes), list(outcomes.values()))

    def _beginning(self) -> Job | None:
        """Known losses and canaries on the linear rung, then on the top one."""
        started = self.state.started()
        if missing := [n for n in started if not self._has("linear", n)]:
            return self._job("linear", missing)
        if any(("linear", n) not in self.state.results for n in started):
            return None  # their settings are not known yet
        missing = [n for n in started if not self._has("adapter", n)]
        return self._job("adapter", missing[:1]) if missing else None

    def _next(self) -> Job | None:
        """What to do next, the most advanced first."""
        assert self.budget is not None
        state, started = self.state, set(self.state.started())
        trained = sum(n not in started for n in self._all("adapter"))
        judged = [n for n in state.on("linear") if n not in started]
        if trained < min(self.budget.adapters, len(judged) // PER_ADAPTER):
            return self._promotion(trained)
        entered = sum(n not in started for n in self._all("linear"))
        waiting = [n for n, one in state.candidates.items() if one.trains and not self._has("linear", n)]
        room = self.budget.linear - entered
        if room > 0 and not waiting and not self._open("linear") and not self.fruitless:
            waiting = self._generation()
        if room > 0 and waiting:
            return self._job("linear", waiting[: min(BATCH, room)])
        if not self._open("linear") and trained < self.budget.adapters and judged and (job := self._promotion(trained)):
            return job
        return self._shorter(trained)

    def _promotion(self, trained: int) -> Job | None:
        """The candidate that most is expected of, and every tenth time one drawn by lot."""
        kinds = self.state.kinds()
        tried = {kinds.get(n) for n in self._all("adapter")}  # what trains alike is not trained again
        below = [n for n in self.state.leaders() if not self._has("adapter", n)]
        below = [n for n in below if kinds.get(n) not in tried] or below
        if not below:
            return None
        draw = np.random.default_rng([self.config.seed, 7, trained])
        by_lot = trained % BY_LOT == BY_LOT - 1
        return self._job("adapter", [below[int(draw.integers(len(below)))] if by_lot else below[0]])

    def _generation(self) -> list[int]:
        """Invent, screen and keep a generation; returns the numbers of those that go on. None where nobody can."""
        unanswered = 0
        for _ in range(FRUITLESS):
            if self._left() < 0 or all(proposer.exhausted for proposer in self.proposers.values()):
                return []
            began, state = time.perf_counter(), self.state
            number, generation = state.next_number, state.generation + 1
            draw = np.random.default_rng([self.config.seed, 5, generation] + [unanswered] * (unanswered > 0))
            proposals = self._proposals(draw, began)
            unanswered += not proposals
            found = [self._screened(p, number + i, generation) for i, p in enumerate(proposals)]
            outcomes, spent = _tabular(found, self.config.seed)
            kept = self._through(found, outcomes, draw)
            self._keep(kept, outcomes, time.perf_counter() - began - spent)
            self.told("propose")
            if going := [candidate.number for candidate in kept if candidate.trains]:
                return going
        self.fruitless = True
        return []

    def _proposals(self, draw: np.random.Generator, began: float) -> list[Proposal]:
        """A generation's proposals, by the proposers that the bandit chooses; one that has nothing to say is passed."""
        population, records = self.state.population(), self._records()
        assert self.budget is not None
        common = self.budget.unit["tabular"] + self.budget.unit["linear"]
        found: list[Proposal] = []
        silent: set[str] = set()
        while len(found) < GENERATION and len(silent) < len(records):
            name = choose({n: r for n, r in records.items() if n not in silent}, common, draw)
            # What asking took so far is charged with the whole generation alone.
            left = self._left() - (time.perf_counter() - began)
            if left < ASKED * records[name].seconds or (found and left < 0):
                silent.add(name)
                continue
            made = self.proposers[name].propose(population, ASKED, draw)
            found += made
            if len(made) < ASKED:
                silent.add(name)
        return found

    def _records(self) -> dict[str, Record]:
        """What became of each proposer's proposals so far."""
        state = self.state
        wins = dict.fromkeys(self.proposers, 0)
        asked = dict.fromkeys(self.proposers, 0)
        seconds = dict.fromkeys(self.proposers, 0.0)
        before: list[float] = []
        kinds = state.kinds()
        for number in sorted(state.candidates):
            origin = state.candidates[number].origin
            outcome = state.results.get(("linear", number))
            if origin in asked:
                asked[origin] += 1
                if outcome is not None and kinds[number] == number:
                    wins[origin] += len(before) - bisect(before, outcome.fitness) < TOP * (len(before) + 1)
            if outcome is not None:
                insort(before, outcome.fitness)
        if "model" in seconds:
            seconds["model"] = state.archive.seconds_of_exchanges()
        return {n: Record(wins[n], asked[n], seconds[n] / max(1, asked[n])) for n in self.proposers}

    def _through(
        self, found: Sequence[Candidate], outcomes: Mapping[int, Outcome], draw: np.random.Generator
    ) -> list[Candidate]:
        """What the tabular rung lets through: all, until it is shown to foretell the linear rung, then the better part.

        One in ten of the others goes on by lot.
        """
        share = _share(self.state.correlation("tabular", "linear"))
        order = sorted(outcomes, key=lambda number: -outcomes[number].fitness)
        stays = {n for n in order[int(np.ceil(share * len(order))) :] if draw.random() >= 1 / BY_LOT}
        return [
            replace(one, refusal=f"weak on the tabular rung: {outcomes[one.number].fitness:.2f} of the optimum's gain")
            if one.number in stays
            else one
            for one in found
        ]

    def _shorter(self, trained: int) -> Job | None:
        """Formulas shorter than those of the winners that train as they do, which had no real training yet."""
        assert self.budget is not None
        shortest = self.state.shortest()
        missing = [n for n in map(shortest.__getitem__, self._winners()) if not self._has("adapter", n)]
        if self._open("adapter") or not missing or trained >= self.budget.adapters + self.config.finalists:
            return None
        return self._job("adapter", missing[:1])

    def _winners(self) -> list[int]:
        """The new candidates that did best in real training, one of each kind."""
        started, trained, kinds = set(self.state.started()), set(self.state.on("adapter")), self.state.kinds()
        new: dict[int, int] = {}
        for n in self.state.leaders():
            if n in trained and n not in started:
                new.setdefault(kinds[n], n)
        return list(new.values())[: self.config.finalists]

    def _retrial(self, budget: Budget) -> Iterator[Job]:
        """Seed by seed, so that all arms have as many when time runs out."""
        arms = [*self.finalists(), *(self.state.named(name) for name in BASELINES)]
        for seed in range(1, budget.seeds + 1):
            for number in arms:
                yield self._job("retrial", [number], seed)

    def finalists(self) -> list[int]:
        """The winners, in their shortest form that was really trained, as they are kept once the race is over.

        None are not kept: a search that goes on may find some.
        """
        known_already = self.state.archive.read_meta("finalists")
        if known_already is None:
            shortest, trained = self.state.shortest(), set(self.state.on("adapter"))
            able = trained - set(self.state.started())
            known_already = [shortest[n] if shortest[n] in able else n for n in self._winners()]
            if known_already:
                with self.state.archive.writing():
                    self.state.archive.write_meta("finalists", known_already)
        return known_already

    def _job(self, rung: str, numbers: Sequence[int], seed: int = 0) -> Job:
        texts = [self._text(number) for number in numbers]
        chosen = () if rung == "linear" else [self.state.results["linear", number].setting for number in numbers]
        return job_of(rung, numbers, texts, chosen, seed)

    def _text(self, number: int) -> str:
        tree = self.state.candidates[number].tree
        if tree is None:
            raise UserError(f"candidate {number} is no objective: {self.state.candidates[number].refusal}")
        return to_python(tree)

    def _has(self, rung: str, number: int) -> bool:
        """Whether a candidate has been on a rung, or is on it now."""
        return (rung, number) in self.state.results or number in self._open(rung)

    def _all(self, rung: str) -> list[int]:
        """Numbers of the candidates that have been on a rung, or are on it now."""
        return [*self.state.on(rung), *self._open(rung)]

    def _open(self, rung: str) -> list[int]:
        """Numbers of the candidates that are on a rung now."""
        return [number for job in self.open if job.rung == rung for number in job.candidates]


def _tabular(found: Sequence[Candidate], seed: int) -> tuple[dict[int, Outcome], float]:
    """The tabular rung, which is too quick to be sent anywhere; and the seconds that it took."""
    began = time.perf_counter()
    some = [one for one in found if one.trains]
    outcomes = run_tabular([one.tree for one in some if one.tree is not None], seed) if some else []
    seconds = time.perf_counter() - began
    shared = [replace(outcome, seconds=seconds / len(some)) for outcome in outcomes]
    return {one.number: outcome for one, outcome in zip(some, shared, strict=True)}, seconds


def _share(correlation: Estimate) -> float:
    """What share of a generation the tabular rung lets through, by how well it has foretold the linear one so far."""
    return next((share for above, share in KEPT.items() if correlation.low > above), 1.0)


def _cost(jobs: Sequence[Job], unit: Mapping[str, float]) -> float:
    return sum(len(job.candidates) * unit[job.rung] for job in jobs)
