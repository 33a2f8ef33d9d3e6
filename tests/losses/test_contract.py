"""What every registered loss has to hold to. A row under ``sartor.losses`` in pyproject.toml buys a loss all of it."""

import inspect
from dataclasses import fields
from functools import partial
from importlib.metadata import entry_points

import pytest
import torch
from conftest import random_tree, tiny_model

from sartor.errors import UserError
from sartor.objectives.catalogue import SECTIONS, entry
from sartor.objectives.contract import Inputs, evaluate, examine, kind_of, moderate, take
from sartor.objectives.logps import TreeLogps
from sartor.objectives.objective import Objective
from sartor.objectives.specs import parse_objective
from sartor.train.gradient import batch_gradient
from sartor.train.preferences import Preferences
from sartor.types import JudgedLogps, PairLogps, RankedLogps

LOSSES = {
    point.name: point.load() for point in entry_points(group="sartor.losses") if point.value.startswith("sartor.")
}
# Their statistic carries no gradient, which a numerical derivative cannot know.
DETACHED = {"bco": "reward shift δ", "bco_pair": "reward shift δ", "tdpo2": "KL of the chosen side"}

every_loss = pytest.mark.parametrize("name", LOSSES)


def cast(batch: Inputs, dtype: torch.dtype) -> Inputs:
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return type(batch)(**{k: v.to(dtype) if v.is_floating_point() and k != "rank" else v for k, v in values.items()})


@every_loss
@pytest.mark.parametrize("beta", [None, 5.0])
def test_finite_under_stress_and_blind_to_order(name: str, beta: float | None) -> None:
    loss = LOSSES[name]
    if beta is not None and "beta" not in inspect.signature(loss).parameters:
        pytest.skip(f"{name} has no β")
    traits = examine(name, loss if beta is None else partial(loss, beta=beta))
    assert traits.kind == kind_of(loss)


@every_loss
def test_gradient_is_the_numerical_one(name: str) -> None:
    if name in DETACHED:
        pytest.skip(f"{name}: its {DETACHED[name]} is detached; its own test checks the gradient")
    batch = cast(moderate(kind_of(LOSSES[name]), 6), torch.float64)
    leaves = [f.name for f in fields(batch) if f.name.startswith("policy") or f.name.endswith("_kl")]

    def losses(*values: torch.Tensor) -> torch.Tensor:
        own = {f.name: getattr(batch, f.name) for f in fields(batch)}
        return LOSSES[name](type(batch)(**{**own, **dict(zip(leaves, values, strict=True))}))

    assert torch.autograd.gradcheck(losses, [getattr(batch, f).clone().requires_grad_() for f in leaves])


@every_loss
def test_fp32_is_enough(name: str) -> None:
    batch = moderate(kind_of(LOSSES[name]), 12)
    single, double = LOSSES[name](batch), LOSSES[name](cast(batch, torch.float64))
    torch.testing.assert_close(single.double(), double.double(), rtol=1e-4, atol=1e-5)
    gradients = [evaluate(name, LOSSES[name], b)[1] for b in (batch, cast(batch, torch.float64))]
    for field in gradients[0]:
        torch.testing.assert_close(gradients[0][field].double(), gradients[1][field], rtol=1e-3, atol=1e-6)
    low, pulls = evaluate(name, LOSSES[name], cast(batch, torch.bfloat16))
    assert all(torch.isfinite(values).all() for values in (low, *pulls.values()))


@every_loss
def test_the_preferred_side_costs_less(name: str) -> None:
    """Where one side is far ahead, the loss is lower if that side was chosen than if it was rejected."""
    kind = kind_of(LOSSES[name])
    right, wrong = (far_apart(kind, sign) for sign in (+1.0, -1.0))
    assert LOSSES[name](right).sum() < LOSSES[name](wrong).sum()


def far_apart(kind: str, sign: float) -> Inputs:
    batch = take(moderate(kind, 12), torch.tensor([0, 1, 3, 4]))  # no ties
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    if kind == "pairs":
        values |= {"policy_chosen": values["reference_chosen"] + 8 * sign}
        values |= {
            "policy_rejected": values["reference_chosen"] - 8 * sign,
            "reference_rejected": values["reference_chosen"],
        }
        values |= {"rejected_length": values["chosen_length"], "rejected_kl": values["chosen_kl"]}
    elif kind == "completions":
        values["policy"] = values["reference"] + 8 * sign * torch.where(values["good"], 1.0, -1.0)
    else:
        values["policy"] = values["reference"] - 8 * sign * values["rank"]
    return type(batch)(**values)


@pytest.fixture(scope="module")
def world() -> tuple:
    """A tiny model, a dozen rankings of two to four answers, some tied, each with a mismatched completion."""
    import random

    rng = random.Random(0)
    model = tiny_model()
    trees = []
    for i in range(12):
        tree = random_tree(rng, 6, 3 + i % 3)
        own = len(tree.branches) - 1
        ranks = tuple(float(1 + (k if i % 4 else max(0, k - 1))) for k in range(own))
        trees.append(type(tree)(tree.prompt, tree.branches, ranks, strength=1.0 + i, mismatched=1))
    shift = torch.Generator().manual_seed(1)
    from sartor.model.reference import score_trees

    reference = [values + 0.3 * torch.randn(values.shape, generator=shift) for values in score_trees(model, trees)]
    return model, Preferences(trees, [str(i) for i in range(12)], [], reference)


@every_loss
@pytest.mark.parametrize("beta", [None, 0.5, 5.0])
def test_micro_batches_change_nothing(name: str, beta: float | None, world: tuple) -> None:
    """The gradient of a batch is the same in one piece and in many, batch statistics included."""
    model, data = world
    if beta is not None and "beta" not in inspect.signature(LOSSES[name]).parameters:
        pytest.skip(f"{name} has no β")
    objective = parse_objective([name], beta)
    rival = tiny_model(seed=1) if objective.needs_kl else None
    found = []
    for budget in (10_000, 60):
        model.network.zero_grad()
        metrics = batch_gradient(model, objective, data, range(12), budget, rival)
        found.append((metrics["loss"], [p.grad.clone() for p in model.network.parameters()]))
    (whole, gradients), (cut, others) = found
    assert cut == pytest.approx(whole, rel=1e-4)
    scale = max(float(g.abs().max()) for g in gradients)
    assert scale > 0
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one / scale, other / scale, rtol=1e-3, atol=1e-5)


@every_loss
def test_docstring_teaches(name: str) -> None:
    found = entry(name)
    assert len(found.summary) <= 120
    for section in ("Formula", "Use it", "Returns", "Examples", "References"):
        assert found.sections.get(section), f"{name} has no {section}"
    assert set(found.sections) <= set(SECTIONS)
    assert found.papers
    for option in found.options:
        assert f"{option}:" in found.sections["Args"], option


def broken_value(pair):
    return torch.exp(-pair.margin)


def broken_gradient(pair):
    return torch.sqrt(pair.margin.abs())


def averaged(pair):
    return (-pair.margin).mean()


def by_position(pair):
    return -pair.margin * torch.arange(1, len(pair.margin) + 1)


def constant(pair):
    return torch.zeros_like(pair.margin) * pair.margin.detach()


def raises(pair):
    return pair.margin + torch.zeros(3)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (
            broken_value,
            r"loss broken_value: its value is inf in a batch of 1 where policy_chosen .*wanted finite values",
        ),
        (broken_gradient, r"loss broken_gradient: its gradient by policy_chosen is nan"),
        (averaged, r"loss averaged: wanted a tensor of shape \(1,\), one number per pair, got shape \(\)"),
        (by_position, r"loss by_position: the order of the batch changes its loss"),
        (constant, r"loss constant: its gradient is zero everywhere"),
        (raises, r"loss raises failed on a batch of 2: RuntimeError|loss raises: wanted a tensor of shape \(1,\)"),
    ],
)
def test_a_broken_loss_is_told_which_property_failed(loss, said: str) -> None:
    with pytest.raises(UserError, match=said):
        examine(loss.__name__, loss)


def test_dependencies_are_found_without_being_declared() -> None:
    traits = {
        name: examine(name, loss) for name, loss in LOSSES.items() if name in ("dpo", "simpo", "kto", "aql", "tdpo2")
    }
    assert traits["dpo"].depends_on == {"reference_chosen", "reference_rejected"}
    assert traits["simpo"].depends_on == {"chosen_length", "rejected_length"}
    assert not traits["simpo"].needs_reference
    assert "mismatched_policy" in traits["kto"].depends_on
    assert {"chosen_kl", "rejected_kl"} <= traits["tdpo2"].depends_on


def test_batch_statistics_are_found_wherever_they_are() -> None:
    """At the default β and where the statistic is saturated in the middle of training, but not at its start."""
    found = {name for name, loss in LOSSES.items() if examine(name, loss).whole_batch}
    assert found == {"aot", "aot_unpaired", "bco", "bco_pair", "kto", "dbaql", "aql", "aqfl"}
    for beta in (0.1, 0.5, 10.0):
        for name in ("dbaql", "aqfl"):
            assert examine(name, partial(LOSSES[name], beta=beta)).whole_batch, (name, beta)


def test_ties_reach_those_who_read_them() -> None:
    found = {name for name, loss in LOSSES.items() if examine(name, loss).reads_ties}
    assert found == {"dpo_rao_kupper", "dpo_davidson", "plackett_luce", "plackett_luce_ties"}


class AsObject:
    """A loss with state, as a class."""

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def __call__(self, pair: PairLogps) -> torch.Tensor:
        return torch.relu(1 - self.slope * pair.margin)


class AsModule(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, judged: JudgedLogps) -> torch.Tensor:
        return torch.where(judged.good, -1.0, 1.0) * judged.logratio * self.weight


def filled_in_place(pair: "PairLogps") -> torch.Tensor:
    out = torch.zeros(len(pair.margin))
    out[pair.margin > 0] = 0.1
    return out - pair.margin


def only_chosen(pair):
    return -pair.policy_chosen


@pytest.mark.parametrize(
    ("loss", "kind", "reference"),
    [
        (AsObject(0.1), "pairs", True),
        (AsModule(), "completions", True),
        (filled_in_place, "pairs", True),
        (only_chosen, "pairs", False),
        (partial(AsObject(0.1)), "pairs", True),
        (AsObject(0.2).__call__, "pairs", True),
    ],
)
def test_losses_come_in_many_forms(loss, kind: str, reference: bool) -> None:
    traits = examine("mine", loss)
    assert (traits.kind, traits.needs_reference) == (kind, reference)


def test_a_listwise_loss_must_not_see_padding() -> None:
    def unmasked(ranked: RankedLogps):
        return -(0.1 * ranked.logratio).log_softmax(1)[:, 0]

    with pytest.raises(UserError, match=r"padding changes it; leave out what ranked.present says"):
        examine("unmasked", unmasked)


def test_a_mixture_is_the_weighted_sum_of_its_terms(world: tuple) -> None:
    model, data = world
    losses = {}
    for specs in (["dpo"], ["sft"], ["kto"], ["dpo:2", "sft:0.5", "kto"]):
        metrics = batch_gradient(model, parse_objective(specs), data, range(12), 10_000)
        losses[" ".join(specs)] = metrics["loss"]
    mixed = 2 * losses["dpo"] + 0.5 * losses["sft"] + losses["kto"]
    assert losses["dpo:2 sft:0.5 kto"] == pytest.approx(mixed, rel=1e-5)


@pytest.mark.parametrize(
    ("specs", "beta", "said"),
    [
        (["dop"], None, "unknown loss 'dop': did you mean 'dpop' or 'dpo'"),
        (["sigmoid"], None, "unknown loss 'sigmoid': it is called dpo here"),
        (["dpo:much"], None, "weight wanted a number, got 'much'"),
        (["dpo:beta=1"], None, "options follow a comma: dpo,beta=1"),
        (["dpo,sft"], None, "several losses stand side by side, with a space"),
        (["dpo,bta=1"], None, "unknown option of loss dpo 'bta': did you mean 'beta'"),
        (["dpo,beta"], None, "wanted OPTION=VALUE after the comma, got 'beta'"),
        (["dpo,beta=inf"], None, "beta wanted a finite number, got 'inf'"),
        (["lrml,variant=other"], None, "unknown variant 'other'"),
        (["bco_pair,shift=perhaps"], None, "shift wanted true or false, got 'perhaps'"),
        (["sft"], 0.1, "--beta 0.1: sft has no β"),
        ([], None, "wanted at least one objective"),
        (["dpo:0"], None, "a weight above 0"),
        (["dpo:-1"], None, "a weight above 0"),
        (["dpo,beta=-1"], None, "loss dpo: β -1: wanted above 0"),
        (["cdpo,label_smoothing=0.7"], None, "label_smoothing 0.7: wanted 0 or more, below 0.5"),
    ],
)
def test_a_bad_spec_is_one_line(specs: list[str], beta: float | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_objective(specs, beta)


def test_options_reach_their_loss() -> None:
    objective = parse_objective(["simpo:0.5,gamma=0.3,beta=3", "dpo"], beta=0.2)
    assert [(term.weight, term.beta) for term in objective.terms] == [(0.5, 3.0), (1.0, 0.2)]
    assert str(objective) == "0.5·simpo (gamma 0.3, beta 3) + dpo"
    assert objective.needs_reference


@pytest.mark.parametrize(("name", "wpo"), [("tdpo2", False), ("dpo", True)])
def test_both_roads_give_the_same_gradient(name: str, wpo: bool, world: tuple) -> None:
    """Packed trees, and the prompt repeated for models that cannot share it: distributions are compared on either."""
    model, data = world
    objective = parse_objective([name], wpo=wpo)
    rival = tiny_model(seed=1)
    gradients = []
    for packed in (True, False):
        model.shares_prompts = rival.shares_prompts = packed
        model.network.zero_grad()
        batch_gradient(model, objective, data, range(12), 100, rival)
        gradients.append([p.grad.clone() for p in model.network.parameters()])
    model.shares_prompts = True
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def tokens_of(model, data: Preferences, objective: Objective) -> TreeLogps:
    return data.logps(model, range(len(data.trees)), objective)


def test_ld_alpha_weighs_what_is_longer_than_the_other_side(world: tuple) -> None:
    model, data = world
    logps = tokens_of(model, data, parse_objective(["dpo"]))
    plain, same, none = logps.pairs(), logps.pairs(ld_alpha=1.0), logps.pairs(ld_alpha=0.0)
    torch.testing.assert_close(same.policy_chosen, plain.policy_chosen)
    shorter = plain.chosen_length <= plain.rejected_length
    torch.testing.assert_close(none.policy_chosen[shorter], plain.policy_chosen[shorter])
    assert (none.policy_chosen[~shorter] > plain.policy_chosen[~shorter]).all()  # fewer tokens, all below 0


def test_wpo_scales_the_pairs_by_what_the_policy_would_write(world: tuple) -> None:
    from sartor.losses.weighting import wpo_weights

    model, data = world
    weighted = parse_objective(["dpo"], wpo=True)
    logps = tokens_of(model, data, weighted)
    ((_, losses, _),) = weighted.losses(logps)
    ((_, plain, _),) = parse_objective(["dpo"]).losses(logps)
    torch.testing.assert_close(losses, plain * wpo_weights(*logps.pair_certainty()))
    assert not torch.allclose(losses, plain)
