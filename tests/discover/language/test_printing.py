"""Trees as text: the language reads back what it writes, torch computes what the program does, and LaTeX renders."""

import ast
import random
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matplotlib.mathtext import MathTextParser

from sartor.discover.language.expression import INPUTS, Expression, LanguageError, constant, given
from sartor.discover.language.known import CANARIES, KNOWN, known
from sartor.discover.language.operators import NUMBER, OPERATORS, TRUTH, apply
from sartor.discover.language.parse import parse
from sartor.discover.language.printing import to_latex, to_python, to_torch
from sartor.discover.language.program import DIFFERENCES, Program, sides_of, stabilised
from sartor.losses import stable
from sartor.objectives.contract import moderate
from sartor.types import PairLogps

CONSTANTS = (0.0, 1.0, -1.0, 2.0, 0.5, -3.25, 1e-5, -2.5e-7, 1234.5, -1e4, 0.333333)
BETA = 0.1
STABLE = {name: getattr(stable, name) for name in dir(stable) if not name.startswith("_")}


def random_tree(rng: random.Random, kind: str = NUMBER, depth: int = 4) -> Expression:
    """A tree of any operators, one in five branches short."""
    if kind == NUMBER and (depth == 0 or rng.random() < 0.2):
        return given(rng.choice(list(INPUTS))) if rng.random() < 0.6 else constant(rng.choice(CONSTANTS))
    operator = rng.choice([operator for operator in OPERATORS.values() if operator.gives == kind])
    return apply(operator.name, *(random_tree(rng, kind, max(0, depth - 1)) for kind in operator.takes))


@cache
def trees(count: int) -> tuple[Expression, ...]:
    rng, found = random.Random(0), []
    while len(found) < count:
        try:
            found.append(random_tree(rng, depth=rng.randint(1, 7)))
        except LanguageError:  # too large
            continue
    return tuple(found)


def test_random_trees_use_everything() -> None:
    used = {node.op for tree in trees(60) for node in tree.walk()}
    assert used == {*OPERATORS, *INPUTS, "constant"}
    assert max(tree.size for tree in trees(60)) > 40


def test_losses_and_random_trees_read_back_as_themselves() -> None:
    losses = [known(name) for name in {**KNOWN, **CANARIES}]
    for tree in {*losses, *map(stabilised, losses), *trees(60)}:
        assert parse(to_python(tree)) == tree


LEAVES = {NUMBER: given("margin"), TRUTH: apply("less", given("margin"), given("beta"))}


def test_brackets_stand_where_they_are_needed() -> None:
    """Every infix operator at every place of every other and of calls, and constants whose sign could be misread."""
    within = [o for o in OPERATORS.values() if o.gives == NUMBER and (o.binds or o.name == "exp")]
    inner = [apply(o.name, *(LEAVES[kind] for kind in o.takes)) for o in within]
    for outer in (o for o in OPERATORS.values() if o.binds or o.name in ("exp", "maximum", "where")):
        for place, kind in enumerate(outer.takes):
            for argument in [*inner, constant(-2.0), constant(-1e-5)] if kind == NUMBER else []:
                args = [LEAVES[k] for k in outer.takes]
                args[place] = argument
                tree = apply(outer.name, *args)
                tree = apply("where", tree, *[given("beta")] * 2) if outer.gives == TRUTH else tree
                assert parse(to_python(tree)) == tree


def test_writes_no_more_brackets_than_needed() -> None:
    meant = {
        "1-(beta-margin)-2": "1 - (beta - margin) - 2",
        "margin/(beta*2)/3": "margin / (beta * 2) / 3",
        "(margin*beta)*(margin*2)": "margin * beta * (margin * 2)",
        "-(margin+1)": "-(margin + 1)",
        "-margin*2": "-margin * 2",
        "-(margin*2)": "-(margin * 2)",
        "where((margin+1)>(beta-2),1,0)": "where(margin + 1 > beta - 2, 1, 0)",
        "1e-7*margin": "1e-07 * margin",
    }
    assert {text: to_python(parse(text)) for text in meant} == meant


# -- torch


class _AsDoubles(ast.NodeTransformer):
    """Every number as a tensor, in double precision: of a constant the spread is 0 there, and not its rounding."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        match node.func:
            case ast.Attribute(attr="float", value=lengths):
                return lengths
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if not isinstance(node.value, int | float) or isinstance(node.value, bool):
            return node
        return ast.copy_location(
            ast.parse(f"torch.tensor({float(node.value)!r}, dtype=torch.float64)", mode="eval").body, node
        )


def ran(text: str, pair: Any, beta: Any, change: ast.NodeTransformer | None = None) -> torch.Tensor:
    code = ast.parse(text, mode="eval")
    if change:
        code = ast.fix_missing_locations(change.visit(code))
    found = eval(compile(code, text, "eval"), {"torch": torch, "F": F, **STABLE, "pair": pair, "beta": beta})
    return torch.as_tensor(found).expand(12)


def batch() -> PairLogps:
    found = moderate("pairs", 12)
    assert isinstance(found, PairLogps)
    return found


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_torch_computes_what_the_program_does() -> None:
    """Operators, order and brackets of the text, with all that it reads as tensors."""
    sides = {name: side.double() for name, side in sides_of(batch()).items()}
    everything = dict(sides)
    for name, (a, b) in DIFFERENCES.items():
        everything[name] = everything[a] - everything[b]
    for tree in [*map(known, KNOWN), *trees(40)]:
        text = to_torch(stabilised(tree))
        found = ran(text, SimpleNamespace(**everything), torch.tensor(BETA, dtype=torch.float64), _AsDoubles())
        same(found, Program(tree).losses(sides, BETA))


def runs_as_it_stands(tree: Expression) -> None:
    """As in a loss file: β is a number, and ``pair`` a ``PairLogps``, with lengths that are integers."""
    same(ran(to_torch(stabilised(tree)), batch(), BETA), Program(tree).losses(sides_of(batch()), BETA))


def test_torch_runs_as_it_stands_in_a_loss_file() -> None:
    for name in KNOWN:
        runs_as_it_stands(known(name))


@pytest.mark.parametrize("leaf", ["2", "chosen_length", "where(margin > 0, 1, 0)"])
def test_torch_takes_numbers_and_lengths_wherever_the_language_does(leaf: str) -> None:
    """Of torch's functions some take no numbers, some no integers, and of integers there is no mean."""
    for operator in (o for o in OPERATORS.values() if o.gives == NUMBER):
        leaves = {NUMBER: parse(leaf), TRUTH: apply("at_least", parse(leaf), constant(1.0))}
        alone = apply(operator.name, *(leaves[kind] for kind in operator.takes))
        runs_as_it_stands(apply("add", given("margin"), alone))
    for mixed in ("margin / LEAF", "maximum(LEAF, margin)", "where(LEAF > beta, LEAF, margin)", "sigmoid(beta) * LEAF"):
        runs_as_it_stands(parse(mixed.replace("LEAF", f"({leaf})")))


@pytest.mark.parametrize("text", ["margin / mean(chosen_length)", "margin * std(chosen_length - rejected_length)"])
def test_torch_takes_statistics_of_lengths(text: str) -> None:
    runs_as_it_stands(parse(text))


# -- LaTeX


@pytest.fixture(scope="module")
def renders() -> Any:
    parser = MathTextParser("agg")

    def rendered(tree: Expression) -> float:
        return parser.parse(f"${to_latex(tree)}$").width

    return rendered


def test_losses_and_operators_render(renders: Any) -> None:
    operators = [apply(o.name, *(LEAVES[kind] for kind in o.takes)) for o in OPERATORS.values()]
    for tree in (*map(known, KNOWN), *operators):
        assert renders(tree) > 0


def test_latex_is_what_people_write() -> None:
    meant = {
        "-log_sigmoid(beta * margin)": r"-\log\sigma\left(\beta \, \rho\right)",
        "1 / (1 - margin / beta)": r"\frac{1}{1 - \frac{\rho}{\beta}}",
        "(margin - 1) ** 2": r"\left(\rho - 1\right)^2",
        "exp(chosen_logratio) - policy_chosen": r"e^{r_w} - \log\pi_w",
        "(margin - 1) * beta": r"(\rho - 1) \, \beta",
        # a product is written without a sign: a minus after it would read as a difference
        "margin * -beta": r"\rho \, (-\beta)",
        "margin * -2 * -exp(beta)": r"\rho \, (-2) \, (-e^{\beta})",
        "-margin * beta": r"-\rho \, \beta",
        "1e-5 * margin": r"10^{-5} \, \rho",
        "2.5e-7 - margin * -1e-5": r"2.5 \cdot 10^{-7} - \rho \, (-10^{-5})",
        "exp(-1e-5)": r"e^{-10^{-5}}",
        "where(margin >= 0, 1, beta)": r"\left\{ 1 \;\mathrm{if}\; \rho \geq 0,\; \beta \;\mathrm{else} \right\}",
    }
    assert {text: to_latex(parse(text)) for text in meant} == meant


def test_no_factor_begins_with_a_minus_in_print() -> None:
    for tree in (*map(known, KNOWN), *trees(50)):
        assert r"\, -" not in to_latex(tree)
