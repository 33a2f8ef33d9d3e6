"""The step itself, run on tensors without memory: its FLOPs and its peak memory, counted and not guessed.

PyTorch's ``meta`` device does everything but the arithmetic. A dispatch mode sees each operation go by, so what is
counted is the code that will run, with its checkpointing, its adapters and whatever an architecture does: there is no
second formula to keep in step with it.
"""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from sartor.data.trees import TokenTree, pack
from sartor.model.checkpointing import checkpoint_layers
from sartor.model.forward import packed_logps, use_lean_layers
from sartor.model.load import LanguageModel, adapt
from sartor.model.tree_attention import TreeAttention
from sartor.model.varlen import VarlenAttention, head_width

# Which arguments are multiplied. Grouped products are those of a mixture of experts.
FACTORS = {
    torch.ops.aten.mm: (0, 1),
    torch.ops.aten.addmm: (1, 2),
    torch.ops.aten.addmm_: (1, 2),
    torch.ops.aten._grouped_mm: (0, 1),
    torch.ops.aten.bmm: (0, 1),
    torch.ops.aten.baddbmm: (1, 2),
}
BATCHED = {torch.ops.aten.bmm, torch.ops.aten.baddbmm}


@dataclass(frozen=True)
class Work:
    """FLOPs of one pass by part, and its peak of live memory beyond what lived before it, in bytes."""

    body: float
    head: float
    attention: float
    peak: int

    @property
    def flops(self) -> float:
        """All of them."""
        return self.body + self.head + self.attention


class Trace(TorchDispatchMode):
    """Counts the FLOPs of matrix products, and the bytes of all storages that come to live beside the network's."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.vocabulary: int = network.config.get_text_config().vocab_size
        self.flops = {"body": 0.0, "head": 0.0, "attention": 0.0}
        self.live = self.peak = 0
        # A transposed weight is a new tensor on old memory.
        self._known = {t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in FACTORS:
            left, right = (args[place] for place in FACTORS[func.overloadpacket])
            part = "attention" if func.overloadpacket in BATCHED else "body"
            if self.vocabulary in (*left.shape, *right.shape):
                part = "head"
            self.flops[part] += 2.0 * left.numel() * right.shape[-1]
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.hold(tensor)
        return result

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def weightless(config: PreTrainedConfig, dtype: torch.dtype, lora_r: int = 0, layers: int | None = None) -> Any:
    """A network of this shape on the meta device, with an adapter where there is one; of ``layers`` layers only."""
    config = copy.deepcopy(config)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        network: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if lora_r:
            network = adapt(network, lora_r, 2 * lora_r, seed=0)
            for name, parameter in network.named_parameters():
                if "lora_" in name:  # PEFT gives adapters their base's precision only where that has numbers
                    parameter.data = parameter.data.to(dtype)
    return network.eval()


def trace(
    network: Any, trees: Sequence[TokenTree], *, backward: bool, checkpointed: int = 0, flash: bool = False
) -> Work:
    """Work and memory of one pass of ``trees`` through a weightless network.

    Gradients are not counted: each goes on into its master's, which is there already. ``flash`` attends as on a GPU,
    where no matrix of scores is kept.
    """
    model = LanguageModel(network, None, "", shares_prompts=True)
    use_lean_layers(model, True)  # before anything is counted: it tries each kind of layer once
    checkpoint_layers(model, checkpointed)
    batch = pack(trees).to("meta")
    with Trace(model.core) as seen:
        with torch.set_grad_enabled(backward):
            logps = packed_logps(model, batch, VarlenAttention(batch) if flash else TreeAttention(batch))
        if backward:
            handles = [p.register_post_accumulate_grad_hook(_free_gradient) for p in trainable(network)]
            logps.sum().backward()
            for handle in handles:
                handle.remove()
    if flash:  # one operation that no product shows: the lower half of what dense attention computes
        text = model.core.config.get_text_config()
        width = head_width(text)
        square = sum(tree.size**2 for tree in trees)
        once = text.num_hidden_layers * 2 * text.num_attention_heads * width * square
        seen.flops["attention"] += once * (3.5 if backward else 1.0)  # backward: five products to forward's two
    return Work(seen.flops["body"], seen.flops["head"], seen.flops["attention"], seen.peak)


def trainable(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that get a gradient."""
    return [p for p in network.parameters() if p.requires_grad]


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None  # it goes on into the fp32 master's, which ``Shape.training`` counts
