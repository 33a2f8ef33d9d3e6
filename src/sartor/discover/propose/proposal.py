"""What a proposer is shown, and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from sartor.discover.language.expression import Expression
from sartor.evaluate.statistics import Estimate


@dataclass(frozen=True)
class Proposal:
    """A candidate, before any screen: its tree, or why the text that was proposed is none.

    ``parents`` are the numbers of the candidates that it was made from, ``thought`` what a language model said of it,
    and ``exchange`` the number of the exchange with one.
    """

    tree: Expression | None
    origin: str
    parents: tuple[int, ...] = ()
    text: str = ""
    name: str = ""
    thought: str = ""
    refusal: str = ""
    exchange: int | None = None


@dataclass(frozen=True)
class Member:
    """A candidate that was trained somewhere: what it is, and how it fared at the highest rung that it reached.

    ``fitness`` orders the members: higher is better. ``island`` is the population that it belongs to,
    ``behaviour`` the cell of the archive over behaviour.
    """

    number: int
    name: str
    tree: Expression
    fitness: float
    score: Estimate
    rung: str
    island: int = 0
    behaviour: str = ""
    likeness: str = ""
    parents: tuple[int, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A text or tree that was refused, and why."""

    text: str
    why: str


@dataclass(frozen=True)
class Population:
    """What a proposer may look at: members, best first, and what failed, newest last.

    ``beta`` is what the run trains at by default, and ``unit`` what a score is in.
    """

    members: Sequence[Member]
    failures: Sequence[Failure] = ()
    beta: float = 0.1
    unit: str = "bits per pair"


@runtime_checkable
class Proposer(Protocol):
    """Somebody who invents objectives."""

    @property
    def name(self) -> str:
        """What ``--proposer`` calls it, and its proposals' origin."""
        ...

    @property
    def exhausted(self) -> str:
        """Why it proposes no more; empty while it does."""
        ...

    def propose(self, population: Population, count: int, draw: np.random.Generator) -> list[Proposal]:
        """About ``count`` proposals. With the same population and the same state of ``draw``, the same ones."""
        ...
