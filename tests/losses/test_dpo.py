import math

import torch

from sartor.losses.dpo import dpo
from sartor.types import PairLogps


def pairs(*rows: tuple[float, float, float, float]) -> PairLogps:
    columns = torch.tensor(rows, requires_grad=False).T
    lengths = torch.full((len(rows),), 5)
    return PairLogps(*columns, lengths, lengths)


def test_equation_7_by_hand() -> None:
    loss = dpo(pairs((-10.0, -12.0, -11.0, -11.0), (-3.0, -3.0, -3.0, -3.0)), beta=0.5)
    # log-ratios +1 and -1: -log σ(0.5·2); and no difference at all: log 2.
    torch.testing.assert_close(loss, torch.tensor([math.log1p(math.exp(-1.0)), math.log(2.0)]))


def test_gradient_is_beta_times_the_chance_of_being_wrong() -> None:
    # ∂L/∂log π_w = -β σ(-β·margin): section 4 of the paper, "what does the DPO update do".
    chosen = torch.tensor([-10.0], requires_grad=True)
    row = pairs((0.0, -12.0, -11.0, -11.0))
    dpo(PairLogps(chosen, *list(vars(row).values())[1:]), beta=0.5).sum().backward()
    torch.testing.assert_close(chosen.grad, torch.tensor([-0.5 / (1 + math.exp(1.0))]))


def test_finite_at_ten_thousand_nats() -> None:
    for sign in (1, -1):
        chosen = torch.tensor([sign * 1e4], requires_grad=True)
        zero = torch.zeros(1)
        loss = dpo(PairLogps(chosen, zero, zero, zero, zero.long(), zero.long()), beta=5.0)
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(chosen.grad).all()


def test_swapping_the_sides_flips_the_margin() -> None:
    row, swapped = pairs((-10.0, -12.0, -11.0, -11.5)), pairs((-12.0, -10.0, -11.5, -11.0))
    difference = dpo(row, beta=1.0) - dpo(swapped, beta=1.0)
    torch.testing.assert_close(difference, torch.tensor([-1.5]))  # log σ(m) - log σ(-m) = m
