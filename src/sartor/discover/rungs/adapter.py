"""Real training of an adapter on the shared base: what the rungs below stand for."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sartor import plugins
from sartor.data.trees import split_by_budget
from sartor.discover.language.expression import Expression
from sartor.discover.language.program import Program, as_term
from sartor.discover.material import Material, Part, Truth
from sartor.discover.rungs.outcome import Outcome, Setting, judged
from sartor.discover.screens import fingerprints
from sartor.evaluate.answers import answers_of
from sartor.evaluate.diversity import distinct_n
from sartor.evaluate.on_policy import look_at
from sartor.model.load import LanguageModel
from sartor.model.reference import score_trees
from sartor.objectives.objective import Objective
from sartor.rollout.local import Sampling, has_room_to_pack, sample
from sartor.train.gradient import batch_gradient
from sartor.train.loop import MasterWeights, train_steps


@dataclass(frozen=True)
class Adapters:
    """Trains one candidate after another on the same network; only the adapter starts anew."""

    material: Material
    start: Mapping[str, Tensor]

    @classmethod
    def fresh(cls, material: Material) -> "Adapters":
        """Of a model whose adapter nobody has trained yet: this is where all start from."""
        return cls(material, {name: p.detach().clone() for name, p in _adapter(material.model)})

    @property
    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return _adapter(self.material.model)

    def reset(self, seed: int) -> None:
        """A fresh adapter: seed 0 is the one that the model came with, others draw another A."""
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self._trained:
                value = self.start[name]
                if seed and "lora_A" in name:
                    # A permutation of the entries that came: another draw from the same distribution, on any device.
                    order = torch.randperm(value.numel(), generator=draw).to(value.device)
                    value = value.flatten()[order].view_as(value)
                parameter.copy_(value)

    def train(
        self, tree: Expression, setting: Setting, seed: int, progress: Callable[[int], None] = lambda steps: None
    ) -> None:
        """Train a fresh adapter by a candidate; it stays on the network."""
        material, recipe = self.material, self.material.recipe
        self.reset(seed)
        if not fingerprints(Program(tree), (setting.beta,)).any():
            return  # AdamW does not move by a gradient of zero, and so need not be asked
        objective = Objective((as_term(tree, beta=setting.beta),))
        model, data = material.model, material.train.data
        weights = MasterWeights(self._trained, weight_decay=0.0)
        steps = train_steps(
            weights,
            recipe.plan(len(data.trees), seed),
            recipe.rates(setting.learning_rate),
            lambda items: batch_gradient(model, objective, data, items, recipe.token_budget),
            max_grad_norm=recipe.max_grad_norm,
        )
        for _ in steps:
            progress(1)
        weights.release()

    def run(self, tree: Expression, setting: Setting, seed: int = 0) -> Outcome:
        """Train a candidate and judge it on the held-out prompts."""
        began = time.perf_counter()
        self.train(tree, setting, seed)
        found = self.judge(setting, seed)
        return replace(found, seconds=time.perf_counter() - began)

    def judge(self, setting: Setting, seed: int = 0) -> Outcome:
        """Judge the adapter that is on the network: by answers that it draws where their truth is known, else by bits.

        All candidates draw with the same random numbers.
        """
        part = self.material.held_out.compared
        moved = branch_logps(self.material.model, part, self.material.recipe.token_budget) - part.reference
        found = judged(moved[None, None], part.pairs(), [setting])[0]
        if self.material.truth is None or not torch.isfinite(moved).all():
            return found  # a model that fell apart is worth minus infinity, and cannot be asked for answers
        return self._by_answers(found, self.material.truth, seed)

    def _by_answers(self, found: Outcome, truth: Truth, seed: int) -> Outcome:
        """The mean true score of the policy's answers to each held-out prompt, less the price of their KL."""
        model, data = self.material.model, self.material.held_out.data
        prompts = list(dict.fromkeys(data.prompts))
        ids = [data.trees[data.prompts.index(prompt)].prompt for prompt in prompts]
        sampling = Sampling(truth.max_new_tokens, seed=seed, packs=has_room_to_pack(model))
        drawn = sample(model, ids, truth.answers, sampling)
        answers = answers_of(prompts, drawn, plugins.resolve("rewards", truth.scorer))
        kl, _ = look_at(model, model, ids, drawn, self.material.recipe.token_budget)
        assert answers.scores is not None
        rewards, nats = ([sum(row) / len(row) for row in table] for table in (answers.scores, kl))
        values = tuple(reward - truth.price * spent for reward, spent in zip(rewards, nats, strict=True))
        lengths = [length for row in answers.lengths for length in row]
        seen = {
            "bits": found.fitness,
            "reward": sum(rewards) / len(rewards),
            "kl": sum(nats) / len(nats),
            "length": sum(lengths) / len(lengths),
            "distinct_2": sum(map(distinct_n, answers.texts)) / len(prompts),
        }
        return Outcome(found.setting, values, {**found.measures, **seen})


def _adapter(model: LanguageModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.network.named_parameters() if "lora_" in name]


def branch_logps(model: LanguageModel, part: Part, token_budget: int) -> Float[Tensor, " branches"]:
    """log π of every branch of a part."""
    trees = part.data.trees
    found = torch.empty(part.first[-1])
    for group in split_by_budget(part.data.sizes(model), token_budget):
        for i, logps in zip(group, score_trees(model, [trees[i] for i in group]), strict=True):
            sums = [tokens.sum() for tokens in logps.split(trees[i].counts)]
            found[part.first[i] : part.first[i + 1]] = torch.stack(sums).cpu()
    return found
