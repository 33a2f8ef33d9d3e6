"""The tabular rung: a policy with a logit for every answer, Bradley-Terry preferences, and an optimum that is known.

Each of some prompts has some answers with true rewards. People compare answers that the reference drew, by
Bradley-Terry. The best policy at a price λ of a nat is π* ∝ π_ref exp(r/λ) (Rafailov et al. 2023, eq. 4), and its
value max_π E[r] - λ·KL is λ log Σ π_ref exp(r/λ). A candidate is judged by the share of that value, above the
reference's, that the policy it trains has. Milliseconds, and no model: it tells objectives that learn at all, under
noise, from others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sartor.discover.language.expression import Expression
from sartor.discover.rungs.many import Batch, train_many
from sartor.discover.rungs.outcome import Outcome, Pairs, Setting, choose
from sartor.train.loop import Schedule

PROMPTS, ANSWERS, COMPARISONS = 24, 6, 24
PRICE = 1.0  # of a nat; true rewards have a variance of 1, and Bradley-Terry's β is this price
STEPS, BATCH = 24, 64  # pairs of a step
RATE, MAX_GRAD_NORM = 0.1, 1.0
BETAS = (0.1, 0.3, 1.0, 3.0, 10.0)  # that each candidate may choose from


@dataclass(frozen=True)
class Tabular:
    """A ``World`` (see ``many``) of independent prompts, drawn by a seed; branches are prompt·answers + answer."""

    seed: int
    share: float = 1.0

    @cached_property
    def reference(self) -> Float[Tensor, "prompts answers"]:
        """log π_ref."""
        return torch.randn(PROMPTS, ANSWERS, generator=self._draw(0)).log_softmax(-1)

    @cached_property
    def reward(self) -> Float[Tensor, "prompts answers"]:
        """True rewards."""
        return torch.randn(PROMPTS, ANSWERS, generator=self._draw(1))

    @cached_property
    def comparisons(self) -> Pairs:
        """What people said: of two unlike answers that the reference drew, one, by Bradley-Terry."""
        draw = self._draw(2)
        first = torch.multinomial(self.reference.exp(), COMPARISONS, replacement=True, generator=draw)
        second = (first + torch.randint(1, ANSWERS, first.shape, generator=draw)) % ANSWERS
        gap = self.reward.gather(1, first) - self.reward.gather(1, second)
        wins = torch.rand(gap.shape, generator=draw) < torch.sigmoid(gap / PRICE)
        start = torch.arange(PROMPTS)[:, None]
        better, worse = torch.where(wins, first, second), torch.where(wins, second, first)
        prompt = start.expand_as(better).flatten()
        return Pairs((start * ANSWERS + better).flatten(), (start * ANSWERS + worse).flatten(), prompt)

    def batches(self, steps: int, size: int) -> list[Batch]:
        """Steps over shuffled comparisons."""
        draw, pairs = self._draw(3), self.comparisons
        orders = [torch.randperm(len(pairs.better), generator=draw) for _ in range(steps)]
        everything, reference = torch.arange(PROMPTS * ANSWERS), self.reference.flatten()
        length = torch.ones(len(everything))
        return [
            Batch(everything, Pairs(pairs.better[at], pairs.worse[at], pairs.prompt[at]), reference, length)
            for at in (order[:size] for order in orders)
        ]

    def parameters(self, runs: int) -> Float[Tensor, "runs P"]:
        """The reference's logits."""
        return self.reference.flatten().expand(runs, -1).clone()

    def logratios(
        self, parameters: Float[Tensor, "runs P"], branches: Int[Tensor, " branches"]
    ) -> Float[Tensor, "runs branches"]:
        """log softmax of the logits, less the reference's."""
        return (self._logps(parameters) - self.reference).flatten(1)[:, branches]

    def gradient(
        self,
        parameters: Float[Tensor, "runs P"],
        branches: Int[Tensor, " branches"],
        weights: Float[Tensor, "runs branches"],
    ) -> Float[Tensor, "runs P"]:
        """∂ log π(y)/∂ logit(y') = 1[y = y'] - π(y')."""
        pulls = torch.zeros_like(parameters).index_add_(1, branches, weights).view(-1, PROMPTS, ANSWERS)
        return (pulls - self._logps(parameters).exp() * pulls.sum(-1, keepdim=True)).flatten(1)

    def value(self, parameters: Float[Tensor, "*runs P"]) -> Float[Tensor, "*runs prompts"]:
        """E[r] - λ·KL of each prompt, as a share of the optimum's above the reference's: 1 is the optimum."""
        logps = self._logps(parameters)
        own = (logps.exp() * (self.reward - PRICE * (logps - self.reference))).sum(-1)
        best = PRICE * (self.reference + self.reward / PRICE).logsumexp(-1)
        start = (self.reference.exp() * self.reward).sum(-1)
        # Where the reference is nearly the best already a share would be noise: all prompts have one measure.
        return (own - start) / (best - start).mean()

    def _logps(self, parameters: Tensor) -> Tensor:
        return parameters.unflatten(-1, (PROMPTS, ANSWERS)).log_softmax(-1)

    def _draw(self, what: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + what)


def run_tabular(trees: Sequence[Expression], seed: int) -> list[Outcome]:
    """Train candidates in one world and judge each at its best β; the β is chosen on half of the prompts, both ways."""
    world = Tabular(seed)
    settings = [Setting(beta, RATE) for beta in BETAS]
    schedule = Schedule(1.0, STEPS, STEPS // 10, "cosine")
    trained = train_many(world, trees, settings, world.batches(STEPS, BATCH), schedule, MAX_GRAD_NORM)
    values = world.value(trained).nan_to_num(-1.0)  # [candidates, settings, prompts]
    return [Outcome(settings[at], tuple(scores.tolist())) for scores, at in map(choose, values)]
