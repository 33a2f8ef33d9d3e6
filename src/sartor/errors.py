"""What a user can mend is a ``UserError``; everything else is a bug and keeps its traceback."""

import difflib
from collections.abc import Iterable

MANY = 20


class UserError(Exception):
    """Wrong input. Its text is one line: what, where, wanted and got, the way out. The command line exits with 2."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not one of ``known``: suggests the nearest, and lists all unless they are many.

    >>> print(unknown("loss", "dop", ["dpo", "ipo"]))
    unknown loss 'dop': did you mean 'dpo'? known: dpo, ipo
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1 if len(names) <= MANY else 3)
    if near and len(names) > MANY:
        return UserError(f"unknown {kind} {name!r}: did you mean {' or '.join(map(repr, near))}?")
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}known: {', '.join(names)}")
