"""A model's shape: what training it holds in memory, and how many layers must be checkpointed for it to fit."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from sartor.data.trees import TokenTree
from sartor.model.varlen import head_width, suits
from sartor.plan.trace import Work, trace, trainable, weightless

GIB = 2**30
MARGIN = 0.95  # of what is free: a forecast of memory is good to a few percent

# What activations take of a CPU's heap beside their own size: buffers inside operations, which the trace does not see,
# and the holes that batches of unlike shape leave in kept memory (measured: docs/log.md, 2026-11-21).
HOLES = 1.35

Group = Sequence[TokenTree]


@dataclass(frozen=True)
class Memory:
    """Peak memory in bytes, by what it is for; in which stage; and how much there is."""

    stage: str
    parts: dict[str, float]
    available: float

    @property
    def total(self) -> float:
        """The peak."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.total <= MARGIN * self.available


class Shape:
    """A network without weights, as it would be trained: its precision, its adapter, the kind of device."""

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, lora_r: int, on_gpu: bool) -> None:
        self.config, self.dtype, self.lora_r, self.on_gpu = config, dtype, lora_r, on_gpu
        self.flash = on_gpu and suits(config.get_text_config(), dtype)
        self.network = weightless(config, dtype, lora_r)
        self.layers: int = config.get_text_config().num_hidden_layers
        self.trained = sum(p.numel() for p in trainable(self.network))
        self.weights = sum(p.numel() * p.element_size() for p in self.network.parameters())
        self._traced: dict[tuple[object, ...], Work] = {}

    def trace(self, trees: Group, backward: bool, checkpointed: int = 0) -> Work:
        """Work and memory of one pass, as the device attends; a second's work for trees of new lengths."""
        lengths = tuple((len(tree.prompt), *map(len, tree.branches)) for tree in trees)
        key = (lengths, backward, checkpointed)
        if key not in self._traced:
            self._traced[key] = trace(
                self.network, trees, backward=backward, checkpointed=checkpointed, flash=self.flash
            )
        return self._traced[key]

    @property
    def state(self) -> int:
        """Bytes of what the optimizer holds between steps: fp32 masters where weights are narrower, two moments."""
        return (12 if self.dtype != torch.float32 else 8) * self.trained

    @property
    def written(self) -> int:
        """Bytes of a saved model: all weights, or the adapter."""
        return self.trained * self.dtype.itemsize if self.lora_r else self.weights

    def training(self, groups: Iterable[Group], checkpointed: int = 0) -> dict[str, float]:
        """Peak bytes of training on the neediest of some micro-batches, by what they are for."""
        peak, gradients = max(self.trace(group, True, checkpointed).peak for group in groups), 4 * self.trained
        return {
            "weights": self.weights,
            "fp32 masters, moments": self.state,
            "gradients": gradients,
            "activations": peak if self.on_gpu else HOLES * peak,
        }

    def sampling(self, rows: int, length: int, packed: bool) -> dict[str, float]:
        """Peak bytes of sampling so many answers at a time, prompt and answer of so many tokens together."""
        cache = rows * length * self.bytes_per_token
        copy = self.weights if packed and self.dtype == torch.bfloat16 else 0
        return {"weights": self.weights + copy, "fp32 masters, moments": self.state, "keys and values": cache}

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        text = self.config.get_text_config()
        width = head_width(text)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return 2 * self.layers * heads * width * self.dtype.itemsize

    def checkpointing(self, groups: Sequence[Group], room: float) -> int:
        """The fewest layers to checkpoint so that training fits into ``room`` bytes; all, where none does."""
        none = sum(self.training(groups).values())
        if none <= room:
            return 0
        every = sum(self.training(groups, self.layers).values())
        if every >= none:
            return 0
        # Each layer that is checkpointed saves the same.
        count = min(self.layers, math.ceil((none - room) / (none - every) * self.layers))
        while count < self.layers and sum(self.training(groups, count).values()) > room:
            count += 1
        return count
