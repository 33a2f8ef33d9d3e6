"""The supervised step: demonstrations to the gradient of their mean negative log-prob per token.

A demonstration is a tree with one branch; packed flat, none sees another, and only completion tokens meet the head.
"""

from collections.abc import Sequence

import torch

from sartor.data.trees import TokenTree, pack, split_by_budget
from sartor.model.forward import token_logps
from sartor.model.load import LanguageModel


def sft_gradient(
    model: LanguageModel, trees: Sequence[TokenTree], items: Sequence[int], token_budget: int
) -> dict[str, float]:
    """Add the gradient of the trees at ``items`` to the weights; returns loss, tokens and examples of the batch.

    The mean is over all completion tokens of the batch, as in every trainer of language models: a long demonstration
    weighs more than a short one.
    """
    batch = [trees[i] for i in items]
    sizes = [tree.size for tree in batch]
    # A branch without a prompt has nothing that predicts its first token.
    scored = sum(len(branch) - (not tree.prompt) for tree in batch for branch in tree.branches if branch)
    total = torch.zeros((), device=model.device)
    for group in split_by_budget(sizes, token_budget):
        loss = -token_logps(model, pack([batch[i] for i in group]).to(model.device)).sum() / scored
        loss.backward()
        total += loss.detach()
    return {"loss": float(total), "tokens": sum(sizes), "examples": len(batch)}
