"""Leaner forms of three layers, put on a Hugging Face model from outside: the same functions, fewer passes over memory.

A matrix product reads each number once and works on it; the small operations around it read and write everything and
do next to nothing. Autograd also keeps what each of them saw. Here each layer is one autograd function that keeps its
inputs, makes the rest again in the backward pass, and works in place where it can:

- ``rms_norm`` keeps its input and one number a row, where autograd keeps two fp32 copies of the input;
- ``swiglu`` keeps gate and up, not silu(gate);
- ``lora_linear`` adds the adapter's product in place, in the product's own epilogue.

A module is replaced only if it computes the same on random input (:func:`_agrees`), so an architecture with a norm of
its own keeps it. ``forward.check`` then guards the whole model: its plain road runs on the untouched layers.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear, silu

Forward = Callable[[Tensor], Tensor]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale  # fp32
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, by_weight, None
        pull = grad * weight.float()
        # ∂L/∂x = r·(p - n·mean(p·n)), with n = x·r and p the gradient by n.
        along = (pull * normed).mean(-1, keepdim=True)
        return pull.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype), by_weight, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        by_up = silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), by_up


class _LoraLinear(torch.autograd.Function):
    """x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ with W and b frozen; Hu et al. 2021 (arXiv 2106.09685), equation 3."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        flat = x.flatten(0, -2)
        inner = flat @ down.t()
        ctx.save_for_backward(flat, inner, weight, down, up)
        ctx.scale, ctx.shape = scale, x.shape
        return linear(flat, weight, bias).addmm_(inner, up.t(), alpha=scale).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, down, up = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        by_up = (flat.t() @ inner).mul_(ctx.scale)
        by_inner = (flat @ up).mul_(ctx.scale)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = (flat @ weight).addmm_(by_inner, down).view(ctx.shape)
        return by_x, None, None, by_inner.t() @ x, by_up, None


def rms_norm(x: Float[Tensor, "*rows H"], weight: Float[Tensor, " H"], eps: float) -> Float[Tensor, "*rows H"]:
    """x / √(mean x² + ε) in fp32, rounded, times the weight (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4)."""
    return _RmsNorm.apply(x, weight, eps)


def swiglu(gate: Float[Tensor, "*rows F"], up: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows F"]:
    """silu(gate)·up (Shazeer 2020, arXiv 2002.05202, equation 5)."""
    return _SwiGlu.apply(gate, up)


_FOUND: WeakKeyDictionary[nn.Module, dict[nn.Module, Forward]] = WeakKeyDictionary()


def lean_forwards(network: nn.Module) -> dict[nn.Module, Forward]:
    """A leaner ``forward`` for each module of a network that has one and computes the same; judged once a network."""
    if network not in _FOUND:
        _FOUND[network] = _judged(network)
    return _FOUND[network]


def _judged(network: nn.Module) -> dict[nn.Module, Forward]:
    verdicts: dict[object, bool] = {}
    found: dict[nn.Module, Forward] = {}
    for module, lean in _candidates(network):
        kind = (type(module), tuple(name for name, _ in module.named_parameters()), _eps(module))
        if kind not in verdicts:
            verdicts[kind] = _agrees(module, lean)
        if verdicts[kind]:
            found[module] = lean(module)
    return found


def _candidates(network: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Any], Forward]]]:
    """Each module that may have a leaner form, and what makes it of a module of this kind."""
    for module in network.modules():
        if isinstance(module, LoraLinear):
            if _is_plain_lora(module):
                yield module, _lora_forward
        elif type(module).__name__.endswith("RMSNorm"):
            if isinstance(getattr(module, "weight", None), nn.Parameter) and _eps(module) is not None:
                yield module, _norm_forward
        elif all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj")):
            yield module, _mlp_forward


def _eps(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


# A form refers to its module weakly: module and form would else keep each other alive, and with them the weights.


def _norm_forward(module: Any) -> Forward:
    own: Any = ref(module)
    eps = _eps(module)
    assert eps is not None
    return lambda hidden_states: rms_norm(hidden_states, own().weight, eps)


def _mlp_forward(module: Any) -> Forward:
    own: Any = ref(module)

    def forward(x: Tensor) -> Tensor:
        mlp = own()
        return mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x)))

    return forward


def _is_plain_lora(module: Any) -> bool:
    return (
        type(module.base_layer) is nn.Linear
        and not getattr(module, "lora_variant", None)
        and not any(p.requires_grad for p in module.base_layer.parameters())
        and all(
            isinstance(module.lora_dropout[name], nn.Identity)
            and not module.use_dora[name]
            and module.lora_B[name].bias is None
            for name in module.lora_A
        )
    )


def _lora_forward(module: Any) -> Forward:
    own: Any = ref(module)

    def forward(x: Tensor) -> Tensor:
        lora = own()
        if lora.disable_adapters or lora.merged:
            return lora.base_layer(x)
        (name,) = lora.active_adapters  # of those on one network one answers at a time
        base, down, up = lora.base_layer, lora.lora_A[name], lora.lora_B[name]
        return _LoraLinear.apply(x, base.weight, base.bias, down.weight, up.weight, lora.scaling[name])

    return forward


@torch.no_grad()
def _agrees(module: nn.Module, lean: Callable[[Any], Forward]) -> bool:
    """Whether both forms of such a module say the same: of random rows, with random weights (a fresh adapter is 0).

    A copy is asked, on the CPU where the module has no numbers of its own; not where it takes or returns anything else.
    """
    twin = copy.deepcopy(module)
    for part in twin.modules():
        vars(part).pop("forward", None)  # a form that was put on belongs to the original
    if next(twin.parameters()).device.type == "meta":
        twin = twin.to_empty(device="cpu")
    draw = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * (parameter.shape[-1] ** -0.5))
    weight = next(twin.parameters())
    width = getattr(module, "in_features", None) or weight.shape[-1]
    x = torch.randn(2, 3, width, generator=draw).to(weight.device, weight.dtype)
    try:
        own, ours = twin(x), lean(twin)(x)
    except (RuntimeError, TypeError, AttributeError):
        return False
    if not own.isfinite().all():
        return False
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    return bool(torch.allclose(ours, own, rtol=tolerance, atol=tolerance * float(own.abs().max())))
