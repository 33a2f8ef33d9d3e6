"""What a step of training is to many candidates at once: the same batch, and from each the weights of its branches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sartor.discover.language.program import Program
from sartor.discover.rungs.outcome import Pairs


@dataclass(frozen=True)
class Batch:
    """One optimizer step: its branches, their pairs by place among them, and what objectives see of them."""

    branches: Int[Tensor, " branches"]
    pairs: Pairs
    reference: Float[Tensor, " branches"]
    length: Float[Tensor, " branches"]


def pulls(
    programs: Sequence[Program],
    batch: Batch,
    logratios: Float[Tensor, "settings candidates branches"],
    betas: Float[Tensor, " settings"],
) -> Float[Tensor, "settings candidates branches"]:
    """Each candidate's derivative of the batch's mean loss by the log-prob of each branch, where training stands.

    Args:
        programs: the candidates.
        batch: what they see.
        logratios: log π - log π_ref of the batch's branches, of each candidate at each setting.
        betas: β of each setting.
    """
    better, worse = batch.pairs.better, batch.pairs.worse
    count = len(better)
    shared = {
        "reference_chosen": batch.reference[better],
        "reference_rejected": batch.reference[worse],
        "chosen_length": batch.length[better],
        "rejected_length": batch.length[worse],
    }
    shared = {name: side.expand(len(betas), count) for name, side in shared.items()}
    policy = logratios + batch.reference
    found = torch.zeros_like(logratios)
    for i, program in enumerate(programs):
        own = {"policy_chosen": policy[:, i, better], "policy_rejected": policy[:, i, worse]}
        weights = program.weights({**own, **shared}, betas[:, None])
        found[:, i].index_add_(1, better, weights.chosen / count).index_add_(1, worse, weights.rejected / count)
    return found
