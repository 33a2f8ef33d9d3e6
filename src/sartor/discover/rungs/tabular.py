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
from jaxtyping import Float
from torch import Tensor

from sartor.discover.language.expression import Expression
from sartor.discover.language.program import Program
from sartor.discover.rungs.many import Batch, pulls
from sartor.discover.rungs.outcome import Outcome, Pairs, Setting, choose
from sartor.train.loop import Schedule

PROMPTS, ANSWERS, COMPARISONS = 24, 6, 24
PRICE = 1.0  # of a nat; true rewards have a variance of 1, and Bradley-Terry's β is this price
STEPS, BATCH = 24, 64  # pairs of a step
RATE, MAX_GRAD_NORM = 0.1, 1.0
BETAS = (0.1, 0.3, 1.0, 3.0, 10.0)  # that each candidate may choose from


@dataclass(frozen=True)
class Tabular:
    """Independent prompts, drawn by a seed; branches are numbered prompt·answers + answer."""

    seed: int

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

    def logratios(self, logits: Float[Tensor, "*runs branches"]) -> Float[Tensor, "*runs branches"]:
        """log π - log π_ref of every answer."""
        return (self._logps(logits) - self.reference).flatten(-2)

    def gradient(
        self, logits: Float[Tensor, "*runs branches"], weights: Float[Tensor, "*runs branches"]
    ) -> Float[Tensor, "*runs branches"]:
        """The gradient of Σ weight·log π by the logits: ∂ log π(y)/∂ logit(y') = 1[y = y'] - π(y')."""
        pulled = weights.unflatten(-1, (PROMPTS, ANSWERS))
        return (pulled - self._logps(logits).exp() * pulled.sum(-1, keepdim=True)).flatten(-2)

    def value(self, logits: Float[Tensor, "*runs branches"]) -> Float[Tensor, "*runs prompts"]:
        """E[r] - λ·KL of each prompt, as a share of the optimum's above the reference's: 1 is the optimum."""
        logps = self._logps(logits)
        own = (logps.exp() * (self.reward - PRICE * (logps - self.reference))).sum(-1)
        best = PRICE * (self.reference + self.reward / PRICE).logsumexp(-1)
        start = (self.reference.exp() * self.reward).sum(-1)
        # Where the reference is nearly the best already a share would be noise: all prompts have one measure.
        return (own - start) / (best - start).mean()

    def _logps(self, logits: Tensor) -> Tensor:
        return logits.unflatten(-1, (PROMPTS, ANSWERS)).log_softmax(-1)

    def _draw(self, what: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + what)


def run_tabular(trees: Sequence[Expression], seed: int) -> list[Outcome]:
    """Train candidates in one world, each at every β, and judge each at its best one (``outcome.choose``)."""
    world = Tabular(seed)
    settings = [Setting(beta, RATE) for beta in BETAS]
    trained = train(world, [Program(tree) for tree in trees])
    values = world.value(trained).nan_to_num(-1.0).transpose(0, 1)  # [candidates, settings, prompts]
    return [Outcome(settings[at], tuple(scores.tolist())) for scores, at in map(choose, values)]


def train(world: Tabular, programs: Sequence[Program]) -> Float[Tensor, "settings candidates branches"]:
    """Logits after all steps of AdamW, of each candidate at each β: all runs are rows of one tensor."""
    logits = world.reference.flatten().expand(len(BETAS), len(programs), -1).clone().requires_grad_()
    values, betas = logits.detach(), torch.tensor(BETAS)
    optimizer = torch.optim.AdamW([logits], weight_decay=0.0, fused=True)
    schedule = Schedule(RATE, STEPS, STEPS // 10, "cosine")
    for step, batch in enumerate(world.batches(STEPS, BATCH)):
        gradient = world.gradient(values, pulls(programs, batch, world.logratios(values), betas))
        norm = gradient.norm(dim=-1, keepdim=True)
        logits.grad = gradient * (MAX_GRAD_NORM / (norm + 1e-6)).clamp(max=1.0)
        optimizer.param_groups[0]["lr"] = schedule.at(step)
        optimizer.step()
    return values
