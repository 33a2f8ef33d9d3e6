"""Does the model prefer what people preferred? Accuracy, margins and log-probs over held-out feedback, with intervals.

The measure is the same whatever the objective: the implicit reward β·(log π - log π_ref) of DPO (eq. 5 without Z(x)),
where π_ref is the model as it came. Accuracies of runs with different objectives can be compared; rewards and margins
are in units of each one's own β.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sartor.evaluate.statistics import Estimate, Sample, auc, combined, mean, proportion
from sartor.objectives.logps import TreeLogps
from sartor.objectives.objective import Objective
from sartor.types import JudgedLogps, PairLogps

SHOWN_MARGINS = 10_000  # of judged completions every good one meets every bad one: a histogram needs no more of them


def metrics_of(logps: TreeLogps, beta: float) -> dict[str, Tensor]:
    """Per pair, or per judged completion where there are no pairs, under the names DPO users know.

    Where the reference is not known, since no objective needs it, there are no rewards.
    """
    paired = any(tree.pairs for tree in logps.trees)
    found = pair_metrics(logps.pairs(), beta) if paired else judged_metrics(logps.judged(), beta)
    unknown = logps.reference.isnan().any()
    return {name: values for name, values in found.items() if not (unknown and name.startswith("rewards/"))}


def pair_metrics(pair: PairLogps, beta: float) -> dict[str, Tensor]:
    """Rewards and log-probs of both sides, margins and accuracies; each with shape [pairs]."""
    chosen, rejected = beta * pair.chosen_logratio, beta * pair.rejected_logratio
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        # A tie is half right: at the first step all margins are 0 and the accuracy is 50 %, not 0.
        "rewards/accuracies": (chosen > rejected).float() + 0.5 * (chosen == rejected).float(),
        "logps/chosen": pair.policy_chosen,
        "logps/rejected": pair.policy_rejected,
    }


def judged_metrics(judged: JudgedLogps, beta: float) -> dict[str, Tensor]:
    """Rewards and log-probs of good completions ("chosen") and of bad ones ("rejected"), which may differ in number."""
    reward = beta * judged.logratio
    return {
        "rewards/chosen": reward[judged.good],
        "rewards/rejected": reward[~judged.good],
        "logps/chosen": judged.policy[judged.good],
        "logps/rejected": judged.policy[~judged.good],
    }


@dataclass(frozen=True)
class HeldOut:
    """What the model says of all held-out trees, and the prompt that each tree answers.

    Pairs of one prompt are not independent, whether they stand in one ranking or in many rows: prompts are the units.
    """

    logps: TreeLogps
    prompt: Sequence[int]
    objective: Objective

    def estimates(self) -> dict[str, Estimate]:
        """The loss and each metric with its 95 % interval."""
        loss = combined(
            [
                Sample(losses.tolist(), [self.prompt[i] for i in owners], weight)
                for weight, losses, owners in self.objective.losses(self.logps)
                if owners
            ]
        )
        return {"loss": loss, **(self._of_pairs() if self._paired else self._of_verdicts())}

    def margins(self) -> list[float]:
        """Margins by pair; of judged completions, those of good ones over bad ones, across prompts."""
        if self._paired:
            return (self.objective.beta * self.logps.pairs().margin).tolist()
        rewards = judged_metrics(self.logps.judged(), self.objective.beta)
        good, bad = (rewards[f"rewards/{side}"].numpy(force=True) for side in ("chosen", "rejected"))
        if good.size * bad.size <= SHOWN_MARGINS:
            return np.subtract.outer(good, bad).ravel().tolist()
        draw = np.random.default_rng(0)
        return (draw.choice(good, SHOWN_MARGINS) - draw.choice(bad, SHOWN_MARGINS)).tolist()

    @property
    def _paired(self) -> bool:
        return any(tree.pairs for tree in self.logps.trees)

    def _of_pairs(self) -> dict[str, Estimate]:
        prompts = [self.prompt[i] for i, tree in enumerate(self.logps.trees) for _ in tree.pairs]
        return {
            name: (proportion if name.endswith("accuracies") else mean)(values.tolist(), prompts)
            for name, values in pair_metrics(self.logps.pairs(), self.objective.beta).items()
        }

    def _of_verdicts(self) -> dict[str, Estimate]:
        """Accuracy is the chance that a good completion gained more than a bad one, to whatever prompt."""
        verdicts = [(self.prompt[i], v) for i, tree in enumerate(self.logps.trees) for v in tree.verdicts]
        prompts = {"chosen": [p for p, v in verdicts if v], "rejected": [p for p, v in verdicts if v is False]}
        values = {k: v.tolist() for k, v in judged_metrics(self.logps.judged(), self.objective.beta).items()}
        found = {name: mean(column, prompts[name.split("/")[1]]) for name, column in values.items()}
        good = Sample(values["rewards/chosen"], prompts["chosen"])
        bad = Sample(values["rewards/rejected"], prompts["rejected"], -1.0)
        return {**found, "rewards/margins": combined([good, bad]), "rewards/accuracies": auc(good, bad)}
