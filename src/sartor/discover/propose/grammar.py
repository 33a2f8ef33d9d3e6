"""Objectives without a language model: a random grammar; mutation, crossover and tuned constants of what did well."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sartor.discover.language.expression import CONSTANT, Expression, LanguageError, constant, replaced
from sartor.discover.language.operators import NUMBER, OPERATORS, TRUTH, apply, kind_of
from sartor.discover.language.parse import parse
from sartor.discover.language.simplify import constants_of, simplify
from sartor.discover.propose.parents import pick
from sartor.discover.propose.proposal import Population, Proposal

MOST = 40  # nodes of a proposal: what is longer is never read
TRIES = 20
DEEPEST = 3
JITTER = 0.5  # standard deviation of the logarithm of a constant's change

# What loss functions are made of, and how often each is drawn: without weights nine of ten trees have no use.
LEAVES = {
    "beta * margin": 6.0,
    "beta * chosen_logratio": 2.0,
    "beta * rejected_logratio": 2.0,
    "margin": 1.0,
    "chosen_logratio": 0.5,
    "rejected_logratio": 0.5,
    "policy_chosen / chosen_length": 0.7,
    "policy_rejected / rejected_length": 0.7,
    "chosen_logratio / chosen_length": 0.5,
    "rejected_logratio / rejected_length": 0.5,
    "policy_chosen - policy_rejected": 0.5,
    "chosen_length - rejected_length": 0.2,
    "beta": 0.3,
}
CALLS = {
    "log_sigmoid": 3.0,
    "softplus": 2.0,
    "sigmoid": 2.0,
    "exp": 1.0,
    "relu": 1.5,
    "square": 1.0,
    "tanh": 1.0,
    "neg": 1.5,
    "abs": 0.5,
    "detach": 0.5,
    "batch_mean": 0.5,
    "batch_std": 0.3,
    "sqrt": 0.2,
    "log": 0.2,
}
INFIX = {"add": 3.0, "sub": 3.0, "mul": 3.0, "div": 0.5, "maximum": 0.5, "minimum": 0.5}


@dataclass(frozen=True)
class Grammar:
    """A ``Proposer`` that makes objectives by one way of making them: one of ``WAYS``."""

    name: str
    exhausted: str = ""  # which it never is

    def propose(self, population: Population, count: int, draw: np.random.Generator) -> list[Proposal]:
        """``count`` proposals, or fewer where this way finds nothing new to say."""
        found: list[Proposal] = []
        for _ in range(TRIES * count):
            if len(found) == count:
                break
            made = WAYS[self.name](population, draw)
            if made is not None and made.tree is not None and 2 < made.tree.size <= MOST:
                found.append(made)
        return found


def random_tree(draw: np.random.Generator, depth: int = DEEPEST) -> Expression:
    """A random number of at most so many operators above its leaves."""
    kind = draw.random()
    if depth == 0 or kind < 0.1:
        if draw.random() < 0.2:
            return constant(_round(float(draw.choice([0.1, 0.25, 0.5, 1.0, 2.0, 5.0]) * np.exp(0.3 * draw.normal()))))
        return parse(_draw(draw, LEAVES))
    if kind < 0.5:
        return apply(_draw(draw, CALLS), random_tree(draw, depth - 1))
    if kind < 0.95:
        return apply(_draw(draw, INFIX), random_tree(draw, depth - 1), random_tree(draw, depth - 1))
    return apply("where", random_truth(draw), random_tree(draw, depth - 1), random_tree(draw, depth - 1))


def random_truth(draw: np.random.Generator) -> Expression:
    """A random comparison of something that pairs differ by with a constant."""
    return apply(str(draw.choice(["greater", "less"])), parse(_draw(draw, LEAVES)), constant(_round(draw.normal())))


def _draw(draw: np.random.Generator, weights: dict[str, float]) -> str:
    total = np.array(list(weights.values()))
    return list(weights)[int(draw.choice(len(weights), p=total / total.sum()))]


def _round(value: float) -> float:
    return float(f"{value:.2g}")


def _random(population: Population, draw: np.random.Generator) -> Proposal | None:
    return Proposal(simplify(random_tree(draw)), "random")


def _mutate(population: Population, draw: np.random.Generator) -> Proposal | None:
    parent = pick(population, draw)
    if parent is None:
        return None
    tree = parent.tree
    for _ in range(1 + int(draw.random() < 0.3)):
        tree = _changed(tree, draw)
    tree = simplify(tree)
    return Proposal(tree, "mutate", (parent.number,)) if tree != parent.tree else None


def _changed(tree: Expression, draw: np.random.Generator) -> Expression:
    """One change at a random place, of the kinds that this place allows."""
    nodes = list(tree.walk())
    at = int(draw.integers(len(nodes)))
    node = nodes[at]
    changes: list[Callable[[], Expression]] = [lambda: _fresh(kind_of(node), draw)]
    if node.op == CONSTANT:
        changes = [lambda: constant(_jittered(node.value, draw))]
    elif kind_of(node) == NUMBER:
        changes += [
            lambda: apply(_draw(draw, CALLS), node),
            lambda: apply(_draw(draw, INFIX), node, random_tree(draw, 1)),
            lambda: apply("where", random_truth(draw), node, random_tree(draw, 1)),
        ]
    if node.op in OPERATORS:
        changes += [lambda: _other_operator(node, draw), lambda: _child(node, draw)]
    try:
        return replaced(tree, at, changes[int(draw.integers(len(changes)))]())
    except LanguageError:  # too large
        return tree


def _fresh(kind: str, draw: np.random.Generator) -> Expression:
    return random_truth(draw) if kind == TRUTH else random_tree(draw, 2)


def _jittered(value: float, draw: np.random.Generator) -> float:
    if value == 0 or draw.random() < 0.1:
        return _round(draw.normal())
    return _round(value * float(np.exp(JITTER * draw.normal())))


def _other_operator(node: Expression, draw: np.random.Generator) -> Expression:
    """The same arguments under another operator of the same type."""
    own = OPERATORS[node.op]
    alike = [o.name for o in OPERATORS.values() if (o.takes, o.gives) == (own.takes, own.gives) and o.name != node.op]
    return apply(str(draw.choice(alike)), *node.args) if alike else node


def _child(node: Expression, draw: np.random.Generator) -> Expression:
    """An argument in place of the whole, where it is of the same kind."""
    alike = [arg for arg in node.args if kind_of(arg) == kind_of(node)]
    return alike[int(draw.integers(len(alike)))] if alike else node


def _cross(population: Population, draw: np.random.Generator) -> Proposal | None:
    first, second = pick(population, draw), pick(population, draw)
    if first is None or second is None or first.number == second.number:
        return None
    nodes = list(first.tree.walk())
    at = int(draw.integers(len(nodes)))
    fitting = [node for node in second.tree.walk() if kind_of(node) == kind_of(nodes[at]) and node.size > 1]
    if not fitting:
        return None
    try:
        tree = simplify(replaced(first.tree, at, fitting[int(draw.integers(len(fitting)))]))
    except LanguageError:
        return None
    return Proposal(tree, "cross", (first.number, second.number)) if tree != first.tree else None


def _tune(population: Population, draw: np.random.Generator) -> Proposal | None:
    """The constants of one of the best forms, each moved a little: LLaMEA-HPO's division of work, without a model."""
    with_constants = [member for member in population.members if constants_of(member.tree)]
    if not with_constants:
        return None
    parent = with_constants[int(draw.integers(max(1, len(with_constants) // 20)))]
    tree = parent.tree
    for place in constants_of(tree):
        value = list(tree.walk())[place].value
        try:
            tree = replaced(tree, place, constant(float(f"{value * np.exp(JITTER / 2 * draw.normal()):.3g}")))
        except LanguageError:
            return None
    return Proposal(tree, "tune", (parent.number,)) if tree != parent.tree else None


def _prune(population: Population, draw: np.random.Generator) -> Proposal | None:
    """One of the best without a part of it: what did nothing there is not missed, and the formula can be read."""
    members = population.members
    if not members:
        return None
    parent = members[int(draw.integers(max(1, len(members) // 20)))]
    nodes = list(parent.tree.walk())
    at = int(draw.integers(len(nodes)))
    tree = simplify(replaced(parent.tree, at, _child(nodes[at], draw)))
    return Proposal(tree, "prune", (parent.number,)) if tree.size < parent.tree.size else None


WAYS: dict[str, Callable[[Population, np.random.Generator], Proposal | None]] = {
    "random": _random,
    "mutate": _mutate,
    "cross": _cross,
    "tune": _tune,
    "prune": _prune,
}
