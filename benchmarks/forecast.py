"""What `sartor dpo` said before each run, and what it took: six runs of different kinds, time and memory.

usage: python benchmarks/forecast.py [--data-folder ../shared/data] [--only full,lora]

Each run is a process of its own on a fresh reference cache. The forecast is the one the run itself printed, the truth
what its summary says. Raw numbers go to benchmarks/results/.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import tyro
from preference_step import rankings

from sartor.machine import machine
from sartor.model.resolve import cache_folder

HERE = Path(__file__).parent
TIME, MEMORY = 0.20, 0.10  # what a forecast may be off by
HH, OASST = "hh-rlhf/harmless-base-2000.jsonl.gz", "oasst/en_100_tree.jsonl.gz"
RANKINGS = "rankings.jsonl"  # made from the Open-Assistant trees
SMALL = "--eval-fraction 0.1 --eval-limit 24 --eval-prompts 16 --max-length 512"
RUNS = {
    "full": f"--data {HH} --limit 64 {SMALL}",
    "lora": f"--data {HH} --limit 80 --lora-r 16 {SMALL}",
    "rankings": f"--data {RANKINGS} --limit 20 --eval-limit 6 --eval-prompts 8 --max-length 1024",
    "long prompts, small micro-batches": f"--data {HH} --limit 40 --token-budget 512 {SMALL}",
    "checkpointed, two epochs": f"--data {HH} --limit 32 --epochs 2 --checkpointing always --batch-size 16 {SMALL}",
    "batch statistics, fp32": f"--data {HH} --limit 24 --loss aot --dtype float32 {SMALL}",
}


@dataclass
class Options:
    """What to run."""

    data_folder: Path = HERE.parents[1] / "shared" / "data"
    only: str = ""
    """Some of the runs, by the first word of their names, with commas between."""


def main(options: Options) -> None:
    if not options.data_folder.is_dir():
        sys.exit(f"--data-folder {options.data_folder}: no such folder; it holds {HH} and others")
    wanted = options.only.split(",") if options.only else [name.split()[0].strip(",") for name in RUNS]
    rows = []
    print(f"{'run':<34} {'forecast':>9} {'took':>7} {'off':>6}   {'forecast':>9} {'peak GiB':>8} {'off':>6}")
    for name, arguments in RUNS.items():
        if name.split()[0].strip(",") in wanted:
            rows.append(run(name, arguments, options.data_folder))
            print(line(rows[-1]), flush=True)
    within = [abs(row["time_off"]) <= TIME and abs(row["memory_off"]) <= MEMORY for row in rows]
    print(f"\n{sum(within)} of {len(rows)} within {TIME:.0%} of time and {MEMORY:.0%} of memory")
    record = {"runs": rows, "machine": machine(), "date": date.today().isoformat()}
    (HERE / "results" / f"forecast-{date.today().isoformat()}.json").write_text(json.dumps(record, indent=1) + "\n")


def run(name: str, arguments: str, data: Path) -> dict[str, object]:
    """One run in a folder of its own; the model comes from the user's cache, the reference from nowhere."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "cache").mkdir()
        if (models := cache_folder() / "models").is_dir():
            (work / "cache" / "models").symlink_to(models)
        if RANKINGS in arguments:
            (work / RANKINGS).write_text("".join(json.dumps(row) + "\n" for row in ranked(data / OASST)))
        files = {HH: data / HH, RANKINGS: work / RANKINGS}
        words = [str(files.get(word, word)) for word in arguments.split()]
        sartor = str(Path(sys.executable).with_name("sartor"))
        command = [sartor, "dpo", "--model", "smollm2", *words, "--output", str(work / "run")]
        environment = {**os.environ, "SARTOR_CACHE": str(work / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{name}: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
        summary = json.loads((work / "run" / "summary.json").read_text())
    told, cost = summary["forecast"], summary["cost"]
    return {
        "run": name,
        "command": f"sartor dpo --model smollm2 {arguments}",
        "forecast": told,
        "took": cost,
        "time_off": told["seconds"] / cost["seconds"] - 1,
        "memory_off": told["peak_memory_gib"] / cost["peak_memory_gib"] - 1,
    }


def ranked(path: Path) -> list[dict[str, object]]:
    """Four ranked answers to a prompt, in the format that ``sartor dpo`` reads."""
    rows = []
    for one in rankings(path):
        prompt = [asdict(message) for message in one.prompt]
        rows.append(
            {"prompt": prompt, "completions": [[asdict(m) for m in c] for c in one.completions], "ranks": one.ranks}
        )
    return rows


def line(row: dict) -> str:
    """A row of the table."""
    told, took = row["forecast"], row["took"]
    time = f"{told['seconds']:>7.0f} s {took['seconds']:>5.0f} s {row['time_off']:>+6.0%}"
    memory = f"{told['peak_memory_gib']:>9.1f} {took['peak_memory_gib']:>8.1f} {row['memory_off']:>+6.0%}"
    return f"{row['run']:<34} {time}   {memory}"


if __name__ == "__main__":
    main(tyro.cli(Options))
