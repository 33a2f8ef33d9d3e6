"""Estimates with their 95 % intervals. Nothing in Sartor compares two numbers without one."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

ONE_UNIT = "[no interval: one unit]"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval and the number of independent units behind it."""

    value: float
    low: float
    high: float
    n: int

    def record(self) -> dict[str, float | None]:
        """As it stands in ``metrics.jsonl``; what is unknown is null there, since JSON has no infinity."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}

    def __str__(self) -> str:
        interval = f"[{self.low:.3g}, {self.high:.3g}]" if math.isfinite(self.high) else ONE_UNIT
        return f"{self.value:.3g} {interval}"


@dataclass(frozen=True, slots=True)
class Sample:
    """Values, the group that each belongs to (the samples of one prompt, the pairs of one ranking), and a weight.

    Without groups every value is its own.
    """

    values: Sequence[float]
    groups: Sequence[object] | None = None
    weight: float = 1.0


def mean(values: Sequence[float], groups: Sequence[object] | None = None) -> Estimate:
    """Mean of ``values`` with a Student t interval, clustered by ``groups``.

    >>> print(mean([1.0, 2.0, 3.0, 4.0]))
    2.5 [0.446, 4.55]
    >>> mean([1.0, 1.0, 3.0, 3.0], groups="aabb").n
    2
    """
    return combined([Sample(values, groups)])


def combined(samples: Sequence[Sample]) -> Estimate:
    """Σ weight·mean over ``samples`` with a Student t interval; the same group may stand in several of them.

    Values of one group are not independent, so the group is the unit: each contributes the sum of its weighted
    residuals, weight·(x - mean)/n, and the variance is that of these sums (Cameron & Miller 2015, eq. 11, for a
    regression on a constant), with the correction G/(G-1) in each sample and the degrees of freedom of the smallest.
    Weights 1 and -1 give a difference of means.

    >>> print(combined([Sample([2.0, 3.0, 4.0], "abc"), Sample([1.0, 2.0, 3.0], "abc", -1.0)]))
    1 [1, 1]
    """
    found = _clustered(samples)
    if not found.count:
        return Estimate(math.nan, math.nan, math.nan, 0)
    half = float(stats.t.ppf(0.975, found.smallest - 1)) * found.error if found.smallest > 1 else math.inf
    return Estimate(found.value, found.value - half, found.value + half, found.count)


@dataclass(frozen=True, slots=True)
class _Clustered:
    """A value, its cluster-robust standard error, the number of groups in all, and in the sample that has fewest."""

    value: float
    error: float
    count: int
    smallest: int


def _clustered(samples: Sequence[Sample]) -> _Clustered:
    value, smallest = 0.0, math.inf
    names: list[str] = []
    residuals: list[np.ndarray] = []
    for number, sample in enumerate(samples):
        x = np.asarray(sample.values, dtype=float)
        if not x.size:
            return _Clustered(math.nan, math.nan, 0, 0)
        groups = [f"{number}.{i}" for i in range(x.size)] if sample.groups is None else [str(g) for g in sample.groups]
        unlike = len(set(groups))
        centre = float(x.mean())
        value += sample.weight * centre
        smallest = min(smallest, unlike)
        # One group knows nothing of its own spread.
        correction = math.sqrt(unlike / (unlike - 1)) if unlike > 1 else math.inf
        residuals.append(
            correction * sample.weight * (x - centre) / x.size if unlike > 1 else np.full(x.size, math.inf)
        )
        names += groups
    if not residuals:
        return _Clustered(math.nan, math.nan, 0, 0)
    _, cluster = np.unique(names, return_inverse=True)
    sums = np.bincount(cluster, weights=np.concatenate(residuals))
    return _Clustered(value, float(np.sqrt((sums**2).sum())), int(cluster.max()) + 1, int(smallest))


def crossed(samples: Sequence[Sample], others: Sequence[Sequence[object]], confidence: float = 0.95) -> Estimate:
    """As :func:`combined`, where values belong to a second kind of group too, ``others`` (prompts, and seeds).

    The variances by either kind add up, and that by both at once is counted once (Cameron, Gelbach & Miller 2011, eq.
    2.11); never less than the larger of the two. Student t with the degrees of freedom of the kind that has fewer.
    ``confidence`` is that of the interval: of m comparisons 1 - 0.05/m each holds all at 95 % (Bonferroni).

    >>> print(crossed([Sample([1.0, 2.0, 1.2, 2.4], "abab")], ["ssuu"]))
    1.65 [-5.34, 8.64]
    """
    one = _clustered(samples)
    both = [[*zip(_names(s), other, strict=True)] for s, other in zip(samples, others, strict=True)]
    kinds = [
        _clustered([Sample(s.values, groups, s.weight) for s, groups in zip(samples, kind, strict=True)])
        for kind in (others, both)
    ]
    smallest = min(one.smallest, kinds[0].smallest)
    if not one.count or smallest < 2:
        return Estimate(one.value, -math.inf, math.inf, one.count)
    variances = [found.error**2 for found in (one, *kinds)]
    error = math.sqrt(max(variances[0] + variances[1] - variances[2], *variances[:2]))
    half = float(stats.t.ppf((1 + confidence) / 2, smallest - 1)) * error
    return Estimate(one.value, one.value - half, one.value + half, one.count)


def _names(sample: Sample) -> Sequence[object]:
    return range(len(sample.values)) if sample.groups is None else sample.groups


def proportion(values: Sequence[float], groups: Sequence[object] | None = None) -> Estimate:
    """Share of successes with a Wilson score interval (Wilson 1927), clustered by ``groups``. A half counts as a tie.

    Trials of one group are not independent: the interval is that of the effective number of trials, p(1-p)/se² with the
    cluster-robust se of :func:`mean`, at most the number of trials (Korn & Graubard 1998 do so for survey samples).
    Where that cannot be known, all trials being alike, groups count as one trial each.

    >>> print(proportion([1.0] * 65 + [0.0] * 35))
    0.65 [0.553, 0.736]
    >>> print(proportion([1.0] * 65 + [0.0] * 35, groups=[i // 5 for i in range(100)]))
    0.65 [0.428, 0.822]
    """
    found = _clustered([Sample(values, groups)])
    if not found.count:
        return Estimate(math.nan, math.nan, math.nan, 0)
    trials = float(len(values)) if groups is None else _effective(found.value, found, len(values))
    return _wilson(found.value, trials, found.count)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Spearman's ρ between two measures of the same things, n of them, with an interval by Fisher's transformation.

    The variance of the transformed ρ is (1 + ρ²/2)/(n - 3) (Bonett & Wright 2000). For a perfect order it would
    leave no width, so that counts as half a step below 1: the next ρ is 12/(n³ - n) lower. Below four things nothing is
    known.

    >>> print(rank_correlation([1, 2, 3, 4, 5, 6], [1, 3, 2, 4, 6, 5]))
    0.886 [0.0664, 0.992]
    >>> print(rank_correlation([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]))
    1 [0.624, 1]
    """
    n = len(x)
    if n < 4 or len(set(x)) < 2 or len(set(y)) < 2:
        return Estimate(math.nan, -math.inf, math.inf, n)
    rho = float(np.clip(stats.spearmanr(x, y).statistic, -1, 1).round(12))
    most = 1 - 6 / (n**3 - n)
    centre = math.atanh(min(max(rho, -most), most))
    half = float(stats.norm.ppf(0.975)) * math.sqrt((1 + rho * rho / 2) / (n - 3))
    return Estimate(rho, min(rho, math.tanh(centre - half)), max(rho, math.tanh(centre + half)), n)


def auc(good: Sample, bad: Sample) -> Estimate:
    """Chance that a value of ``good`` exceeds one of ``bad``, ties half, with a Wilson interval.

    The area under the ROC curve, whose variance is that of its structural components, clustered by group (DeLong et
    al. 1988; Obuchowski 1997). Where one side is rare its spread is hardly known: the effective number of trials
    shrinks by (z/t)², with t at the degrees of freedom of the side that has fewer groups.

    >>> print(auc(Sample([3.0, 4.0, 5.0]), Sample([1.0, 2.0, 3.0])))
    0.944 [0.219, 0.999]
    >>> print(auc(Sample([3.0, 4.0, 5.0]), Sample([1.0])))  # one bad answer tells little
    1 [0.207, 1]
    """
    x, y = np.asarray(good.values, dtype=float), np.asarray(bad.values, dtype=float)
    if not x.size or not y.size:
        return Estimate(math.nan, math.nan, math.nan, 0)
    components = [Sample(_wins(x, y), good.groups), Sample([1 - w for w in _wins(y, x)], bad.groups)]
    found = _clustered(components)
    p = found.value / 2
    trials = _effective(p, found, x.size + y.size)
    if found.smallest > 1:
        trials *= float(stats.norm.ppf(0.975) / stats.t.ppf(0.975, found.smallest - 1)) ** 2
    return _wilson(p, trials, found.count)


def _wins(x: np.ndarray, y: np.ndarray) -> list[float]:
    """For each x the share of y that it exceeds, ties half."""
    ordered = np.sort(y)
    below, at_most = np.searchsorted(ordered, x, "left"), np.searchsorted(ordered, x, "right")
    return ((below + at_most) / (2 * y.size)).tolist()


def _effective(p: float, found: _Clustered, trials: int) -> float:
    """Independent trials that would have the same standard error, p(1-p)/error², at most ``trials``.

    Where that cannot be known, all trials being alike, the groups of the smallest sample count as one trial each.
    """
    if 0 < p < 1 and 0 < found.error < math.inf:
        return min(float(trials), p * (1 - p) / found.error**2)
    return float(found.smallest)


def _wilson(p: float, trials: float, count: int) -> Estimate:
    z = float(stats.norm.ppf(0.975))
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), count)
