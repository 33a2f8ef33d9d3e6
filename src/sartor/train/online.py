"""Online preference optimisation: the model answers, a reward ranks its answers, it learns from the ranking, and again.

Direct preference optimisation on the policy's own answers (Guo et al. 2024, arXiv 2402.04792), where a reward stands
for the annotator: the bridge between learning from a fixed set of comparisons and reinforcement learning. Different
from the paper: K answers and all their pairs instead of two, and any pairwise or listwise objective. The reference
stays what the policy was at the start.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor

from sartor.config import DpoConfig
from sartor.data.trees import TokenTree, split_by_budget
from sartor.errors import UserError
from sartor.evaluate.answers import ranks_of
from sartor.evaluate.statistics import Estimate
from sartor.model.critic import trained
from sartor.model.reference import score_trees
from sartor.objectives.objective import Objective
from sartor.objectives.specs import parse_objective
from sartor.train.forecast import announce, rollouts
from sartor.train.gradient import batch_gradient
from sartor.train.held_out import HeldOutAnswers
from sartor.train.preferences import Preferences
from sartor.train.rollout import Stage, draw, score_all, set_stage
from sartor.train.run import RunFolder
from sartor.train.stopwatch import Stopwatch
from sartor.train.trainer import Trainer, begin, resolved


def train_online(config: DpoConfig, command: str = "") -> RunFolder:
    """Run ``sartor dpo --online REWARD`` from prompts to report.

    Raises:
        UserError: input that the user can mend; nothing that was written is lost.
    """
    objective = parse_objective(config.loss, config.beta, config.wpo, config.ld_alpha)
    if objective.needs_kl or objective.needs_mismatched:
        raise UserError(f"--online: {objective} needs more than rankings of the model's own answers; take dpo or ipo")
    if config.eval_prompts == 0:
        raise UserError("--eval-prompts 0: reward and KL are measured on held-out prompts, wanted some")
    if config.samples < 2:
        raise UserError(f"--samples {config.samples}: answers are compared with each other, wanted 2 or more")
    run, finished = begin(config)
    if finished:
        return run
    watch = Stopwatch()
    with watch.stage("load"):
        stage = set_stage(config, config.online, with_critic=False)
        policy = stage.actors.policy
        config = resolved(config, policy, len(stage.training.texts))
        run.open(config, {**stage.identity, "loss": objective.digest()}, command)
        policy.keep_base_if_needed(run.path / "base")
    with watch.stage("forecast"):
        looks = 1 + len(stage.actors.rewards)
        work = partial(rollouts, config, stage.training.ids, stage.held_out.ids, looks, 1, 1)
        announce(run, watch, config, policy, work, objective)
    held_out = HeldOutAnswers(config, run, stage)
    trainer = Trainer(config, run, watch, policy, len(stage.training.texts), trained=trained(stage.actors))
    online = Online(config, watch, stage, objective, held_out)
    estimates = trainer.train(online)
    summary = held_out.summary(estimates, f"{config.model} fitted online to {stage.named}")
    trainer.finish({"verb": "dpo --online", "networks": stage.actors.networks, **summary}, online.unit)
    return run


class Online:
    """One run: what answers, what ranks, what is minimised."""

    unit = "pairs"

    def __init__(
        self, config: DpoConfig, watch: Stopwatch, stage: Stage, objective: Objective, held_out: HeldOutAnswers
    ) -> None:
        self.config, self.watch, self.stage = config, watch, stage
        self.objective, self.held_out = objective, held_out

    def __str__(self) -> str:
        prompts, n = len(self.stage.training.texts), self.config.samples
        return f"{prompts} prompts, {n} answers each, {self.objective} on {self.stage.named}"

    def steps(self, trainer: Trainer, first: int) -> Iterator[dict[str, Any]]:
        """One optimizer step a batch of prompts, each with answers of the policy of that step."""
        step = count(first)
        return trainer.steps(lambda items: self.gradient(items, next(step)), first)

    def gradient(self, items: Sequence[int], step: int) -> dict[str, float]:
        """Answer the prompts, rank the answers, add the gradient of the objective; returns the metrics."""
        config, actors, prompts = self.config, self.stage.actors, self.stage.training.take(items)
        with self.watch.stage("sample"):
            drawn = draw(actors.policy, prompts, config.samples, config.max_new_tokens, [config.seed, 8, step])
        scores = score_all(self.stage.reward, prompts, [[one.text.strip() for one in row] for row in drawn])
        trees = [
            TokenTree(ids, tuple(one.tokens for one in row), ranks_of(score))
            for ids, row, score in zip(prompts.ids, drawn, scores.tolist(), strict=True)
        ]
        ranked = [i for i, tree in enumerate(trees) if tree.pairs]
        data = Preferences([trees[i] for i in ranked], [prompts.texts[i] for i in ranked], [])
        found = {"objective/scores": float(scores.mean()), "examples": 0, "tokens": 0, "loss": 0.0}
        if not ranked:  # all answers to each prompt are worth the same: nothing to prefer
            return found
        reference: dict[int, Tensor] = {}
        for group in split_by_budget(data.sizes(actors.policy), config.token_budget):
            reference |= zip(group, score_trees(actors.reference, [data.trees[i] for i in group]), strict=True)
        data = replace(data, reference=[reference[i] for i in range(len(ranked))])
        learned = batch_gradient(actors.policy, self.objective, data, range(len(ranked)), config.token_budget)
        return {**found, **learned}

    def note(self, metrics: Mapping[str, float]) -> str:
        """What the progress bar shows of a step."""
        return f"loss {metrics['loss']:.3f}  reward {metrics['objective/scores']:.3f}"

    def measure(self, step: int) -> dict[str, Estimate]:
        """Rewards, KL and variety of answers to held-out prompts."""
        return self.held_out.measure(step)

    def in_words(self, measured: Mapping[str, Estimate]) -> str:
        """Reward, truth where it is known, and KL."""
        return self.held_out.in_words(measured)
