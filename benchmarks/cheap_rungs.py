"""How many candidates the cheap rungs of a search take: screened a second, through the linear rung a minute.

    python benchmarks/cheap_rungs.py --output runs/discover [--trees 1200]

Random trees of the grammar go through all screens, likeness to the catalogue and to all earlier ones included; those
that pass are trained on the linear rung of a search, each at all of its settings. Writes
benchmarks/results/cheap_rungs.json.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np

from sartor.discover.language.known import known
from sartor.discover.language.program import BETA
from sartor.discover.propose.grammar import Grammar
from sartor.discover.propose.proposal import Population
from sartor.discover.rungs.linear import run_linear
from sartor.discover.screens import Seen, screen
from sartor.discover.workbench import Workbench
from sartor.machine import machine, set_up_memory

RESULT = Path(__file__).parent / "results" / "cheap_rungs.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--trees", type=int, default=1200)
    options = parser.parse_args()
    drawn = Grammar("random").propose(Population([]), options.trees, np.random.default_rng(0))
    trees = [proposal.tree for proposal in drawn if proposal.tree is not None]
    screen(known("dpo"), BETA)  # what is made once: stress batches, and the catalogue's fingerprints
    seen, kept = Seen(), []
    fates: Counter[str] = Counter()
    began = time.perf_counter()
    for number, tree in enumerate(trees):
        found = screen(tree, BETA)
        if found.refusal or seen.twin(found) is not None:
            fates["refused" if found.refusal else "twin"] += 1
            continue
        seen.add(number, found)
        kept.append(tree)
    screened = time.perf_counter() - began
    print(f"{len(trees)} screened in {screened:.1f} s, {len(trees) / screened:.0f} a second; {dict(fates)}", flush=True)
    set_up_memory(2048)
    bench = Workbench(options.output)
    kernel, material = bench.kernel, bench.search
    began = time.perf_counter()
    run_linear(material, kernel, kept, bench.settings)
    trained = time.perf_counter() - began
    print(f"{len(kept)} through the linear rung in {trained:.1f} s, {60 * len(kept) / trained:.0f} a minute")
    result = {
        "machine": machine(),
        "screened": len(trees),
        "fates": {**fates, "kept": len(kept)},
        "screened a second": len(trees) / screened,
        "linear": len(kept),
        "settings": len(bench.settings),
        "steps": material.recipe.steps,
        "linear a minute": 60 * len(kept) / trained,
    }
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(RESULT)


if __name__ == "__main__":
    main()
