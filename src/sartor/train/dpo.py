"""Preference optimisation without a reward model: from what people said to a better model, with evidence.

Follows Rafailov et al. 2023 (arXiv 2305.18290), with the objective passed in, so that every loss of the family trains
here, and yours. Different from the paper's own code:

1. AdamW in place of RMSprop, cosine schedule in place of constant: what is used today.
2. The reference is not kept in memory: its per-token log-probs are computed once and cached by content. Objectives
   that do not depend on it have none computed; those that compare whole distributions (TDPO) need it beside the policy.
3. A ranking of K answers is one tree with all its pairs, so its prompt and its answers are computed once.
4. Dropout is off, as in TRL: policy and reference differ by their weights alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sartor import plugins
from sartor.config import DpoConfig
from sartor.console import say
from sartor.data.trees import split_by_budget
from sartor.evaluate.preferences import HeldOut
from sartor.evaluate.statistics import Estimate
from sartor.model.forward import check
from sartor.model.load import LanguageModel, fingerprint, load
from sartor.model.reference import folder_of, not_cached
from sartor.objectives.contract import Loss
from sartor.objectives.logps import TreeLogps
from sartor.objectives.objective import Objective
from sartor.objectives.shape import shape
from sartor.objectives.specs import name_of, parse_objective
from sartor.rewards.scoring import score_texts
from sartor.train.forecast import announce, workload
from sartor.train.gradient import batch_gradient
from sartor.train.preferences import Preferences, digest, encode, read_preferences, with_reference
from sartor.train.run import RunFolder
from sartor.train.showcase import Showcase
from sartor.train.stopwatch import Stopwatch
from sartor.train.summary import headline, percent
from sartor.train.trainer import Trainer, begin, resolved

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
    if config.online:
        from sartor.train.online import train_online

        return train_online(config, command)
    terms = config.loss if loss is None else loss if isinstance(loss, Sequence) else [loss]
    config = replace(config, loss=tuple(term if isinstance(term, str) else name_of(term) for term in terms))
    run, finished = begin(config, allowed=BEFORE_THE_RUN)
    if finished:
        return run
    watch = watch or Stopwatch()
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
        model.keep_base_if_needed(run.path / "base")
    # The held-out start is measured whatever the objective: it is what every result is told against.
    parts = (training, held_out) if objective.needs_reference else (held_out,)
    kept, cache = run.path / "reference.safetensors", run.path / "reference"
    if config.reference_cache:
        cache = folder_of(weights)
    with watch.stage("forecast"):
        fresh = [] if kept.is_file() else not_cached(cache, [tree for part in parts for tree in part.trees])
        work = partial(workload, config, objective, training, held_out, fresh, model.context)
        announce(run, watch, config, model, work, objective)
    if objective.needs_reference:
        with watch.stage("reference"):
            training = with_reference(model, training, config.token_budget, kept, cache)
    with watch.stage("evaluate"):
        held_out = with_reference(model, held_out, config.token_budget, kept.with_stem("reference_held_out"), cache)
    showcase = Showcase(model, held_out.prompts, config, scorer)
    dpo = Dpo(config, run, watch, model, objective, training, held_out, showcase)
    trainer = Trainer(config, run, watch, model, len(training.trees), training.labels)
    how = "" if str(objective) == "dpo" else f" with {objective}"
    dpo.finish(trainer, trainer.train(dpo), title or f"{config.model} fitted to {Path(config.data).name}{how}")
    return run


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
        self.rival = self._rival() if objective.needs_kl else None

    def __str__(self) -> str:
        return f"{self.training.size}, {self.objective}"

    def _rival(self) -> LanguageModel:
        """The reference model itself: the frozen weights under an adapter, else a second copy."""
        if self.model.is_adapted:
            return self.model
        rival = load(str(self.model.path), self.config.dtype)
        rival.network.requires_grad_(False)
        rival.shares_prompts = self.model.shares_prompts
        return rival

    @property
    def unit(self) -> str:
        """What speed counts: pairs, or judged completions."""
        return self.training.unit

    def steps(self, trainer: Trainer, first: int) -> Iterator[dict[str, Any]]:
        """One optimizer step a batch."""
        return trainer.steps(self.gradient, first)

    def gradient(self, items: Sequence[int]) -> dict[str, float]:
        """Add the gradient of one optimizer batch to the weights; returns its metrics."""
        return batch_gradient(self.model, self.objective, self.training, items, self.config.token_budget, self.rival)

    def note(self, metrics: Mapping[str, float]) -> str:
        """What the progress bar shows of a step."""
        return f"loss {metrics['loss']:.3f}"

    def measure(self, step: int) -> dict[str, Estimate]:
        """Held-out metrics and KL to the reference. At step 0 the policy is the reference: accuracy 50 %, KL 0."""
        groups = list(split_by_budget(self.held_out.sizes(self.model), self.config.token_budget))
        parts = [
            self.held_out.logps(self.model, group, self.objective, self.rival, at_start=step == 0) for group in groups
        ]
        prompts = [self.held_out.prompt_numbers[i] for group in groups for i in group]
        found = HeldOut(TreeLogps.cat(parts), prompts, self.objective)
        estimates = found.estimates()
        if self.showcase.prompts:
            estimates |= self.showcase.measure(self.run, step)
        if step == 0:
            self.showcase.ask_before(self.run)
        self.run.write_json("margins.json", {"step": step, "margins": found.margins()})
        return estimates

    def in_words(self, measured: Mapping[str, Estimate]) -> str:
        """Accuracy, and score and KL where they were measured."""
        score = f", score {measured['objective/scores']}" if "objective/scores" in measured else ""
        kl = f", KL {measured['objective/kl']} nats" if "objective/kl" in measured else ""
        return f"held-out accuracy {percent(measured['rewards/accuracies'])}{score}{kl}"

    def finish(self, trainer: Trainer, estimates: Mapping[str, Estimate], title: str) -> None:
        """Answers after, and all that is left behind."""
        config = self.config
        with self.watch.stage("evaluate"):
            comparison, cut = self.showcase.ask_after(self.run)
        if comparison:
            comparison["kl"] = estimates["objective/kl"]
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
                "eval": f"{self.held_out.size} in {len(self.held_out.trees)} rows of held-out prompts",
                "notes": [*notes_of(self.training, self.held_out), *shortcomings(self.objective, self.training), *cut],
            },
        }
        trainer.finish(summary, self.unit)
