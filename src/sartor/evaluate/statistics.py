"""Estimates with their 95 % intervals. Nothing in Sartor compares two numbers without one."""

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

    def record(self) -> dict[str, float]:
        """As it stands in ``metrics.jsonl``."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


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
    x = np.asarray(values, dtype=float)
    if x.size == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    _, cluster = np.unique(np.arange(x.size) if groups is None else [str(g) for g in groups], return_inverse=True)
    centre, count = float(x.mean()), int(cluster.max()) + 1
    if count < 2:
        return Estimate(centre, float("-inf"), float("inf"), count)
    residual_g = np.bincount(cluster, weights=x - centre)
    error = np.sqrt(count / (count - 1) * (residual_g**2).sum()) / x.size
    half = float(stats.t.ppf(0.975, count - 1)) * float(error)
    return Estimate(centre, centre - half, centre + half, count)


def proportion(values: Sequence[float]) -> Estimate:
    """Share of successes among independent trials with a Wilson score interval (Wilson 1927). A half counts as a tie.

    >>> print(proportion([1.0] * 65 + [0.0] * 35))
    0.65 [0.553, 0.736]
    """
    n = len(values)
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    p, z = float(np.mean(values)), float(stats.norm.ppf(0.975))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n)
