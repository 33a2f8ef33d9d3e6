"""Tree to text: the language itself, the torch of a loss file, LaTeX."""

from collections.abc import Callable

from sartor.discover.language.expression import CONSTANT, INPUTS, Expression
from sartor.discover.language.operators import OPERATORS, divides_by_constant

LOOSEST, TIGHTEST = 0, 5


def to_python(tree: Expression) -> str:
    """The tree as the language writes it; parsing it again gives the same tree.

    >>> from sartor.discover.language.parse import parse
    >>> to_python(parse("-logsigmoid(beta*(margin - 2)) / 2"))
    '-log_sigmoid(beta * (margin - 2)) / 2'
    """
    return _infix(tree, _python)


def to_torch(tree: Expression) -> str:
    """The tree as an expression of torch over ``pair``, a ``PairLogps``, and ``beta``."""
    return _infix(tree, _torch, lambda name: name if name == "beta" else f"pair.{name}")


def to_latex(tree: Expression) -> str:
    """The tree for print; ρ is the margin, r the log-ratios to the reference, w the chosen side, l the rejected one."""
    return _infix(tree, lambda node: OPERATORS[node.op].latex, INPUTS.__getitem__)


def _python(node: Expression) -> str:
    places = ", ".join(f"{{{i}}}" for i in range(len(node.args)))
    return OPERATORS[node.op].python or f"{node.op}({places})"


def _torch(node: Expression) -> str:
    return "{0} / {1}" if divides_by_constant(node) else OPERATORS[node.op].torch


def _infix(
    tree: Expression, written: Callable[[Expression], str], named: Callable[[str], str] = lambda name: name
) -> str:
    """Write a tree by the operators' patterns, with brackets where precedence asks for them."""

    def write(node: Expression, least: int) -> str:
        if node.op == CONSTANT:
            text = f"{node.value:g}" if float(f"{node.value:g}") == node.value else repr(node.value)
            return f"({text})" if node.value < 0 and least > 2 else text
        if node.op in INPUTS:
            return named(node.op)
        operator = OPERATORS[node.op]
        binds = operator.binds
        # The right side of a - and a / is held tighter than the left one; arguments of a call need no brackets.
        places = [(binds, binds + 1), (binds,)][len(node.args) == 1] if binds else (LOOSEST,) * len(node.args)
        if written(node).startswith("\\frac"):
            places, binds = (LOOSEST, LOOSEST), TIGHTEST
        text = written(node).format(*(write(a, p) for a, p in zip(node.args, places, strict=True)))
        return f"({text})" if binds and binds < least else text

    return write(tree, LOOSEST)
