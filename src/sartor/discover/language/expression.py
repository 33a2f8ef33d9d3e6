"""The tree that an objective is: inputs, constants and operators, each of a kind, number or truth."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from sartor.errors import UserError

CONSTANT = "constant"
MOST_NODES = 160
LARGEST_CONSTANT, DIGITS = 1e4, 6

# What an objective sees of a pair (``PairLogps``); the last three are differences of the first four.
INPUTS = {
    "policy_chosen": r"\log\pi_w",
    "policy_rejected": r"\log\pi_l",
    "reference_chosen": r"\log\pi^{ref}_w",
    "reference_rejected": r"\log\pi^{ref}_l",
    "chosen_length": r"|y_w|",
    "rejected_length": r"|y_l|",
    "beta": r"\beta",
    "chosen_logratio": r"r_w",
    "rejected_logratio": r"r_l",
    "margin": r"\rho",
}


class LanguageError(UserError):
    """Why a text or a tree is no objective of the language, in one line."""


@dataclass(frozen=True)
class Expression:
    """A node: the name of an input, ``CONSTANT`` with its ``value``, or an operator with its arguments.

    Equal trees are equal and hash alike. Made by :func:`apply`, :func:`constant` and :func:`given`, which keep it typed
    and bounded.
    """

    op: str
    args: tuple["Expression", ...] = ()
    value: float = 0.0

    @cached_property
    def size(self) -> int:
        """Nodes of the tree."""
        return 1 + sum(arg.size for arg in self.args)

    @cached_property
    def _hash(self) -> int:
        return hash((self.op, self.args, self.value))

    def __hash__(self) -> int:
        return self._hash

    def walk(self) -> Iterator["Expression"]:
        """Every node, the arguments of one after itself."""
        yield self
        for arg in self.args:
            yield from arg.walk()

    def map(self, change: Callable[["Expression"], "Expression"]) -> "Expression":
        """The tree with every node changed, from the leaves up."""
        args = tuple(arg.map(change) for arg in self.args)
        return change(self if args == self.args else Expression(self.op, args, self.value))

    @cached_property
    def inputs(self) -> frozenset[str]:
        """Names of the inputs that it reads."""
        return frozenset(node.op for node in self.walk() if node.op in INPUTS)


def constant(value: float) -> Expression:
    """A constant, kept to six digits, since more say nothing.

    >>> constant(0.1234567)
    Expression(op='constant', args=(), value=0.123457)

    Raises:
        LanguageError: beyond ±10,000, or not finite.
    """
    if not abs(value) <= LARGEST_CONSTANT:
        raise LanguageError(f"constant {value:g}: wanted between -{LARGEST_CONSTANT:,.0f} and {LARGEST_CONSTANT:,.0f}")
    return Expression(CONSTANT, (), float(f"{value:.{DIGITS}g}") + 0.0)


def given(name: str) -> Expression:
    """An input by its name."""
    if name not in INPUTS:
        raise LanguageError(f"unknown input {name!r}; known: {', '.join(INPUTS)}")
    return Expression(name)


def bounded(tree: Expression) -> Expression:
    """The tree itself, if it is no larger than an objective may be.

    Raises:
        LanguageError: more than 160 nodes.
    """
    if tree.size > MOST_NODES:
        raise LanguageError(f"the expression has more than {MOST_NODES} nodes: wanted a smaller one")
    return tree


def replaced(tree: Expression, target: int, new: Expression) -> Expression:
    """The tree with the node at place ``target`` of :meth:`Expression.walk` replaced."""
    if target == 0:
        return new
    place, args = 1, list(tree.args)
    for i, arg in enumerate(args):
        if target < place + arg.size:
            args[i] = replaced(arg, target - place, new)
            return Expression(tree.op, tuple(args), tree.value)
        place += arg.size
    raise IndexError(target)
