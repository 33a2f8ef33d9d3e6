"""Operations that are finite everywhere, with gradients that are finite and keep their sign."""

import math

import torch
from torch import Tensor

CAP = 20.0  # e^20 = 4.9e8: beyond it a loss has said all that it can say
SMALLEST = 1e-6  # what is nearer to 0 counts as this near, where 0 has no answer


def tangent_exp(x: Tensor) -> Tensor:
    """e^x up to x = 20 and its tangent beyond: value and gradient stay finite, and the gradient keeps its sign.

    >>> import torch
    >>> tangent_exp(torch.tensor([0.0, 10_000.0])).isfinite().all()
    tensor(True)
    """
    low = x.clamp(max=CAP)
    return low.exp() * (1 + (x - low))


def tangent_expm1(x: Tensor) -> Tensor:
    """The same of e^x - 1, exact near 0."""
    low = x.clamp(max=CAP)
    return low.expm1() + low.exp() * (x - low)


def guarded_div(a: Tensor, b: Tensor) -> Tensor:
    """a / b, with b no nearer to 0 than 1e-6.

    >>> import torch
    >>> guarded_div(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]))
    tensor([5.0000e-01, 1.0000e+06])
    """
    return a / torch.where(b.abs() < SMALLEST, torch.where(b < 0, -SMALLEST, SMALLEST), b)


def guarded_log(x: Tensor) -> Tensor:
    """log x, which goes on as its tangent below 1e-6."""
    below = x.clamp(max=SMALLEST) - SMALLEST
    return x.clamp(min=SMALLEST).log() + below / SMALLEST


def guarded_sqrt(x: Tensor) -> Tensor:
    """√x, flat below 1e-12."""
    return x.clamp(min=SMALLEST**2).sqrt()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) up to x = -1e-6, its tangent above: at probability one, odds are infinite and this is not."""
    above = x.clamp(min=-SMALLEST) + SMALLEST  # and not x - low: its two gradients of 1e6 would not cancel in fp32
    low = x.clamp(max=-SMALLEST)
    far = low.clamp(max=-math.log(2))  # nearer to 0, where its form is not taken, it is infinite in bf16
    # Of the two forms each keeps the digits that the other loses (Mächler 2012).
    return torch.where(low > -math.log(2), torch.log(-torch.expm1(low)), torch.log1p(-far.exp())) - above / SMALLEST
