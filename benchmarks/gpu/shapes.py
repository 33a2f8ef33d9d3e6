"""Random models of known shapes, data of known lengths, and what a step of them cannot do without."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from sartor.data.trees import TokenTree

PAIRS = 16  # in an optimizer batch
LORA_R = 16
LENGTHS = {"uf": (168, 400), "hh": (215, 100)}  # mean prompt and completion of UltraFeedback and HH
SPREAD = 0.5  # lengths are uniform within so much of their mean
DENSE_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s, from the data sheets
# Hidden width, layers, heads, key-value heads, inner width, vocabulary.
SHAPES = {
    "1b": (2048, 16, 32, 8, 8192, 128256),
    "8b": (4096, 32, 32, 8, 14336, 128256),
    "check": (1024, 4, 16, 4, 3072, 32000),
    "tiny": (32, 2, 4, 2, 48, 300),
}
TIED = ("1b",)  # input and output embeddings are one
SCATTER = {"check": 0.05, "tiny": 0.2}  # of the weights, large enough for log-probs that differ from token to token
# Per parameter, by whether only an adapter is trained. TRL's autocast holds a bf16 copy of trained fp32 weights, and as
# shipped a reference beside the policy.
BYTES = {True: {"sartor": 2, "trl-tuned": 2, "trl": 4}, False: {"sartor": 18, "trl-tuned": 18, "trl": 22}}


def build(shape: str, device: Any, lora: bool, dtype: Any = None) -> Any:
    """A random model, the same weights whatever its precision: they are drawn, and rounded, in bf16."""
    torch.manual_seed(0)
    hidden, layers, heads, kv_heads, inner, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=shape in TIED,
        initializer_range=SCATTER.get(shape, 0.02),
        max_position_embeddings=4096,
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
    )
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if dtype is not None:
        network = network.to(dtype)
    if not lora:
        return network

    network = get_peft_model(network, lora_config(), autocast_adapter_dtype=False)
    set_adapter(network)
    return network


def lora_config() -> Any:
    return LoraConfig(
        r=LORA_R, lora_alpha=2 * LORA_R, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def set_adapter(network: Any) -> None:
    """Both halves random, so that policy and reference differ from the first step on; values that bf16 can hold."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(zlib.crc32(name[name.index("layers.") :].encode()))
                p.copy_((0.02 * torch.randn(p.shape, generator=generator)).bfloat16())


def draw_trees(data: str, vocabulary: int, count: int, scale: float = 1.0) -> list[Any]:
    rng = np.random.default_rng(0)
    tokens = lambda n: tuple(rng.integers(10, vocabulary, n).tolist())  # noqa: E731
    length = lambda mean: max(1, round(scale * mean * rng.uniform(1 - SPREAD, 1 + SPREAD)))  # noqa: E731
    prompt, completion = LENGTHS[data]
    return [
        TokenTree(tokens(length(prompt)), (tokens(length(completion)), tokens(length(completion))), (1.0, 2.0))
        for _ in range(count)
    ]


def useful_flops(config: Any, trees: Sequence[Any], lora: bool) -> float:
    """FLOPs that a step cannot do without: each prompt once, the head on completion tokens, no recomputation.

    A frozen matrix needs two products per token (forward, and the gradient by its input), a trained one three.
    """
    hidden, width = config.hidden_size, config.head_dim
    attention = hidden * width * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    body = config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size)
    tokens = sum(tree.size for tree in trees)
    scored = sum(len(branch) for tree in trees for branch in tree.branches)
    seen = 0  # keys, summed over queries
    for tree in trees:
        p = len(tree.prompt)
        seen += p * (p + 1) // 2 + sum(len(b) * p + len(b) * (len(b) + 1) // 2 for b in tree.branches)
    products = 2 if lora else 3
    matrices = 2 * products * (body * tokens + config.vocab_size * hidden * scored)
    return matrices + 3 * 4 * config.num_hidden_layers * config.num_attention_heads * width * seen


def token_budget(config: Any, static: float, device: Any) -> int:
    """Tokens whose activations fit beside ``static`` bytes, by a rough count per layer."""
    if device.type != "cuda":
        return 512
    memory = torch.cuda.get_device_properties(device).total_memory
    per_token = config.num_hidden_layers * (40 * config.hidden_size + 10 * config.intermediate_size)
    return max(512, int((0.85 * memory - 4e9 - static) * 0.8 / per_token))


def bytes_of_weights(shape: str, lora: bool, who: str) -> float:
    """What stays in memory from step to step: weights, and where they are trained gradients, moments and masters."""
    hidden, layers, heads, kv_heads, inner, vocabulary = SHAPES[shape]
    attention = 2 * hidden * hidden * (1 + kv_heads / heads)
    parameters = layers * (attention + 3 * hidden * inner) + vocabulary * hidden * (1 if shape in TIED else 2)
    return parameters * BYTES[lora][who]


def peak_flops() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rate for card, rate in DENSE_BF16.items() if card in name), None)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
