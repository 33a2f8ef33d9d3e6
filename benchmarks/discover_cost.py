"""What a candidate of a search costs, beside training each fully and alone.

    python benchmarks/discover_cost.py --output runs/discover [--losses dpo hinge simpo]

Alone: `sartor dpo` as a process of its own on the search's data and recipe, judged on its held-out prompts as the
search judges; its cache holds the weights and nothing else. In the search: what its archive says was spent. The time of
one real training there, with models loaded and the reference known, is the strictest measure of "alone". Writes
benchmarks/results/discover_cost.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sartor.discover.archive import Archive
from sartor.discover.parts import scorer_of
from sartor.discover.workbench import ANSWERS, Workbench
from sartor.evaluate.statistics import mean
from sartor.machine import machine
from sartor.model.resolve import cache_folder

RESULT = Path(__file__).parent / "results" / "discover_cost.json"
SET_UP = ("answers", "reference and kernel")
RACE = ("propose and screen", "tabular", "linear", "adapter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--losses", nargs="+", default=["dpo", "hinge", "simpo"])
    options = parser.parse_args()
    alone = {}
    for loss in options.losses:
        alone[loss] = seconds_alone(options.output, loss)
        print(f"{loss}: {alone[loss]:.1f} s alone", flush=True)
    archive = Archive(options.output / "archive.sqlite", reads_only=True)
    spent, rungs = archive.spent(), [result.rung for result in archive.results()]
    linear, adapters = rungs.count("linear"), rungs.count("adapter")
    each = mean(list(alone.values()))
    per = {
        "linear": spent["linear"] / linear,
        "linear with the kernel": (spent["linear"] + spent["reference and kernel"]) / linear,
        "race": sum(spent[name] for name in RACE) / linear,
        "race with set-up": sum(spent[name] for name in (*SET_UP, *RACE)) / linear,
    }
    inside = spent["adapter"] / adapters
    for name, seconds in per.items():
        ratios = f"1/{each.value / seconds:.0f} of {each} alone, 1/{inside / seconds:.0f} of {inside:.1f} in the search"
        print(f"{name}: {seconds:.3f} s a candidate, {ratios}")
    found = {"machine": machine(), "alone": alone, "mean": each.record(), "spent": spent, "per candidate": per}
    found |= {"linear candidates": linear, "really trained": adapters, "one real training in the search": inside}
    RESULT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(RESULT)


def seconds_alone(run: Path, loss: str) -> float:
    """Wall time of a process that trains by one loss and judges what came of it."""
    bench = Workbench(run)
    config, rates = bench.config, sorted({setting.learning_rate for setting in bench.settings})
    with tempfile.TemporaryDirectory() as folder:
        if (models := cache_folder() / "models").is_dir():  # weights at hand, as they are for the search
            shutil.copytree(models, Path(folder) / "models")
        options = {
            "model": config.model,
            "data": run / "search.jsonl",
            "eval-data": run / "search-held-out.jsonl",
            "output": Path(folder) / "run",
            "loss": loss,
            "learning-rate": rates[len(rates) // 2],
            "epochs": config.epochs,
            "batch-size": config.batch_size,
            "lora-r": config.lora_r,
            "max-new-tokens": config.max_new_tokens,
            "eval-samples": ANSWERS,
            "eval-every": 10_000,
            "score": scorer_of(config),
        }
        command = [sys.executable, "-m", "sartor", "dpo"]
        command += [str(word) for name, value in options.items() for word in (f"--{name}", value) if value is not None]
        began = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "SARTOR_CACHE": folder}, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
