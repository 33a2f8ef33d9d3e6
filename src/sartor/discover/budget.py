"""The budget of a search: what a candidate costs on each rung, how many that pays for, and when to stop.

The plan is made once, from what the known losses cost that every search begins with, and kept in the archive: from
there on the search does what the plan says, and looks at the clock only to stop in time.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sartor.config import DiscoverConfig
from sartor.config.discover import seconds_of
from sartor.console import duration
from sartor.discover.archive import Archive
from sartor.errors import UserError

PER_ADAPTER = 25  # candidates through the linear rung for each that is really trained
LEAST_SEEDS = 3  # to which a budget may shorten a retrial: of two an interval reaches from here to the moon
SPARE = 1.05  # of what a forecast says, for what it does not foresee
BASELINES = ("dpo", "simpo", "lrml")  # what a winner has to be better than


@dataclass(frozen=True)
class Budget:
    """Counts that a search works off, and the seconds that they were made from.

    Attributes:
        linear: candidates through the linear rung, known losses not counted.
        adapters: of these, how many are really trained.
        seeds: of the retrial.
        forecast: seconds of the whole, set-up included.
        unit: seconds of one candidate by rung, the retrial's too.
        given: the time that it was made for.
    """

    linear: int
    adapters: int
    seeds: int
    forecast: float
    unit: Mapping[str, float]
    given: str

    def __str__(self) -> str:
        retrial = f"{self.seeds} fresh seeds for the retrial" if self.seeds else "no retrial"
        return (
            f"{self.linear:,} candidates through the linear rung, {self.adapters} really trained, {retrial}: about "
            f"{duration(self.forecast)}"
        )

    def record(self) -> dict[str, Any]:
        """As it stands in the archive."""
        return asdict(self)


def make_budget(
    config: DiscoverConfig, unit: Mapping[str, float], spent: float, linear: int = 0, adapters: int = 0
) -> Budget:
    """What the time that is left pays for: the retrial first, the rest for the race.

    Args:
        config: --budget, or counts in its place.
        unit: seconds of one candidate by rung, as measured; ``retrial`` of one run of the retrial.
        spent: seconds so far.
        linear: candidates that went through the linear rung already.
        adapters: candidates that were really trained already.

    Raises:
        UserError: the budget does not pay for one real training and the retrial.
    """
    left = seconds_of(config.budget) - spent
    arms = config.finalists + len(BASELINES)
    race = unit["tabular"] + unit["linear"]
    each = PER_ADAPTER * race + unit["adapter"]
    seeds = config.seeds
    if config.candidates is not None:
        more = config.candidates - linear, (config.adapters or max(1, config.candidates // PER_ADAPTER)) - adapters
    else:
        # A shorter retrial leaves room for a search at all; what it can show is told by its interval.
        while seeds > LEAST_SEEDS and SPARE * (seeds * arms * unit["retrial"] + 2 * each) > left:
            seeds -= 1
        room = left / SPARE - seeds * arms * unit["retrial"]
        if room < each:
            least = spent + SPARE * (seeds * arms * unit["retrial"] + each)
            raise UserError(
                f"--budget {config.budget}: {duration(spent)} are spent, and one real training with a retrial on "
                f"{seeds} seeds takes about {duration(least - spent)} more; wanted {duration(least)} or more, fewer "
                "--prompts, shorter answers, or --seeds 0"
            )
        trained = config.adapters - adapters if config.adapters else int(room / each)
        more = PER_ADAPTER * trained, trained
    forecast = spent + more[0] * race + more[1] * unit["adapter"] + seeds * arms * unit["retrial"]
    return Budget(linear + more[0], adapters + more[1], seeds, forecast, dict(unit), config.budget)


def kept_budget(archive: Archive) -> Budget | None:
    """The plan of a search that was begun."""
    found = archive.read_meta("budget")
    return None if found is None else Budget(**found)


class Clock:
    """Device-seconds that a search may still spend."""

    def __init__(self, config: DiscoverConfig, archive: Archive) -> None:
        # Where counts are given they are worked off, however long that takes.
        self.total = float("inf") if config.candidates is not None else seconds_of(config.budget)
        self.archive = archive

    @property
    def left(self) -> float:
        """Seconds."""
        return self.total - sum(self.archive.spent().values())
