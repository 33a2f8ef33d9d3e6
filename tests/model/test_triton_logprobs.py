"""The Triton kernels against the same formulas in torch: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it comes with CUDA builds of torch")

from sartor.model import triton_logprobs
from sartor.model.triton_logprobs import available, d_logits_, logsumexp_and_target

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_device = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="without a GPU these run in test_in_the_interpreter"
)
# Relative error of one rounding on top of fp32's own; to bf16 a GPU rounds to nearest and the interpreter cuts off.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}
Tensor = torch.Tensor


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the other tests run here themselves")
def test_in_the_interpreter() -> None:
    """Triton reads the variable when it is imported, so the tests of this file run in a process of their own."""
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
    assert "passed" in found.stdout


def shaped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = logits.double() * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def truth(
    logits: Tensor, target: Tensor, grad: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """log Z, target logit and gradient by the logits, in fp64 by autograd."""
    leaf = logits.double().requires_grad_()
    values = shaped(leaf, scale, softcap)
    log_z, chosen = torch.logsumexp(values, -1), values.gather(1, target[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(chosen - log_z, leaf, grad.double())
    return log_z.detach(), chosen.detach(), gradient


def draw(rows: int, columns: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * columns)
    logits = spread * torch.randn(rows, columns, generator=generator)
    target = torch.randint(columns, (rows,), generator=generator)
    grad = torch.randn(rows, generator=generator)
    return logits.to(DEVICE, dtype), target.to(DEVICE), grad.to(DEVICE)


# One block, less than one, several with a rest, exactly several.
COLUMNS = [1, 5, 64, 261, 4096, 5000, 8192, 9001]


@needs_device
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.125, None), (1.0, 3.0), (2.0, 30.0)])
def test_kernels_equal_torch(columns: int, dtype: torch.dtype, scale: float, softcap: float | None) -> None:
    logits, target, grad = draw(3, columns, dtype)
    true_z, true_chosen, true_gradient = truth(logits, target, grad, scale, softcap)
    log_z, chosen = logsumexp_and_target(logits, target, scale, softcap)
    assert log_z.dtype == chosen.dtype == torch.float32
    torch.testing.assert_close(log_z.double(), true_z, atol=3e-6, rtol=1e-6)
    torch.testing.assert_close(chosen.double(), true_chosen, atol=3e-6, rtol=1e-6)
    gradient = d_logits_(logits, target, log_z, grad, scale, softcap)
    assert gradient.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(gradient.double(), true_gradient, atol=1e-6, rtol=ROUNDING[dtype])


@needs_device
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_huge_and_impossible_logits(softcap: float | None) -> None:
    inf = torch.inf
    logits = torch.tensor(
        [
            [1e4, -1e4, 9999.0, 0.0, -inf],
            [-inf, -inf, -inf, -inf, 2.0],
            [-1e4, -1e4, -1e4, -1e4, -1e4],
            [-inf, 1e4, 1e4, -inf, 0.0],
        ],
        device=DEVICE,
    )
    target, grad = torch.tensor([0, 4, 2, 1], device=DEVICE), torch.ones(4, device=DEVICE)
    true_z, true_chosen, true_gradient = truth(logits, target, grad, 1.0, softcap)
    log_z, chosen = logsumexp_and_target(logits, target, 1.0, softcap)
    torch.testing.assert_close(log_z.double(), true_z, atol=1e-5, rtol=1e-7)
    torch.testing.assert_close(chosen.double(), true_chosen, atol=1e-5, rtol=1e-7)
    gradient = d_logits_(logits, target, log_z, grad, 1.0, softcap)
    # At 1e4 the fp32 log Z is known to 5e-4, and so the softmax to as much.
    torch.testing.assert_close(gradient.double(), true_gradient.nan_to_num(), atol=1e-3, rtol=0)


@needs_device
def test_first_block_without_a_possible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_logprobs, "LARGEST_BLOCK", 4)
    logits = torch.full((2, 11), -torch.inf, device=DEVICE)
    logits[0, 9:] = torch.tensor([1.0, 2.0])
    target = torch.tensor([10, 0], device=DEVICE)
    log_z, chosen = logsumexp_and_target(logits, target)
    torch.testing.assert_close(log_z, torch.logsumexp(logits, -1))
    assert chosen.tolist() == [2.0, -torch.inf]


@needs_device
def test_nan_is_not_hidden() -> None:
    logits, target, _ = draw(2, 300, torch.float32)
    logits[1, 7] = torch.nan
    log_z, _ = logsumexp_and_target(logits, target)
    assert log_z.isnan().tolist() == [False, True]


@needs_device
def test_a_view_of_rows_and_a_gradient_seen_many_times() -> None:
    wide, target, _ = draw(4, 100, torch.float32)
    kept = wide.clone()
    logits, grad = wide[::2, :70], torch.ones((), device=DEVICE).expand(2)
    target = target[::2] % 70
    true_z, _, true_gradient = truth(logits, target, grad, 1.0, None)
    log_z, _ = logsumexp_and_target(logits, target)
    torch.testing.assert_close(log_z.double(), true_z, atol=3e-6, rtol=0)
    torch.testing.assert_close(d_logits_(logits, target, log_z, grad).double(), true_gradient, atol=1e-6, rtol=1e-5)
    assert torch.equal(wide[1::2], kept[1::2])
    assert torch.equal(wide[:, 70:], kept[:, 70:])


@needs_device
def test_rows_more_than_two_billion_elements_apart() -> None:
    far = torch.empty_strided((2, 40), (2**31 + 8, 1), dtype=torch.bfloat16, device=DEVICE)
    far.copy_(draw(2, 40, torch.bfloat16)[0])
    target, grad = torch.tensor([3, 39], device=DEVICE), torch.ones(2, device=DEVICE)
    true_z, true_chosen, true_gradient = truth(far, target, grad, 1.0, None)
    log_z, chosen = logsumexp_and_target(far, target)
    torch.testing.assert_close(log_z.double(), true_z, atol=3e-6, rtol=0)
    torch.testing.assert_close(chosen.double(), true_chosen)
    gradient = d_logits_(far, target, log_z, grad)
    torch.testing.assert_close(gradient.double(), true_gradient, atol=1e-6, rtol=ROUNDING[torch.bfloat16])


@needs_device
def test_no_rows() -> None:
    logits, target = torch.empty(0, 9, device=DEVICE), torch.empty(0, dtype=torch.long, device=DEVICE)
    log_z, chosen = logsumexp_and_target(logits, target)
    assert log_z.shape == chosen.shape == (0,)
    assert d_logits_(logits, target, log_z, log_z).shape == (0, 9)


def test_cpu_tensors_take_torchs_way() -> None:
    assert not available(torch.zeros(1))
