"""``sartor demo``: the whole road, walked once in about ten minutes on two cores.

A real model answers prompts that the project wrote itself, four times each. A stand-in for a person ranks the answers:
the sentiment lexicon VADER, whose taste is known exactly, so that the result can be checked (the controlled experiment
of the DPO paper, arXiv 2305.18290, section 6.1). DPO learns from the rankings, and the model answers prompts that it
never trained on. Every part is what ``sartor sample`` and ``sartor dpo`` do on your own data.
"""

from dataclasses import replace
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

from sartor.config import DemoConfig, DpoConfig
from sartor.console import say
from sartor.data.trees import TokenTree
from sartor.machine import available_memory, resident_memory, set_up_memory
from sartor.model.load import load, load_shape
from sartor.objectives.specs import parse_objective
from sartor.plan.forecast import Place, forecast
from sartor.plan.shape import Shape
from sartor.rewards.vader import vader
from sartor.rollout.local import Sampling
from sartor.train.dpo import BEFORE_THE_RUN, train_dpo
from sartor.train.feedback import collect
from sartor.train.forecast import workload
from sartor.train.preferences import Preferences
from sartor.train.run import RunFolder
from sartor.train.stopwatch import Stopwatch

ANSWERS = 4  # to each prompt: InstructGPT had people rank 4 to 9
TOKENS = 48
TEMPERATURE = 0.7
EPOCHS = 1  # a second one wins more by VADER, but the answers drift from their prompts (docs/log.md, 2026-11-21)
PROMPT_TOKENS = 60  # a built-in prompt in its template, about


def run_demo(config: DemoConfig, command: str = "") -> RunFolder:
    """Run the demo in a new folder, or go on with one that was interrupted.

    Raises:
        UserError: data or a model that the user can mend.
    """
    set_up_memory()
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
        say(
            f"{config.model} answers {len(_prompts('train'))} prompts, the lexicon VADER ranks them in place of a "
            f"person, DPO learns from that,\nand {len(_prompts('eval'))} other prompts show what changed."
        )
        say(f"plan    {minutes(dpo)}")
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
        # A seed of its own: answers that were selected for being rankable must not be the "before" of the comparison.
        sampling = Sampling(TOKENS, TEMPERATURE, seed=config.seed + 1)
        kept = collect(model, _prompts(part), ANSWERS, sampling, vader, f"answers to rank, {part}").rankings()
        run.write_jsonl(name, kept)
        say(f"ranked  {len(kept)} of {len(_prompts(part))} prompts, {ANSWERS} answers each -> {run.path / name}")


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


def minutes(config: DpoConfig) -> str:
    """How long the demo takes on this machine: a few seconds of its own work, times how much of that there is."""
    model, objective = load_shape(config.model), parse_objective(config.loss)
    tree = TokenTree((0,) * PROMPT_TOKENS, ((0,) * TOKENS,) * ANSWERS, tuple(range(ANSWERS)))
    parts = {part: Preferences([tree] * len(_prompts(part)), [*_prompts(part)], []) for part in ("train", "eval")}
    trees = [tree for part in parts.values() for tree in part.trees]
    work = workload(config, objective, parts["train"], parts["eval"], trees)
    assert work.sampled is not None
    collected = work.sampled.answers + ANSWERS * len(trees)
    work = replace(work, sampled=replace(work.sampled, answers=collected))
    place = Place(None, resident_memory(), available_memory())
    found = forecast(
        lambda rank: Shape(model.core.config, model.core.dtype, rank, model.device.type == "cuda"),
        0,
        work,
        place,
        tokenizer=model.tokenizer,
    )
    return f"about {max(1, round(found.seconds / 60))} minutes on this machine" if found.stages else found.basis
