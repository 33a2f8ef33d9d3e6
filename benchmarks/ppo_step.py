"""A PPO iteration beside TRL's: rollout, scores, two passes over it, on the same model, prompts and reward model.

usage: python benchmarks/ppo_step.py [--reward RUN] [--peer PYTHON] [--contenders trl-lora]

TRL 1.12 is its last release with a PPOTrainer. It lives in an environment of its own (benchmarks/.peers/trl-ppo, made
on first use, or the interpreter that --peer names); its contenders stand in peers/trl_ppo.py. Each contender is a
process of its own, one after the other; the first iteration of each is left out. What the policies write is their own,
of up to 48 tokens, and since they hardly learn it stays as long as it is. Sartor runs with micro-batches of 512 tokens
and of 2,048, its default; TRL's have eight rows of about a hundred. Raw numbers go to benchmarks/results/; what was
measured earlier the same day stays.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import tyro

from sartor.data.chat import as_conversation, encode_prompts
from sartor.errors import UserError
from sartor.machine import machine
from sartor.model.load import convert_gguf, load
from sartor.model.resolve import resolve

HERE = Path(__file__).parent
ENVIRONMENT = HERE / ".peers" / "trl-ppo"
TRL, TORCH = "trl==1.12.0", "torch==2.13.0"
CONTENDERS = ("trl-lora", "trl-small", "trl")
ROLLOUT = {"prompts_per_rollout": 16, "samples": 4, "max_new_tokens": 48, "ppo_epochs": 2, "lora_r": 16}
TOKEN_BUDGETS = (512, 2048)
LEARNING_RATE = 1e-6  # next to nothing: as policies learn, answers get shorter or longer, and iterations with them
WANTED_SPEED, WANTED_MEMORY = 2.0, 0.4


@dataclass
class Options:
    """What to run."""

    reward: Path | None = None
    """A reward model that `sartor reward` made, all weights; by default one of two steps is made."""
    peer: str | None = None
    """Python of an environment with TRL 1.12 in it."""
    model: str = "smollm2"
    rollouts: int = 4
    micro_batch: int = 8
    """TRL's per_device_train_batch_size; the rest is gradient accumulation."""
    contenders: tuple[Literal["trl-lora", "trl-small", "trl"], ...] = CONTENDERS
    """Which of TRL's to run."""
    token_budgets: tuple[int, ...] = TOKEN_BUDGETS
    """Micro-batches to run Sartor with."""


def main(options: Options) -> None:
    python = environment(options.peer)
    file = HERE / "results" / f"ppo_step-{date.today().isoformat()}.json"
    results: dict[str, Any] = json.loads(file.read_text())["results"] if file.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        reward = options.reward or quick_reward(options, work)
        for budget in options.token_budgets:
            name = f"sartor-{budget}"
            results[name] = ours(options, reward, work / name, budget)
            print(told(name, results[name]), flush=True)
        for contender in options.contenders:
            results[contender] = theirs(options, reward / "model", work, contender, python)
            print(told(contender, results[contender]), flush=True)
    verdicts = [
        compared(name, results[name], other, results[other])
        for name in results
        for other in results
        if name.startswith("sartor") and other.startswith("trl")
    ]
    print("\n".join(verdicts))
    settings = {**ROLLOUT, "micro_batch": options.micro_batch, "learning_rate": LEARNING_RATE}
    record = {"work": settings, "results": results, "told": verdicts, "machine": machine()}
    file.write_text(json.dumps(record, indent=1) + "\n")


def environment(named: str | None) -> str:
    """Python of an environment with TRL and peft; made where none is named."""
    python = named or str(ENVIRONMENT / "bin" / "python")
    if named is None and not Path(python).exists():
        venv.create(ENVIRONMENT, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", TORCH], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", TRL, TORCH, "peft", "pandas", "rich"], check=True)
    probe = "from importlib.metadata import version; import peft; print(version('trl'))"
    done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
    if not done.stdout.startswith("1.12."):
        raise UserError(
            f"--peer {python}: wanted trl 1.12 and peft, got {done.stdout.strip() or done.stderr.strip()[-80:]}"
        )
    return python


def prompts() -> list[str]:
    text = (files("sartor.data") / "prompts" / "sentiment_train.txt").read_text(encoding="utf-8")
    return text.splitlines()


def quick_reward(options: Options, work: Path) -> Path:
    """A reward model of two steps: what it likes does not matter to the clock."""
    rows = [{"prompt": prompt, "chosen": "Gladly.", "rejected": "No."} for prompt in prompts()[:40]]
    (work / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_sartor(
        "reward",
        "--model",
        options.model,
        "--data",
        work / "prefs.jsonl",
        "--max-steps",
        2,
        "--output",
        work / "reward",
    )
    return work / "reward"


def ours(options: Options, reward: Path, work: Path, token_budget: int) -> dict[str, Any]:
    work.mkdir()
    (work / "prompts.txt").write_text("\n".join(prompts()) + "\n")
    run = work / "sartor"
    sizes = ["--batch-size", ROLLOUT["prompts_per_rollout"], "--samples", ROLLOUT["samples"]]
    sizes += [
        "--max-new-tokens",
        ROLLOUT["max_new_tokens"],
        "--ppo-epochs",
        ROLLOUT["ppo_epochs"],
        "--lora-r",
        ROLLOUT["lora_r"],
        "--token-budget",
        token_budget,
        "--learning-rate",
        LEARNING_RATE,
    ]
    small = [
        "--eval-prompts",
        1,
        "--eval-samples",
        1,
        "--max-steps",
        options.rollouts,
        "--eval-every",
        options.rollouts,
    ]
    run_sartor(
        "ppo",
        "--model",
        options.model,
        "--data",
        work / "prompts.txt",
        "--reward",
        reward,
        *sizes,
        *small,
        "--output",
        run,
    )
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": [row["seconds"] for row in rows if row["split"] == "train"],
        "answer_tokens": [row["completions/length"] for row in rows if row["split"] == "train"],
        "peak_memory_gib": summary["cost"]["peak_memory_gib"],
        "networks": summary["networks"],
        "stages": summary["cost"]["stages"],
    }


def theirs(options: Options, reward: Path, work: Path, contender: str, python: str) -> dict[str, Any]:
    model = load(options.model)
    job = {
        **ROLLOUT,
        "contender": contender,
        "model": str(resolve(options.model, convert_gguf)),
        "reward": str(reward),
        "dtype": str(model.core.dtype).removeprefix("torch."),
        "prompts": [
            list(ids)
            for ids in encode_prompts(model.tokenizer, [as_conversation(text, "user") for text in prompts()], 512)
        ],
        "rollouts": options.rollouts,
        "micro_batch": options.micro_batch,
        "learning_rate": LEARNING_RATE,
        "kl_coef": 0.05,
        "output": str(work / contender),
        "result": str(work / f"{contender}.json"),
    }
    del model
    (work / f"{contender}-job.json").write_text(json.dumps(job))
    subprocess.run([python, HERE / "peers" / "trl_ppo.py", work / f"{contender}-job.json"], check=True)
    return json.loads((work / f"{contender}.json").read_text())


def run_sartor(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "sartor", *map(str, words)], check=True)


def usual(result: dict[str, Any]) -> float:
    return statistics.median(result["seconds"][1:])


def told(name: str, result: dict[str, Any]) -> str:
    each = ", ".join(f"{seconds:.1f}" for seconds in result["seconds"])
    return f"{name}: {usual(result):.1f} s an iteration ({each}), peak {result['peak_memory_gib']:.2f} GiB"


def compared(name: str, sartor: dict[str, Any], other: str, peer: dict[str, Any]) -> str:
    speed, memory = usual(peer) / usual(sartor), sartor["peak_memory_gib"] / peer["peak_memory_gib"]
    met = ["met" if good else "MISSED" for good in (speed >= WANTED_SPEED, memory <= WANTED_MEMORY)]
    return (
        f"{name} against {other}: {speed:.1f} times as fast (wanted {WANTED_SPEED:g}: {met[0]}), "
        f"{memory:.2f} of its memory (wanted {WANTED_MEMORY:g}: {met[1]})"
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
