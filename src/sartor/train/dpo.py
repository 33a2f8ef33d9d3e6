"""Preference optimisation without a reward model: from what people said to a better model, with evidence.

Follows Rafailov et al. 2023 (arXiv 2305.18290), with the objective passed in, so that every loss of the family trains
here, and yours. Different from the paper's own code:

1. AdamW in place of RMSprop, cosine schedule in place of constant: what is used today.
2. The reference is not kept in memory: its per-token log-probs are computed once and cached by content. Objectives
   that do not depend on it have none computed; those that compare whole distributions (TDPO) need it beside the policy.
3. A ranking of K answers is one tree with all its pairs, so its prompt and its answers are computed once.
4. Dropout is off, as in TRL: policy and reference differ by their weights alone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sartor import plugins
from sartor.config import DpoConfig
from sartor.console import progress, say
from sartor.data.trees import TokenTree, split_by_budget
from sartor.errors import UserError
from sartor.evaluate.answers import Answers, compare
from sartor.evaluate.preferences import HeldOut
from sartor.evaluate.statistics import Estimate
from sartor.machine import machine, peak_memory_gib, set_up_memory
from sartor.model.checkpointing import checkpoint_layers, layers_of
from sartor.model.forward import check
from sartor.model.load import LanguageModel, fingerprint, load
from sartor.model.reference import folder_of, not_cached
from sartor.objectives.contract import Loss
from sartor.objectives.logps import TreeLogps
from sartor.objectives.objective import Objective
from sartor.objectives.shape import shape
from sartor.objectives.specs import name_of, parse_objective
from sartor.plan.words import one_line, warning
from sartor.report.page import write_report
from sartor.rewards.scoring import score_texts
from sartor.train.forecast import forecast_run
from sartor.train.gradient import batch_gradient
from sartor.train.loop import (
    MasterWeights,
    Plan,
    Schedule,
    default_learning_rate,
    load_checkpoint,
    save_checkpoint,
    steps_of,
    train_steps,
)
from sartor.train.preferences import Preferences, digest, encode, read_preferences, with_reference
from sartor.train.run import RunFolder
from sartor.train.showcase import Showcase
from sartor.train.stopwatch import Stopwatch
from sartor.train.summary import cost, cut_answers, headline, model_card, percent, side_by_side

BEFORE_THE_RUN = ("demo.json", "rankings.jsonl", "rankings_held_out.jsonl")  # what the demo collects into the folder


def train_dpo(
    config: DpoConfig,
    loss: Loss | Sequence[str | Loss] | None = None,
    command: str = "",
    title: str | None = None,
    watch: Stopwatch | None = None,
) -> RunFolder:
    """Run ``sartor dpo`` from data to report.

    Args:
        config: the options of the command line.
        loss: an objective in place of ``config.loss``: a function, or a mixture of names and functions.
        command: what to type to repeat this, for the report.
        title: the report's; by default what was fitted to what.
        watch: the clock of work that came before and belongs to the run.

    Raises:
        UserError: input that the user can mend; nothing that was written is lost.
    """
    terms = config.loss if loss is None else loss if isinstance(loss, Sequence) else [loss]
    config = replace(config, loss=tuple(term if isinstance(term, str) else name_of(term) for term in terms))
    run, watch = RunFolder(config.output), watch or Stopwatch()
    run.check(config, allowed=BEFORE_THE_RUN)
    set_up_memory(config.token_budget)
    if config.resume and run.finished:
        say(f"{run.path} is finished already")
        return run
    objective = parse_objective(terms, config.beta, config.wpo, config.ld_alpha)
    scorer = plugins.resolve("rewards", config.score) if config.score else None
    if scorer:
        score_texts(scorer, ["Is it well?"], ["It is."])  # a scorer that fails should not wait for the training to end
    with watch.stage("load"):
        rows = read_preferences(config, objective)
        model = load(config.model, config.dtype, config.lora_r, config.lora_alpha, config.seed)
        say(f"model   {model}")
        training, held_out = (encode(model, part, config, objective) for part in rows)
        reason = check(model, max([*training.trees, *held_out.trees], key=lambda tree: tree.size))
        if reason:
            say(f"note    prompts are repeated for each answer, which is slower: {reason}")
        for note in (*notes_of(training, held_out), *shortcomings(objective, training)):
            say(f"note    {note}")
        config = resolved(config, model, len(training.trees))
        weights = fingerprint(model)
        identity = {"model": weights, "data": digest(training, held_out), "loss": objective.digest()}
        run.open(config, identity, command)
        if model.is_adapted and model.needs_base:
            model.keep_base(run.path / "base")
    # The held-out start is measured whatever the objective: it is what every result is told against.
    parts = (training, held_out) if objective.needs_reference else (held_out,)
    kept, cache = run.path / "reference.safetensors", folder_of(weights)
    with watch.stage("forecast"):
        fresh = [] if kept.is_file() else not_cached(cache, [tree for part in parts for tree in part.trees])
        announce(run, config, model, objective, training, held_out, fresh, watch)
    with watch.stage("reference"):
        *with_training, held_out = with_reference(model, parts, config.token_budget, kept, cache)
        training = with_training[0] if with_training else training
    showcase = Showcase(model, held_out.prompts, config, scorer)
    dpo = Dpo(config, run, watch, model, objective, training, held_out, showcase)
    dpo.train()
    how = "" if str(objective) == "dpo" else f" with {objective}"
    dpo.finish(title or f"{config.model} fitted to {Path(config.data).name}{how}")
    return run


def announce(
    run: RunFolder,
    config: DpoConfig,
    model: LanguageModel,
    objective: Objective,
    training: Preferences,
    held_out: Preferences,
    fresh: Sequence[TokenTree],
    watch: Stopwatch,
) -> None:
    """Say what the run will take, keep it for the end, and checkpoint as many layers as memory asks for."""
    done = next((step for step, _ in run.checkpoints()), 0)
    found = forecast_run(
        config, model, objective, training, held_out, fresh, done=done, elapsed=watch.total if done == 0 else 0.0
    )
    if isinstance(found, str):
        say(f"note    no forecast: {found}")
        checkpoint_layers(model, len(layers_of(model)) if config.checkpointing == "always" else 0)
        return
    checkpoint_layers(model, found.checkpointed)
    say(f"plan    {'what is left, ' * (done > 0)}{one_line(found)}")
    if wanting := warning(found):
        say(f"note    {wanting}")
    if run.read_json("forecast.json") is None and done == 0:
        run.write_json("forecast.json", found.record())


def notes_of(training: Preferences, held_out: Preferences) -> list[str]:
    """What was done to either part."""
    notes = [*training.notes, *(f"held out: {note}" for note in held_out.notes if note not in training.notes)]
    if held_out.unit == "completions":
        notes.append("held-out accuracy and margins are those of every good completion against every bad one")
    return notes


def shortcomings(objective: Objective, data: Preferences) -> Iterator[str]:
    """What a user should know of an objective before it trains for hours."""
    for term in objective.terms:
        slope = term.weight * shape(term).slope
        if slope > 0:
            yield f"{term.name} lowers the margin of chosen over rejected where it is 0: is its sign right?"
        if "strength" in term.traits.depends_on and all(tree.strength is None for tree in data.trees):
            yield f"{term.name} learns from strengths, and no row has one (columns strength or margin)"
        if "tie" in term.traits.depends_on and not any(tree.ties for tree in data.trees):
            yield f"{term.name} learns from ties, and no row is one (column tie: true)"


def resolved(config: DpoConfig, model: LanguageModel, trees: int) -> DpoConfig:
    """The options with what was left to Sartor filled in: this is what the run records."""
    steps = steps_of(config.epochs, config.max_steps, trees, config.batch_size)
    rate = config.learning_rate or default_learning_rate(model.parameters, lora=config.lora_r > 0)
    return replace(config, learning_rate=rate, eval_every=config.eval_every or math.ceil(steps / 4))


class Dpo:
    """One run: what it learns from, and what is measured before, during and after."""

    def __init__(
        self,
        config: DpoConfig,
        run: RunFolder,
        watch: Stopwatch,
        model: LanguageModel,
        objective: Objective,
        training: Preferences,
        held_out: Preferences,
        showcase: Showcase,
    ) -> None:
        self.config, self.run, self.watch, self.model, self.objective = config, run, watch, model, objective
        self.training, self.held_out, self.showcase = training, held_out, showcase
        steps = steps_of(config.epochs, config.max_steps, len(training.trees), config.batch_size)
        peak, every = config.learning_rate, config.eval_every
        assert peak is not None  # both were filled in by ``resolved``
        assert every is not None
        self.plan = Plan(len(training.trees), config.batch_size, steps, config.seed, training.labels)
        self.schedule = Schedule(peak, steps, round(config.warmup_ratio * steps), config.schedule)
        self.every = every
        self.weights = MasterWeights(model.network, config.weight_decay)
        self.rival = self._rival() if objective.needs_kl else None

    def _rival(self) -> LanguageModel:
        """The reference model itself: the frozen weights under an adapter, else a second copy."""
        if self.model.is_adapted:
            return self.model
        rival = load(str(self.model.path), self.config.dtype)
        rival.network.requires_grad_(False)
        rival.shares_prompts = self.model.shares_prompts
        return rival

    def gradient(self, items: Sequence[int]) -> dict[str, float]:
        """Add the gradient of one optimizer batch to the weights; returns its metrics."""
        return batch_gradient(self.model, self.objective, self.training, items, self.config.token_budget, self.rival)

    def train(self) -> None:
        """All steps after the newest checkpoint, with evaluations and checkpoints between them."""
        config, last = self.config, self.plan.steps
        done = load_checkpoint(self.run, self.weights)
        if done:
            self.watch.add(self.run.read_json("elapsed.json") or {})
        # Step 0 and the last evaluation belong to no checkpoint: they are made again with what surrounds them.
        self.run.rewind(lambda row: 0 < done >= row["step"] and (row["split"], row["step"]) != ("eval", last))
        going_on = f", going on after step {done}" if done else ""
        say(
            f"train   {self.training.size}, {self.objective}, {last} steps of {config.batch_size} prompts, "
            f"learning rate {self.schedule.peak:g}{going_on}"
        )
        if done == 0:
            self.start()
        steps = train_steps(
            self.weights,
            self.plan,
            self.schedule,
            self.gradient,
            max_grad_norm=config.max_grad_norm,
            first_step=done,
        )
        with self.watch.stage("train"), progress("training", last) as advance:
            advance(done)
            speeds: list[float] = []
            for metrics in self.watch.timed(steps):
                step = int(metrics["step"])
                self._check_finite(metrics)
                self.run.log({"split": "train", **metrics})
                speeds.append(metrics["examples"] / metrics["seconds"])
                advance(1, note=f"loss {metrics['loss']:.3f}  {np.mean(speeds[-20:]):.2f} {self.training.unit}/s")
                if step % self.every == 0 and step < last:
                    self.evaluate(step)
                if step % config.save_every == 0 or step == last:
                    with self.watch.stage("save"):
                        save_checkpoint(self.run, step, self.model, self.weights)
                        self.run.write_json("elapsed.json", self.watch.seconds)

    def _check_finite(self, metrics: Mapping[str, float]) -> None:
        if not all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm")):
            raise UserError(
                f"training diverged at step {metrics['step']}: loss {metrics['loss']}, gradient norm "
                f"{metrics['grad_norm']}; lower --learning-rate (it was {self.schedule.peak:g})"
            )

    def start(self) -> None:
        """What is known before the first step: the metrics of step 0, and the answers of the model as it came."""
        self.evaluate(0)
        known = Answers.from_rows(self.run.read_jsonl("samples_before.jsonl"))
        if known.prompts != self.showcase.prompts:
            with self.watch.stage("sample"):
                self.run.write_jsonl("samples_before.jsonl", self.showcase.answers("answers before").rows())

    def evaluate(self, step: int) -> dict[str, Estimate]:
        """Held-out metrics and KL to the reference. At step 0 the policy is the reference: accuracy 50 %, KL 0."""
        with self.watch.stage("evaluate"), torch.no_grad():
            groups = list(split_by_budget(self.held_out.sizes(self.model), self.config.token_budget))
            parts = [
                self.held_out.logps(self.model, group, self.objective, self.rival, at_start=step == 0)
                for group in groups
            ]
            prompts = [self.held_out.prompt_numbers[i] for group in groups for i in group]
            found = HeldOut(TreeLogps.cat(parts), prompts, self.objective)
            estimates = found.estimates()
            if self.showcase.prompts:
                estimates["objective/kl"] = self.showcase.kl(step)
        self.run.log({"step": step, "split": "eval", "epoch": step / self.plan.steps_per_epoch, **estimates})
        self.run.write_json("margins.json", {"step": step, "margins": found.margins()})
        if step:
            kl = f", KL {estimates['objective/kl']} nats" if self.showcase.prompts else ""
            say(f"step {step}: held-out accuracy {percent(estimates['rewards/accuracies'])}{kl}")
        return estimates

    def finish(self, title: str) -> None:
        """Last evaluation, answers after, the model itself, summary and report."""
        config, run = self.config, self.run
        estimates = self.evaluate(self.plan.steps)
        comparison, cut = None, []
        if self.showcase.prompts:
            with self.watch.stage("sample"):
                after = self.showcase.answers("answers after")
            before = Answers.from_rows(run.read_jsonl("samples_before.jsonl"))
            comparison = {**compare(before, after), "kl": estimates["objective/kl"]}
            run.write_jsonl("samples.jsonl", side_by_side(before, after))
            cut = cut_answers(before, after, config.max_new_tokens)
        with self.watch.stage("save"):
            self.model.save(run.path / "model")
        training = [row for row in run.read_jsonl("metrics.jsonl") if row["split"] == "train"]
        summary = {
            "verb": "dpo",
            "title": title,
            "headline": headline(estimates, self.held_out.size, comparison, config.score),
            "objective": str(self.objective),
            "beta": self.objective.beta,
            "scorer": config.score,
            "comparison": comparison,
            "data": {
                "train": f"{self.training.size} in {len(self.training.trees)} rows of {config.data}",
                "eval": f"{self.held_out.size} in {len(self.held_out.trees)} rows of prompts never trained on",
                "notes": [*notes_of(self.training, self.held_out), *shortcomings(self.objective, self.training), *cut],
            },
            "forecast": run.read_json("forecast.json"),
            "cost": cost(self.watch.seconds, training, peak_memory_gib(), self.training.unit),
            "machine": {**machine(), "dtype": str(self.model.core.dtype).removeprefix("torch.")},
            "command": run.read_json("identity.json")["command"],
        }
        run.write_text("README.md", model_card(config, summary))
        run.write_json("summary.json", summary)
        write_report(run.path)
