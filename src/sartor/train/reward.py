"""The reward model's step: comparisons and rankings to a Bradley-Terry gradient, one tree per prompt.

Ouyang et al. 2022 (arXiv 2203.02155, equation 1): every pair of a ranking, -log σ(r_better - r_worse), weighted so that
a prompt counts once however many answers were ranked. All of a prompt's answers stand in one tree, so each is
computed once and not once per pair.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import logsigmoid

from sartor.data.trees import TokenTree, pack, split_by_budget
from sartor.model.heads import rewards
from sartor.model.load import LanguageModel


def reward_gradient(
    model: LanguageModel, trees: Sequence[TokenTree], items: Sequence[int], token_budget: int
) -> dict[str, float]:
    """Add the gradient of the trees at ``items`` to the weights; returns loss, tokens and pairs of the batch."""
    batch = [trees[i] for i in items if trees[i].pairs]
    sizes = [tree.size for tree in batch]
    total = torch.zeros((), device=model.device)
    for group in split_by_budget(sizes, token_budget):
        packed = pack([batch[i] for i in group]).to(model.device)
        per_tree = rewards(model, packed).split([len(tree.branches) for tree in packed.trees])
        losses = [_bradley_terry(tree, row) for tree, row in zip(packed.trees, per_tree, strict=True)]
        loss = torch.stack(losses).sum() / len(batch)
        loss.backward()
        total += loss.detach()
    return {"loss": float(total), "tokens": sum(sizes), "examples": sum(len(tree.pairs) for tree in batch)}


def _bradley_terry(tree: TokenTree, reward: torch.Tensor) -> torch.Tensor:
    better, worse = torch.tensor(tree.pairs, device=reward.device).T
    return -logsigmoid(reward[better] - reward[worse]).mean()
