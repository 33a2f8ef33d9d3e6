"""Trees that compute: every loss said in the language is its hand-written twin, in value, gradient and traits."""

import inspect
import math
import random
from collections.abc import Callable
from dataclasses import fields
from functools import cache, partial
from importlib.metadata import entry_points

import pytest
import torch
from conftest import random_tree

from sartor.discover.language.expression import Expression, LanguageError, constant, given, replaced
from sartor.discover.language.known import CANARIES, KNOWN, known
from sartor.discover.language.operators import NUMBER, OPERATORS, apply
from sartor.discover.language.parse import parse
from sartor.discover.language.printing import to_python
from sartor.discover.language.program import Program, as_loss, as_term, sides_of, stabilised
from sartor.losses.dpo import dpo
from sartor.objectives import contract
from sartor.objectives.contract import SCALES, evaluate, examine, moderate, stress
from sartor.objectives.logps import PER_TOKEN, TreeLogps
from sartor.objectives.objective import Objective
from sartor.objectives.specs import parse_objective
from sartor.types import PairLogps


@cache
def twins() -> dict[str, Callable[..., torch.Tensor]]:
    """The hand-written losses."""
    return {point.name: point.load() for point in entry_points(group="sartor.losses") if point.name in KNOWN}


def beta_of(name: str) -> float:
    """The loss's own default β; one that the language gives no β where it has none."""
    beta = inspect.signature(twins()[name]).parameters.get("beta")
    return 0.1 if beta is None else beta.default


@cache
def usual() -> tuple[PairLogps, ...]:
    return tuple(moderate("pairs", 12, scale) for scale in SCALES)


@cache
def batches(mixes: bool) -> tuple[PairLogps, ...]:
    """Usual ones and every combination of extremes, in one batch; where the batch matters, in some of every size."""
    if mixes:
        return (*usual(), *[batch for size, every in ((64, 3), (2, 80), (1, 16)) for batch in stressed(size)[::every]])
    every = (*usual(), *stressed(64))
    joined = {f.name: torch.cat([getattr(batch, f.name) for batch in every]) for f in fields(PairLogps)}
    return PairLogps(**joined), stressed(1)[0]


@cache
def stressed(size: int) -> tuple[PairLogps, ...]:
    return tuple(stress("pairs", size))


def test_a_loss_is_its_hand_written_twin() -> None:
    for name, twin in twins().items():
        mine = partial(as_loss(known(name)), beta=beta_of(name))
        for batch in batches(Program(known(name)).mixes):
            losses, gradients = evaluate(name, twin, batch)
            own, pulls = evaluate(name, mine, batch)
            close(name, own, losses)
            for side in ("policy_chosen", "policy_rejected"):
                close(name, pulls[side], gradients[side])
    assert set(twins()) == set(KNOWN)


def close(name: str, one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=lambda said: f"{name}: {said}")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss is examined at one scale and without stress, which tests/losses/test_contract.py does of every one."""
    monkeypatch.setattr(contract, "SIZES", ())
    monkeypatch.setattr(contract, "SCALES", (0.1,))


@pytest.mark.usefixtures("quick")
def test_traits_read_from_the_tree_are_those_measured_of_the_twin() -> None:
    for name, twin in twins().items():
        term = as_term(known(name), name)
        assert term.name == name
        assert term.traits == examine(name, twin), name
        assert (term.beta is not None) == ("beta" in inspect.signature(twin).parameters), name


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("text", ["-log_sigmoid(beta * margin)", "-policy_chosen / beta - std(beta * chosen_length)"])
def test_traits_read_from_a_tree_are_those_measured_of_it(text: str) -> None:
    assert as_term(parse(text)).traits == examine("candidate", as_loss(parse(text)))


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("-chosen_logratio", {"reference_chosen"}),
        ("rejected_logratio / rejected_length", {"reference_rejected", "rejected_length"}),
        ("-margin", {"reference_chosen", "reference_rejected"}),
        ("policy_rejected - policy_chosen", set()),
    ],
)
def test_one_log_ratio_needs_one_side_of_the_reference(text: str, read: set[str]) -> None:
    term = as_term(parse(text), "mine", 0.3)
    assert term.traits.depends_on == read
    assert (term.name, term.weight, term.beta) == ("mine", 1.0, None)


def test_many_batches_at_once_are_each_alone() -> None:
    betas = torch.tensor([[0.05], [0.3], [2.0]])
    alone = [sides_of(batch) for batch in usual()]
    together = {side: torch.stack([batch[side] for batch in alone]) for side in alone[0]}
    for name in KNOWN:
        program = Program(known(name))
        found = program.weights(together, betas)
        ones = [program.weights(batch, float(beta)) for batch, beta in zip(alone, betas, strict=True)]
        for f in fields(found):
            close(name, getattr(found, f.name), torch.stack([getattr(one, f.name) for one in ones]))


# -- the stable form


@pytest.mark.parametrize(
    ("text", "stable"),
    [
        ("log(sigmoid(margin))", "log_sigmoid(margin)"),
        ("log(1 + exp(margin))", "softplus(margin)"),
        ("log(exp(margin) + 1)", "softplus(margin)"),
        ("log(exp(margin))", "margin"),
        ("sigmoid(beta) * exp(margin)", "exp(log_sigmoid(beta) + margin)"),
        ("exp(margin) * sigmoid(beta)", "exp(log_sigmoid(beta) + margin)"),
        ("exp(margin) * exp(beta)", "exp(margin + beta)"),
        ("sigmoid(beta) * exp(margin) * exp(beta)", "exp(log_sigmoid(beta) + margin + beta)"),
        ("square(log(sigmoid(-log(1 + exp(margin)))))", "square(log_sigmoid(-softplus(margin)))"),
        # and what looks like these and is not
        ("log(2 + exp(margin))", "log(2 + exp(margin))"),
        ("sigmoid(margin) * (1 + exp(margin))", "sigmoid(margin) * (1 + exp(margin))"),
    ],
)
def test_the_stable_form(text: str, stable: str) -> None:
    assert to_python(stabilised(parse(text))) == stable
    pair = usual()[0]
    double = {name: side.double() for name, side in sides_of(pair).items()}
    straight = eval_slowly(parse(text), {**double, "margin": pair.margin.double(), "beta": torch.tensor(0.1)})
    torch.testing.assert_close(Program(parse(text)).losses(double, 0.1), straight, rtol=1e-6, atol=1e-6)


def eval_slowly(tree: Expression, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tree as it stands, node by node."""
    if tree.op in values:
        return values[tree.op].double()
    if tree.op == "constant":
        return torch.tensor(tree.value, dtype=torch.float64)
    return OPERATORS[tree.op].compute(*(eval_slowly(arg, values) for arg in tree.args))


@pytest.mark.parametrize("beta", [2.5, 5.0])
def test_lrml_is_finite_where_the_released_code_gave_nan(beta: float) -> None:
    far = torch.tensor([-1000.0, -35.6, -17.8, 1000.0])
    zero, five = torch.zeros(4), torch.full((4,), 5)
    pair = PairLogps(far / 2, -far / 2, zero, zero, five, five)
    gate, z = torch.sigmoid(beta * far / 0.05), beta * far
    assert torch.isnan(gate * torch.exp(-z)).any()  # what TRL multiplies
    losses, gradients = evaluate("lrml", partial(as_loss(known("lrml")), beta=beta), pair)
    twin, pulls = evaluate("lrml", partial(twins()["lrml"], beta=beta), pair)
    assert torch.isfinite(losses).all()
    torch.testing.assert_close(losses, twin, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[0], -z[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients["policy_chosen"], pulls["policy_chosen"], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients["policy_chosen"][:3], torch.full((3,), -beta), rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_operator_is_finite_with_a_finite_gradient(precision: torch.dtype) -> None:
    """At every combination of extremes, among them those at which a division, a root or a logarithm has no answer."""
    extremes = torch.tensor([0.0, 1e-38, -1e-38, 1e-7, -1e-6, 1e-6, 1.0, -1.0, 19.9, 20.1, 90.0, -90.0, 1e4, -1e4])
    pairs = torch.cartesian_prod(extremes, extremes).to(precision).T
    for name, operator in OPERATORS.items():
        leaves = [leaf.clone().requires_grad_() for leaf in pairs[: operator.takes.count(NUMBER)]]
        truth = torch.arange(len(leaves[0])) % 2 == 0
        found = operator.compute(*([truth] if operator.takes[0] != NUMBER else []), *leaves)
        assert torch.isfinite(found).all(), name
        if found.requires_grad:
            for gradient in torch.autograd.grad(found.sum(), leaves):
                assert torch.isfinite(gradient).all(), name


def test_operators_compute_what_they_are_called() -> None:
    x = torch.tensor([-2.5, -0.3, 0.2, 1.7], dtype=torch.float64)
    y = torch.tensor([0.4, -1.1, 0.2, 0.2], dtype=torch.float64)  # equal to x once
    truth = x > 0
    meant = {
        "add": x + y, "sub": x - y, "mul": x * y, "div": x / y, "neg": -x, "square": x * x, "sqrt": x.abs() ** 0.5,
        "abs": x.sign() * x, "exp": math.e**x, "expm1": math.e**x - 1, "log": x.abs().log2() / math.log2(math.e),
        "log1mexp": (1 - math.e ** -x.abs()).log(), "sigmoid": 1 / (1 + math.e**-x),
        "log_sigmoid": (1 / (1 + math.e**-x)).log(), "softplus": (1 + math.e**x).log(), "relu": x * truth,
        "tanh": (math.e**x - math.e**-x) / (math.e**x + math.e**-x), "maximum": (x + y + (x - y).abs()) / 2,
        "minimum": (x + y - (x - y).abs()) / 2, "greater": x - y > 0, "less": y - x > 0,
        "at_least": ~(y - x > 0), "at_most": ~(x - y > 0),
        "where": truth * x + ~truth * y, "detach": x, "batch_mean": x * 0 + x.sum() / 4,
        "batch_var": x * 0 + (x * x).sum() / 4 - (x.sum() / 4) ** 2,
        "batch_std": x * 0 + ((x * x).sum() / 4 - (x.sum() / 4) ** 2) ** 0.5,
    }  # fmt: skip
    arguments = {"sqrt": (x.abs(),), "log": (x.abs(),), "log1mexp": (-x.abs(),), "where": (truth, x, y)}
    assert set(meant) == set(OPERATORS)
    for name, operator in OPERATORS.items():
        found = operator.compute(*arguments.get(name, (x, y)[: len(operator.takes)]))
        torch.testing.assert_close(found, meant[name], rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_a_batch_without_spread_has_no_gradient_of_it() -> None:
    flat = torch.full((4,), -3.0, requires_grad=True)
    for name in ("batch_std", "batch_var"):
        (gradient,) = torch.autograd.grad(OPERATORS[name].compute(flat).sum(), flat)
        assert torch.equal(gradient, torch.zeros(4))


@pytest.mark.parametrize(("sign", "said"), [(">=", 1.0), ("<=", 1.0), (">", 2.0), ("<", 2.0)])
def test_an_equal_margin_is_at_least_and_at_most(sign: str, said: float) -> None:
    """As all margins are at the start of a run."""
    sides = sides_of(usual()[0])
    sides |= {"reference_chosen": sides["policy_chosen"], "reference_rejected": sides["policy_rejected"]}
    found = Program(parse(f"where(margin {sign} 0, 1, 2)")).losses(sides, 0.1)
    assert torch.equal(found, torch.full((12,), said))


# -- weights, and training by them


def test_weights_are_the_derivatives_of_the_summed_loss() -> None:
    """Batch statistics included: what one pair's log-prob does to the losses of all."""
    sides = {name: side.double() for name, side in sides_of(usual()[0]).items()}
    program = Program(parse("softplus(-margin) * sigmoid(std(margin)) - mean(policy_chosen) * abs(rejected_logratio)"))
    found = program.weights(sides, 0.1)
    step = 1e-6
    for name, weights in (("policy_chosen", found.chosen), ("policy_rejected", found.rejected)):
        for i in range(12):
            up, down = (sides | {name: sides[name] + sign * step * (torch.arange(12) == i)} for sign in (1, -1))
            slope = (program.losses(up, 0.1).sum() - program.losses(down, 0.1).sum()) / (2 * step)
            assert float(weights[i]) == pytest.approx(float(slope), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    "text", ["beta", "detach(margin)", "chosen_length - reference_chosen", "where(margin > 0, 1, 2)"]
)
def test_what_is_not_differentiable_has_no_weight(text: str) -> None:
    found = Program(parse(text)).weights(sides_of(usual()[0]), 0.1)
    assert found.loss.shape == (12,)
    assert torch.equal(found.chosen, torch.zeros(12))
    assert torch.equal(found.rejected, torch.zeros(12))


def test_a_loss_is_the_same_where_no_gradient_is_kept() -> None:
    pair = usual()[0]
    loss = as_loss(known("dpo"))
    with torch.no_grad():
        still = loss(pair, beta=0.1)
    assert not still.requires_grad
    torch.testing.assert_close(still, dpo(pair, beta=0.1))


@pytest.fixture
def logps() -> TreeLogps:
    """Log-probs of the tokens of a few rankings, as a model would give them."""
    rng = random.Random(0)
    trees = [random_tree(rng, 4, 2 + i % 3) for i in range(6)]
    lengths = torch.tensor([count for tree in trees for count in tree.counts])
    noise = torch.Generator().manual_seed(0)
    tokens = {name: -3 * torch.rand(int(lengths.sum()), generator=noise) for name in PER_TOKEN}
    return TreeLogps(trees, lengths, **tokens)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["dpo", "simpo", "ipo", "bco_pair"])
def test_training_gives_tokens_the_gradient_of_the_twin(name: str, logps: TreeLogps) -> None:
    twin = parse_objective([name])
    found = []
    for objective in (twin, Objective((as_term(known(name), name, twin.beta),))):
        policy = logps.policy.clone().requires_grad_()
        moved = TreeLogps(**{f.name: getattr(logps, f.name) for f in fields(logps)} | {"policy": policy})
        total = objective.total(moved, objective.units(logps.trees))
        total.backward()
        found.append((total.detach(), policy.grad))
    (total, gradient), (own, pulls) = found
    torch.testing.assert_close(own, total)
    torch.testing.assert_close(pulls, gradient, rtol=1e-5, atol=1e-8)
    assert bool(gradient.any())


@pytest.mark.usefixtures("quick")
def test_a_loss_has_the_digest_of_its_twin() -> None:
    twin = parse_objective(["dpo"], 0.2)
    assert Objective((as_term(known("dpo"), "dpo", 0.2),)).digest() == twin.digest()
    assert Objective((as_term(known("dpo"), "dpo", 0.3),)).digest() != twin.digest()


# -- trees


def test_a_place_of_a_tree_is_replaced() -> None:
    tree = parse("where(margin > 0, exp(-margin), beta * margin)")
    nodes = list(tree.walk())
    for place, node in enumerate(nodes):
        assert replaced(tree, place, node) == tree
        new = replaced(tree, place, given("rejected_length"))
        assert list(new.walk())[place] == given("rejected_length")
        assert new.size == tree.size - node.size + 1
    with pytest.raises(IndexError):
        replaced(tree, len(nodes), constant(1.0))


def test_equal_trees_are_one() -> None:
    one, other = (parse(KNOWN["aqfl"]) for _ in range(2))
    assert one is not other
    assert len({one, other}) == 1
    assert hash(one) == hash(other)
    assert one != parse(KNOWN["aql"])


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: apply("power", given("margin"), constant(2.0)), "unknown operator 'power'; known: add, sub"),
        (lambda: apply("exp"), "exp: wanted 1 argument, got 0"),
        (lambda: apply("where", *[given("margin")] * 3), "where: argument 1 wanted a truth, got a number"),
        (lambda: given("os"), "unknown input 'os'; known: policy_chosen"),
        (lambda: constant(float("nan")), "constant nan: wanted between -10,000 and 10,000"),
    ],
)
def test_a_tree_is_made_typed(made: Callable[[], Expression], said: str) -> None:
    with pytest.raises(LanguageError, match=said):
        made()


@pytest.mark.parametrize("name", CANARIES)
def test_canaries_are_what_they_are_called(name: str) -> None:
    sides = sides_of(usual()[0])
    found, plain = Program(known(name)).weights(sides, 0.1), Program(known("dpo")).weights(sides, 0.1)
    if name == "inverted":
        assert (found.chosen > 0).all()
        assert (plain.chosen < 0).all()
    else:
        assert not found.chosen.any()
        assert not found.rejected.any()
        assert float(found.loss[0]) == {"zero": 0.0, "constant": 1.0}[name]
