"""A run from its first step to its last: gradient, log, evaluate, save; killed at any moment, it goes on.

Every algorithm that steps through a fixed set of items trains here. It brings what is its own: the gradient of some
items, and what to measure on those held out.
"""

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch

from sartor.config import TrainingConfig
from sartor.console import progress, say
from sartor.errors import UserError
from sartor.evaluate.statistics import Estimate
from sartor.machine import machine, peak_memory_gib, set_up_memory
from sartor.model.load import LanguageModel
from sartor.report.page import write_report
from sartor.train.loop import (
    SPENT,
    MasterWeights,
    Plan,
    Schedule,
    default_learning_rate,
    load_checkpoint,
    save_checkpoint,
    steps_of,
    train_steps,
)
from sartor.train.run import CHECKPOINT, RunFolder
from sartor.train.stopwatch import Stopwatch
from sartor.train.summary import cost, model_card

Gradient = Callable[[Sequence[int]], dict[str, float]]
Config = TypeVar("Config", bound=TrainingConfig)


@runtime_checkable
class Algorithm(Protocol):
    """What is trained. Its str is for people: how much there is to learn from, and by what."""

    @property
    def unit(self) -> str:
        """What speed counts: pairs, completions, demonstrations."""
        ...

    def steps(self, trainer: "Trainer", first: int) -> Iterator[dict[str, Any]]:
        """Take the steps from ``first`` on; yields the metrics of each."""
        ...

    def note(self, metrics: Mapping[str, float]) -> str:
        """What the progress bar shows of a step."""
        ...

    def measure(self, step: int) -> dict[str, Estimate]:
        """What held-out data say after ``step`` steps; called with 0 before the first."""
        ...

    def in_words(self, measured: Mapping[str, Estimate]) -> str:
        """The same for people, in a line."""
        ...


def begin(config: TrainingConfig, allowed: Collection[str] = ()) -> tuple[RunFolder, bool]:
    """The folder of a run, checked, with memory set up; and whether the run is finished already, which is said.

    Raises:
        UserError: a folder that cannot be taken, or a run that cannot be resumed with these options.
    """
    run = RunFolder(config.output)
    run.check(config, allowed)
    set_up_memory(config.token_budget)
    finished = config.resume and run.finished
    if finished:
        say(f"{run.path} is finished already")
    return run, finished


def resolved(config: Config, model: LanguageModel, items: int, faster: float = 1.0) -> Config:
    """The options with what was left to Sartor filled in: this is what the run records.

    ``faster`` is the default learning rate as a multiple of that of a model whose head is its own.
    """
    steps = steps_of(config.epochs, config.max_steps, items, config.batch_size)
    rate = config.learning_rate or faster * default_learning_rate(model.parameters, lora=config.lora_r > 0)
    return replace(config, learning_rate=rate, eval_every=config.eval_every or math.ceil(steps / 4))


class Trainer:
    """The steps of one run over ``items``; ``labels`` are spread evenly where there are any.

    ``trained`` names the parameters, where they are not all that the model has.
    """

    def __init__(
        self,
        config: TrainingConfig,
        run: RunFolder,
        watch: Stopwatch,
        model: LanguageModel,
        items: int,
        labels: Sequence[Hashable] = (),
        trained: Sequence[tuple[str, torch.nn.Parameter]] | None = None,
    ) -> None:
        self.config, self.run, self.watch, self.model = config, run, watch, model
        steps = steps_of(config.epochs, config.max_steps, items, config.batch_size)
        assert config.learning_rate is not None  # both were filled in by ``resolved``
        assert config.eval_every is not None
        self.every = config.eval_every
        self.plan = Plan(items, config.batch_size, steps, config.seed, labels)
        self.schedule = Schedule(config.learning_rate, steps, round(config.warmup_ratio * steps), config.schedule)
        self.weights = MasterWeights(model.network if trained is None else trained, config.weight_decay)

    def train(self, algorithm: Algorithm) -> dict[str, Estimate]:
        """All steps after the newest checkpoint, with evaluations and checkpoints between them; returns the last one.

        Raises:
            UserError: training diverged.
        """
        config, last = self.config, self.plan.steps
        done = load_checkpoint(self.run, self.weights)
        if done:
            self.watch.add(self.run.read_json(f"{CHECKPOINT}{done}/{SPENT}") or {})
        # Step 0 and the last evaluation belong to no checkpoint: they are made again with what surrounds them.
        self.run.rewind(lambda row: 0 < done >= row["step"] and (row["split"], row["step"]) != ("eval", last))
        going_on = f", going on after step {done}" if done else ""
        say(
            f"train   {algorithm}, {last} steps of {config.batch_size} prompts, "
            f"learning rate {self.schedule.peak:g}{going_on}"
        )
        if done == 0:
            self.evaluate(algorithm, 0)
        with self.watch.stage("train"), progress("training", last) as advance:
            advance(done)
            speeds: list[float] = []
            for metrics in self.watch.timed(algorithm.steps(self, done)):
                step = int(metrics["step"])
                self._check_finite(metrics)
                self.run.log({"split": "train", **metrics})
                speeds.append(metrics["examples"] / metrics["seconds"])
                advance(1, note=f"{algorithm.note(metrics)}  {np.mean(speeds[-20:]):.2f} {algorithm.unit}/s")
                if step % self.every == 0 and step < last:
                    self.evaluate(algorithm, step)
                if step % config.save_every == 0 or step == last:
                    with self.watch.stage("save"):
                        save_checkpoint(self.run, step, self.model, self.weights, self.watch.record())
        return self.evaluate(algorithm, last)

    def steps(self, gradient: Gradient, first: int) -> Iterator[dict[str, Any]]:
        """One optimizer step a batch: ``gradient`` adds that of some items to the weights and returns its metrics."""
        norm = self.config.max_grad_norm
        return train_steps(self.weights, self.plan, self.schedule, gradient, max_grad_norm=norm, first_step=first)

    def evaluate(self, algorithm: Algorithm, step: int) -> dict[str, Estimate]:
        """Measure on held-out data, log and say it."""
        with self.watch.stage("evaluate"), torch.no_grad():
            measured = algorithm.measure(step)
        self.run.log({"step": step, "split": "eval", "epoch": step / self.plan.steps_per_epoch, **measured})
        if step:
            say(f"step {step}: {algorithm.in_words(measured)}")
        return measured

    def _check_finite(self, metrics: Mapping[str, float]) -> None:
        if not all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm")):
            raise UserError(
                f"training diverged at step {metrics['step']}: loss {metrics['loss']}, gradient norm "
                f"{metrics['grad_norm']}; lower --learning-rate (it was {self.schedule.peak:g})"
            )

    def finish(self, summary: Mapping[str, Any], unit: str) -> None:
        """Write the model, the summary with what the run cost, the model card and the report.

        ``summary`` is the algorithm's part: verb, title, headline, data, and what its report shows.
        """
        run = self.run
        with self.watch.stage("save"):
            self.model.save(run.path / "model")
        training = [row for row in run.read_jsonl("metrics.jsonl") if row["split"] == "train"]
        whole = {
            **summary,
            "forecast": run.read_json("forecast.json"),
            "cost": cost(self.watch, training, peak_memory_gib(), unit),
            "machine": {**machine(), "dtype": str(self.model.core.dtype).removeprefix("torch.")},
            "command": run.read_json("identity.json")["command"],
        }
        run.write_text("README.md", model_card(self.config, whole))
        run.write_json("summary.json", whole)
        write_report(run.path)
