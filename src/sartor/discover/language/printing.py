"""Tree to text: the language itself, the torch of a loss file, LaTeX."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sartor.discover.language.expression import CONSTANT, INPUTS, Expression
from sartor.discover.language.operators import OPERATORS, divides_by_constant

LOOSEST, TIGHTEST = 0, 5
TORCH_INPUTS = {
    "beta": "beta",
    "chosen_length": "pair.chosen_length.float()",
    "rejected_length": "pair.rejected_length.float()",
}


def to_python(tree: Expression) -> str:
    """The tree as the language writes it; parsing it again gives the same tree.

    >>> from sartor.discover.language.parse import parse
    >>> to_python(parse("-logsigmoid(beta*(margin - 2)) / 2"))
    '-log_sigmoid(beta * (margin - 2)) / 2'
    """
    return _written(tree, _Style(_python, lambda name: name))


def to_torch(tree: Expression) -> str:
    """The tree as an expression of torch over ``pair``, a ``PairLogps``, and ``beta``, a number."""
    inputs = lambda name: TORCH_INPUTS.get(name, f"pair.{name}")  # noqa: E731
    # Numbers with a point: of whole ones torch makes tensors of integers, which some of its functions do not take.
    return _written(tree, _Style(_torch, inputs, number=repr, calls_take_tensors=True))


def to_latex(tree: Expression) -> str:
    """The tree for print; ρ is the margin, r the log-ratios to the reference, w the chosen side, l the rejected one."""
    return _written(tree, _Style(lambda node: OPERATORS[node.op].latex, INPUTS.__getitem__, _latex_number, {"neg": 3}))


@dataclass(frozen=True)
class _Style:
    """How operators, inputs and constants are written, and which bind otherwise than in Python."""

    operator: Callable[[Expression], str]
    input: Callable[[str], str]
    number: Callable[[float], str] = lambda value: f"{value:g}" if float(f"{value:g}") == value else repr(value)
    binds: Mapping[str, int] = field(default_factory=dict)
    calls_take_tensors: bool = False


def _python(node: Expression) -> str:
    places = ", ".join(f"{{{i}}}" for i in range(len(node.args)))
    return OPERATORS[node.op].python or f"{node.op}({places})"


def _torch(node: Expression) -> str:
    return "{0} / {1}" if divides_by_constant(node) else OPERATORS[node.op].torch


def _latex_number(value: float) -> str:
    digits, mark, power = f"{value:g}".partition("e")
    if not mark:
        return digits
    factor = {"1": "", "-1": "-"}.get(digits, rf"{digits} \cdot ")
    return f"{factor}10^{{{int(power)}}}"


def _written(tree: Expression, style: _Style) -> str:
    """Write a tree by the operators' patterns, with brackets where precedence asks for them."""

    def write(node: Expression, least: int) -> str:
        if node.op == CONSTANT:
            text = style.number(node.value)
            return f"({text})" if node.value < 0 and least > 2 else text
        if node.op in INPUTS:
            return style.input(node.op)
        pattern, binds = style.operator(node), style.binds.get(node.op, OPERATORS[node.op].binds)
        is_call = "(" in pattern
        # The right side of a - and a / is held tighter than the left one; arguments of a call need no brackets.
        places = [(binds, binds + 1), (binds,)][len(node.args) == 1] if binds else (LOOSEST,) * len(node.args)
        if is_call or pattern.startswith("\\frac"):
            places, binds = (LOOSEST,) * len(node.args), TIGHTEST
        args = [write(arg, place) for arg, place in zip(node.args, places, strict=True)]
        if style.calls_take_tensors and is_call:  # torch's functions take no plain numbers
            args = [
                text if arg.inputs - {"beta"} else f"torch.as_tensor({text})"
                for text, arg in zip(args, node.args, strict=True)
            ]
        text = pattern.format(*args)
        return f"({text})" if binds and binds < least else text

    return write(tree, LOOSEST)
