"""``sartor compare``: the controlled experiment of the DPO paper (arXiv 2305.18290, section 6.1), with what it cost.

Every arm starts from the same model and has the same prompts; feedback is the same for DPO and for the reward model;
the true score is known, so that nobody has to be asked who won. Different from the paper: three seeds and intervals in
place of one run; PPO by this project's own recipe; the cost of every point, which the paper does not tell. Each arm
runs in a process of its own, so that its peak memory is its own.
"""

import ctypes
import hashlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sartor import plugins
from sartor.compare.arms import DPO, PPO, REWARD, Arm, arms_of
from sartor.compare.results import results
from sartor.config import CompareConfig
from sartor.config.compare import MATCHED, SIZES
from sartor.console import duration, say
from sartor.errors import UserError
from sartor.machine import machine, release_freed_memory, set_up_memory
from sartor.model.load import fingerprint, load
from sartor.report.comparison import write_comparison
from sartor.rewards.scoring import as_rows, score_texts
from sartor.rollout.command import read_prompts
from sartor.rollout.local import Sampling
from sartor.tasks.task import Task, task_named
from sartor.train.feedback import collect, split_prompts
from sartor.train.run import RunFolder
from sartor.types import Text

TOKENS = 48  # of an answer, where a task of the user's own does not say
PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # looked up here: between fork and exec little may be done


def run_compare(config: CompareConfig, command: str = "") -> str:
    """Run the experiment, or go on with it; returns what the user reads last.

    Raises:
        UserError: input that the user can mend, or an arm that ended with an error; what is there is kept.
    """
    run = RunFolder(config.output)
    run.check(config, may_change=("seeds",))
    task = _task(config)
    scorer = plugins.resolve("rewards", task.score)
    score_texts(scorer, ["Is it well?"], ["It is."])  # a scorer that fails should not wait for the first model
    run.open(config, _identity(config, task), command)
    set_up_memory()
    say(f"compare {_in_words(config, task)}")
    finished: list[list[Arm]] = []
    for seed in range(config.seeds):
        began = time.perf_counter()
        folder = config.output / f"seed-{seed}"
        _feedback(config, task, folder, seed)
        feedback = RunFolder(folder).read_json("feedback.json")
        arms = arms_of(config, task, folder, seed, feedback["rankings"], feedback["parameters"])
        for number, arm in enumerate(arms, start=1):
            _run(arm, f"seed {seed + 1} of {config.seeds}, arm {number} of {len(arms)}: {arm.name}")
        finished.append(arms)
        found = results(config, task, finished)
        about = {"machine": machine(), "command": run.read_json("identity.json")["command"]}
        run.write_json("compare.json", {**found, **about})
        write_comparison(run.path)
        left = (config.seeds - seed - 1) * (time.perf_counter() - began)
        and_left = f", about {duration(left)} left" if left else ""
        say(f"\nseeds   {seed + 1} of {config.seeds} -> {run.path / 'report.html'}{and_left}")
    return _told(run)


def _identity(config: CompareConfig, task: Task) -> dict[str, str]:
    """What all seeds have to share, however late they come: weights, prompts, truth, and how the arms learn."""
    file = Path(task.score.partition(".py:")[0] + ".py")
    source = file.read_bytes() if file.is_file() else task.score.encode()
    prompts = repr([as_rows(prompt) for prompt in (*task.train, *task.held_out)])
    recipe = repr((SIZES[config.size], DPO, REWARD, PPO, MATCHED))
    return {
        "model": fingerprint(load(config.model)),
        "recipe of the arms": hashlib.blake2b(recipe.encode(), digest_size=16).hexdigest(),
        "prompts": hashlib.blake2b(prompts.encode(), digest_size=16).hexdigest(),
        "scorer": hashlib.blake2b(source, digest_size=16).hexdigest(),
    }


def _in_words(config: CompareConfig, task: Task) -> str:
    size = SIZES[config.size]
    betas = " and ".join(f"{beta:g}" for beta in size.betas)
    return (
        f"on {task.name}, by {task.score}: DPO at β {betas}; a reward model with PPO; PPO on the truth; best of "
        f"{size.best_of}\n        {len(task.train)} prompts to train on, {len(task.held_out)} to measure on, seeds: "
        f"{config.seeds}"
    )


def _task(config: CompareConfig) -> Task:
    if config.prompts is None or config.score is None:
        task = task_named(config.task)
    else:
        train, held_out = split_prompts(read_prompts(config.prompts), share=1 / 3, seed=0)
        task = Task(Path(config.prompts).stem, train, held_out, config.score, TOKENS)
    size = SIZES[config.size]
    return replace(task, train=task.train[: size.prompts], held_out=task.held_out[: size.held_out])


def _feedback(config: CompareConfig, task: Task, folder: Path, seed: int) -> None:
    """What all arms of a seed share: ranked answers, prompts, and answers of the start to choose the best from."""
    here = RunFolder(folder)
    if (folder / "start.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    model, scorer = load(config.model), plugins.resolve("rewards", task.score)
    tokens = config.max_new_tokens or task.max_new_tokens
    kept: list[Text] = []
    for part, prompts, name in (("train", task.train, "rankings"), ("held out", task.held_out, "rankings_held_out")):
        started = time.perf_counter()
        label = f"answers to rank, {part}"
        answers = collect(model, prompts, config.answers, Sampling(tokens, seed=2 * seed + 1), scorer, label)
        rows = answers.rankings()
        if not rows:
            raise UserError(
                f"--model {config.model}: {task.score} scores its answers to each prompt alike ({part}): there is "
                "nothing to prefer; more --answers, longer ones, or another model"
            )
        here.write_jsonl(f"{name}.jsonl", rows)
        kept = [row["prompt"] for row in rows]
        seconds = time.perf_counter() - started
        if part == "train":
            spent = {
                "seconds": seconds,
                "tokens": sum(map(sum, answers.lengths)),
                "rankings": len(rows),
                "parameters": model.parameters,
            }
            here.write_json("feedback.json", spent)
            here.write_jsonl("prompts.jsonl", [{"prompt": as_rows(prompt)} for prompt in answers.prompts])
        say(f"ranked  {len(rows)} of {len(prompts)} prompts ({part}) by {task.score} in {duration(seconds)}")
    # All arms are measured on the held-out prompts that have a ranking, which DPO's own evaluation needs.
    here.write_jsonl("prompts_held_out.jsonl", [{"prompt": prompt} for prompt in kept])
    best_of = SIZES[config.size].best_of
    answers = collect(
        model,
        read_prompts(str(folder / "prompts_held_out.jsonl")),
        best_of,
        Sampling(tokens, seed=2 * seed),
        scorer,
        "answers of the start",
    )
    here.write_jsonl("start.jsonl", answers.rows())
    del model
    release_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _run(arm: Arm, title: str) -> None:
    """Run an arm's command in a process of its own, or go on with what is there.

    Raises:
        UserError: it ended with an error, which it told itself.
    """
    if RunFolder(arm.folder).finished:
        return
    say(f"\n{title}")
    command = [*arm.command, *(["--resume"] if RunFolder(arm.folder).exists else [])]
    say(shlex.join(["sartor", *command]))
    code = _call(command)
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        raise UserError(f"arm {arm.name} ended with exit code {code}: see above for why; --resume tries it again")


def _call(command: Sequence[str]) -> int:
    return subprocess.run(
        [sys.executable, "-m", "sartor", *command], preexec_fn=_die_with_parent, check=False
    ).returncode


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, however that ends: two must not write into one folder."""
    if PRCTL:
        PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL)


def _told(run: RunFolder) -> str:
    found = json.loads((run.path / "compare.json").read_text(encoding="utf-8"))
    return "\n" + "\n".join(found["headline"]) + f"\n\nreport  {run.path / 'report.html'}"
