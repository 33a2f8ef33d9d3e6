"""How fast this machine is at this model: the real step, on a model of the same shape with one layer and with five.

The difference between the two is what layers take, products, small operations and Python together; times the
number of layers it gives the whole within seconds, without the weights and without room for them. Layers are taken to
be alike: a model that mixes kinds of layers is forecast by its first few.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from sartor.data.trees import TokenIds, TokenTree, pack
from sartor.errors import UserError
from sartor.machine import available_memory, resident_memory
from sartor.model.forward import token_logps, use_lean_layers
from sartor.model.load import LanguageModel, pick_device
from sartor.plan.trace import trainable, weightless
from sartor.rollout.local import Sampling, sample

REPEATS = 2
DEPTHS = 1, 5  # layers: far enough apart that their difference stands out of the head's time
SHARE = 0.25  # of the memory that is free: a larger thin model is not made beside the one that is to be trained
FEW, MANY = 2, 26  # tokens to decode: the difference is decoding alone, without the prompts


@dataclass(frozen=True)
class Pass:
    """One pass of some trees, to be timed."""

    trees: Sequence[TokenTree]
    backward: bool

    def shorter(self, by: int) -> "Pass":
        """With so many tokens less of each prompt that has more of them."""
        cut = [TokenTree(t.prompt[by:], t.branches) if len(t.prompt) > by else t for t in self.trees]
        return Pass(cut, self.backward)


def time_passes(config: PreTrainedConfig, dtype: torch.dtype, lora_r: int, passes: Sequence[Pass]) -> list[float]:
    """Seconds of each pass on this machine's device.

    Each runs once, after other shapes of trees: in a run, too, the next micro-batch has a shape of its own, which
    finds neither its memory nor its kernels at hand, and takes a tenth longer than the second time.
    """
    by_depth = []
    for cut, depth in enumerate(_depths(config)):
        with _thin(config, dtype, lora_r, depth) as model:
            # Pages are fetched here, or only the first depth would pay for them; each depth has shapes of its own, or
            # only the first would pay for kernels.
            _seconds(model, Pass(max(passes, key=lambda one: len(one.trees)).shorter(2).trees, True))
            by_depth.append([_seconds(model, one.shorter(cut)) for one in passes])
    return [_extrapolate(seconds, config) for seconds in zip(*by_depth, strict=True)]


def time_decoding(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    lora_r: int,
    tokenizer: Any,
    prompts: Sequence[TokenIds],
    new_tokens: int,
) -> float:
    """Seconds of one decoding step of an answer to each prompt, answers being ``new_tokens`` long at most."""
    by_depth = []
    many = max(FEW + 1, min(MANY, new_tokens))
    for depth in _depths(config):
        with _thin(config, dtype, lora_r, depth, tokenizer) as model:
            short, long = (
                best_of(lambda count=count: sample(model, prompts, 1, Sampling(count)), REPEATS)  # type: ignore[misc]
                for count in (FEW, many)
            )
            by_depth.append((long - short) / (many - FEW))
    return _extrapolate(by_depth, config)


def _depths(config: PreTrainedConfig) -> tuple[int, int]:
    few, more = DEPTHS
    return few, max(few + 1, min(more, config.get_text_config().num_hidden_layers))


def _extrapolate(seconds: Sequence[float], config: PreTrainedConfig) -> float:
    """Seconds at the model's own depth from those at two depths."""
    few, more = _depths(config)
    per_layer = max(0.0, seconds[1] - seconds[0]) / (more - few)
    return seconds[0] + (config.get_text_config().num_hidden_layers - few) * per_layer


@contextmanager
def _thin(
    config: PreTrainedConfig, dtype: torch.dtype, lora_r: int, layers: int, tokenizer: Any = None
) -> Iterator[LanguageModel]:
    """A model of a few layers, its numbers made up, for as long as the context lasts.

    Raises:
        UserError: it would take more than a share of the memory that is free.
    """
    network = weightless(config, dtype, lora_r, layers)
    size, free = sum(p.nbytes for p in network.parameters()), available_memory() - resident_memory()
    if size > SHARE * free:
        raise UserError("a layer of it is too large to be timed beside the rest")
    network = network.to_empty(device=pick_device())
    network.tie_weights()
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            # Numbers as a model has them: none changes the time, but for those too small for the processor's fast path.
            tensor.data.fill_(1.0) if tensor.ndim < 2 else tensor.data.uniform_(-0.05, 0.05)
    model = LanguageModel(network, tokenizer, "", shares_prompts=True)
    try:
        yield model
    finally:
        use_lean_layers(model, False)  # their closures would keep the weights until the next collection of garbage


def _seconds(model: LanguageModel, one: Pass) -> float:
    def run() -> None:
        with torch.set_grad_enabled(one.backward):
            logps = token_logps(model, pack(one.trees).to(model.device))
        if one.backward:
            logps.sum().backward()
            for parameter in trainable(model.network):
                parameter.grad = None

    return _clock(run)


def _clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def best_of(run: Callable[[], object], repeats: int) -> float:
    """Shortest of some runs after one to warm up, in seconds: what the machine does when left alone."""
    run()
    return min(_clock(run) for _ in range(repeats))


def seconds_per_update(dtype: torch.dtype, parameters: int = 8_000_000) -> float:
    """Seconds that clipping, AdamW and the rounded copy take per trained parameter."""
    device = pick_device()
    master = torch.zeros(parameters, device=device, requires_grad=True)
    master.grad = torch.zeros(parameters, device=device)
    working: Tensor = torch.zeros(parameters, device=device, dtype=dtype)
    optimizer = torch.optim.AdamW([master], lr=0.0, fused=True)

    def run() -> None:
        torch.nn.utils.clip_grad_norm_([master], 1.0)
        optimizer.step()
        with torch.no_grad():
            working.copy_(master)

    return best_of(run, REPEATS) / parameters
