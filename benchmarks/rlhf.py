"""The targets of RLHF, each by the commands a user would type, on the real small model.

usage: python benchmarks/rlhf.py [--only reward-vader,reward-hh,reward-oasst,ppo] [--folder runs/rlhf]

- reward-vader: a reward model from 3,000 answers that VADER ranked in fours, judged on unseen prompts.
- reward-hh: one from 1,800 HH comparisons, judged on 200 others.
- reward-oasst: the K-wise loss on Open-Assistant rankings, with their ties and unequal K.
- ppo: controlled sentiment. how much of the gain of the best of 16 answers, how far from the start, how fast?

Raw numbers go to benchmarks/results/.
"""

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

import tyro

from sartor.data.chat import as_conversation, encode_prompts
from sartor.evaluate.answers import answer
from sartor.evaluate.statistics import mean
from sartor.machine import machine
from sartor.model.load import load
from sartor.rewards.vader import vader
from sartor.rollout.local import Sampling

HERE = Path(__file__).parent
HH, OASST = "hh-rlhf/harmless-base-2000.jsonl.gz", "oasst/en_100_tree.jsonl.gz"
TOKENS, K = 48, 4
ADAPTERS = ["--lora-r", "16"]


@dataclass
class Options:
    """What to run."""

    only: str = "reward-vader,reward-hh,reward-oasst,ppo"
    """Some of the parts, with commas between."""
    folder: Path = Path("runs/rlhf")
    """Where data and runs go; what is there already is not made again."""
    data_folder: Path = HERE.parents[1] / "shared" / "data"
    model: str = "smollm2"
    seed: int = 0
    ppo: str = ""
    """More options for `sartor ppo`, in one string."""


def main(options: Options) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    parts = {"reward-vader": reward_vader, "reward-hh": reward_hh, "reward-oasst": reward_oasst, "ppo": ppo}
    file = HERE / "results" / "rlhf.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    for name in options.only.split(","):
        found = parts[name](options)
        record[name] = {**found, "machine": machine(), "date": date.today().isoformat(), "seed": options.seed}
        print(f"{name}: {found['told']}", flush=True)
        file.write_text(json.dumps(record, indent=1) + "\n")


def reward_vader(options: Options) -> dict[str, Any]:
    train = sampled_rankings(options, "train", 3000)
    held_out = sampled_rankings(options, "eval", 480)
    # Few rankings in a step: how many steps there are counts for more than how many answers (docs/log.md, 2026-11-22).
    more = ["--max-length", "512", *ADAPTERS, "--batch-size", "4", "--epochs", "2"]
    run = sartor(options, "reward", f"vader-{options.seed}", "--data", train, "--eval-data", held_out, *more)
    return judged(options, run, "held-out pair accuracy", wanted=0.80)


def reward_hh(options: Options) -> dict[str, Any]:
    data = str(options.data_folder / HH)
    run = sartor(options, "reward", f"hh-{options.seed}", "--data", data, "--max-length", "512", *ADAPTERS)
    return judged(options, run, "held-out pair accuracy", wanted=None)


def reward_oasst(options: Options) -> dict[str, Any]:
    data = options.folder / "oasst.jsonl"
    with gzip.open(options.data_folder / OASST, "rt") as trees:
        rows = [row for tree in trees for row in ranked_siblings(json.loads(tree)["prompt"], [])]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = sartor(options, "reward", f"oasst-{options.seed}", "--data", str(data), "--max-length", "768", *ADAPTERS)
    return judged(options, run, "held-out pair accuracy", wanted=None)


def ranked_siblings(node: dict[str, Any], before: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Every prompt of an Open-Assistant tree with its 2 to 9 ranked answers."""
    path = [*before, {"role": {"prompter": "user"}.get(node["role"], node["role"]), "content": node["text"]}]
    ranked = [reply for reply in node["replies"] if reply.get("rank") is not None][:9]
    if node["role"] == "prompter" and len({reply["text"] for reply in ranked}) > 1:
        answers = [[{"role": "assistant", "content": reply["text"]}] for reply in ranked]
        yield {"prompt": path, "completions": answers, "ranks": [reply["rank"] for reply in ranked]}
    for reply in node["replies"]:
        yield from ranked_siblings(reply, path)


def judged(options: Options, run: Path, what: str, wanted: float | None) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text())
    accuracy = summary["evaluation"]["accuracy"]
    target = f", wanted {wanted:.0%}" if wanted else ", wanted above 50 % with its interval"
    met = accuracy["value"] >= wanted if wanted else accuracy["low"] > 0.5
    told = (
        f"{what} {interval(accuracy, 100)} %{target}: {'met' if met else 'MISSED'}; {summary['cost']['seconds']:.0f} s"
    )
    return {
        "told": told,
        "met": met,
        "evaluation": summary["evaluation"],
        "cost": summary["cost"],
        "command": summary["command"].replace(f"{run.parent}/", "").replace(f"{options.data_folder}/", ""),
    }


def ppo(options: Options) -> dict[str, Any]:
    """PPO on VADER, beside the best of 16 answers of the start to the same unseen prompts."""
    best = best_of(options, 16)
    data, held_out = (prompts_file(options, part) for part in ("train", "eval"))
    more = ["--data", data, "--eval-data", held_out, "--reward", "vader", "--max-new-tokens", str(TOKENS)]
    run = sartor(options, "ppo", f"ppo-{options.seed}", *more, "--eval-prompts", "60", *options.ppo.split())
    minutes = summary_of(run)["cost"]["seconds"] / 60
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evals = [row for row in rows if row["split"] == "eval"]
    start, end, kl = evals[0]["objective/scores"], evals[-1]["objective/scores"], evals[-1]["objective/kl"]
    share = (end["value"] - start["value"]) / (best["value"] - best["start"])
    met = share >= 0.5 and kl["value"] < 20 and minutes <= 30
    told = (
        f"mean score {interval(start)} -> {interval(end)}, {share:.0%} of what best of 16 gains "
        f"({best['start']:.3f} -> {best['value']:.3f}), wanted 50 %; KL {interval(kl)} nats of 20; "
        f"{minutes:.1f} minutes of 30: {'met' if met else 'MISSED'}"
    )
    return {
        "told": told,
        "met": met,
        "best_of_16": best,
        "evaluations": evals,
        "minutes": minutes,
        "command": summary_of(run)["command"].replace(f"{run.parent}/", ""),
    }


def best_of(options: Options, n: int) -> dict[str, float]:
    kept = options.folder / f"best-of-{n}-{options.seed}.json"
    if not kept.is_file():
        model, prompts = load(options.model), [as_conversation(line, "user") for line in lines("eval")]
        ids = encode_prompts(model.tokenizer, prompts, 512)
        scores = answer(model, prompts, ids, n, Sampling(TOKENS, seed=options.seed), vader).scores
        best = mean([max(row) for row in scores])
        kept.write_text(json.dumps({**asdict(best), "start": mean([sum(row) / n for row in scores]).value}))
    return json.loads(kept.read_text())


def sampled_rankings(options: Options, part: str, answers: int) -> str:
    """So many answers to the built-in prompts, ranked in fours by VADER; equal scores share a rank."""
    file = options.folder / f"{part}-{options.seed}.jsonl"
    if not file.is_file():
        model, prompts = load(options.model), [as_conversation(line, "user") for line in lines(part)]
        ids = encode_prompts(model.tokenizer, prompts, 512)
        n = -(-answers // len(prompts)) // K * K
        found = answer(model, prompts, ids, n, Sampling(TOKENS, seed=options.seed + 1), vader)
        rows = []
        for prompt, texts, scores in zip(lines(part), found.texts, found.scores, strict=True):
            for start in range(0, n, K):
                group = scores[start : start + K]
                places = sorted(set(group), reverse=True)
                if len(places) > 1 and len(set(texts[start : start + K])) > 1:
                    ranks = [places.index(score) + 1 for score in group]
                    rows.append({"prompt": prompt, "completions": texts[start : start + K], "ranks": ranks})
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def prompts_file(options: Options, part: str) -> str:
    file = options.folder / f"{part}.txt"
    file.write_text("\n".join(lines(part)) + "\n")
    return str(file)


def lines(part: str) -> list[str]:
    return (files("sartor.data") / "prompts" / f"sentiment_{part}.txt").read_text(encoding="utf-8").splitlines()


def sartor(options: Options, verb: str, name: str, *arguments: str) -> Path:
    """Run a verb in a process of its own, or go on with the run that is there."""
    run = options.folder / name
    if (run / "report.html").is_file():
        return run
    command = [verb, "--model", options.model, "--output", str(run), *arguments, "--seed", str(options.seed)]
    command += ["--resume"] if (run / "config.yaml").is_file() else []
    code = "import sys; from sartor.cli import main; main(sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, *command], check=True)
    return run


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def interval(estimate: dict[str, float], scale: float = 1) -> str:
    value, low, high = (scale * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
