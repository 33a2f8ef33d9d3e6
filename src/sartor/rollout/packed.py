"""Linear layers with their weights laid out for the processor once, and not again in every product.

oneDNN brings a bfloat16 weight into blocks before it multiplies, on every call. With the 64 rows of a decoding step
that is a fifth of the product's time, so the sampler lays them out for as long as it runs, at the cost of a second copy
of the weights. The products are the same but for the order of their sums.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ROUNDING = 2**-6  # of the largest output: what another order of summing may change in bfloat16


@contextmanager
def packed_weights(network: nn.Module, rows: int) -> Iterator[None]:
    """Context in which a network's bfloat16 linear layers on a CPU run from packed weights; others run as ever.

    Args:
        network: any module; its weights must not change inside.
        rows: how many rows a product usually has.
    """
    plain = [m for m in network.modules() if type(m) is nn.Linear and "forward" not in vars(m) and _suits(m.weight)]
    packs = bool(plain) and _agrees(plain[0], rows)
    try:
        for module in plain if packs else []:
            module.forward = _pack(module, rows)  # type: ignore[method-assign, assignment]
        yield
    finally:
        for module in plain:
            vars(module).pop("forward", None)


def _suits(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def _pack(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    """The layer's forward from a packed copy of its weight, as torch.compile would run it."""
    ops, bias = torch.ops.mkldnn, layer.bias
    weight = ops._reorder_linear_weight(layer.weight.detach(), rows)
    return lambda x: ops._linear_pointwise(x, weight, bias, "none", [], "")


def _agrees(layer: nn.Linear, rows: int) -> bool:
    """Whether this build of torch packs, and gets what it gets without."""
    x = torch.linspace(-1, 1, rows * layer.in_features).view(rows, -1).to(layer.weight.dtype)
    try:
        packed = _pack(layer, rows)(x)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    plain = layer(x)
    return bool((packed - plain).abs().max() <= ROUNDING * plain.abs().max())
