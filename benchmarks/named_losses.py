"""Ten published losses, five seeds each, with tuned β: their order here beside the published ones.

    python benchmarks/named_losses.py --output runs/named [any option of sartor discover]

β and learning rate of each are chosen on the linear rung; then each trains for real with seeds 0 to 4. Published by
DiscoPOP (arXiv 2406.08414): AlpacaEval win rates against GPT-4 (table 1), and rewards of its IMDb runs at β = 0.05 (its
released results). Writes benchmarks/results/named_losses.json, and goes on where it stopped.
"""

import json
import sys
from pathlib import Path

from linear_rung import opened

from sartor.config import DiscoverConfig
from sartor.discover.language.known import KNOWN
from sartor.discover.language.parse import parse as parse_objective
from sartor.discover.rungs.linear import run_linear
from sartor.evaluate.statistics import Sample, crossed, mean, rank_correlation
from sartor.machine import machine

RESULT = Path(__file__).parent / "results" / "named_losses.json"
SEEDS = 5
KTO_PAIR = """
w = maximum(mean(chosen_logratio), 0)
l = maximum(mean(rejected_logratio), 0)
return 2 - sigmoid(beta * (chosen_logratio - l)) - sigmoid(beta * (w - rejected_logratio))
"""
ALPACA_EVAL = {
    "dpo": 11.23,
    "hinge": 10.67,
    "kto_pair": 12.57,
    "dbaql": 10.68,
    "aql": 11.11,
    "padll": 14.07,
    "aqfl": 13.63,
    "cell": 10.27,
    "lrml": 13.21,
    "pfl": 8.15,
}
IMDB = {
    "dpo": 0.972,
    "hinge": 0.961,
    "lrml": 0.975,
    "padll": 0.973,
    "aqfl": 0.973,
    "aql": 0.969,
    "dbaql": 0.969,
    "cell": 0.966,
    "pfl": 0.845,
}
TOGETHER = 1 - 0.05 / (len(ALPACA_EVAL) - 1)  # of each difference to DPO, so that all hold at 95 % (Bonferroni)


def main() -> None:
    bench = opened(sys.argv[1:])
    run = bench.run
    done = run.read_json("named.json") or {}
    trees = {name: parse_objective(KTO_PAIR if name == "kto_pair" else KNOWN[name]) for name in ALPACA_EVAL}
    tuned = run_linear(bench.search, bench.kernel, list(trees.values()), bench.settings)
    for seed in range(SEEDS):
        for (name, tree), chosen in zip(trees.items(), tuned, strict=True):
            if f"{name} {seed}" not in done:
                found = bench.adapters.run(tree, chosen.setting, seed)
                done[f"{name} {seed}"] = {"values": found.values, "setting": str(chosen.setting), **found.measures}
                run.write_json("named.json", done)
                print(name, seed, chosen.setting, round(found.fitness, 4), flush=True)
    RESULT.write_text(json.dumps(summary(bench.config, done), indent=1, ensure_ascii=False) + "\n")
    print(RESULT)


def summary(config: DiscoverConfig, done: dict) -> dict:
    rows = {}
    for name in ALPACA_EVAL:
        runs, dpo = ([done[f"{one} {seed}"] for seed in range(SEEDS)] for one in (name, "dpo"))
        less = [Sample(*values_of(runs)), Sample(*values_of(dpo), -1.0)]
        row = {
            "setting": runs[0]["setting"],
            "value": crossed([Sample(*values_of(runs))], [seeds_of(runs)]),
            **({} if name == "dpo" else {"less dpo": crossed(less, [seeds_of(runs), seeds_of(dpo)], TOGETHER)}),
            "reward": mean([run["reward"] for run in runs]),
            "kl": mean([run["kl"] for run in runs]),
            "accuracy": mean([run["accuracy"] for run in runs]),
        }
        print(f"{name:10}", *(f"{what} {said}" for what, said in row.items()), sep="  ")
        rows[name] = row
    orders = {}
    for label, published in (("AlpacaEval vs GPT-4", ALPACA_EVAL), ("IMDb, β 0.05", IMDB)):
        orders[label] = rank_correlation([rows[name]["value"].value for name in published], list(published.values()))
        print(f"Spearman with {label}: {orders[label]}, {orders[label].n} losses")
    return {
        "machine": machine(),
        "model": config.model,
        "task": config.task,
        "seeds": SEEDS,
        "losses": {
            name: {what: said if isinstance(said, str) else said.record() for what, said in row.items()}
            for name, row in rows.items()
        },
        "spearman": {label: rho.record() for label, rho in orders.items()},
        "runs": done,
    }


def values_of(runs: list[dict]) -> tuple[list[float], list[int]]:
    """Values of all seeds and the prompt of each."""
    return [v for run in runs for v in run["values"]], [i for run in runs for i in range(len(run["values"]))]


def seeds_of(runs: list[dict]) -> list[int]:
    """The seed of each of these values."""
    return [seed for seed, run in enumerate(runs) for _ in run["values"]]


if __name__ == "__main__":
    main()
