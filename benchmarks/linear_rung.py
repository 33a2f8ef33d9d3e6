"""How true the linear rung is: unlike objectives trained in the linearised model and for real, at the same settings.

    python benchmarks/linear_rung.py --output runs/fidelity [any option of sartor discover]

Objectives are the most unlike ones among the catalogue and four more, at two β each: DPO, then always the one whose
fingerprint is farthest from all those taken. All learn at the rate in the middle of those that a search has candidates
choose from. Writes benchmarks/results/linear_rung-DTYPE.json, by the precision of the model: per objective what both
say, and Spearman's ρ over objectives with its interval for each measure; and what a candidate costs on either. Goes on
where it stopped. The canary zero is run as well, and left out of all correlations.
"""

import json
import sys
import time
from pathlib import Path

import torch

from sartor.cli import parse
from sartor.config import DiscoverConfig, to_yaml
from sartor.discover.language.expression import Expression
from sartor.discover.language.known import KNOWN, known
from sartor.discover.language.parse import parse as parse_objective
from sartor.discover.language.printing import to_python
from sartor.discover.language.program import Program
from sartor.discover.parts import write_parts
from sartor.discover.rungs.linear import run_linear
from sartor.discover.rungs.outcome import Outcome, Setting
from sartor.discover.screens import fingerprints
from sartor.discover.workbench import Workbench
from sartor.evaluate.statistics import rank_correlation
from sartor.machine import machine, set_up_memory
from sartor.train.run import RunFolder

RESULTS = Path(__file__).parent / "results"
COUNT = 24
BETAS = (0.1, 1.0)
MORE = {
    "unlikelihood": "softplus(beta * rejected_logratio)",
    "chosen only": "-log_sigmoid(beta * chosen_logratio)",
    "exponential": "exp(-(beta * margin))",
    "lrml wide": "sigmoid(-margin / 5) * softplus(-(beta * margin)) + sigmoid(margin / 5) * exp(-(beta * margin))",
}
MEASURES = ("fitness", "accuracy", "margin", "chosen", "rejected", "reward", "kl")


def main() -> None:
    bench = opened(sys.argv[1:])
    run, began = bench.run, time.perf_counter()
    kernel = bench.kernel
    seconds_of_kernel = run.read_json("kernel.json") or time.perf_counter() - began
    run.write_json("kernel.json", seconds_of_kernel)
    done, rows = run.read_json("real.json") or {}, {}
    rates = sorted({setting.learning_rate for setting in bench.settings})
    result = RESULTS / f"linear_rung-{bench.base.model.core.dtype}.json".replace("torch.", "")
    for name, (tree, beta) in {**unlike(COUNT), "zero": (known("zero"), BETAS[0])}.items():
        setting = Setting(beta, rates[len(rates) // 2])
        linear = run_linear(bench.search, kernel, [tree], [setting])[0]
        real = done.get(name) or record(bench.adapters.run(tree, setting))
        done[name] = real
        run.write_json("real.json", done)
        rows[name] = {"formula": to_python(tree), "setting": str(setting), "linear": record(linear), "real": real}
        print(f"\n{name}: {setting}", flush=True)
        found = summary(bench, rows, seconds_of_kernel)
        result.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(result)


def opened(arguments: list[str]) -> Workbench:
    """The model and the data of a search with these options, made where they are not there yet."""
    config = parse("discover", DiscoverConfig, arguments)
    set_up_memory(config.token_budget)
    config.output.mkdir(parents=True, exist_ok=True)
    run = RunFolder(config.output)
    run.write_text("config.yaml", to_yaml(config))
    write_parts(config, run)
    return Workbench(config.output)


def record(outcome: Outcome) -> dict[str, float]:
    return {"fitness": outcome.fitness, **outcome.measures, "seconds": outcome.seconds}


def unlike(count: int) -> dict[str, tuple[Expression, float]]:
    """The most unlike objectives and their β by name: farthest-first traversal of fingerprints, from DPO on."""
    trees = {name: known(name) for name in KNOWN} | {name: parse_objective(text) for name, text in MORE.items()}
    pool = {f"{name}, β {beta:g}": (tree, beta) for name, tree in trees.items() for beta in BETAS}
    prints = {name: fingerprints(Program(tree), (beta,))[0] for name, (tree, beta) in pool.items()}
    taken = [next(iter(pool))]
    while len(taken) < count:
        those = torch.stack([prints[name] for name in taken])
        taken.append(min(prints, key=lambda name: float((those @ prints[name]).max())))
    return {name: pool[name] for name in taken}


def summary(bench: Workbench, done: dict, seconds_of_kernel: float) -> dict:
    objectives = [name for name in done if name != "zero"]
    found = {
        measure: rank_correlation(
            [done[name]["linear"][measure] for name in objectives], [done[name]["real"][measure] for name in objectives]
        )
        for measure in MEASURES
    }
    for measure, estimate in found.items():
        print(f"{measure:10} Spearman {estimate}, {estimate.n} objectives", flush=True)
    material = bench.search
    return {
        "machine": machine(),
        "model": bench.config.model,
        "task": bench.config.task,
        "steps": material.recipe.steps,
        "trees": {"train": len(material.train.data.trees), "held out": len(material.held_out.data.trees)},
        "branches": {"train": material.train.first[-1], "held out": material.held_out.first[-1]},
        "seconds of kernel": seconds_of_kernel,
        "spearman": {measure: estimate.record() for measure, estimate in found.items()},
        "objectives": done,
    }


if __name__ == "__main__":
    main()
