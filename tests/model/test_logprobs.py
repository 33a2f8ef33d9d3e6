import pytest
import torch

from sartor.model import logprobs
from sartor.model.logprobs import Head, chunked_logps, sum_by_branch


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 5.0)])
def test_chunked_equals_log_softmax(bias: bool, scale: float, softcap: float | None, monkeypatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK", 4)  # 11 rows: two whole chunks and a rest
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, weight, b, seed = make(11, 6), make(17, 6), make(17) if bias else None, make(11).float()
    target = torch.randint(17, (11,), generator=generator)
    leaves = [x.float().requires_grad_() for x in (hidden, weight, b) if x is not None]

    ours = chunked_logps(leaves[0], target, Head(leaves[1], leaves[2] if bias else None, scale, softcap))
    grads = torch.autograd.grad(ours, leaves, seed)

    truth = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = torch.nn.functional.linear(truth[0], truth[1], truth[2] if bias else None) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    theirs = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-5)
    for ours_grad, true_grad in zip(grads, torch.autograd.grad(theirs, truth, seed.double()), strict=True):
        torch.testing.assert_close(ours_grad, true_grad.float(), atol=1e-5, rtol=1e-4)


def test_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    chunked_logps(hidden, torch.tensor([0, 1, 2]), Head(weight)).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_huge_logits_stay_finite() -> None:
    hidden = torch.full((2, 1), 1e4, requires_grad=True)
    logps = chunked_logps(hidden, torch.tensor([0, 1]), Head(torch.tensor([[1.0], [-1.0]])))
    logps.sum().backward()
    assert logps.tolist() == [0.0, -2e4]
    assert torch.isfinite(hidden.grad).all()


def test_an_empty_branch_sums_to_zero() -> None:
    assert sum_by_branch(torch.tensor([1.0, 2.0]), torch.tensor([0, 2]), 3).tolist() == [1.0, 0.0, 2.0]
