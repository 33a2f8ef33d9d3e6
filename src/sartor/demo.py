"""``sartor demo``: the whole road, walked once in about ten minutes on two cores.

A real model answers prompts that the project wrote itself, four times each. A stand-in for a person ranks the answers:
the sentiment lexicon VADER, whose taste is known exactly, so that the result can be checked (the controlled experiment
of the DPO paper, arXiv 2305.18290, section 6.1). DPO learns from the rankings, and the model answers prompts that it
never trained on. Every part is what ``sartor sample`` and ``sartor dpo`` do on your own data.
"""

import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

import torch

from sartor.config import DemoConfig, DpoConfig
from sartor.console import progress, say
from sartor.data.chat import as_conversation, encode_prompts
from sartor.evaluate.answers import answer
from sartor.machine import keep_freed_memory
from sartor.model.load import load, pick_device, pick_dtype
from sartor.rewards.vader import vader
from sartor.rollout.local import Sampling
from sartor.train.dpo import BEFORE_THE_RUN, train_dpo
from sartor.train.run import RunFolder
from sartor.train.stopwatch import Stopwatch
from sartor.types import Text

ANSWERS = 4  # to each prompt: InstructGPT had people rank 4 to 9
TOKENS = 48
TEMPERATURE = 0.7
EPOCHS = 1  # a second one wins more by VADER, but the answers drift from their prompts (docs/log.md, 2026-11-21)
# What no faster matrix product would save, and the matrix products: a guess that fits the one machine it was seen on,
# two cores without AMX (6 minutes said, 6.2 taken). A forecast from the model's own shapes takes its place later.
FIXED_SECONDS, FLOPS = 120, 1e14


def run_demo(config: DemoConfig, command: str = "") -> RunFolder:
    """Run the demo in a new folder, or go on with one that was interrupted.

    Raises:
        UserError: data or a model that the user can mend.
    """
    keep_freed_memory()
    watch = Stopwatch()
    run = RunFolder(config.output or _next_folder(Path("runs/demo"), config))
    if config.data is not None:
        say(f"Fits {config.model} to {config.data} and shows it before and after, in about ten minutes on two cores.")
        dpo = DpoConfig(
            model=config.model,
            data=config.data,
            output=run.path,
            seed=config.seed,
            limit=400,
            eval_fraction=0.15,
            eval_limit=120,
            max_length=512,
            eval_prompts=16,
            max_new_tokens=TOKENS,
        )
    else:
        say(
            f"{config.model} answers {len(_prompts('train'))} prompts, the lexicon VADER ranks them in place of a "
            f"person, DPO learns from that,\nand {len(_prompts('eval'))} other prompts show what changed: about "
            f"{minutes()} minutes on this machine."
        )
        dpo = DpoConfig(
            model=config.model,
            data=str(run.path / "rankings.jsonl"),
            eval_data=str(run.path / "rankings_held_out.jsonl"),
            output=run.path,
            seed=config.seed,
            learning_rate=5e-5,
            epochs=EPOCHS,
            eval_prompts=len(_prompts("eval")),
            eval_samples=ANSWERS,
            max_new_tokens=TOKENS,
            temperature=TEMPERATURE,
            score="vader",
        )
    dpo.resume = run.exists
    run.check(dpo, allowed=BEFORE_THE_RUN)
    run.path.mkdir(parents=True, exist_ok=True)
    run.write_json("demo.json", _kind(config))
    if config.data is None:
        with watch.stage("collect feedback"):
            _collect(config, run)
    taste = "the taste of VADER, a sentiment lexicon in place of a person" if config.data is None else config.data
    return train_dpo(dpo, command=command, title=f"{config.model} fitted to {taste}", watch=watch)


def _collect(config: DemoConfig, run: RunFolder) -> None:
    """Sample and rank: the feedback that people would give."""
    files_of = {"train": "rankings.jsonl", "eval": "rankings_held_out.jsonl"}
    if all((run.path / name).is_file() for name in files_of.values()):
        return
    model = load(config.model)
    for part, name in files_of.items():
        prompts: list[Text] = [as_conversation(prompt, "user") for prompt in _prompts(part)]
        ids = encode_prompts(model.tokenizer, prompts, max_length=512)
        # A seed of its own: answers that were selected for being rankable must not be the "before" of the comparison.
        sampling = Sampling(TOKENS, TEMPERATURE, seed=config.seed + 1)
        with progress(f"answers to rank, {part}", len(prompts) * ANSWERS) as advance:
            answers = answer(model, prompts, ids, ANSWERS, sampling, vader, advance)
        kept = [row for row in answers.rows() if len(set(row["scores"])) > 1]  # four equals rank nothing
        run.write_jsonl(name, [_ranking(row) for row in kept])
        say(f"ranked  {len(kept)} of {len(prompts)} prompts, {ANSWERS} answers each -> {run.path / name}")


def _ranking(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the format ``prompt, completions, ranks``: 1 is best, equal scores share a rank."""
    places = sorted(set(row["scores"]), reverse=True)
    ranks = [places.index(score) + 1 for score in row["scores"]]
    return {"prompt": row["prompt"], "completions": row["texts"], "ranks": ranks}


def _prompts(part: str) -> list[str]:
    return (files("sartor.data") / "prompts" / f"sentiment_{part}.txt").read_text(encoding="utf-8").splitlines()


def _next_folder(base: Path, config: DemoConfig) -> Path:
    """``base``, or ``base-2``, ``base-3`` … : the first that is free, or holds an unfinished demo of the same kind."""
    for i in count(1):
        path = base if i == 1 else base.with_name(f"{base.name}-{i}")
        if not path.exists():
            return path
        begun = RunFolder(path)
        if not begun.finished and begun.read_json("demo.json") == _kind(config):
            return path
    raise AssertionError("there is always a next number")


def _kind(config: DemoConfig) -> dict[str, Any]:
    return {"model": config.model, "data": config.data, "seed": config.seed}


def minutes() -> int:
    """How long the demo takes on this machine, from the speed of one matrix product of the model's own shape."""
    dtype = pick_dtype("auto", pick_device())
    rows, weight = torch.randn(2048, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    best = min(_seconds(lambda: rows @ weight.T) for _ in range(8))
    flops_per_second = 2 * rows.numel() * len(weight) / best
    return max(1, round((FIXED_SECONDS + FLOPS / flops_per_second) / 60))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
