"""Pointwise, listwise, token-level and discovered objectives against the papers' formulas in float64."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sartor.losses.apo_zero_unpaired import apo_zero_unpaired
from sartor.losses.bco import bco
from sartor.losses.best_of_k import best_against_rest
from sartor.losses.discovered.aqfl import aqfl
from sartor.losses.discovered.aql import aql
from sartor.losses.discovered.cell import cell
from sartor.losses.discovered.dbaql import dbaql
from sartor.losses.discovered.lrml import lrml
from sartor.losses.discovered.padll import padll
from sartor.losses.discovered.pfl import pfl
from sartor.losses.dpo import dpo
from sartor.losses.kto import kto
from sartor.losses.lipo import lipo
from sartor.losses.plackett_luce import plackett_luce
from sartor.losses.plackett_luce_ties import plackett_luce_ties
from sartor.losses.tdpo import tdpo1, tdpo2
from sartor.losses.weighting import desensitised, wpo_weights
from sartor.types import JudgedLogps, PairLogps, RankedLogps

Array = np.ndarray
Batch = dict[str, Array]
INF = math.inf
POLICIES = ("policy", "policy_chosen", "policy_rejected", "chosen_kl", "rejected_kl", "mismatched_policy")
REFERENCES = ("reference", "reference_chosen", "reference_rejected", "mismatched_reference")


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def softplus(x: Any) -> Any:
    return np.log(1 + np.exp(x))


def relu(x: Any) -> Any:
    return np.maximum(0, x)


# The papers' formulas. A batch is a dict of float64 arrays under the field names.


def naive_kto(b: Batch, beta: float = 0.1, desirable_weight: float = 1, undesirable_weight: float = 1) -> Any:
    r = b["policy"] - b["reference"]
    z = max(0.0, np.mean(b["mismatched_policy"] - b["mismatched_reference"]))
    good = desirable_weight * (1 - sigmoid(beta * (r - z)))
    return np.where(b["good"], good, undesirable_weight * (1 - sigmoid(beta * (z - r))))


def naive_bco(b: Batch, beta: float = 0.1) -> Any:
    r = beta * (b["policy"] - b["reference"])
    delta = (r[b["good"]].mean() + r[~b["good"]].mean()) / 2
    return np.where(b["good"], -np.log(sigmoid(r - delta)), -np.log(sigmoid(-(r - delta))))


def naive_apo(b: Batch, beta: float = 0.1, desirable_weight: float = 1, undesirable_weight: float = 1) -> Any:
    r = beta * (b["policy"] - b["reference"])
    return np.where(b["good"], desirable_weight * (1 - sigmoid(r)), undesirable_weight * sigmoid(r))


def by_list(naive: Callable[..., float]) -> Callable[..., Array]:
    def over_lists(b: Batch, beta: float, **options: Any) -> Array:
        losses = []
        for policy, reference, rank in zip(b["policy"], b["reference"], b["rank"], strict=True):
            there = np.isfinite(rank)
            losses.append(naive(beta * (policy - reference)[there], rank[there], **options))
        return np.array(losses)

    return over_lists


def naive_plackett_luce(s: Array, rank: Array) -> float:
    return -sum(np.log(np.exp(s[i]) / np.exp(s[rank >= rank[i]]).sum()) for i in range(len(s)))


def naive_davidson_luce(s: Array, rank: Array, nu: float = 1.0, largest_tie: int = 0) -> float:
    def strength(subset: tuple[int, ...]) -> float:
        delta = nu if len(subset) > 1 else 1.0
        return delta * np.prod(np.exp(s[list(subset)])) ** (1 / len(subset))

    groups = [tuple(np.flatnonzero(rank == place)) for place in sorted(set(rank))]
    limit = max(largest_tie or len(s), *map(len, groups))
    loss = 0.0
    for place, group in zip(sorted(set(rank)), groups, strict=True):
        rest = np.flatnonzero(rank >= place)
        sizes = range(1, min(limit, len(rest)) + 1)
        loss -= np.log(strength(group) / sum(strength(t) for n in sizes for t in itertools.combinations(rest, n)))
    return loss


def naive_lipo(s: Array, rank: Array) -> float:
    k = len(s)
    psi = [sum(rank[j] > rank[i] for j in range(k)) / k for i in range(k)]
    place = [1 + sum(s[j] > s[i] for j in range(k)) for i in range(k)]
    loss = 0.0
    for i, j in itertools.product(range(k), repeat=2):
        if psi[i] > psi[j]:
            gain = abs((2 ** psi[i] - 1) - (2 ** psi[j] - 1))
            loss += gain * abs(1 / np.log2(1 + place[i]) - 1 / np.log2(1 + place[j])) * softplus(-(s[i] - s[j]))
    return loss


def naive_best(s: Array, rank: Array) -> float:
    worse = s[rank > rank.min()]
    if not len(worse):
        return 0.0
    return np.mean([-np.log(sigmoid(-np.log(np.exp(worse - w).sum()))) for w in s[rank == rank.min()]])


def margin(b: Batch) -> Array:
    return b["policy_chosen"] - b["reference_chosen"] - (b["policy_rejected"] - b["reference_rejected"])


def naive_tdpo1(b: Batch, beta: float = 0.1) -> Any:
    return -np.log(sigmoid(beta * margin(b) - beta * (b["rejected_kl"] - b["chosen_kl"])))


def naive_tdpo2(b: Batch, beta: float = 0.1, alpha: float = 0.5) -> Any:
    return -np.log(sigmoid(beta * margin(b) - alpha * (beta * b["rejected_kl"] - beta * b["chosen_kl"])))


def naive_dbaql(b: Batch, beta: float = 0.05, tau: float = 0.05, variant: str = "paper") -> Any:
    rho = margin(b)
    c = sigmoid(np.var(rho if variant == "found" else beta * rho / tau))
    return c * softplus(-beta * rho / 0.9) + (1 - c) * np.exp(-beta * rho * 0.9)


def naive_aql(b: Batch, beta: float = 0.05, tau: float = 0.05, variant: str = "paper") -> Any:
    rho = margin(b)
    if variant == "paper":
        q = sigmoid(tau * (0.5 + 0.01 * (np.mean(sigmoid(beta * rho / tau)) - 0.5)) - beta * rho)
    elif variant == "found":
        q = sigmoid(-beta * (rho - (0.5 + 0.01 * (sigmoid(rho.mean()) - 0.5))))
    else:
        q = sigmoid(-(beta * rho / tau - (0.5 + 0.01 * (sigmoid(np.mean(beta * rho / tau)) - 0.5))))
    return q * softplus(-beta * rho) + (1 - q) * relu(1 - beta * rho)


def naive_padll(b: Batch, beta: float = 0.05) -> Any:
    rho = margin(b)
    return 0.9 * (1 - (rho < 0) * 0.5) * np.log(1 + np.exp(-beta * rho))


def naive_aqfl(b: Batch, beta: float = 0.05, tau: float = 0.05, variant: str = "paper") -> Any:
    rho = margin(b)
    x = rho if variant == "found" else beta * rho / tau
    if variant == "paper":
        m1 = np.mean(sigmoid(-x)) * np.var(x)
        m2 = m1 + 0.05 * sigmoid(np.mean(x) - m1)
    else:
        m1 = np.std(x) * np.mean(sigmoid(-x))
        m2 = m1 + 0.05 * (sigmoid(np.mean(x)) - m1)
    r = sigmoid(0.1 * np.abs(x - m2))
    return r * softplus(-beta * rho) + (1 - r) * relu(1 - beta * rho)


def naive_cell(b: Batch, beta: float = 0.05) -> Any:
    return 0.5 * softplus(-beta * margin(b)) + 0.5 * np.exp(-beta * margin(b))


def naive_lrml(b: Batch, beta: float = 0.05, tau: float = 0.05, variant: str = "paper") -> Any:
    rho = margin(b)
    gate = sigmoid(rho if variant == "found" else beta * rho / tau)
    return (1 - gate) * softplus(-beta * rho) + gate * np.exp(-beta * rho)


def naive_pfl(b: Batch, beta: float = 0.05, tau: float = 0.05, variant: str = "paper") -> Any:
    x = margin(b) * {"found": 1, "paper": beta / tau, "released": beta}[variant]
    return np.where(b["policy_chosen"] > b["policy_rejected"], 0.5 * softplus(-x), 2 * relu(1 - x))


def variants(**other: float) -> list[dict[str, Any]]:
    return [{"variant": v, **other} for v in ("found", "paper", "released")]


# name: (function, naive formula, tolerance, settings; the first is the default)
FAMILIES: dict[str, tuple[Callable[..., Any], Callable[..., Any], float, list[dict[str, Any]]]] = {
    "kto": (kto, naive_kto, 1e-5, [{}, {"beta": 0.7}, {"desirable_weight": 1.3, "undesirable_weight": 0.5}]),
    "bco": (bco, naive_bco, 1e-5, [{}, {"beta": 0.01}, {"beta": 1.0}]),
    "apo_zero_unpaired": (
        apo_zero_unpaired,
        naive_apo,
        1e-5,
        [{}, {"beta": 1.0}, {"desirable_weight": 1.3, "undesirable_weight": 0.5}],
    ),
    "plackett_luce": (plackett_luce, by_list(naive_plackett_luce), 1e-5, [{"beta": 0.1}, {"beta": 1.0}]),
    "plackett_luce_ties": (
        plackett_luce_ties,
        by_list(naive_davidson_luce),
        1e-5,
        [{"beta": 0.1}, {"beta": 1.0, "nu": 0.3}, {"beta": 1.0, "nu": 2.0, "largest_tie": 2}],
    ),
    "lipo": (lipo, by_list(naive_lipo), 1e-5, [{"beta": 0.05}, {"beta": 1.0}]),
    "best_against_rest": (best_against_rest, by_list(naive_best), 1e-5, [{"beta": 0.1}, {"beta": 1.0}]),
    "tdpo1": (tdpo1, naive_tdpo1, 1e-5, [{}, {"beta": 0.5}]),
    "tdpo2": (tdpo2, naive_tdpo2, 1e-5, [{}, {"beta": 0.5, "alpha": 0.2}, {"alpha": 1.5}]),
    "dbaql": (dbaql, naive_dbaql, 1e-5, [{}, {"beta": 0.5}, *variants(beta=0.2, tau=0.3)]),
    "aql": (aql, naive_aql, 1e-5, [{}, {"beta": 0.5}, *variants(beta=0.2, tau=0.3)]),
    "padll": (padll, naive_padll, 1e-5, [{}, {"beta": 0.5}, {"beta": 1.0}]),
    "aqfl": (aqfl, naive_aqfl, 1e-5, [{}, {"beta": 0.5}, *variants(beta=0.2, tau=0.3)]),
    "cell": (cell, naive_cell, 1e-5, [{}, {"beta": 0.5}, {"beta": 2.0}]),
    "lrml": (lrml, naive_lrml, 1e-5, [{}, {"beta": 0.5}, *variants(beta=0.2, tau=0.3)]),
    "pfl": (pfl, naive_pfl, 1e-5, [{}, {"beta": 0.5}, *variants(beta=0.2, tau=0.3)]),
}
ROWS = [(name, index) for name, family in FAMILIES.items() for index in range(len(family[3]))]
POINTWISE = ("kto", "bco", "apo_zero_unpaired")
LISTWISE = ("plackett_luce", "plackett_luce_ties", "lipo", "best_against_rest")
PAIRWISE = tuple(name for name in FAMILIES if name not in POINTWISE + LISTWISE)
RANKS = [
    [1.0, 2.0, 3.0, 4.0, 5.0],
    [5.0, 3.0, 1.0, 2.0, 4.0],
    [1.0, 1.0, 3.0, 3.0, 3.0],
    [2.0, 1.0, 1.0, 3.0, INF],
    [2.0, 1.0, INF, INF, INF],
    [1.0, 1.0, INF, INF, INF],
    [1.0, INF, INF, INF, INF],
]


def batch(name: str) -> Batch:
    """Log-probs around -30, log-ratios within ±1.5, unlike lengths."""
    draw = np.random.default_rng(7)
    n = 12

    def sides(shape: Any) -> tuple[Array, Array]:
        reference = -30 + 4 * draw.standard_normal(shape)
        return reference + draw.uniform(-1.5, 1.5, shape), reference

    if name in POINTWISE:
        policy, reference = sides(n)
        mismatched, mismatched_reference = sides(5)
        return {
            "policy": policy,
            "reference": reference,
            "good": np.arange(n) % 3 == 0,
            "length": draw.integers(1, 60, n),
            "mismatched_policy": mismatched + 1.0,  # so that z is above 0
            "mismatched_reference": mismatched_reference,
        }
    if name in LISTWISE:
        rank = np.array(RANKS)
        policy, reference = (np.where(np.isfinite(rank), x, 0) for x in sides(rank.shape))
        length = np.where(np.isfinite(rank), draw.integers(1, 60, rank.shape), 1)
        return {"policy": policy, "reference": reference, "rank": rank, "length": length}
    (policy_chosen, reference_chosen), (policy_rejected, reference_rejected) = sides(n), sides(n)
    return {
        "policy_chosen": policy_chosen,
        "policy_rejected": policy_rejected,
        "reference_chosen": reference_chosen,
        "reference_rejected": reference_rejected,
        "chosen_length": draw.integers(1, 60, n),
        "rejected_length": draw.integers(1, 60, n),
        "chosen_kl": draw.uniform(0, 3, n),
        "rejected_kl": draw.uniform(0, 3, n),
    }


def noun(name: str, columns: Batch) -> Any:
    kind = JudgedLogps if name in POINTWISE else RankedLogps if name in LISTWISE else PairLogps
    tensors = {key: torch.from_numpy(np.asarray(value)) for key, value in columns.items()}
    return kind(**{key: x.float() if x.is_floating_point() else x for key, x in tensors.items()})


def with_gradient(batch: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    leaves = {
        field.name: getattr(batch, field.name).clone().requires_grad_()
        for field in dataclasses.fields(batch)
        if field.name in POLICIES
    }
    return dataclasses.replace(batch, **leaves), leaves


def pairs(rho: Any, **more: Any) -> PairLogps:
    """Pairs with these margins, all of it in the policy's chosen side."""
    chosen = torch.as_tensor(rho, dtype=torch.float32)
    zero, length = torch.zeros(len(chosen)), torch.full((len(chosen),), 5)
    return PairLogps(chosen, zero, zero, zero, length, length, **more)


def ranked(scores: Any, ranks: Any) -> RankedLogps:
    policy, rank = torch.tensor(scores, dtype=torch.float32), torch.tensor(ranks, dtype=torch.float32)
    return RankedLogps(policy, torch.zeros_like(policy), rank, torch.full(rank.shape, 5))


def judged(rewards: Any, good: Any, mismatched: Any = ()) -> JudgedLogps:
    policy, shifts = torch.tensor(rewards, dtype=torch.float32), torch.tensor(mismatched, dtype=torch.float32)
    length = torch.full(policy.shape, 5)
    return JudgedLogps(policy, torch.zeros_like(policy), torch.tensor(good), length, shifts, torch.zeros_like(shifts))


@pytest.mark.parametrize(("name", "index"), ROWS)
def test_value_is_the_papers_formula(name: str, index: int) -> None:
    function, naive, tolerance, settings = FAMILIES[name]
    columns = batch(name)
    loss = function(noun(name, columns), **settings[index])
    want = torch.from_numpy(np.asarray(naive(columns, **settings[index]))).float()
    torch.testing.assert_close(loss, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "index"), [row for row in ROWS if row[0] != "bco"])  # its δ is detached, see below
def test_gradient_is_the_slope_of_the_formula(name: str, index: int) -> None:
    function, naive, _, settings = FAMILIES[name]
    columns, step = batch(name), 1e-5
    field = "policy_chosen" if name in PAIRWISE else "policy"
    inputs, leaves = with_gradient(noun(name, columns))
    function(inputs, **settings[index]).sum().backward()
    slope = np.zeros_like(columns[field])
    for place in np.ndindex(slope.shape):
        for sign in (1, -1):
            moved = columns[field].copy()
            moved[place] += sign * step
            slope[place] += sign * np.sum(naive({**columns, field: moved}, **settings[index])) / (2 * step)
    torch.testing.assert_close(leaves[field].grad, torch.from_numpy(slope).float(), rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 64])
def test_loss_and_gradient_are_finite_down_to_minus_ten_thousand(name: str, size: int) -> None:
    function, _, _, settings = FAMILIES[name]
    draw = torch.Generator().manual_seed(size)
    levels = torch.tensor([0.0, -1e-3, -1.0, -30.0, -300.0, -1e4])
    for options in [*settings, *({**option, "beta": 5.0} for option in settings)]:
        for round_ in range(12):
            columns = batch(name)
            rows = [i % len(next(iter(columns.values()))) for i in range(size)]
            inputs = noun(name, {key: x if key.startswith("mismatched") else x[rows] for key, x in columns.items()})
            extreme = {}
            for key in {*POLICIES, *REFERENCES} & set(columns):
                shape = getattr(inputs, key).shape
                extreme[key] = levels[torch.randint(6, shape, generator=draw)]
                if round_ == 0:
                    extreme[key] = torch.full(shape, -1e4 if key in POLICIES else 0.0)
                if round_ == 1:
                    extreme[key] = torch.full(shape, -1e4 if "chosen" in key else 0.0)
                if round_ == 2:  # the first step: policy and reference are one
                    extreme[key] = torch.full(shape, -30.0)
                if key.endswith("_kl"):
                    extreme[key] = -extreme[key]
                if name in LISTWISE:
                    extreme[key] = extreme[key].masked_fill(~inputs.present, 0.0)
            inputs, leaves = with_gradient(dataclasses.replace(inputs, **extreme))
            loss = function(inputs, **options)
            assert loss.shape == (size,)
            assert torch.isfinite(loss).all(), options
            loss.mean().backward()
            for key, leaf in leaves.items():
                assert leaf.grad is None or torch.isfinite(leaf.grad).all(), (key, options)


@pytest.mark.parametrize("name", FAMILIES)
def test_permuting_the_batch_permutes_the_losses(name: str) -> None:
    function, columns = FAMILIES[name][0], batch(name)
    loss = function(noun(name, columns))
    order = np.random.default_rng(3).permutation(len(loss))
    moved = {key: x if key.startswith("mismatched") else x[order] for key, x in columns.items()}
    torch.testing.assert_close(function(noun(name, moved)), loss[torch.from_numpy(order)])


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("bco", "dbaql", "aql", "aqfl")])
def test_a_loss_depends_on_its_own_entry_only(name: str) -> None:
    function, columns = FAMILIES[name][0], batch(name)
    whole = function(noun(name, columns))
    first = {key: x if key.startswith("mismatched") else x[:1] for key, x in columns.items()}
    torch.testing.assert_close(function(noun(name, first)), whole[:1])


@pytest.mark.parametrize("name", LISTWISE)
def test_permuting_the_answers_of_a_list_changes_nothing(name: str) -> None:
    function, columns = FAMILIES[name][0], batch(name)
    order = np.array([3, 0, 4, 2, 1])
    moved = {key: x[:, order] for key, x in columns.items()}
    torch.testing.assert_close(function(noun(name, moved)), function(noun(name, columns)))


@pytest.mark.parametrize("name", LISTWISE)
def test_padding_changes_nothing_and_gets_no_gradient(name: str) -> None:
    function, columns = FAMILIES[name][0], batch(name)
    inputs, leaves = with_gradient(noun(name, columns))
    loss = function(inputs)
    loss.sum().backward()
    assert (leaves["policy"].grad[~inputs.present] == 0).all()
    assert leaves["policy"].grad[inputs.present].abs().sum() > 0
    short = {key: x[4:, :2] for key, x in columns.items()}
    torch.testing.assert_close(loss[4:], function(noun(name, short)))
    assert loss[6] == 0  # a single answer says nothing


@pytest.mark.parametrize("name", LISTWISE)
def test_an_empty_list_costs_nothing(name: str) -> None:
    inputs, leaves = with_gradient(ranked([[0.0, 0.0]], [[INF, INF]]))
    loss = FAMILIES[name][0](inputs)
    loss.sum().backward()
    assert loss.item() == 0
    assert (leaves["policy"].grad == 0).all()


@pytest.mark.parametrize("function", [plackett_luce, best_against_rest])
def test_a_list_of_two_is_a_pair(function: Callable[..., Any]) -> None:
    torch.testing.assert_close(function(ranked([[2.0, -1.0]], [[1, 2]]), beta=0.3), dpo(pairs([3.0]), beta=0.3))


def test_lipo_on_a_list_of_two_is_dpo_times_a_constant() -> None:
    for policy in ([2.0, -1.0], [-1.0, 2.0], [0.0, 0.0]):
        loss = lipo(ranked([policy], [[1, 2]]), beta=0.3)
        pair = dpo(pairs([policy[0] - policy[1]]), beta=0.3)
        torch.testing.assert_close(loss, pair * (math.sqrt(2) - 1) * (1 - 1 / math.log2(3)))


def test_lipo_learns_at_the_first_step_where_all_scores_are_equal() -> None:
    inputs, leaves = with_gradient(ranked([[0.0, 0.0, 0.0]], [[3, 1, 2]]))
    lipo(inputs).sum().backward()
    assert leaves["policy"].grad[0, 1] < 0 < leaves["policy"].grad[0, 0]


def test_lipo_weights_have_no_gradient() -> None:
    inputs, leaves = with_gradient(ranked([[1.0, -0.5]], [[1, 2]]))
    lipo(inputs, beta=0.3).sum().backward()
    weight = (math.sqrt(2) - 1) * (1 - 1 / math.log2(3))
    want = torch.tensor([[-1.0, 1.0]]) * weight * 0.3 * sigmoid(-0.3 * 1.5)
    torch.testing.assert_close(leaves["policy"].grad, want.float())


@pytest.mark.parametrize("nu", [0.2, 1.0, 3.0])
def test_two_answers_with_ties_are_davidsons_model(nu: float) -> None:
    a, b = math.exp(0.5 * 2.0), math.exp(0.5 * -1.0)
    total = a + b + nu * math.sqrt(a * b)
    loss = plackett_luce_ties(ranked([[2.0, -1.0]] * 3, [[1, 2], [2, 1], [1, 1]]), beta=0.5, nu=nu)
    want = torch.tensor([a / total, b / total, nu * math.sqrt(a * b) / total])
    torch.testing.assert_close(torch.exp(-loss), want)
    torch.testing.assert_close(torch.exp(-loss).sum(), torch.tensor(1.0))


def test_outcomes_of_davidson_luce_sum_to_one() -> None:
    weak_orders = {tuple(sorted(set(r)).index(x) + 1 for x in r) for r in itertools.product(range(3), repeat=3)}
    loss = plackett_luce_ties(ranked([[1.0, -0.5, 0.3]] * 13, [list(r) for r in weak_orders]), beta=0.7, nu=0.4)
    torch.testing.assert_close(torch.exp(-loss).sum(), torch.tensor(1.0))


def test_without_ties_and_with_nu_zero_it_is_plackett_luce() -> None:
    columns = {key: x[:2] for key, x in batch("plackett_luce").items()}
    inputs = noun("plackett_luce", columns)
    torch.testing.assert_close(plackett_luce_ties(inputs, beta=1.0, nu=0.0), plackett_luce(inputs, beta=1.0))


def test_nu_zero_is_finite_on_data_with_ties() -> None:
    inputs, leaves = with_gradient(noun("plackett_luce", batch("plackett_luce")))
    loss = plackett_luce_ties(inputs, nu=0.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(leaves["policy"].grad).all()


def test_a_tie_pulls_its_members_together() -> None:
    for function in (plackett_luce, plackett_luce_ties):
        inputs, leaves = with_gradient(ranked([[2.0, -1.0]], [[1, 1]]))
        function(inputs, beta=1.0).sum().backward()
        assert leaves["policy"].grad[0, 0] > 0 > leaves["policy"].grad[0, 1]


def test_the_tied_best_are_not_each_others_rivals() -> None:
    both = best_against_rest(ranked([[2.0, -1.0, 0.5]], [[1, 1, 3]]), beta=1.0)
    each = [best_against_rest(ranked([[score, 0.5]], [[1, 2]]), beta=1.0) for score in (2.0, -1.0)]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)
    assert best_against_rest(ranked([[2.0, -1.0]], [[1, 1]])).item() == 0


def test_kto_baseline_is_detached_and_never_negative() -> None:
    inputs, leaves = with_gradient(judged([1.0, -1.0], [True, False], [3.0, 1.0]))
    loss = kto(inputs, beta=1.0)
    torch.testing.assert_close(loss, torch.tensor([1 - sigmoid(1 - 2.0), 1 - sigmoid(2.0 + 1)]).float())
    loss.sum().backward()
    assert leaves["mismatched_policy"].grad is None
    slope = [-sigmoid(-1.0) * sigmoid(1.0), sigmoid(3.0) * sigmoid(-3.0)]
    torch.testing.assert_close(leaves["policy"].grad, torch.tensor(slope).float())
    plain = kto(judged([1.0, -1.0], [True, False]), beta=1.0)
    torch.testing.assert_close(kto(judged([1.0, -1.0], [True, False], [-4.0]), beta=1.0), plain)
    torch.testing.assert_close(plain, apo_zero_unpaired(judged([1.0, -1.0], [True, False]), beta=1.0))


def test_bco_shift_is_detached() -> None:
    inputs, leaves = with_gradient(judged([1.0, 3.0, -1.0], [True, True, False]))
    bco(inputs, beta=1.0).sum().backward()
    shift = (2.0 - 1.0) / 2
    want = [-sigmoid(shift - 1.0), -sigmoid(shift - 3.0), sigmoid(-1.0 - shift)]
    torch.testing.assert_close(leaves["policy"].grad, torch.tensor(want).float())


def test_bco_with_one_label_shifts_by_its_mean() -> None:
    for label in (True, False):
        loss = bco(judged([1.0, 3.0], [label, label]), beta=1.0)
        want = torch.tensor([softplus(1.0), softplus(-1.0)]).float()
        torch.testing.assert_close(loss, want if label else want.flip(0))


def test_tdpo_stops_the_gradient_on_the_chosen_side_in_the_second_form_only() -> None:
    kl = {"chosen_kl": torch.tensor([1.0]), "rejected_kl": torch.tensor([2.0])}
    inputs, leaves = with_gradient(pairs([0.5], **kl))
    tdpo2(inputs, beta=1.0, alpha=0.5).sum().backward()
    assert leaves["chosen_kl"].grad is None
    torch.testing.assert_close(leaves["rejected_kl"].grad, torch.tensor([0.5 * sigmoid(0.0)]).float())
    inputs, leaves = with_gradient(pairs([0.5], **kl))
    tdpo1(inputs, beta=1.0).sum().backward()
    torch.testing.assert_close(leaves["chosen_kl"].grad, torch.tensor([-sigmoid(0.5)]).float())
    torch.testing.assert_close(leaves["rejected_kl"].grad, torch.tensor([sigmoid(0.5)]).float())


def test_tdpo_without_divergence_is_dpo() -> None:
    some = pairs([1.0, -2.0], chosen_kl=torch.tensor([3.0, 1.0]), rejected_kl=torch.tensor([0.5, 2.0]))
    none = dataclasses.replace(some, chosen_kl=torch.zeros(2), rejected_kl=torch.zeros(2))
    torch.testing.assert_close(tdpo2(some, alpha=0.0), dpo(some))
    torch.testing.assert_close(tdpo1(none), dpo(some))
    torch.testing.assert_close(tdpo2(some, alpha=1.0), tdpo1(some))


DISCOVERED = {"dbaql": dbaql, "aql": aql, "aqfl": aqfl, "lrml": lrml, "pfl": pfl}


@pytest.mark.parametrize("name", DISCOVERED)
def test_an_unknown_variant_names_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="unknown variant 'new'; known: found, paper, released"):
        DISCOVERED[name](pairs([1.0]), variant="new")


@pytest.mark.parametrize("name", ["dbaql", "lrml", "pfl"])
def test_found_and_paper_agree_at_the_beta_of_the_search(name: str) -> None:
    some, function = pairs([1.0, -2.0, 0.3]), DISCOVERED[name]
    torch.testing.assert_close(function(some, variant="found"), function(some, variant="paper"))
    for variant in ("found", "released"):  # and differ elsewhere, where they do
        same = torch.allclose(function(some, beta=0.5, variant=variant), function(some, beta=0.5))
        assert same == (variant == "released" and name != "pfl")


@pytest.mark.parametrize("name", ["dbaql", "aql", "aqfl"])
def test_gradient_flows_through_the_batch_statistic(name: str) -> None:
    inputs, leaves = with_gradient(pairs([1.0, -2.0, 0.3]))
    DISCOVERED[name](inputs, beta=1.0, tau=1.0)[0].backward()
    assert leaves["policy_chosen"].grad[1] != 0


def test_aql_averages_the_sigmoids_in_the_paper_and_the_margins_in_the_code() -> None:
    rho = np.array([8.0, -1.0, -1.0])
    columns: Any = {
        "policy_chosen": rho,
        **dict.fromkeys(("reference_chosen", "policy_rejected", "reference_rejected"), 0.0),
    }
    for variant in ("found", "paper", "released"):
        want = torch.from_numpy(naive_aql(columns, beta=1.0, tau=1.0, variant=variant)).float()
        torch.testing.assert_close(aql(pairs(rho), beta=1.0, tau=1.0, variant=variant), want)
    gap = aql(pairs(rho), beta=1.0, tau=1.0) - aql(pairs(rho), beta=1.0, tau=1.0, variant="found")
    assert gap.abs().max() > 1e-4


def test_exponentials_continue_as_a_line_below_minus_twenty() -> None:
    steep = math.exp(20.0)
    inputs, leaves = with_gradient(pairs([-19.0, -20.5, -1000.0]))
    loss = cell(inputs, beta=1.0)
    line = [math.exp(19.0), 1.5 * steep, 981 * steep]
    half = torch.tensor([0.5 * e + 0.5 * r for e, r in zip(line, (19.0, 20.5, 1000.0), strict=True)])
    torch.testing.assert_close(loss, half, rtol=1e-5, atol=0)
    loss.sum().backward()
    torch.testing.assert_close(leaves["policy_chosen"].grad[1:], torch.full((2,), -0.5 * steep), rtol=1e-5, atol=0)


def test_lrml_has_the_papers_dip_and_hump() -> None:
    x = torch.linspace(-6, 6, 120_001, dtype=torch.float64)
    zero, length = torch.zeros_like(x), torch.full(x.shape, 5)
    loss = lrml(PairLogps(x, zero, zero, zero, length, length))  # at beta = tau, z/τ is the margin
    dip, hump = loss[:60_000].argmin(), 60_000 + loss[60_000:].argmax()
    assert x[dip].item() == pytest.approx(-2.3714, abs=1e-3)
    assert x[hump].item() == pytest.approx(1.4402, abs=1e-3)
    assert (loss[dip].item(), loss[hump].item()) == pytest.approx((0.78593, 0.87829), abs=1e-5)


def test_lrml_stays_finite_where_the_product_form_is_not() -> None:
    inputs, leaves = with_gradient(pairs([-40.0]))  # z = -200: gate 0 times exponential infinity
    loss = lrml(inputs, beta=5.0)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([200.0]))
    torch.testing.assert_close(leaves["policy_chosen"].grad, torch.tensor([-5.0]))


def test_wpo_weight_is_the_product_of_both_sides_and_a_constant() -> None:
    # π over three tokens; the answer is token 0 then token 1: eq. 2 by hand.
    policy = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
    picked = np.array([0.7, 0.3])
    certainty = np.mean(np.log(picked) - np.log((policy**2).sum(1)))
    chosen = torch.tensor([certainty]).float().requires_grad_()
    weights = wpo_weights(chosen, torch.tensor([-0.2]))
    want = np.prod(picked / (policy**2).sum(1)) ** 0.5 * math.exp(-0.2)
    torch.testing.assert_close(weights, torch.tensor([want]).float())
    assert not weights.requires_grad
    assert torch.isfinite(wpo_weights(torch.tensor([-1e4]), torch.tensor([-1e4]))).all()


def test_desensitised_counts_the_excess_less() -> None:
    tokens = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, 0.0, 0.0]], requires_grad=True)
    shared = torch.tensor([2, 2])
    torch.testing.assert_close(desensitised(tokens, shared, 0.25), torch.tensor([-3.0 + 0.25 * -7.0, -11.0]))
    torch.testing.assert_close(desensitised(tokens, shared, 1.0), tokens.sum(1))
    torch.testing.assert_close(desensitised(tokens, shared, 0.0), torch.tensor([-3.0, -11.0]))
    desensitised(tokens, shared, 0.25).sum().backward()
    torch.testing.assert_close(tokens.grad, torch.tensor([[1.0, 1.0, 0.25, 0.25], [1.0, 1.0, 0.25, 0.25]]))
