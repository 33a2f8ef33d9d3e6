"""Operations that are finite everywhere: exact where there is nothing to guard, and on their own tangent beyond."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sartor.losses.stable import CAP, SMALLEST, guarded_div, guarded_log, guarded_sqrt, log1mexp, tangent_exp
from sartor.losses.stable import tangent_expm1 as expm1

Function = Callable[[Tensor], Tensor]
FAR = [0.0, 1e-38, -1e-38, SMALLEST, -SMALLEST, 1.0, -1.0, CAP, 89.0, -89.0, 1e4, -1e4, 1e28, -1e28]


def slope(function: Function, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


@pytest.mark.parametrize(
    ("function", "exact", "points"),
    [
        (tangent_exp, math.exp, [-80.0, -20.0, -1.0, 0.0, 1e-3, 1.0, 19.9, 20.0]),
        (expm1, math.expm1, [-80.0, -1.0, -1e-8, 0.0, 1e-8, 1e-3, 1.0, 19.9]),
        (guarded_log, math.log, [1.1e-6, 1e-3, 1.0, 2.0, 1e30]),
        (guarded_sqrt, math.sqrt, [1e-11, 1e-3, 1.0, 2.0, 1e30]),
        (log1mexp, lambda x: math.log(-math.expm1(x)), [-1.1e-6, -1e-3, -0.7, -2.0]),
        (lambda x: guarded_div(torch.ones_like(x), x), lambda x: 1 / x, [1.1e-6, -1.1e-6, 1.0, -3.0, 1e30]),
    ],
    ids=["exp", "expm1", "log", "sqrt", "log1mexp", "div"],
)
def test_is_exact_where_there_is_nothing_to_guard(function: Function, exact: Callable, points: list[float]) -> None:
    x = torch.tensor(points)
    expected = torch.tensor([exact(float(value)) for value in x], dtype=torch.float64)
    torch.testing.assert_close(function(x).double(), expected, rtol=1e-5, atol=0)
    x = x.double()
    steps = 1e-6 * torch.where(x == 0, 1e-3, x.abs())
    numerical = torch.tensor([(exact(float(a)) - exact(float(b))) for a, b in zip(x + steps, x - steps, strict=True)])
    inside = x < CAP  # at the cap itself both sides have the same slope, but not the same curve
    torch.testing.assert_close(
        slope(function, x)[inside], (numerical.double() / (2 * steps))[inside], rtol=1e-3, atol=1e-30
    )


def test_an_exponential_is_as_exact_as_torchs() -> None:
    x = torch.linspace(-80, 19, 10_000)
    torch.testing.assert_close(tangent_exp(x), torch.exp(x), rtol=3e-7, atol=0)


def test_log1mexp_keeps_its_digits_far_below_zero() -> None:
    x = torch.tensor([-0.6931, -0.6932, -5.0, -10.0, -15.0, -50.0, -80.0])
    torch.testing.assert_close(log1mexp(x).double(), torch.log1p(-torch.exp(x.double())), rtol=1e-6, atol=0)
    expected = -torch.exp(x.double()) / -torch.expm1(x.double())
    torch.testing.assert_close(slope(log1mexp, x).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("function", "at", "value", "tangent"),
    [
        (tangent_exp, CAP, math.exp(CAP), math.exp(CAP)),
        (expm1, CAP, math.expm1(CAP), math.exp(CAP)),
        (guarded_log, SMALLEST, math.log(SMALLEST), 1 / SMALLEST),
        (log1mexp, -SMALLEST, math.log(-math.expm1(-SMALLEST)), -1 / SMALLEST),
    ],
)
def test_goes_on_as_its_tangent(function: Function, at: float, value: float, tangent: float) -> None:
    beyond = torch.tensor([0.5, 3.0, 1000.0], dtype=torch.float64) * (-1 if function is guarded_log else 1)
    expected = value + tangent * beyond
    torch.testing.assert_close(function(at + beyond), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(slope(function, at + beyond), torch.full((3,), tangent).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("function", [tangent_exp, expm1, guarded_log, guarded_sqrt, log1mexp])
def test_is_finite_and_never_falls_or_never_rises(function: Function, precision: torch.dtype) -> None:
    x = torch.tensor(FAR, dtype=precision).sort().values
    found, slopes = function(x), slope(function, x)
    assert torch.isfinite(found).all()
    assert torch.isfinite(slopes).all()
    sign = -1 if function is log1mexp else 1
    assert (sign * slopes >= 0).all()
    if precision != torch.bfloat16:
        assert (sign * found.diff() >= 0).all()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_quotient_is_finite_with_the_sign_of_its_parts(precision: torch.dtype) -> None:
    tops, bottoms = torch.cartesian_prod(*[torch.tensor(FAR[:-2], dtype=precision)] * 2).T
    leaves = [side.clone().requires_grad_() for side in (tops, bottoms)]
    found = guarded_div(*leaves)
    assert torch.isfinite(found).all()
    for gradient in torch.autograd.grad(found.sum(), leaves):
        assert torch.isfinite(gradient).all()
    below = torch.where(bottoms < 0, -1, 1)
    assert (found * below * tops >= 0).all()
    assert (found.abs() <= tops.abs() / SMALLEST * 1.01).all()


def test_zero_counts_as_a_small_positive_number() -> None:
    zero = torch.zeros(2)
    torch.testing.assert_close(guarded_div(torch.tensor([1.0, -1.0]), zero), torch.tensor([1e6, -1e6]))
    torch.testing.assert_close(guarded_sqrt(zero), torch.full((2,), SMALLEST))
    assert torch.equal(slope(guarded_sqrt, zero), zero)
    assert float(guarded_log(zero)[0]) == pytest.approx(math.log(SMALLEST) - 1)
