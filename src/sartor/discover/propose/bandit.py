"""Which proposer is asked next: Thompson sampling of how often its proposals succeed, by what they cost."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

TOP = 0.25  # a proposal succeeds if, when judged, it is among so many of the best so far
PRIOR = 1.0, 3.0  # successes and failures that each proposer starts with: what TOP expects of one


@dataclass(frozen=True)
class Record:
    """What became of one proposer's proposals: successes, all of them, and seconds that asking for one took."""

    successes: float
    proposals: float
    seconds: float


def choose(records: Mapping[str, Record], common: float, draw: np.random.Generator) -> str:
    """The proposer with the highest draw of successes per second.

    Args:
        records: by proposer; one that was never asked has only its prior.
        common: seconds that judging a proposal takes, whoever made it.
        draw: where the randomness comes from.
    """
    worth = {
        name: draw.beta(PRIOR[0] + record.successes, PRIOR[1] + record.proposals - record.successes)
        / (common + record.seconds)
        for name, record in records.items()
    }
    return max(worth, key=worth.__getitem__)
