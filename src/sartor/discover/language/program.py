"""Tree to tensor code: a straight line of operations, each common part once, and the weights it gives both sides.

A candidate sees detached log-probs and gives back numbers: its loss for each pair and the two weights ∂loss/∂log π_w
and ∂loss/∂log π_l, which are all that training needs of an objective. It never meets a model, an optimizer or a graph.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from sartor.discover.language.expression import CONSTANT, INPUTS, Expression
from sartor.discover.language.operators import OPERATORS, apply, divides_by_constant
from sartor.objectives.contract import Loss, Traits
from sartor.objectives.objective import Term
from sartor.types import PairLogps

LOGPS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
DIFFERENCES = {
    "chosen_logratio": ("policy_chosen", "reference_chosen"),
    "rejected_logratio": ("policy_rejected", "reference_rejected"),
    "margin": ("chosen_logratio", "rejected_logratio"),
}
BETA = 0.1  # where a run says none


def stabilised(tree: Expression) -> Expression:
    """The same function in the form that neither overflows nor loses digits.

    A gate times an exponential becomes one exponential, so that neither factor overflows alone (LRML's NaN at β of 2.5
    and more: a gate of 0 times an exponential of infinity).

    >>> from sartor.discover.language.parse import parse
    >>> from sartor.discover.language.printing import to_python
    >>> to_python(stabilised(parse("sigmoid(margin / 2) * exp(-margin) + log(1 + exp(margin))")))
    'exp(log_sigmoid(margin / 2) + -margin) + softplus(margin)'
    """
    return tree.map(_stable)


def _stable(node: Expression) -> Expression:
    match node:
        case Expression("log", (Expression("sigmoid", (x,)),)):
            return apply("log_sigmoid", x)
        case Expression("log", (Expression("add", (Expression("constant", (), 1.0), Expression("exp", (x,)))),)):
            return apply("softplus", x)
        case Expression("log", (Expression("add", (Expression("exp", (x,)), Expression("constant", (), 1.0))),)):
            return apply("softplus", x)
        case Expression("log", (Expression("exp", (x,)),)):
            return x
        case Expression("mul", (Expression("sigmoid", (gate,)), Expression("exp", (x,)))):
            return apply("exp", apply("add", apply("log_sigmoid", gate), x))
        case Expression("mul", (Expression("exp", (x,)), Expression("sigmoid", (gate,)))):
            return apply("exp", apply("add", apply("log_sigmoid", gate), x))
        case Expression("mul", (Expression("exp", (x,)), Expression("exp", (y,)))):
            return apply("exp", apply("add", x, y))
    return node


@dataclass(frozen=True)
class Weights:
    """What a candidate says of some pairs: its loss, and the two weights that training multiplies gradients with."""

    loss: Float[Tensor, "*batches pairs"]
    chosen: Float[Tensor, "*batches pairs"]
    rejected: Float[Tensor, "*batches pairs"]


@dataclass(frozen=True)
class Program:
    """A tree, ready to run."""

    tree: Expression

    @cached_property
    def _line(self) -> tuple[list[tuple[int, Callable[..., Tensor], tuple[int, ...]]], dict[Expression, int]]:
        """Steps (place of the result, operation, places of its arguments), and the place of each distinct node."""
        places: dict[Expression, int] = {}
        steps = []

        def visit(node: Expression) -> int:
            if node not in places:
                args = tuple(visit(arg) for arg in node.args)
                places[node] = len(places)
                if node.op in OPERATORS:
                    compute = torch.div if divides_by_constant(node) else OPERATORS[node.op].compute
                    steps.append((places[node], compute, args))
            return places[node]

        visit(stabilised(self.tree))
        return steps, places

    @cached_property
    def mixes(self) -> bool:
        """Whether one pair's loss depends on the others in its batch."""
        return any(OPERATORS[node.op].mixes for node in self.tree.walk() if node.op in OPERATORS)

    def losses(self, sides: Mapping[str, Tensor], beta: Tensor | float) -> Float[Tensor, "*batches pairs"]:
        """The loss of each pair, differentiable.

        Args:
            sides: the four log-probs and two lengths by the names of ``PairLogps``, each [*batches, pairs]: several
                batches are computed at once, and statistics are over the last axis.
            beta: β, one for all or [*batches, 1].
        """
        steps, places = self._line
        values: list[Tensor] = [None] * len(places)  # type: ignore[list-item]
        like = sides["policy_chosen"]
        known = dict(sides)
        for name, (a, b) in DIFFERENCES.items():
            known[name] = known[a] - known[b]
        known["beta"] = beta if isinstance(beta, Tensor) else like.new_tensor(beta)
        for node, place in places.items():
            if node.op == CONSTANT:
                values[place] = like.new_tensor(node.value)
            elif node.op in INPUTS:
                values[place] = known[node.op]
        for place, compute, args in steps:
            values[place] = compute(*(values[arg] for arg in args))
        last = values[-1]
        return last.expand_as(like) if last.shape != like.shape else last

    def weights(self, sides: Mapping[str, Tensor], beta: Tensor | float) -> Weights:
        """The loss of each pair and its derivative by both log-probs of the policy; nothing carries a gradient.

        With batch statistics the derivative is that of the batch's summed loss.
        """
        with torch.enable_grad():
            leaves = {name: side.detach() for name, side in sides.items()}
            pair = [leaves[name].requires_grad_() for name in LOGPS[:2]]
            loss = self.losses(leaves, beta)
            found: tuple[Tensor | None, ...] = (None, None)
            if loss.requires_grad:
                found = torch.autograd.grad(loss.sum(), pair, allow_unused=True)
        chosen, rejected = (torch.zeros_like(loss) if g is None else g for g in found)
        return Weights(loss.detach(), chosen, rejected)


def as_loss(tree: Expression, name: str = "candidate") -> Loss:
    """The tree as a loss like any other: ``loss(pair, *, beta)``.

    What training differentiates is the line through the loss with the candidate's two weights as slopes, so that the
    candidate itself only ever sees numbers.
    """
    program = Program(tree)

    def loss(pair: PairLogps, *, beta: float = BETA) -> Float[Tensor, " pairs"]:
        found = program.weights(sides_of(pair), beta)
        policy = pair.policy_chosen, pair.policy_rejected
        moved = [p - p.detach() for p in policy]
        return found.loss + found.chosen * moved[0] + found.rejected * moved[1]

    loss.__name__ = name
    return loss


def as_term(tree: Expression, name: str = "candidate", beta: float = BETA) -> Term:
    """The tree as a term of an objective, with traits that follow from the tree and need not be measured."""
    has_beta = "beta" in tree.inputs
    loss = as_loss(tree, name)
    bound = lambda pair: loss(pair, beta=beta)  # noqa: E731
    read = set(tree.inputs)
    for difference in ("margin", "chosen_logratio", "rejected_logratio"):  # the margin is made of the two others
        read |= set(DIFFERENCES[difference]) if difference in read else set()
    depends_on = frozenset(field for field in read if field.startswith("reference") or field.endswith("length"))
    traits = Traits("pairs", depends_on, Program(tree).mixes, False)
    return Term(name, bound, 1.0, traits, beta if has_beta else None)


def sides_of(pair: PairLogps) -> dict[str, Tensor]:
    """The inputs of a candidate that are not derived from others, lengths as numbers of the log-probs' precision."""
    sides = {name: getattr(pair, name) for name in LOGPS}
    for name in ("chosen_length", "rejected_length"):
        sides[name] = getattr(pair, name).to(sides["policy_chosen"].dtype)
    return sides
