"""Is a reward model right? Accuracy, calibration, and whether it is fooled by length, on comparisons and rankings.

Any reward will do: a reward model's, or the implicit one of a policy. Pairs of one prompt are not independent, so
prompts are the units of every interval.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sartor.data.trees import TokenTree
from sartor.evaluate.statistics import Estimate, proportion

BINS = 10  # of the calibration plot, each with as many pairs
FEW_STRENGTHS = 6  # unlike strengths up to which each is shown by itself


@dataclass(frozen=True, slots=True)
class Pair:
    """One comparison: the reward of the better answer less that of the worse, and what people and lengths say.

    ``strength`` is by how much the better one was preferred, where that is known; ``apart`` how many places lie between
    the two; ``longer`` by how many tokens the better one is longer.
    """

    prompt: int
    margin: float
    strength: float | None
    apart: int
    longer: int

    @property
    def right(self) -> float:
        """1 where the better answer has the higher reward, a half for equal ones."""
        return float(self.margin > 0) + 0.5 * (self.margin == 0)


@dataclass(frozen=True)
class ScoredTrees:
    """Ranked trees, the rewards of their branches, and the number of the prompt that each tree answers."""

    trees: Sequence[TokenTree]
    rewards: Sequence[Sequence[float]]
    prompt: Sequence[int]

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every pair of unlike rank."""
        found = []
        for tree, reward, prompt in zip(self.trees, self.rewards, self.prompt, strict=True):
            places = sorted(set(tree.ranks))
            for i, j in tree.pairs:
                apart = places.index(tree.ranks[j]) - places.index(tree.ranks[i])
                longer = len(tree.branches[i]) - len(tree.branches[j])
                found.append(Pair(prompt, reward[i] - reward[j], tree.strength, apart, longer))
        return found

    def evaluation(self) -> dict[str, Any]:
        """Everything below, by name, ready for JSON."""
        return {
            "accuracy": self.accuracy(),
            "pick_rate": self.pick_rate(),
            "pick_rate_chance": self.chance(),
            "calibration": self.calibration(),
            "calibration_error": self.calibration_error(),
            "by_strength": self.by_strength(),
            "by_length": self.by_length(),
            "longer_preferred": self.longer_preferred(),
            "pairs": len(self.pairs),
        }

    def accuracy(self, where: Callable[[Pair], bool] = lambda pair: True) -> Estimate:
        """Share of pairs whose better answer has the higher reward."""
        return _right([pair for pair in self.pairs if where(pair)])

    def pick_rate(self) -> Estimate | None:
        """Share of rankings of three and more whose answer of highest reward is one that people put first."""
        wins, prompts = [], []
        for tree, reward, prompt in self._longer_lists():
            top = [rank for rank, value in zip(tree.ranks, reward, strict=True) if value == max(reward)]
            wins.append(sum(rank == min(tree.ranks) for rank in top) / len(top))
            prompts.append(prompt)
        return proportion(wins, prompts) if wins else None

    def chance(self) -> float | None:
        """The pick rate of a blind choice."""
        shares = [tree.ranks.count(min(tree.ranks)) / len(tree.ranks) for tree, _, _ in self._longer_lists()]
        return sum(shares) / len(shares) if shares else None

    def _longer_lists(self) -> list[tuple[TokenTree, Sequence[float], int]]:
        rows = zip(self.trees, self.rewards, self.prompt, strict=True)
        return [row for row in rows if len(row[0].ranks) > 2 and row[0].pairs]

    def calibration(self) -> list[dict[str, Any]]:
        """Bins of pairs by how sure the model is: the probability σ(|margin|) it gives, and how often it is right."""
        ordered = sorted(self.pairs, key=lambda pair: abs(pair.margin))
        cuts = np.array_split(np.arange(len(ordered)), min(BINS, max(1, len(ordered) // 5)))
        bins = [[ordered[i] for i in cut] for cut in cuts if len(cut)]
        return [
            {
                "predicted": float(np.mean([_sigmoid(abs(pair.margin)) for pair in group])),
                "right": _right(group),
                "pairs": len(group),
            }
            for group in bins
        ]

    def calibration_error(self) -> float | None:
        """Expected calibration error: the mean distance of both over the bins (Guo et al. 2017, arXiv 1706.04599)."""
        bins = self.calibration()
        total = sum(row["pairs"] for row in bins)
        return sum(row["pairs"] * abs(row["predicted"] - row["right"].value) for row in bins) / total if total else None

    def by_strength(self) -> list[dict[str, Any]]:
        """Accuracy by how clearly people preferred: by strength where they said one, else by places apart."""
        known = all(pair.strength is not None for pair in self.pairs)
        of = [float(pair.apart if pair.strength is None or not known else pair.strength) for pair in self.pairs]
        values = sorted(set(of))
        if len(values) < 2:
            return []
        edges = np.unique(np.quantile(of, [0, 0.25, 0.5, 0.75, 1]))
        groups: dict[str, list[Pair]] = {}
        for value, pair in sorted(zip(of, self.pairs, strict=True), key=lambda row: row[0]):
            quarter = int(np.searchsorted(edges[1:-1], value))
            few = len(values) <= FEW_STRENGTHS
            name = f"{value:g}" if few else f"{edges[quarter]:.3g} to {edges[quarter + 1]:.3g}"
            groups.setdefault(name, []).append(pair)
        what = "strength" if known else "places apart"
        return [{"of": what, "value": name, "right": _right(group)} for name, group in groups.items()]

    def by_length(self) -> dict[str, Estimate]:
        """Accuracy where the better answer is the longer one, and where it is the shorter one."""
        return {
            "longer": self.accuracy(lambda pair: pair.longer > 0),
            "shorter": self.accuracy(lambda pair: pair.longer < 0),
        }

    def longer_preferred(self) -> dict[str, Estimate]:
        """How often the longer answer of a pair is preferred: by the model, and by people."""
        unlike = [pair for pair in self.pairs if pair.longer]
        prompts = [pair.prompt for pair in unlike]
        by_model = [pair.right if pair.longer > 0 else 1 - pair.right for pair in unlike]
        return {
            "model": proportion(by_model, prompts),
            "people": proportion([float(pair.longer > 0) for pair in unlike], prompts),
        }


def _right(pairs: Sequence[Pair]) -> Estimate:
    return proportion([pair.right for pair in pairs], [pair.prompt for pair in pairs])


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-min(x, 700.0)))
