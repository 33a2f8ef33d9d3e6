"""How soon each proposer finds a known loss again that its seeds hide, by proposals and by seconds.

    python benchmarks/rediscovery.py [--repeats 5] [--proposals 1500]

A loss counts as found when a proposal has its fingerprint (cosine 0.999) at some β. Candidates are judged on the
tabular rung alone, so that nothing but the proposers differs. Writes benchmarks/results/rediscovery.json.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from sartor.discover.language.known import known
from sartor.discover.language.program import BETA, Program
from sartor.discover.propose.grammar import Grammar
from sartor.discover.propose.parents import ISLANDS
from sartor.discover.propose.proposal import Member, Population, Proposal
from sartor.discover.rungs.tabular import run_tabular
from sartor.discover.screens import BETAS, SAME, Seen, curve_of, fingerprints, screen
from sartor.discover.state import behaviour_of
from sartor.evaluate.statistics import mean, proportion
from sartor.machine import machine

RESULT = Path(__file__).parent / "results" / "rediscovery.json"
TARGETS = {"dpo": ("sft", "apo_zero"), "hinge": ("dpo", "sft"), "ipo_sum": ("dpo", "sft"), "cell": ("dpo", "sft")}
PROPOSERS = {"random": ("random",), "evolution": ("random", "mutate", "cross", "tune")}
GENERATION = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--proposals", type=int, default=1500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for target, starts in TARGETS.items():
        for name, ways in PROPOSERS.items():
            found = [hunt(target, starts, ways, seed, options.proposals) for seed in range(options.repeats)]
            hits = [one for one in found if one["found"]]
            rows.append(
                {
                    "target": target,
                    "starts": starts,
                    "proposer": name,
                    "found": proportion([float(one["found"]) for one in found]).record(),
                    "proposals": mean([one["proposals"] for one in hits]).record() if hits else None,
                    "seconds": mean([one["seconds"] for one in hits]).record() if hits else None,
                    "runs": found,
                }
            )
            print(target, name, f"{len(hits)} of {len(found)}", [one["proposals"] for one in found], flush=True)
    RESULT.write_text(json.dumps({"machine": machine(), "limit": options.proposals, "rows": rows}, indent=1) + "\n")
    print(RESULT)


def hunt(target: str, starts: tuple[str, ...], ways: tuple[str, ...], seed: int, limit: int) -> dict:
    """Propose until the target comes, generation by generation, the ways in turn."""
    wanted = fingerprints(Program(known(target)), BETAS)
    draw, seen, members, number = np.random.default_rng(seed), Seen(), [], 0
    began = time.perf_counter()
    proposals = [Proposal(known(name), "named") for name in starts]
    while number < limit:
        trained = []
        for proposal in proposals:
            number += 1
            found = screen(proposal.tree, BETA)
            if found.refusal or seen.twin(found):
                continue
            if float((wanted @ found.fingerprint).max()) >= SAME:
                return {"found": True, "proposals": number, "seconds": time.perf_counter() - began}
            seen.add(number, found)
            trained.append((number, proposal.tree, behaviour_of(proposal.tree, *curve_of(found))))
        outcomes = run_tabular([tree for _, tree, _ in trained], seed) if trained and len(ways) > 1 else []
        for (n, tree, behaviour), one in zip(trained, outcomes, strict=False):
            members.append(Member(n, str(n), tree, one.fitness, one.score, "tabular", n % ISLANDS, behaviour))
        members.sort(key=lambda member: (-member.fitness, member.number))
        population = Population(members)
        proposals = [p for way in ways for p in Grammar(way).propose(population, GENERATION // len(ways), draw)]
    return {"found": False, "proposals": number, "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main()
