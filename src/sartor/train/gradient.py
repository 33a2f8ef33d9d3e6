"""The gradient of one optimizer batch, however it is cut into micro-batches."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sartor.data.trees import split_by_budget
from sartor.evaluate.preferences import metrics_of
from sartor.model.load import LanguageModel
from sartor.objectives.logps import TreeLogps
from sartor.objectives.objective import Objective
from sartor.train.loop import Sums
from sartor.train.preferences import Preferences

Forward = Callable[[Sequence[int]], TreeLogps]


def batch_gradient(
    model: LanguageModel,
    objective: Objective,
    data: Preferences,
    items: Sequence[int],
    token_budget: int,
    rival: LanguageModel | None = None,
) -> dict[str, float]:
    """Add the gradient of some items of ``data`` to the weights; returns the metrics of the batch.

    Micro-batches of ``token_budget`` tokens bound the memory and change nothing else. ``rival`` is the reference model
    itself, where the objective needs it.
    """
    sizes = data.sizes(model)
    groups = [[items[i] for i in group] for group in split_by_budget([sizes[i] for i in items], token_budget)]
    units = objective.units([data.trees[i] for i in items])
    loss, parts = accumulate(objective, lambda group: data.logps(model, group, objective, rival), groups, units)
    sums = Sums()
    for logps in parts:  # read from the device only now, when all its work is queued
        sums.add(metrics_of(logps.map(Tensor.cpu), objective.beta))
    examples = data.count_pairs(items) or units[0]
    return {"loss": float(loss), **sums.means(), "tokens": sum(sizes[i] for i in items), "examples": examples}


def accumulate(
    objective: Objective, forward: Forward, groups: Sequence[Sequence[int]], units: Sequence[int]
) -> tuple[Tensor, list[TreeLogps]]:
    """Add the batch's gradient to the weights; returns its loss and the log-probs of each group.

    A loss without batch statistics is a sum over micro-batches, divided by the count of the whole batch: each group is
    passed forward and back in turn. A loss *with* them sees all log-probs of the batch at once: first every group is
    passed forward without gradient, the objective gives its derivative by each token's log-prob, and in a second pass
    every group's log-probs are pulled by these weights. So the gradient is the whole batch's own, at the memory of one
    group and the price of one more forward pass (the gradient cache of Gao et al. 2021, arXiv 2101.06983).

    Args:
        objective: what to minimise.
        forward: log-probs of a group of items, differentiable by the weights.
        groups: the batch, cut into micro-batches.
        units: what each term of the objective takes its mean over, in the whole batch.
    """
    if not objective.mixes or len(groups) == 1:
        parts, losses = [], []
        for group in groups:
            logps = forward(group)
            loss = objective.total(logps, units)
            if loss.requires_grad:  # not where a group has nothing but ties, and no term that reads them
                loss.backward()
            parts.append(logps.map(Tensor.detach))
            losses.append(loss.detach())
        return torch.stack(losses).sum(), parts
    with torch.no_grad():
        parts = [forward(group) for group in groups]
    leaves = TreeLogps.cat(parts).map(lambda tokens: tokens.detach().requires_grad_())
    loss = objective.total(leaves, units)
    if loss.requires_grad:
        loss.backward()
    sizes = [len(part.policy) for part in parts]
    pulls = [_gradient(tokens).split(sizes) for tokens in (leaves.policy, leaves.kl)]
    for group, by_policy, by_kl in zip(groups, *pulls, strict=True):
        logps = forward(group)
        pairs = [(t, pull) for t, pull in ((logps.policy, by_policy), (logps.kl, by_kl)) if t.requires_grad]
        torch.autograd.backward([t for t, _ in pairs], [pull for _, pull in pairs])
    return loss.detach(), parts


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
