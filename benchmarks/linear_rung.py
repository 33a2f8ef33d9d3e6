"""How true the linear rung is: unlike objectives trained in the linearised model and for real, at the same settings.

    python benchmarks/linear_rung.py --output runs/fidelity [any option of sartor discover]

Writes benchmarks/results/linear_rung.json: per objective what both say, and Spearman's ρ over objectives with its
interval for fitness, accuracy, margin and displacement; and what a candidate costs on either. Goes on where it stopped.
"""

import json
import sys
import time
from pathlib import Path

from sartor.cli import parse
from sartor.config import DiscoverConfig, to_yaml
from sartor.discover.language.known import KNOWN, known
from sartor.discover.language.parse import parse as parse_objective
from sartor.discover.parts import write_parts
from sartor.discover.rungs.linear import run_linear
from sartor.discover.rungs.outcome import Setting
from sartor.discover.workbench import Workbench
from sartor.evaluate.statistics import rank_correlation
from sartor.machine import machine, set_up_memory
from sartor.train.run import RunFolder

RESULT = Path(__file__).parent / "results" / "linear_rung.json"
# Unlike in what they do to chosen and rejected, not in name alone: likelihood only, one side only, wrong sign.
MORE = {
    "unlikelihood": "softplus(beta * rejected_logratio)",
    "chosen only": "-log_sigmoid(beta * chosen_logratio)",
    "exponential": "exp(-(beta * margin))",
    "lrml wide": "sigmoid(-margin / 5) * softplus(-(beta * margin)) + sigmoid(margin / 5) * exp(-(beta * margin))",
}
# The most unlike first, since each takes a while and what is there is told after each.
FIRST = ("dpo", "inverted", "sft", "simpo", "lrml", "dpop", "apo_down", "unlikelihood", "orpo", "hinge", "chosen only")
LIKE_OTHERS = ("robust", "r_dpo", "dpo_norm", "ipo", "aqfl")
MEASURES = ("fitness", "accuracy", "margin", "chosen", "rejected")
BETA = {"simpo": 2.0, "alphapo": 2.0, "nca": 0.1, "sppo": 0.05, "cal_dpo": 0.05}  # 0.1 for the others


def main() -> None:
    config = parse("discover", DiscoverConfig, sys.argv[1:])
    set_up_memory(config.token_budget)
    run = RunFolder(config.output)
    config.output.mkdir(parents=True, exist_ok=True)
    run.write_text("config.yaml", to_yaml(config))
    write_parts(config, run)
    bench = Workbench(config.output)
    began = time.perf_counter()
    kernel = bench.kernel
    seconds_of_kernel = run.read_json("kernel.json") or time.perf_counter() - began
    run.write_json("kernel.json", seconds_of_kernel)
    done = run.read_json("fidelity.json") or {}
    rate = min(setting.learning_rate for setting in bench.settings)
    for name in dict.fromkeys([*FIRST, *MORE, *(name for name in KNOWN if name not in LIKE_OTHERS), "zero"]):
        if name in done:
            continue
        tree = parse_objective(MORE[name]) if name in MORE else known(name)
        setting = Setting(BETA.get(name, 0.1), rate)
        linear = run_linear(bench.search, kernel, [tree], [setting])[0]
        real = bench.adapters.run(tree, setting)
        done[name] = {
            "setting": str(setting),
            "linear": {"fitness": linear.fitness, **linear.measures, "seconds": linear.seconds},
            "real": {"fitness": real.fitness, **real.measures, "seconds": real.seconds},
        }
        run.write_json("fidelity.json", done)
        print(f"\n{name}: {setting}", flush=True)
        found = summary(bench, done, seconds_of_kernel)
        RESULT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(RESULT)


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
