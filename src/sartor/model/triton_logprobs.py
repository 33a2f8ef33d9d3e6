"""Two Triton kernels for a chunk of logits [n, V], in place of the passes over an fp32 copy of it.

The head's product leaves bf16 logits; torch's own operations would widen them and walk over them half a dozen times.
Here one pass reads them for the log-sum-exp (online: Milakov & Gimelshein 2018, arXiv 1805.02867), and one turns them
into their own gradient where they lie. Scale and soft cap are applied on the way. All arithmetic is fp32, so that only
the logits themselves, and the gradient written back, are rounded to the head's precision, as without the kernels.

Triton comes with CUDA builds of torch; without it the module has nothing to offer, and :func:`available` says so.
"""

import inspect
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
LARGEST_BLOCK = 4096  # columns that one program reads at a time
WARPS = 8

if HAS_TRITON:
    import triton
    import triton.language as tl

    def _jit(kernel: Callable[..., None]) -> Any:
        """Triton reads a function's own source and globals: what a type checker wrapped in tests is unwrapped."""
        return triton.jit(inspect.unwrap(kernel))

    @_jit
    def _shaped(x, scale, cap, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
        """cap·tanh(scale·x/cap), or scale·x."""
        x *= scale
        if CAPPED:
            y = x / cap
            # Near 0 the closed form would lose digits, and there the series is exact to fp32.
            z = y * y
            series = y * (1.0 - z * (1.0 / 3.0 - z * (2.0 / 15.0 - z * (17.0 / 315.0))))
            x = cap * tl.where(tl.abs(y) < 0.1, series, 1.0 - 2.0 / (tl.exp(2.0 * y) + 1.0))
        return x

    @_jit
    def _logsumexp_kernel(  # type: ignore[no-untyped-def]
        logits, target, log_z, chosen, stride, scale, cap, CAPPED: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One program a row: running maximum and sum of exponentials, then the target's logit."""
        row = tl.program_id(0).to(tl.int64)  # n·V may pass 2³¹
        here = logits + row * stride
        columns = tl.arange(0, BLOCK)
        top = float("-inf")
        total = 0.0
        for start in range(0, V, BLOCK):
            inside = columns < V - start
            x = tl.load(here + start + columns, mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside, _shaped(x, scale, cap, CAPPED), float("-inf"))
            higher = tl.maximum(top, tl.max(x, 0))
            # Subtracting an infinite maximum would give NaN: so far all were -inf, or the sum is inf anyway.
            shift = tl.where(tl.abs(higher) == float("inf"), 0.0, higher)
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
            top = higher
        shift = tl.where(tl.abs(top) == float("inf"), 0.0, top)
        tl.store(log_z + row, shift + tl.log(total))
        x = tl.load(here + tl.load(target + row)).to(tl.float32)
        tl.store(chosen + row, _shaped(x, scale, cap, CAPPED))

    @_jit
    def _gradient_kernel(  # type: ignore[no-untyped-def]
        logits, target, log_z, grad, stride, scale, cap, CAPPED: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One program a block of a row: ∂ log p(target) / ∂ logits = onehot - softmax, through cap and scale."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < V
        here = logits + row * stride + columns
        x = _shaped(tl.load(here, mask=inside, other=0.0).to(tl.float32), scale, cap, CAPPED)
        onehot = tl.where(columns == tl.load(target + row), 1.0, 0.0)
        d = tl.load(grad + row) * (onehot - tl.exp(x - tl.load(log_z + row)))
        if CAPPED:
            d *= 1.0 - (x / cap) * (x / cap)
        tl.store(here, (d * scale).to(logits.dtype.element_ty), mask=inside)


def available(tensor: Tensor) -> bool:
    """Whether the kernels can run on this tensor."""
    return tensor.is_cuda and _compiles()


@cache
def _compiles() -> bool:
    """Whether a kernel can be built here: Triton wants a C compiler, which some images lack."""
    if not HAS_TRITON:
        return False
    try:
        logsumexp_and_target(torch.zeros(1, 2, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda"))
    except Exception:  # Triton has errors of many kinds, and torch's own operations do the same
        return False
    return True


def logsumexp_and_target(
    logits: Float[Tensor, "n V"], target: Int[Tensor, " n"], scale: float = 1.0, softcap: float | None = None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Per row log Σ exp and the target's own logit, both fp32 and both of cap·tanh(scale·logits/cap).

    The target's log-prob is their difference. Logits of -inf are tokens that cannot come.
    """
    log_z = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    chosen = torch.empty_like(log_z)
    if len(logits):
        with torch.cuda.device_of(logits):
            _logsumexp_kernel[(len(logits),)](
                logits, target.contiguous(), log_z, chosen, **_shape_of(logits, scale, softcap)
            )
    return log_z, chosen


def d_logits_(
    logits: Float[Tensor, "n V"],
    target: Int[Tensor, " n"],
    log_z: Float[Tensor, " n"],
    grad: Float[Tensor, " n"],
    scale: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, "n V"]:
    """Overwrite logits with grad · ∂ log p(target) / ∂ logits, in their own precision, and return them.

    ``log_z`` is what :func:`logsumexp_and_target` gave for the same logits, ``grad`` the gradient by each row's
    log-prob.
    """
    if len(logits):
        options = _shape_of(logits, scale, softcap)
        grid = (len(logits), triton.cdiv(logits.shape[1], options["BLOCK"]))
        with torch.cuda.device_of(logits):
            # ``grad`` of a sum comes as one number seen n times.
            _gradient_kernel[grid](
                logits, target.contiguous(), log_z.contiguous(), grad.float().contiguous(), **options
            )
    return logits


def _shape_of(logits: Tensor, scale: float, softcap: float | None) -> dict[str, Any]:
    assert logits.stride(1) == 1
    return {
        "stride": logits.stride(0),
        "scale": float(scale),
        "cap": float(softcap or 1.0),
        "CAPPED": softcap is not None,
        "V": logits.shape[1],
        "BLOCK": min(LARGEST_BLOCK, triton.next_power_of_2(logits.shape[1])),
        "num_warps": WARPS,
    }
