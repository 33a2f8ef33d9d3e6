"""Every pairwise objective against its paper's formula, written naively in float64."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sartor.losses.alphapo import alphapo
from sartor.losses.aot import aot, aot_unpaired
from sartor.losses.apo import apo_down, apo_zero
from sartor.losses.bco_pair import bco_pair
from sartor.losses.cal_dpo import cal_dpo
from sartor.losses.cpo import cpo
from sartor.losses.dpo import dpo
from sartor.losses.dpop import dpop
from sartor.losses.exo import exo
from sartor.losses.f_alpha import dpo_alpha
from sartor.losses.f_divergence import dpo_forward_kl, dpo_js
from sartor.losses.hinge import hinge
from sartor.losses.ipo import ipo, ipo_sum
from sartor.losses.length import dpo_norm, r_dpo
from sartor.losses.mappo import mappo
from sartor.losses.margin import dpo_margin
from sartor.losses.nca import nca
from sartor.losses.noisy import cdpo, robust
from sartor.losses.orpo import orpo
from sartor.losses.sft import sft
from sartor.losses.simpo import simpo
from sartor.losses.sppo import sppo
from sartor.losses.ties import dpo_davidson, dpo_rao_kupper
from sartor.types import PairLogps

Array = np.ndarray
Loss = Callable[..., torch.Tensor]


def batch(size: int = 12, seed: int = 0) -> PairLogps:
    """Log-probs around -30, log-ratios within ±1.5, unlike lengths, some ties, strengths that are partly unsaid."""
    g = torch.Generator().manual_seed(seed)
    sides = [-30 + 8 * torch.rand(size, generator=g) for _ in range(2)]
    policy = [side + 3 * torch.rand(size, generator=g) - 1.5 for side in sides]
    lengths = [torch.randint(3, 40, (size,), generator=g) for _ in range(2)]
    tie = torch.arange(size) % 3 == 0
    strength = torch.rand(size, generator=g)
    strength[1::2] = torch.nan
    return PairLogps(*policy, *sides, *lengths, tie=tie, strength=strength)


class Paper:
    """The papers' symbols, in float64: w is chosen, l is rejected, u a probability ratio, n a length."""

    def __init__(self, pair: PairLogps) -> None:
        self.w, self.l, self.ref_w, self.ref_l, self.n_w, self.n_l = (
            x.double().numpy()
            for x in (
                pair.policy_chosen,
                pair.policy_rejected,
                pair.reference_chosen,
                pair.reference_rejected,
                pair.chosen_length,
                pair.rejected_length,
            )
        )
        self.u_w, self.u_l = np.exp(self.w) / np.exp(self.ref_w), np.exp(self.l) / np.exp(self.ref_l)
        self.h_w, self.h_l = np.log(self.u_w), np.log(self.u_l)
        self.rho = self.h_w - self.h_l
        self.tie, self.strength = pair.tie.numpy(), pair.strength.double().numpy()


def s(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def log_s(x: Array) -> Array:
    return np.log(s(x))


def paper_exo(p: Paper, beta: float = 0.1, label_smoothing: float = 1e-3) -> Array:
    model = np.stack([p.u_w**beta, p.u_l**beta]) / (p.u_w**beta + p.u_l**beta)
    target = np.array([[1 - label_smoothing], [label_smoothing]])
    return (model * np.log(model / target)).sum(0)


def paper_bco(p: Paper, beta: float = 0.1, shift: bool = True) -> Array:
    delta = beta * np.concatenate([p.h_w, p.h_l]).mean() if shift else 0.0
    return -log_s(beta * p.h_w - delta) - log_s(-(beta * p.h_l - delta))


def paper_aot(u: Array, v: Array, beta: float, eps: float) -> Array:
    gap = beta * (np.sort(u) - np.sort(v))
    quantiles = -(1 - eps) * log_s(gap) - eps * log_s(-gap)
    return quantiles[np.argsort(np.argsort(u))]  # each pair's own


def paper_f(prime: Callable[[Array], Array], p: Paper, beta: float) -> Array:
    return -log_s(beta * prime(p.u_w) - beta * prime(p.u_l))


def paper_alphapo(p: Paper, beta: float = 2.0, gamma: float = 1.0, alpha: float = 0.25) -> Array:
    w, l_ = np.exp(p.w) ** (-alpha / p.n_w), np.exp(p.l) ** (-alpha / p.n_l)
    return -log_s(-beta / alpha * w + beta / alpha * l_ - gamma)


def paper_orpo(p: Paper, weight: float = 0.1) -> Array:
    w, l_ = np.exp(p.w / p.n_w), np.exp(p.l / p.n_l)
    odds_ratio = (w / (1 - w)) / (l_ / (1 - l_))
    return -p.w / p.n_w - weight * log_s(np.log(odds_ratio))


def paper_rao_kupper(p: Paper, beta: float = 0.1, nu: float = 3.0) -> Array:
    w, l_ = p.u_w**beta, p.u_l**beta
    tie = (nu**2 - 1) * w * l_ / ((w + nu * l_) * (l_ + nu * w))
    return -np.log(np.where(p.tie, tie, w / (w + nu * l_)))


def paper_davidson(p: Paper, beta: float = 0.1, nu: float = 1.0) -> Array:
    w, l_ = p.u_w**beta, p.u_l**beta
    total = w + l_ + 2 * nu * np.sqrt(w * l_)
    return -np.log(np.where(p.tie, 2 * nu * np.sqrt(w * l_), w) / total)


def paper_margin(p: Paper, beta: float = 0.1, alpha: float = 1.0, log: bool = False) -> Array:
    offset = [0.0 if math.isnan(x) else alpha * (math.log(x) if log else x) for x in p.strength]
    return -log_s(beta * p.rho - np.array(offset))


def paper_mappo(p: Paper, beta: float = 0.1) -> Array:
    gap = np.array([1.0 if math.isnan(x) else x for x in p.strength])
    return -log_s(beta * p.h_w - gap * beta * p.h_l)


def smoothed(p: Paper, beta: float = 0.1, label_smoothing: float = 0.1) -> Array:
    return -(1 - label_smoothing) * log_s(beta * p.rho) - label_smoothing * log_s(-beta * p.rho)


def unbiased(p: Paper, beta: float = 0.1, label_smoothing: float = 0.1) -> Array:
    kept, flipped = -log_s(beta * p.rho), -log_s(-beta * p.rho)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def paper_aot_paired(p: Paper, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    return paper_aot(p.w - p.l, p.ref_w - p.ref_l, beta, label_smoothing)


def paper_aot_unpaired(p: Paper, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    return paper_aot(p.h_w, p.h_l, beta, label_smoothing)


BETAS: list[dict[str, Any]] = [{}, {"beta": 0.5}, {"beta": 2.0}]
SMOOTH: list[dict[str, Any]] = [{}, {"beta": 0.7}, {"beta": 2.0, "label_smoothing": 0.25}]
TABLE: dict[str, tuple[Loss, Callable[..., Array], float, list[dict[str, Any]]]] = {
    "cdpo": (cdpo, smoothed, 1e-5, SMOOTH),
    "robust": (robust, unbiased, 1e-5, SMOOTH),
    "ipo": (ipo, lambda p, beta=0.1: (p.h_w / p.n_w - p.h_l / p.n_l - 1 / (2 * beta)) ** 2, 1e-5, BETAS),
    "ipo_sum": (ipo_sum, lambda p, beta=0.1: (p.rho - 1 / (2 * beta)) ** 2, 1e-4, BETAS),
    "hinge": (hinge, lambda p, beta=0.1: np.maximum(0, 1 - beta * p.rho), 1e-5, BETAS),
    "exo": (exo, paper_exo, 1e-4, SMOOTH),
    "nca": (
        nca,
        lambda p, beta=0.01: -log_s(beta * p.h_w) - 0.5 * log_s(-beta * p.h_w) - 0.5 * log_s(-beta * p.h_l),
        1e-5,
        BETAS,
    ),
    "bco_pair": (bco_pair, paper_bco, 1e-5, [{}, {"shift": False}, {"beta": 2.0}]),
    "sppo": (sppo, lambda p, beta=1e-3: (p.h_w - 0.5 / beta) ** 2 + (p.h_l + 0.5 / beta) ** 2, 1e-5, BETAS),
    "aot": (aot, paper_aot_paired, 1e-5, SMOOTH),
    "aot_unpaired": (aot_unpaired, paper_aot_unpaired, 1e-5, SMOOTH),
    "apo_zero": (apo_zero, lambda p, beta=0.1: 1 - s(beta * p.h_w) + s(beta * p.h_l), 1e-5, BETAS),
    "apo_down": (apo_down, lambda p, beta=0.1: s(beta * p.h_w) + 1 - s(beta * p.rho), 1e-5, BETAS),
    "r_dpo": (
        r_dpo,
        lambda p, beta=0.1, alpha=0.01: -log_s(beta * p.rho + alpha * p.n_w - alpha * p.n_l),
        1e-5,
        [{}, {"beta": 1.0}, {"alpha": 0.1}],
    ),
    "dpo_norm": (dpo_norm, lambda p, beta=5.0: -log_s(beta * (p.h_w / p.n_w - p.h_l / p.n_l)), 1e-5, BETAS),
    "dpop": (
        dpop,
        lambda p, beta=0.3, penalty=50.0: -log_s(beta * (p.rho - penalty * np.maximum(0, -p.h_w))),
        1e-5,
        [{}, {"beta": 0.1}, {"penalty": 5.0}],
    ),
    "dpo_forward_kl": (dpo_forward_kl, lambda p, beta=0.1: paper_f(lambda u: -1 / u, p, beta), 1e-5, BETAS),
    "dpo_js": (dpo_js, lambda p, beta=0.1: paper_f(lambda u: np.log(2 * u / (1 + u)), p, beta), 1e-5, BETAS),
    "dpo_alpha": (
        dpo_alpha,
        lambda p, beta=0.1, alpha=0.5: paper_f(lambda u: (1 - u**-alpha) / alpha, p, beta),
        1e-5,
        [*BETAS, {"alpha": 0.1}],
    ),
    "cpo": (
        cpo,
        lambda p, beta=0.1, nll_weight=1.0: -log_s(beta * (p.w - p.l)) - nll_weight * p.w / p.n_w,
        1e-5,
        [{}, {"beta": 0.5}, {"nll_weight": 0.0}],
    ),
    "simpo": (
        simpo,
        lambda p, beta=2.0, gamma=1.0: -log_s(beta / p.n_w * p.w - beta / p.n_l * p.l - gamma),
        1e-5,
        [{}, {"beta": 5.0}, {"gamma": 0.5}],
    ),
    "alphapo": (alphapo, paper_alphapo, 1e-5, [{}, {"alpha": 0.05, "gamma": 0.5}, {"alpha": -0.5}, {"beta": 5.0}]),
    "orpo": (orpo, paper_orpo, 1e-5, [{}, {"weight": 1.0}]),
    "mappo": (mappo, paper_mappo, 1e-5, BETAS),
    "cal_dpo": (
        cal_dpo,
        lambda p, beta=0.002, weight=1.0: (
            -log_s(p.rho) + weight * ((p.h_w - 1 / (2 * beta)) ** 2 + (p.h_l + 1 / (2 * beta)) ** 2)
        ),
        1e-5,
        [{}, {"beta": 0.5}, {"beta": 0.5, "weight": 0.5}],
    ),
    "dpo_rao_kupper": (dpo_rao_kupper, paper_rao_kupper, 1e-5, [{}, {"beta": 2.0}, {"nu": 1.5}]),
    "dpo_davidson": (dpo_davidson, paper_davidson, 1e-5, [{}, {"beta": 2.0}, {"nu": 0.3}]),
    "dpo_margin": (dpo_margin, paper_margin, 1e-5, [{}, {"alpha": 0.5}, {"log": True, "beta": 1.0}]),
    "sft": (sft, lambda p: -p.w / p.n_w, 1e-6, [{}]),
}
ROWS = [pytest.param(name, options, id=f"{name}-{options}") for name, row in TABLE.items() for options in row[3]]
POOLED = {"aot", "aot_unpaired", "bco_pair"}  # entry i depends on the whole batch


def select(pair: PairLogps, index: Any) -> PairLogps:
    return PairLogps(*(getattr(pair, field.name)[index] for field in dataclasses.fields(pair)))


def with_gradients(pair: PairLogps) -> PairLogps:
    leaves = {
        name: getattr(pair, name).detach().clone().requires_grad_() for name in ("policy_chosen", "policy_rejected")
    }
    return dataclasses.replace(pair, **leaves)


@pytest.mark.parametrize(("name", "options"), ROWS)
def test_is_the_papers_formula(name: str, options: dict[str, Any]) -> None:
    loss, naive, tolerance, _ = TABLE[name]
    pair = batch()
    value = loss(pair, **options)
    assert value.dtype == torch.float32
    expected = torch.from_numpy(naive(Paper(pair), **options))
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", TABLE)
def test_finite_with_finite_gradients_however_far_apart(name: str) -> None:
    levels = torch.tensor([0.0, -1e-7, -1.0, -300.0, -10_000.0])
    corners = torch.cartesian_prod(*[levels] * 4).T
    for lengths in ((1, 1), (1, 5000), (5000, 1)):
        n_w, n_l = (torch.full(corners[0].shape, n) for n in lengths)
        for tie, strength in ((False, math.nan), (True, 0.0), (False, 100.0)):
            pair = PairLogps(
                *corners,
                n_w,
                n_l,
                tie=torch.full(corners[0].shape, tie),
                strength=torch.full(corners[0].shape, strength),
            )
            for options in [{}] if name in {"orpo", "sft"} else [{}, {"beta": 5.0}]:
                pair = with_gradients(pair)
                value = TABLE[name][0](pair, **options)
                value.sum().backward()
                for side in (pair.policy_chosen, pair.policy_rejected):
                    assert side.grad is None or torch.isfinite(side.grad).all(), (lengths, options)
                assert torch.isfinite(value).all(), (lengths, options)


@pytest.mark.parametrize("name", TABLE)
def test_a_pair_does_not_care_about_its_place(name: str) -> None:
    pair, order = batch(), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    straight, shuffled = TABLE[name][0](pair), TABLE[name][0](select(pair, order))
    torch.testing.assert_close(shuffled, straight[order])


@pytest.mark.parametrize("name", sorted(set(TABLE) - POOLED))
def test_a_pair_does_not_care_about_its_company(name: str) -> None:
    pair = batch()
    alone = torch.cat([TABLE[name][0](select(pair, slice(i, i + 1))) for i in range(12)])
    torch.testing.assert_close(alone, TABLE[name][0](pair))


@pytest.mark.parametrize("name", ["cpo", "simpo", "alphapo", "orpo", "sft"])
def test_reference_free_objectives_do_not_read_the_reference(name: str) -> None:
    unknown = torch.full((12,), torch.nan)
    pair = dataclasses.replace(batch(), reference_chosen=unknown, reference_rejected=unknown)
    torch.testing.assert_close(TABLE[name][0](pair), TABLE[name][0](batch()))


LIMITS = {
    "cdpo": (cdpo, {"label_smoothing": 0.0}),
    "robust": (robust, {"label_smoothing": 0.0}),
    "r_dpo": (r_dpo, {"alpha": 0.0}),
    "dpop": (dpop, {"penalty": 0.0}),
    "dpo_alpha at the limit": (dpo_alpha, {"alpha": 0.0}),
    "dpo_alpha towards it": (dpo_alpha, {"alpha": 1e-5}),
    "dpo_margin": (dpo_margin, {"alpha": 0.0}),
    "dpo_davidson": (dpo_davidson, {"nu": 1e-9}),
    "dpo_rao_kupper": (dpo_rao_kupper, {"nu": 1 + 1e-6}),
}


@pytest.mark.parametrize("name", LIMITS)
def test_dpo_is_the_limit(name: str) -> None:
    loss, options = LIMITS[name]
    pair = dataclasses.replace(batch(), tie=torch.zeros(12, dtype=torch.bool))
    torch.testing.assert_close(loss(pair, beta=0.7, **options), dpo(pair, beta=0.7), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", [aot, aot_unpaired, mappo, dpo_margin])
def test_one_pair_without_a_strength_is_dpo(loss: Loss) -> None:
    pair = select(batch(), slice(1, 2))
    torch.testing.assert_close(loss(pair, beta=0.7), dpo(pair, beta=0.7))


def test_an_alpha_of_one_is_the_forward_kl() -> None:
    torch.testing.assert_close(dpo_alpha(batch(), beta=0.5, alpha=1.0), dpo_forward_kl(batch(), beta=0.5))


def test_alphapo_tends_to_simpo() -> None:
    pair = batch()
    torch.testing.assert_close(alphapo(pair, alpha=0.0), simpo(pair))
    torch.testing.assert_close(alphapo(pair, alpha=1e-5), simpo(pair), rtol=1e-4, atol=1e-4)


def test_cdpo_is_lowest_where_the_odds_match_the_noise() -> None:
    best = math.log(0.9 / 0.1) / 0.1
    zero, five = torch.zeros(3), torch.full((3,), 5)
    losses = cdpo(PairLogps(torch.tensor([best - 0.5, best, best + 0.5]), zero, zero, zero, five, five))
    assert losses[1] < losses[0]
    assert losses[1] < losses[2]


def test_robust_averages_to_dpo_over_flips() -> None:
    pair = batch()
    flipped = PairLogps(
        pair.policy_rejected,
        pair.policy_chosen,
        pair.reference_rejected,
        pair.reference_chosen,
        pair.rejected_length,
        pair.chosen_length,
    )
    mean = 0.8 * robust(pair, label_smoothing=0.2) + 0.2 * robust(flipped, label_smoothing=0.2)
    torch.testing.assert_close(mean, dpo(pair))


def test_the_shift_of_bco_passes_no_gradient() -> None:
    pair = with_gradients(batch())
    bco_pair(pair, beta=0.5).sum().backward()
    p = Paper(batch())
    delta = 0.5 * (0.5 * p.h_w.mean() + 0.5 * p.h_l.mean())
    expected = torch.from_numpy(-0.5 * s(-(0.5 * p.h_w - delta)))  # as if δ were a constant
    assert pair.policy_chosen.grad is not None
    torch.testing.assert_close(pair.policy_chosen.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_common_level_of_reward_is_shifted_away() -> None:
    pair = batch()
    raised = dataclasses.replace(pair, policy_chosen=pair.policy_chosen + 7, policy_rejected=pair.policy_rejected + 7)
    torch.testing.assert_close(bco_pair(raised), bco_pair(pair), rtol=1e-4, atol=1e-5)
    assert (bco_pair(raised, shift=False) - bco_pair(pair, shift=False)).abs().min() > 1e-3


@pytest.mark.parametrize(("loss", "nu"), [(dpo_rao_kupper, 3.0), (dpo_davidson, 1.0)])
def test_win_loss_and_tie_have_chances_that_sum_to_one(loss: Loss, nu: float) -> None:
    pair = batch()
    no, yes = torch.zeros(12, dtype=torch.bool), torch.ones(12, dtype=torch.bool)
    swapped = PairLogps(
        pair.policy_rejected,
        pair.policy_chosen,
        pair.reference_rejected,
        pair.reference_chosen,
        pair.rejected_length,
        pair.chosen_length,
    )
    won = loss(dataclasses.replace(pair, tie=no), beta=0.7, nu=nu)
    tied = loss(dataclasses.replace(pair, tie=yes), beta=0.7, nu=nu)
    total = sum(torch.exp(-x) for x in (won, tied, loss(swapped, beta=0.7, nu=nu)))
    torch.testing.assert_close(total, torch.ones(12))


@pytest.mark.parametrize("loss", [dpo_rao_kupper, dpo_davidson])
def test_equal_answers_tie_half_of_the_time(loss: Loss) -> None:
    zero, five = torch.zeros(1), torch.tensor([5])
    tied = loss(PairLogps(zero, zero, zero, zero, five, five, tie=torch.tensor([True])))
    torch.testing.assert_close(tied, torch.tensor([math.log(2.0)]))


def test_a_strength_outside_zero_to_one_is_clamped_by_mappo() -> None:
    pair = dataclasses.replace(batch(), strength=torch.full((12,), 4.0))
    torch.testing.assert_close(mappo(pair, beta=0.5), dpo(pair, beta=0.5))


def test_gradients_still_point_down_beyond_the_guards() -> None:
    # A chosen answer that fell by 10,000 nats must still be pulled up, a certain rejected one pushed down.
    zero, far, five = torch.zeros(1), torch.full((1,), -1e4), torch.tensor([5])
    for loss in (dpo_forward_kl, dpo_alpha, alphapo):
        pair = with_gradients(PairLogps(far, zero, zero, zero, five, five))
        loss(pair).sum().backward()
        assert pair.policy_chosen.grad is not None
        assert pair.policy_chosen.grad < 0
    pair = with_gradients(PairLogps(torch.full((1,), -5.0), zero, zero, zero, five, five))
    orpo(pair).sum().backward()
    assert pair.policy_rejected.grad is not None
    assert pair.policy_rejected.grad > 0
