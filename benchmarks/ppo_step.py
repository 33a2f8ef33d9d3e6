"""A PPO iteration beside TRL's: rollout, scores, two passes over it, on the same model, prompts and reward model.

usage: python benchmarks/ppo_step.py [--reward RUN] [--peer PYTHON]

TRL 1.12 is its last release with a PPOTrainer. It lives in an environment of its own (benchmarks/.peers/trl-ppo, made
on first use, or the interpreter that --peer names); its contenders stand in peers/trl_ppo.py. Each contender is a
process of its own, one after the other; the first iteration of each is left out. What the policies write is their own,
of up to 48 tokens. Raw numbers go to benchmarks/results/.
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
from typing import Any

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


def main(options: Options) -> None:
    python = environment(options.peer)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        reward = options.reward or quick_reward(options, work)
        results = {"sartor": ours(options, reward, work)}
        print(told("sartor", results["sartor"]), flush=True)
        for contender in CONTENDERS:
            results[contender] = theirs(options, reward / "model", work, contender, python)
            print(told(contender, results[contender]), flush=True)
    fastest = min(CONTENDERS, key=lambda name: usual(results[name]))
    leanest = min(CONTENDERS, key=lambda name: results[name]["peak_memory_gib"])
    verdicts = [compared(results["sartor"], results[name], name) for name in CONTENDERS]
    verdicts.append(f"the fastest of TRL's is {fastest}, the leanest {leanest}")
    print("\n".join(verdicts))
    record = {"work": ROLLOUT, "results": results, "told": verdicts, "machine": machine()}
    file = HERE / "results" / f"ppo_step-{date.today().isoformat()}.json"
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


def ours(options: Options, reward: Path, work: Path) -> dict[str, Any]:
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
        "learning_rate": 2e-4,
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


def compared(sartor: dict[str, Any], peer: dict[str, Any], name: str) -> str:
    speed, memory = usual(peer) / usual(sartor), sartor["peak_memory_gib"] / peer["peak_memory_gib"]
    met = ["met" if good else "MISSED" for good in (speed >= WANTED_SPEED, memory <= WANTED_MEMORY)]
    return (
        f"against {name}: {speed:.1f} times as fast (wanted {WANTED_SPEED:g}: {met[0]}), "
        f"{memory:.2f} of its memory (wanted {WANTED_MEMORY:g}: {met[1]})"
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
