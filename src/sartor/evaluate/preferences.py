"""Does the model prefer what people preferred? Accuracy, margins and log-probs over held-out pairs, with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sartor.evaluate.statistics import Estimate, mean, proportion
from sartor.types import PairLogps


def pair_metrics(pair: PairLogps, beta: float) -> dict[str, Float[Tensor, " pairs"]]:
    """Per pair, under the names DPO users know. Rewards are implicit: β·(log π - log π_ref), eq. 5 without Z(x)."""
    chosen = beta * (pair.policy_chosen - pair.reference_chosen)
    rejected = beta * (pair.policy_rejected - pair.reference_rejected)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        # A tie is half right: at the first step all margins are 0 and the accuracy is 50 %, not 0.
        "rewards/accuracies": (chosen > rejected).float() + 0.5 * (chosen == rejected).float(),
        "logps/chosen": pair.policy_chosen,
        "logps/rejected": pair.policy_rejected,
    }


@dataclass(frozen=True)
class HeldOut:
    """Per-pair values of every metric over the held-out pairs, and the prompt that each pair answers.

    Pairs of one prompt are not independent, whether they stand in one ranking or in many rows: prompts are the units.
    """

    values: Mapping[str, Sequence[float]]
    prompt: Sequence[int]

    def estimates(self) -> dict[str, Estimate]:
        """Mean and 95 % interval of each metric: Wilson for accuracies, Student t for the rest."""
        return {
            name: (proportion if name.endswith("accuracies") else mean)(values, self.prompt)
            for name, values in self.values.items()
        }


def gather_pairs(
    policy: Float[Tensor, " S"], reference: Float[Tensor, " S"], lengths: Tensor, pairs: Tensor
) -> PairLogps:
    """Per-branch log-probs to the four sides of each (better, worse) pair of branches."""
    better, worse = pairs.unbind(1)
    return PairLogps(
        policy[better], policy[worse], reference[better], reference[worse], lengths[better], lengths[worse]
    )
