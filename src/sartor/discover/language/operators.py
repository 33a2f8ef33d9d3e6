"""The closed set of operators: what each takes and gives, its tensor code, and how it is written.

Every one is finite with finite gradients wherever its arguments are: a division, a logarithm or a root is guarded where
it would not be, and an exponential goes on as its tangent where it would overflow (``sartor.losses.stable``). Batch
statistics are over the last axis, so that many batches can be computed at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sartor.discover.language.expression import CONSTANT, Expression, LanguageError, bounded, constant
from sartor.losses.stable import SMALLEST, guarded_div, guarded_log, guarded_sqrt, log1mexp, tangent_exp, tangent_expm1

NUMBER, TRUTH = "number", "truth"


@dataclass(frozen=True)
class Operator:
    """One operator. ``python`` is how the language writes it, ``torch`` what stands in a loss file, ``latex`` in print;
    each with the arguments' places in braces. ``binds`` is how tightly an infix one holds its arguments, 0 for a call.
    """

    name: str
    compute: Callable[..., Tensor]
    torch: str
    latex: str
    takes: tuple[str, ...] = (NUMBER,)
    gives: str = NUMBER
    python: str = ""
    binds: int = 0

    @property
    def mixes(self) -> bool:
        """Whether one pair's value depends on the others in its batch."""
        return self.name.startswith("batch_")


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True).expand_as(x)


def _variance(x: Tensor) -> Tensor:
    return x.var(-1, unbiased=False, keepdim=True).expand_as(x)


def _deviation(x: Tensor) -> Tensor:
    # The gradient of a root at 0 is infinite: a batch without spread has none here.
    return guarded_sqrt(x.var(-1, unbiased=False, keepdim=True)).expand_as(x)


_TWO = (NUMBER, NUMBER)
OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("add", torch.add, "{0} + {1}", "{0} + {1}", _TWO, python="{0} + {1}", binds=2),
        Operator("sub", torch.sub, "{0} - {1}", "{0} - {1}", _TWO, python="{0} - {1}", binds=2),
        Operator("mul", torch.mul, "{0} * {1}", r"{0} \, {1}", _TWO, python="{0} * {1}", binds=3),
        Operator(
            "div", guarded_div, "guarded_div({0}, {1})", r"\frac{{{0}}}{{{1}}}", _TWO, python="{0} / {1}", binds=3
        ),
        Operator("neg", torch.neg, "-{0}", "-{0}", python="-{0}", binds=4),
        Operator("square", torch.square, "torch.square({0})", r"\left({0}\right)^2"),
        Operator("sqrt", guarded_sqrt, "guarded_sqrt({0})", r"\sqrt{{{0}}}"),
        Operator("abs", torch.abs, "torch.abs({0})", r"\left|{0}\right|"),
        Operator("exp", tangent_exp, "tangent_exp({0})", r"e^{{{0}}}"),
        Operator("expm1", tangent_expm1, "tangent_expm1({0})", r"\left(e^{{{0}}} - 1\right)"),
        Operator("log", guarded_log, "guarded_log({0})", r"\log\left({0}\right)"),
        Operator("log1mexp", log1mexp, "log1mexp({0})", r"\log\left(1 - e^{{{0}}}\right)"),
        Operator("sigmoid", torch.sigmoid, "torch.sigmoid({0})", r"\sigma\left({0}\right)"),
        Operator("log_sigmoid", F.logsigmoid, "F.logsigmoid({0})", r"\log\sigma\left({0}\right)"),
        Operator("softplus", F.softplus, "F.softplus({0})", r"\log\left(1 + e^{{{0}}}\right)"),
        Operator("relu", F.relu, "F.relu({0})", r"\left[{0}\right]_+"),
        Operator("tanh", torch.tanh, "torch.tanh({0})", r"\tanh\left({0}\right)"),
        Operator("maximum", torch.maximum, "torch.maximum({0}, {1})", r"\max\left({0}, {1}\right)", _TWO),
        Operator("minimum", torch.minimum, "torch.minimum({0}, {1})", r"\min\left({0}, {1}\right)", _TWO),
        Operator("greater", torch.gt, "{0} > {1}", "{0} > {1}", _TWO, TRUTH, "{0} > {1}", 1),
        Operator("less", torch.lt, "{0} < {1}", "{0} < {1}", _TWO, TRUTH, "{0} < {1}", 1),
        Operator("at_least", torch.ge, "{0} >= {1}", r"{0} \geq {1}", _TWO, TRUTH, "{0} >= {1}", 1),
        Operator("at_most", torch.le, "{0} <= {1}", r"{0} \leq {1}", _TWO, TRUTH, "{0} <= {1}", 1),
        Operator(
            "where",
            torch.where,
            "torch.where({0}, {1}, {2})",
            r"\left\{{ {1} \;\mathrm{{if}}\; {0},\; {2} \;\mathrm{{else}} \right\}}",
            (TRUTH, NUMBER, NUMBER),
        ),
        Operator("detach", Tensor.detach, "({0}).detach()", r"\mathrm{{sg}}\left[{0}\right]"),
        Operator("batch_mean", _mean, "({0}).mean()", r"\mathrm{{E}}\left[{0}\right]"),
        Operator("batch_var", _variance, "({0}).var(unbiased=False)", r"\mathrm{{Var}}\left[{0}\right]"),
        Operator("batch_std", _deviation, "guarded_sqrt(({0}).var(unbiased=False))", r"\mathrm{{Std}}\left[{0}\right]"),
    )
}


def kind_of(tree: Expression) -> str:
    """Whether it is a number or a truth, for each pair."""
    return OPERATORS[tree.op].gives if tree.op in OPERATORS else NUMBER


def apply(name: str, *args: Expression) -> Expression:
    """An operator on its arguments, checked; a constant's sign is part of the constant.

    >>> apply("neg", constant(2.0))
    Expression(op='constant', args=(), value=-2.0)

    Raises:
        LanguageError: an unknown operator, too many or too few arguments, one of the wrong kind, or too large a tree.
    """
    operator = OPERATORS.get(name)
    if operator is None:
        raise LanguageError(f"unknown operator {name!r}; known: {', '.join(OPERATORS)}")
    if len(args) != len(operator.takes):
        wanted = f"{len(operator.takes)} argument{'s' * (len(operator.takes) > 1)}"
        raise LanguageError(f"{name}: wanted {wanted}, got {len(args)}")
    for place, (arg, kind) in enumerate(zip(args, operator.takes, strict=True), start=1):
        if kind_of(arg) != kind:
            raise LanguageError(f"{name}: argument {place} wanted a {kind}, got a {kind_of(arg)}")
    if name == "neg" and args[0].op == CONSTANT:
        return constant(-args[0].value)
    return bounded(Expression(name, args))


def divides_by_constant(node: Expression) -> bool:
    """Whether it is a division that needs no guard."""
    return node.op == "div" and node.args[1].op == CONSTANT and abs(node.args[1].value) >= SMALLEST
