"""The reward model: what people preferred, learned as a number for any answer.

Follows Ouyang et al. 2022 (arXiv 2203.02155, section 3.5, equation 1): -log σ(r_better - r_worse) over every pair of a
ranking, averaged over its pairs, so that a prompt counts once however many answers were ranked. All of a prompt's
answers stand in one tree, so each is computed once and not once per pair. Different from the paper:

1. Any loss of the catalogue that depends on log-ratios alone trains a reward model: the reward stands where
   log π - log π_ref stands in DPO, the other way round from its equation 5. Hence Plackett-Luce, ties and strengths.
2. The reward is not shifted by a bias, which a sequence classifier has no place for: its mean and spread on
   demonstrations, or on the held-out answers, stand in ``reward.json`` beside the model, and PPO subtracts the mean.
3. A penalty keeps rewards around 0 during training on demand (Eisenstein et al. 2023, arXiv 2312.09244).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sartor.config import RewardConfig
from sartor.console import progress, say
from sartor.data.chat import encode_demonstrations
from sartor.data.rows import read_rows
from sartor.data.trees import TokenTree, pack, split_by_budget
from sartor.errors import UserError
from sartor.evaluate.preferences import pair_metrics
from sartor.evaluate.rewards import ScoredTrees
from sartor.evaluate.statistics import Estimate, Sample, combined, mean
from sartor.model.heads import check_rewards, new_reward_model, rewards, score_rewards
from sartor.model.load import LanguageModel, fingerprint
from sartor.objectives.logps import TreeLogps
from sartor.objectives.objective import Objective
from sartor.objectives.specs import parse_objective
from sartor.train.forecast import announce, workload
from sartor.train.loop import Sums
from sartor.train.preferences import Preferences, digest, encode, read_preferences
from sartor.train.run import RunFolder
from sartor.train.stopwatch import Stopwatch
from sartor.train.summary import percent
from sartor.train.trainer import Trainer, begin, resolved
from sartor.types import Demonstration

# A head that knows nothing takes larger steps to learn: at a language model's rate 3,000 ranked answers taught 58 % of
# held-out pairs (docs/log.md, 2026-11-22).
FRESH_HEAD = 5.0
# What the losses of the catalogue are called where the reward is a model's own.
REWARD_LOSSES = {
    "bradley_terry": "dpo",
    "rao_kupper": "dpo_rao_kupper",
    "davidson": "dpo_davidson",
    "margin": "dpo_margin",
}


def reward_objective(specs: Sequence[str]) -> Objective:
    """The objective that ``--loss`` names, with rewards in their own units: β is 1.

    Raises:
        UserError: an unknown loss, or one that sees more than the log-ratios that rewards stand for.
    """
    translated = [_translated(spec) for spec in specs]
    found = parse_objective(translated)
    if any(term.beta is not None for term in found.terms):
        found = parse_objective(translated, beta=1.0)
    called = {theirs: ours for ours, theirs in REWARD_LOSSES.items()}
    for term in found.terms:
        more = {name for name in term.traits.depends_on if name.endswith(("length", "_kl"))}
        if term.traits.kind == "completions" or term.traits.whole_batch or more or not term.traits.needs_reference:
            raise UserError(
                f"--loss {term.name} is no loss for a reward model: wanted one of pairs or rankings that depends on "
                f"log-ratios alone, such as {', '.join(REWARD_LOSSES)} or plackett_luce"
            )
    terms = tuple(replace(term, name=called.get(term.name, term.name), given="") for term in found.terms)
    return replace(found, terms=terms)


def _translated(spec: str) -> str:
    """A reward loss by its name in the catalogue, with weight and options as they were."""
    name = spec.split(":")[0].split(",")[0]
    return REWARD_LOSSES.get(name, name) + spec.removeprefix(name)


def as_logratios(trees: Sequence[TokenTree], reward: Tensor) -> TreeLogps:
    """Rewards [S] in the place of log-ratios: a stand-in of one token for each branch, its reference 0."""
    stand_ins = [TokenTree((0,), ((0,),) * len(tree.branches), tree.ranks, strength=tree.strength) for tree in trees]
    nothing = torch.full_like(reward, torch.nan, requires_grad=False)
    zero = torch.zeros_like(reward, requires_grad=False)
    lengths = torch.ones(len(reward), dtype=torch.long, device=reward.device)
    return TreeLogps(stand_ins, lengths, reward, zero, nothing, nothing)


def losses_by_tree(objective: Objective, logratios: TreeLogps) -> list[tuple[float, Tensor, list[int]]]:
    """For each term its weight, its loss averaged within each tree, and which tree each of these belongs to."""
    found = []
    for weight, losses, owners in objective.losses(logratios):
        places, index, counts = torch.tensor(owners, dtype=torch.long).unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(places), device=losses.device).index_add(0, index.to(losses.device), losses)
        found.append((weight, sums / counts.to(losses.device), places.tolist()))
    return found


def reward_gradient(
    model: LanguageModel,
    objective: Objective,
    trees: Sequence[TokenTree],
    items: Sequence[int],
    token_budget: int,
    center: float = 0.0,
) -> dict[str, float]:
    """Add the gradient of the trees at ``items`` to the weights; returns the metrics of the batch.

    The loss is a mean over prompts of means over what each holds. ``center`` weighs the mean square of a pair's summed
    rewards.
    """
    batch = [trees[i] for i in items]
    sizes = [tree.size if model.shares_prompts else tree.repeated_size for tree in batch]
    units = [max(1, sum(term.units(tree) > 0 for tree in batch)) for term in objective.terms]
    paired = max(1, sum(bool(tree.pairs) for tree in batch))
    total, sums = torch.zeros((), device=model.device), Sums()
    for group in split_by_budget(sizes, token_budget):
        packed = pack([batch[i] for i in group]).to(model.device)
        logratios = as_logratios(packed.trees, rewards(model, packed))
        terms = zip(losses_by_tree(objective, logratios), units, strict=True)
        loss = torch.stack([weight / count * losses.sum() for (weight, losses, _), count in terms]).sum()
        if center:
            shares = torch.tensor([1 / len(tree.pairs) for tree in packed.trees for _ in tree.pairs])
            both = logratios.pairs()
            offset = (both.policy_chosen + both.policy_rejected).square() @ shares.to(model.device)
            loss = loss + center / paired * offset
        if loss.requires_grad:
            loss.backward()
        total += loss.detach()
        sums.add(reward_metrics(logratios.map(Tensor.detach)))
    pairs = sum(len(tree.pairs) for tree in batch)
    return {"loss": float(total), **sums.means(), "tokens": sum(sizes), "examples": pairs or len(batch)}


def reward_metrics(logratios: TreeLogps) -> dict[str, Tensor]:
    """Rewards of both sides of each pair, margins and accuracies, under the names of preference optimisation."""
    found = pair_metrics(logratios.pairs(), beta=1.0)
    return {name: values for name, values in found.items() if name.startswith("rewards/")}


def train_reward(config: RewardConfig, command: str = "") -> RunFolder:
    """Run ``sartor reward`` from data to report: train a reward model, or with ``--evaluate`` measure one.

    Raises:
        UserError: input that the user can mend; nothing that was written is lost.
    """
    if config.evaluate:
        from sartor.train.reward_evaluation import evaluate_reward

        return evaluate_reward(config, command)
    run, finished = begin(config)
    if finished:
        return run
    watch = Stopwatch()
    objective = reward_objective(config.loss)
    with watch.stage("load"):
        rows = read_preferences(config, objective)
        demonstrations = _demonstrations(config)
        model = new_reward_model(config.model, config.dtype, config.lora_r, config.lora_alpha, config.seed)
        say(f"model   {model}")
        training, held_out = (encode(model, part, config, objective) for part in rows)
        reason = check_rewards(model, max([*training.trees, *held_out.trees], key=lambda tree: tree.size))
        if reason:
            say(f"note    prompts are repeated for each answer, which is slower: {reason}")
        for note in (*training.notes, *held_out.notes):
            say(f"note    {note}")
        config = resolved(config, model, len(training.trees), faster=FRESH_HEAD)
        identity = {"model": fingerprint(model), "data": digest(training, held_out), "loss": objective.digest()}
        run.open(config, identity, command)
        model.keep_base_if_needed(run.path / "base")
    with watch.stage("forecast"):
        parts = (_without_head(training), _without_head(held_out))
        announce(run, watch, config, model, partial(workload, config, None, *parts, [], model.context))
    reward = Reward(config, run, model, objective, training, held_out)
    trainer = Trainer(config, run, watch, model, len(training.trees))
    estimates = trainer.train(reward)
    reward.finish(trainer, estimates, demonstrations)
    return run


def _without_head(data: Preferences) -> Preferences:
    """The same trees for a forecast: no vocabulary is computed for their tokens."""
    longest = max(len(branch) for tree in data.trees for branch in tree.branches)
    return replace(data, trees=[replace(tree, unscored=frozenset(range(longest - 1))) for tree in data.trees])


def _demonstrations(config: RewardConfig) -> list[Demonstration]:
    if config.center_data is None:
        return []
    return read_rows(config.center_data, config.split, (Demonstration,), config).examples


class Reward:
    """One run: what it learns from, and what is measured before, during and after."""

    unit = "pairs"

    def __init__(
        self,
        config: RewardConfig,
        run: RunFolder,
        model: LanguageModel,
        objective: Objective,
        training: Preferences,
        held_out: Preferences,
    ) -> None:
        self.config, self.run, self.model, self.objective = config, run, model, objective
        self.training, self.held_out = training, held_out

    def __str__(self) -> str:
        return f"{self.training.size}, {self.objective}"

    def steps(self, trainer: Trainer, first: int) -> Iterator[dict[str, Any]]:
        """One optimizer step a batch."""
        return trainer.steps(self.gradient, first)

    def gradient(self, items: Sequence[int]) -> dict[str, float]:
        """Add the gradient of one optimizer batch to the weights; returns its metrics."""
        config = self.config
        return reward_gradient(
            self.model, self.objective, self.training.trees, items, config.token_budget, config.center
        )

    def note(self, metrics: Mapping[str, float]) -> str:
        """What the progress bar shows of a step."""
        return f"loss {metrics['loss']:.3f}"

    def measure(self, step: int) -> dict[str, Estimate]:
        """The loss, accuracy and rewards on held-out pairs, prompts as units."""
        scored = self.scored()
        flat = torch.tensor([value for row in scored.rewards for value in row])
        logratios = as_logratios(scored.trees, flat)
        terms = [
            Sample(losses.tolist(), [scored.prompt[place] for place in places], weight)
            for weight, losses, places in losses_by_tree(self.objective, logratios)
        ]
        prompts = [pair.prompt for pair in scored.pairs]
        found = {name: mean(values.tolist(), prompts) for name, values in reward_metrics(logratios).items()}
        self.run.write_json("margins.json", {"step": step, "margins": [pair.margin for pair in scored.pairs]})
        return {"loss": combined(terms), **found, "rewards/accuracies": scored.accuracy()}

    def in_words(self, measured: Mapping[str, Estimate]) -> str:
        """Accuracy."""
        return f"held-out accuracy {percent(measured['rewards/accuracies'])}"

    def scored(self) -> ScoredTrees:
        """The held-out trees with their rewards."""
        held_out, budget = self.held_out, self.config.token_budget
        with progress("held-out rewards", len(held_out.trees)) as advance:
            found = score_rewards(self.model, held_out.trees, budget, advance)
        return ScoredTrees(held_out.trees, found, held_out.prompt_numbers)

    def finish(
        self, trainer: Trainer, estimates: Mapping[str, Estimate], demonstrations: Sequence[Demonstration]
    ) -> None:
        """What the reward's numbers mean, the full evaluation, and all that is left behind."""
        config, run = self.config, self.run
        with trainer.watch.stage("evaluate"):
            scored = self.scored()
            shown = self._demonstrated(demonstrations)
            values = shown or [value for row in scored.rewards for value in row]
        evaluation = scored.evaluation()
        run.write_json("evaluation.json", evaluation)
        (run.path / "model").mkdir(exist_ok=True)
        where = config.center_data if shown else f"{len(values)} held-out answers"
        scale = {"mean": float(np.mean(values)), "std": float(np.std(values)), "measured_on": where}
        (run.path / "model" / "reward.json").write_text(json.dumps(scale, indent=1) + "\n", encoding="utf-8")
        summary = {
            "verb": "reward",
            "title": f"A reward model from {Path(config.data).name}",
            "headline": reward_headline(estimates["rewards/accuracies"], self.held_out.size),
            "objective": str(self.objective),
            "evaluation": evaluation,
            "data": {
                "train": f"{self.training.size} in {len(self.training.trees)} rows of {config.data}",
                "eval": f"{self.held_out.size} in {len(self.held_out.trees)} rows of held-out prompts",
                "notes": [*self.training.notes, *self.held_out.notes],
            },
        }
        trainer.finish(summary, self.unit)

    def _demonstrated(self, demonstrations: Sequence[Demonstration]) -> list[float]:
        """Rewards of the demonstrations, none where there are none."""
        if not demonstrations:
            return []
        as_chat = self.model.reads_as_chat(self.config.as_chat)
        found = encode_demonstrations(self.model.tokenizer, demonstrations, self.config.max_length, as_chat)
        return [row[0] for row in score_rewards(self.model, found.trees, self.config.token_budget)]


def reward_headline(accuracy: Estimate, pairs: str, held_out: bool = True) -> str:
    """The result in one sentence, and no more than the interval allows to say."""
    aside = " held out" * held_out
    what = f"on {pairs}{aside}, the answer that people preferred has the higher reward in {percent(accuracy)}."
    return f"Not shown to be better than chance: {what}" if accuracy.low <= 0.5 else what[0].upper() + what[1:]
