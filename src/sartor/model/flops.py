"""Floating-point operations of all models of this process, counted while they run.

The usual count (Kaplan et al. 2020, arXiv 2001.08361, section 2.1): for each token and each weight of the layers 2
forward; in training 2 more for the gradient by the activations, and 2 for that by the weights, which frozen weights
under an adapter do not have. Left out are attention's own products, the output layer, adapters, and layers that
checkpointing runs again: this is what the layers' work needs, whoever does it. In small models the output layer is no
small part of the rest.
"""

from typing import Any

import torch
from torch import Tensor

_counted = [0.0]


def flops_so_far() -> float:
    """Operations of this process so far."""
    return _counted[0]


def count_flops(core: Any) -> None:
    """Count what this network does from now on: every pass embeds its tokens first, whichever road it takes."""
    embedding = core.get_input_embeddings()
    if embedding is None or getattr(embedding, "sartor_counts", False):
        return
    embedding.sartor_counts = True
    named = core.base_model.named_parameters()
    layers = [p for name, p in named if p.ndim > 1 and p is not embedding.weight and "lora_" not in name]
    embedding.register_forward_pre_hook(_Counter(layers))


class _Counter:
    """An object and no function: a copy of the network, which copies it too, counts by the copy's own weights."""

    def __init__(self, layers: list[torch.nn.Parameter]) -> None:
        self.layers, self.size = layers, sum(layer.numel() for layer in layers)

    def __call__(self, _module: Any, inputs: tuple[Tensor, ...]) -> None:
        backward = 2 + 2 * self.layers[0].requires_grad if torch.is_grad_enabled() and self.layers else 0
        _counted[0] += (2 + backward) * self.size * inputs[0].numel()
