"""Train many objectives at once, each at several settings, in a world where a step is two products.

What differs between candidates is the two weights that each gives to a pair. All else of a step is the same for all of
them: the batch, the log-probs' dependence on what is trained, and AdamW, which acts on each coordinate alone. So all
runs are rows of one matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sartor.discover.language.expression import Expression
from sartor.discover.language.program import Program
from sartor.discover.rungs.outcome import Pairs, Setting
from sartor.train.loop import Schedule


@dataclass(frozen=True)
class Batch:
    """One optimizer step: its branches, their pairs by place among them, and what objectives see of them."""

    branches: Int[Tensor, " branches"]
    pairs: Pairs
    reference: Float[Tensor, " branches"]
    length: Float[Tensor, " branches"]


@runtime_checkable
class World(Protocol):
    """What is trained: one row of parameters for each run."""

    def parameters(self, runs: int) -> Float[Tensor, "runs P"]:
        """Parameters of so many runs, at the reference."""
        ...

    def logratios(
        self, parameters: Float[Tensor, "runs P"], branches: Int[Tensor, " branches"]
    ) -> Float[Tensor, "runs branches"]:
        """log π - log π_ref of some branches."""
        ...

    def gradient(
        self,
        parameters: Float[Tensor, "runs P"],
        branches: Int[Tensor, " branches"],
        weights: Float[Tensor, "runs branches"],
    ) -> Float[Tensor, "runs P"]:
        """The gradient of Σ weight·log π by the parameters."""
        ...

    @property
    def share(self) -> float:
        """What share of the coordinates is there: the gradient's norm is that of all of them."""
        ...


def train_many(
    world: World,
    trees: Sequence[Expression],
    settings: Sequence[Setting],
    batches: Sequence[Batch],
    schedule: Schedule,
    max_grad_norm: float,
) -> Float[Tensor, "candidates settings P"]:
    """Parameters after all steps, of each candidate at each setting.

    Args:
        world: what is trained.
        trees: the candidates.
        settings: every candidate trains at each of them.
        batches: one for each optimizer step.
        schedule: learning rate by step, as a share of each setting's own (a peak of 1).
        max_grad_norm: clips each run's gradient.
    """
    programs = [Program(tree) for tree in trees]
    parameters = world.parameters(len(trees) * len(settings)).requires_grad_()
    # Rows are ordered by setting, then candidate: those of one learning rate are one block, and one group of AdamW.
    blocks = parameters.view(len(settings), len(trees), -1)
    parts = [blocks[i].detach().requires_grad_() for i in range(len(settings))]
    optimizer = torch.optim.AdamW([{"params": [part]} for part in parts], lr=0.0, weight_decay=0.0, fused=True)
    betas = torch.tensor([setting.beta for setting in settings])[:, None]
    values = parameters.detach()
    for step, batch in enumerate(batches):
        logratios = world.logratios(values, batch.branches)
        pulls = _pulls(programs, batch, logratios.view(len(settings), len(trees), -1), betas)
        gradient = world.gradient(values, batch.branches, pulls.flatten(0, 1))
        norm = gradient.norm(dim=1, keepdim=True) / world.share**0.5
        gradient *= (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for part, own, group, setting in zip(
            parts, gradient.view_as(blocks), optimizer.param_groups, settings, strict=True
        ):
            part.grad = own
            group["lr"] = setting.learning_rate * schedule.at(step)
        optimizer.step()
    return values.view(len(settings), len(trees), -1).transpose(0, 1)


def _pulls(
    programs: Sequence[Program], batch: Batch, logratios: Float[Tensor, "settings candidates branches"], betas: Tensor
) -> Float[Tensor, "settings candidates branches"]:
    """Each candidate's derivative of the batch's mean loss by the log-prob of each branch."""
    better, worse = batch.pairs.better, batch.pairs.worse
    count = len(better)
    lengths = {"chosen_length": batch.length[better], "rejected_length": batch.length[worse]}
    references = {"reference_chosen": batch.reference[better], "reference_rejected": batch.reference[worse]}
    policy = logratios + batch.reference
    pulls = torch.zeros_like(logratios)
    for i, program in enumerate(programs):
        sides = {
            name: side.expand(len(betas), count)
            for name, side in {
                "policy_chosen": policy[:, i, better],
                "policy_rejected": policy[:, i, worse],
                **references,
                **lengths,
            }.items()
        }
        found = program.weights(sides, betas)
        pulls[:, i].index_add_(1, better, found.chosen / count).index_add_(1, worse, found.rejected / count)
    return pulls
