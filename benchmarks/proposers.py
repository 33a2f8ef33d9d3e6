"""Proposers at equal budget: what they find on the linear rung, and how soon a known loss that their seeds hide.

    python benchmarks/proposers.py --output runs/discover [--repeats 5] [--trained 400] [--proposals 1500]

``--output`` is the folder of a search, whose model and data are used. What they find: each proposer has ``--trained``
distinct candidates trained in the linearised model; the one that does best there is trained once more, linearised too,
on the run's retrial parts, beside DPO. Rediscovery: candidates are judged on the tabular rung alone, and a loss counts
as found when a proposal has its fingerprint (cosine 0.999) at some β. Writes benchmarks/results/proposers.json.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sartor.discover.language.expression import Expression
from sartor.discover.language.known import known
from sartor.discover.language.printing import to_python
from sartor.discover.language.program import BETA, Program
from sartor.discover.propose.grammar import Grammar
from sartor.discover.propose.parents import ISLANDS
from sartor.discover.propose.proposal import Member, Population, Proposal
from sartor.discover.rungs.linear import Kernel, kernel_of, run_linear
from sartor.discover.rungs.outcome import Outcome
from sartor.discover.rungs.tabular import run_tabular
from sartor.discover.screens import BETAS, SAME, Screened, Seen, curve_of, fingerprints, screen
from sartor.discover.state import behaviour_of
from sartor.discover.workbench import Workbench
from sartor.evaluate.statistics import mean, proportion
from sartor.machine import machine, set_up_memory

RESULT = Path(__file__).parent / "results" / "proposers.json"
HIDDEN = {"dpo": ("sft", "apo_zero"), "hinge": ("dpo", "sft"), "ipo_sum": ("dpo", "sft"), "cell": ("dpo", "sft")}
PROPOSERS = {"random": ("random",), "evolution": ("random", "mutate", "cross", "tune", "prune")}
STARTS = ("dpo", "hinge", "simpo", "lrml", "sft")
GENERATION = 32
Judge = Callable[[Sequence[Expression]], list[Outcome]]


@dataclass(frozen=True)
class Trained:
    """A candidate that was new and passed all screens: the number of its proposal, and how it fared."""

    number: int
    tree: Expression
    screened: Screened
    outcome: Outcome


def generations(starts: Sequence[str], ways: Sequence[str], judge: Judge, seed: int) -> Iterator[list[Trained]]:
    """A search by some ways in turn, without an end; the first generation is what it starts from."""
    draw, seen, members, number = np.random.default_rng(seed), Seen(), [], 0
    proposals = [Proposal(known(name), "named") for name in starts]
    while True:
        new = []
        for proposal in proposals:
            number += 1
            assert proposal.tree is not None
            found = screen(proposal.tree, BETA)
            if not found.refusal and seen.twin(found) is None:
                seen.add(number, found)
                new.append((number, proposal.tree, found))
        outcomes = judge([tree for _, tree, _ in new]) if new else []
        trained = [Trained(*one, outcome) for one, outcome in zip(new, outcomes, strict=True)]
        yield trained
        for one in trained:
            behaviour = behaviour_of(one.tree, *curve_of(one.screened))
            fitness, n = one.outcome.fitness, one.number
            members.append(Member(n, str(n), one.tree, fitness, one.outcome.score, "", n % ISLANDS, behaviour))
        members.sort(key=lambda member: (-member.fitness, member.number))
        population = Population(members)
        proposals = [p for way in ways for p in Grammar(way).propose(population, GENERATION // len(ways), draw)]


def rediscover(target: str, ways: Sequence[str], seed: int, limit: int) -> dict:
    """How many proposals and seconds it takes until the target comes."""
    wanted = fingerprints(Program(known(target)), BETAS)
    began = time.perf_counter()
    for trained in generations(HIDDEN[target], ways, lambda trees: run_tabular(trees, seed), seed):
        for one in trained:
            if float((wanted @ one.screened.fingerprint).max()) >= SAME:
                return {"found": True, "proposals": one.number, "seconds": time.perf_counter() - began}
        if trained and trained[-1].number >= limit:
            return {"found": False, "proposals": limit, "seconds": time.perf_counter() - began}
    raise AssertionError("generations do not end")


@dataclass(frozen=True)
class Arena:
    """The linear rung of a search, and the same on the parts that the search never touches."""

    bench: Workbench
    fresh: Kernel

    @classmethod
    def of(cls, run: Path) -> "Arena":
        """Of the folder of a search; the second kernel is kept beside the first."""
        bench, path = Workbench(run), run / "kernel-retrial.safetensors"
        if not path.is_file():
            bench.adapters.reset(0)
            parts = bench.retrial.train.data.trees, bench.retrial.held_out.data.trees
            found = kernel_of(bench.base.model, *parts, bench.config.token_budget)
            save_file({name: value.contiguous() for name, value in vars(found).items()}, path)
        return cls(bench, Kernel(**load_file(path)))

    def search(self, ways: Sequence[str], seed: int, limit: int) -> dict:
        """The best of so many candidates, and what it is worth beside DPO where nobody looked."""
        began = time.perf_counter()
        bench, everything = self.bench, []
        judge = lambda trees: run_linear(bench.search, bench.kernel, trees, bench.settings)  # noqa: E731
        for trained in generations(STARTS, ways, judge, seed):
            everything += trained
            if len(everything) >= limit:
                break
        everything = everything[:limit]
        best = max(everything, key=lambda one: one.outcome.fitness)
        seconds = time.perf_counter() - began
        fitness = [one.outcome.fitness for one in everything]
        return {
            "best": {str(n): max(fitness[:n]) for n in (50, 100, 200, limit)},
            "proposals": everything[-1].number,
            "seconds": seconds,
            "formula": to_python(best.tree),
            "fresh": self.again(best.tree, best.outcome) - self.again(everything[0].tree, everything[0].outcome),
        }

    def again(self, tree: Expression, outcome: Outcome) -> float:
        """Fitness on the fresh parts at the setting that was chosen in the search."""
        return run_linear(self.bench.retrial, self.fresh, [tree], [outcome.setting])[0].fitness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trained", type=int, default=400)
    parser.add_argument("--proposals", type=int, default=1500)
    options = parser.parse_args()
    seeds = range(options.repeats)
    result = {"machine": machine(), **{name: value for name, value in vars(options).items() if name != "output"}}
    if options.output is not None:
        set_up_memory(2048)
        arena = Arena.of(options.output)
        result["search"] = {name: found(arena, ways, seeds, options.trained) for name, ways in PROPOSERS.items()}
        for name, row in result["search"].items():
            print(name, row["best"], "fresh, less DPO", row["fresh"], flush=True)
    torch.set_num_threads(1)
    result["rediscovery"] = []
    for target in HIDDEN:
        for name, ways in PROPOSERS.items():
            runs = [rediscover(target, ways, seed, options.proposals) for seed in seeds]
            hits = [run for run in runs if run["found"]]
            row = {"target": target, "starts": HIDDEN[target], "proposer": name, "runs": runs}
            row["found"] = proportion([float(run["found"]) for run in runs]).record()
            result["rediscovery"].append(row)
            print(target, name, f"{len(hits)} of {len(runs)}", [run["proposals"] for run in runs], flush=True)
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(RESULT)


def found(arena: Arena, ways: Sequence[str], seeds: Sequence[int], limit: int) -> dict:
    """What a proposer found in each repeat, and means with their intervals, repeats as units."""
    runs = [arena.search(ways, seed, limit) for seed in seeds]
    best = {n: mean([run["best"][n] for run in runs]).record() for n in runs[0]["best"]}
    return {
        "best": best,
        "fresh": mean([run["fresh"] for run in runs]).record(),
        "seconds": mean([run["seconds"] for run in runs]).record(),
        "runs": runs,
    }


if __name__ == "__main__":
    main()
