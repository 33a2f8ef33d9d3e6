"""What an option's value has to be, told by its type: an option that is declared is an option that is checked."""

import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sartor.errors import UserError, unknown


@dataclass(frozen=True, slots=True)
class Wanted:
    """A condition on a value, and how an error says it."""

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True, slots=True, init=False)
class OneOf:
    """A value that is one of a few names."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)


ABOVE_0 = Wanted("above 0", lambda value: value > 0)
NOT_BELOW_0 = Wanted("0 or more", lambda value: value >= 0)
# What help shows for an option that may be left out: FLOAT and not {None}|FLOAT.
INT, FLOAT = tyro.conf.arg(metavar="INT"), tyro.conf.arg(metavar="FLOAT")
STR, PATH = tyro.conf.arg(metavar="STR"), tyro.conf.arg(metavar="PATH")

Count = Annotated[int, ABOVE_0]
Positive = Annotated[float, ABOVE_0]
NotNegative = Annotated[float, NOT_BELOW_0]
Share = Annotated[float, Wanted("between 0 and 1", lambda value: 0 < value < 1)]
Seed = Annotated[int, NOT_BELOW_0]
OptionalCount = Annotated[int | None, INT, ABOVE_0]
OptionalPositive = Annotated[float | None, FLOAT, ABOVE_0]
OptionalText = Annotated[str | None, STR]
OptionalPath = Annotated[Path | None, PATH]
AsChat = Annotated[str, OneOf("auto", "always", "never")]
Dtype = Annotated[str, OneOf("auto", "bfloat16", "float32")]


class Checked:
    """A dataclass whose values are checked against what their types ask for.

    Raises:
        UserError: on the first value that is not as wanted.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self), include_extras=True)
        for name, value in vars(self).items():
            if value is not None:
                _check(name, value, getattr(hints[name], "__metadata__", ()))


def _check(name: str, value: Any, conditions: tuple[Any, ...]) -> None:
    finite = Wanted("a finite number", lambda value: not isinstance(value, float) or math.isfinite(value))
    for condition in (*conditions, finite):
        if isinstance(condition, OneOf) and value not in condition.names:
            raise unknown(_option(name), value, condition.names)
        if isinstance(condition, Wanted) and not condition.holds(value):
            raise UserError(f"{_option(name)} {value}: wanted {condition.words}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
