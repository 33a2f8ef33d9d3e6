"""Gradient checkpointing of as many layers as memory asks for (Chen et al. 2016, arXiv 1604.06174).

A checkpointed layer keeps its input only and runs forward again in the backward pass: one more unit of work for a
tenth of the memory. It is the same arithmetic in the same order, so the gradient is the same to the last bit.

transformers' own switch is not used: it asks for training mode, which would turn on dropout inside some layers.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from sartor.model.load import LanguageModel

# Nothing is random in a pass, so no state of a generator has to be kept for it.
run_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def layers_of(model: LanguageModel) -> list[Any]:
    """The layers that can be checkpointed, first to last; of a model with several parts those of its text decoder."""
    decoder = model.core.get_decoder() if hasattr(model.core, "get_decoder") else model.core
    return [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_layers(model: LanguageModel, count: int) -> None:
    """Checkpoint the first ``count`` layers and no other."""
    for number, layer in enumerate(layers_of(model)):
        vars(layer).pop("forward", None)
        if number < count:
            layer.forward = _checkpointed(layer.forward)  # on the instance, in front of the class's own


def _checkpointed(forward: Any) -> Any:
    def either_way(*args: Any, **kwargs: Any) -> Any:
        return run_again(forward, *args, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)

    return either_way
