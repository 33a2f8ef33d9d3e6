"""Estimates with their 95 % intervals. Nothing in Sartor compares two numbers without one."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats


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
        interval = f"[{self.low:.3g}, {self.high:.3g}]" if math.isfinite(self.high) else "[no interval: one unit]"
        return f"{self.value:.3g} {interval}"


def mean(values: Sequence[float], groups: Sequence[object] | None = None) -> Estimate:
    """Mean of ``values`` with a Student t interval, clustered by ``groups``.

    Values of one group (the samples of one prompt, the pairs of one ranking) are not independent, so the group is the
    unit: the interval is that of a ratio of group sums, var(Σ_g (s_g - mean·n_g)) / N² with a G/(G-1) correction
    (Cameron & Miller 2015, eq. 11, for a regression on a constant). Without groups every value is its own.

    >>> print(mean([1.0, 2.0, 3.0, 4.0]))
    2.5 [0.446, 4.55]
    >>> mean([1.0, 1.0, 3.0, 3.0], groups="aabb").n
    2
    """
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan, 0)
    centre, error, count = _clustered(values, groups)
    half = float(stats.t.ppf(0.975, count - 1)) * error if count > 1 else math.inf
    return Estimate(centre, centre - half, centre + half, count)


def _clustered(values: Sequence[float], groups: Sequence[object] | None) -> tuple[float, float, int]:
    """Mean, its cluster-robust standard error (infinite for one group), and the number of groups."""
    x = np.asarray(values, dtype=float)
    _, cluster = np.unique(np.arange(x.size) if groups is None else [str(g) for g in groups], return_inverse=True)
    centre, count = float(x.mean()), int(cluster.max()) + 1
    if count < 2:
        return centre, math.inf, count
    residual_g = np.bincount(cluster, weights=x - centre)
    return centre, float(np.sqrt(count / (count - 1) * (residual_g**2).sum()) / x.size), count


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
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan, 0)
    p, error, count = _clustered(values, groups)
    trials = float(count)
    if groups is None:
        trials = float(len(values))
    elif 0 < p < 1 and 0 < error < math.inf:
        trials = min(float(len(values)), p * (1 - p) / error**2)
    z = float(stats.norm.ppf(0.975))
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), count)
