"""Estimates in words: figures with as many digits as their interval supports, and verdicts that follow from it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sartor.evaluate.statistics import ONE_UNIT, Estimate

NO_DIFFERENCE = "no difference shown"
NOT_MEASURABLE = "not measurable"
NO_INTERVAL = "no interval, so no verdict"


@dataclass(frozen=True, slots=True)
class Figure:
    """One estimate as printed: ``68 %``, ``[61, 75]`` and ``n = 120 pairs``."""

    value: str
    interval: str
    n: str

    def __str__(self) -> str:
        return f"{self.value} {self.interval}"


def read_estimate(raw: object) -> Estimate | None:
    """The estimate in a JSON value, or None. A plain number is an estimate of unknown width, never a certain one.

    >>> print(read_estimate({"value": 0.5, "low": 0.4, "high": 0.6, "n": 90}), read_estimate("soon"))
    0.5 [0.4, 0.6] None
    """
    if isinstance(raw, Mapping):
        value, low, high = (as_float(raw.get(key)) for key in ("value", "low", "high"))
        n = as_float(raw.get("n"))
        return Estimate(value, low, high, int(n) if math.isfinite(n) else 0) if "value" in raw else None
    value = as_float(raw)
    return None if math.isnan(value) else Estimate(value, -math.inf, math.inf, 0)


def as_float(raw: object) -> float:
    """A JSON number as a float; anything else is NaN."""
    return float(raw) if isinstance(raw, int | float) and not isinstance(raw, bool) else math.nan


def verdict(estimate: Estimate, neutral: float, above: str = "better", below: str = "worse") -> str:
    """What the 95 % interval allows one to say against ``neutral``. An interval that touches it shows nothing.

    >>> verdict(Estimate(0.68, 0.61, 0.75, 60), 0.5), verdict(Estimate(0.55, 0.50, 0.60, 60), 0.5)
    ('better', 'no difference shown')
    """
    if not math.isfinite(estimate.value):
        return NOT_MEASURABLE
    if not (math.isfinite(estimate.low) or math.isfinite(estimate.high)):
        return NO_INTERVAL
    if estimate.low > neutral:
        return above
    return below if estimate.high < neutral else NO_DIFFERENCE


def shift(before: Estimate, after: Estimate, up: str = "higher", down: str = "lower") -> str:
    """What two 95 % intervals allow one to say about a change: a word only where they do not overlap.

    >>> shift(Estimate(0.1, 0.0, 0.2, 60), Estimate(0.4, 0.3, 0.5, 60))
    'higher'
    """
    if not (math.isfinite(before.value) and math.isfinite(after.value)):
        return NOT_MEASURABLE
    if not all(math.isfinite(estimate.high) for estimate in (before, after)):
        return NO_INTERVAL
    if after.low > before.high:
        return up
    return down if after.high < before.low else NO_DIFFERENCE


def number(value: float, decimals: int | None = None) -> str:
    """A number to read: a true minus sign, commas in thousands, three significant digits unless told.

    >>> number(-0.1234), number(31402.4), number(1e-6), number(float("nan"))
    ('−0.123', '31,402', '1e−06', 'n/a')
    """
    if not math.isfinite(value):
        return "n/a"
    if decimals is None:
        if value and not 1e-4 <= abs(value) < 1e9:
            return f"{value:.3g}".replace("-", "−")
        decimals = 0 if abs(value) >= 100 or value == int(value) else max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.removeprefix("-") if not text.strip("-0.,") else text.replace("-", "−")


def figure(estimate: Estimate, unit: str = "", percent: bool = False) -> Figure:
    """An estimate as printed. The width of the interval decides the digits; ``unit`` names what ``n`` counts.

    >>> f = figure(Estimate(0.684, 0.612, 0.748, 120), "pairs", percent=True)
    >>> f.value, f.interval, f.n
    ('68\\xa0%', '[61,\\xa075]', 'n\\xa0=\\xa0120\\xa0pairs')
    >>> figure(Estimate(0.41, -5.2, 6.1, 2)).value
    '0.4'
    """
    scale = 100 if percent else 1
    value, low, high = (scale * x for x in (estimate.value, estimate.low, estimate.high))
    known, width = math.isfinite(low) and math.isfinite(high), high - low
    decimals = None
    if known and width > 0:
        decimals = min(6, max(0, 1 - math.floor(math.log10(width))))
        if value and not percent and not round(value, decimals):
            decimals += 1  # however wide the interval, a value is not rounded to nothing if one digit more can help it
        # A bound of 50.3 % printed as 50 would seem to contradict a verdict of "better".
        close = any(0 < abs(x - 50) < 0.5 for x in (low, high))
        decimals = int(close) if percent and width >= 2 else decimals
    elif percent:
        decimals = 0
    shown = number(value, decimals)
    ends = [number(x, decimals) for x in (low, high)]
    unit = unit.removesuffix("s") if estimate.n == 1 else unit
    unknown = ONE_UNIT if estimate.n == 1 else "[interval unknown]"
    n = f"n = {estimate.n:,} {unit}".rstrip() if estimate.n else "n not recorded"
    return Figure(
        f"{shown}\u00a0%" if percent and shown != "n/a" else shown,
        f"[{ends[0]},\u00a0{ends[1]}]" if known else unknown.replace(" ", "\u00a0"),
        n.replace(" ", "\u00a0"),
    )
