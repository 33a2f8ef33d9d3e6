"""The trace counts what really happens: FLOPs against the formula, memory against what a real pass keeps."""

import random

import pytest
import torch
from conftest import CONFIGS, _shape, random_tree, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig

from sartor.data.trees import TokenTree, pack
from sartor.model import tree_attention
from sartor.model.forward import packed_logps, token_logps, use_lean_layers
from sartor.model.load import LanguageModel
from sartor.plan.trace import Trace, trace, weightless


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("backward", [False, True])
def test_flops_are_those_of_a_real_pass(name: str, backward: bool, rng: random.Random) -> None:
    trees = [random_tree(rng, 9, 3), random_tree(rng, 4, 2)]
    model = tiny_model(name)
    model.shares_prompts = True
    use_lean_layers(model, True)  # it tries each kind of layer once, which is no part of a pass
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        logps = token_logps(model, pack(trees))
        if backward:
            logps.sum().backward()
    found = trace(weightless(CONFIGS[name](), torch.float32), trees, backward=backward)
    assert found.flops == counter.get_total_flops()


def test_parts_of_a_llama() -> None:
    """Body: every parameter of a linear layer, twice a token and pass; head: its own, where a token is scored."""
    config = CONFIGS["llama"]()
    tree = TokenTree((1,) * 10, ((2,) * 5, (3,) * 5), (1.0, 2.0))
    body = config.num_hidden_layers * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    found = trace(weightless(config, torch.float32), [tree, tree], backward=False)
    assert found.body == 2 * body * 40
    assert found.head == 2 * 32 * config.vocab_size * 20
    assert found.attention == config.num_hidden_layers * 2 * 2 * (32 * 20**2) * 2
    adapted = trace(weightless(config, torch.float32, lora_r=2), [tree, tree], backward=True)
    assert adapted.head == 2 * found.head  # a frozen head: logits, and the gradient by the hidden states at once


def test_memory_is_counted_while_it_lives() -> None:
    network = weightless(CONFIGS["llama"](), torch.float32)
    with Trace(network) as seen:
        first = torch.empty(1000, device="meta")
        second = first * 2
        del first
        third = second + 1
        third.view(10, 100).t()  # the same memory under another shape
        network.lm_head.weight.t() * 1  # the weight itself is not counted, the product is
    assert seen.peak == 3 * 4000 - 4000 + 4 * network.lm_head.weight.numel()
    assert seen.live == 2 * 4000


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_memory_is_what_a_real_pass_holds(
    name: str, in_blocks: bool, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same counting on a real pass, where layers were judged by their own weights and nothing is meta."""
    if in_blocks:
        monkeypatch.setattr(tree_attention, "SHORT", 20)
        monkeypatch.setattr(tree_attention, "ROWS", 16)
    trees = [random_tree(rng, 60, 3, 40) for _ in range(4)]
    model = tiny_model(name)
    model.shares_prompts = True
    use_lean_layers(model, True)
    batch = pack(trees)
    for parameter in model.network.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Trace(model.core) as real:
        packed_logps(model, batch).sum().backward()
    found = trace(weightless(CONFIGS[name](), torch.float32), trees, backward=True)
    assert found.peak == pytest.approx(real.peak, rel=0.02)


def test_experts_are_counted() -> None:
    config = MixtralConfig(**_shape(), num_local_experts=4, num_experts_per_tok=2)
    tree = TokenTree((1,) * 40, ((2,) * 20, (3,) * 20), (1.0, 2.0))
    found = trace(weightless(config, torch.bfloat16), [tree], backward=False)
    experts = config.num_hidden_layers * 3 * 32 * 48 * config.num_experts_per_tok
    assert found.body >= 2 * experts * tree.size


def test_checkpointing_trades_memory_for_work() -> None:
    config, tree = CONFIGS["llama"](), TokenTree((1,) * 60, ((2,) * 30, (3,) * 30), (1.0, 2.0))
    network = weightless(config, torch.bfloat16)
    none, one, both = (trace(network, [tree] * 4, backward=True, checkpointed=count) for count in (0, 1, 2))
    assert none.peak > one.peak > both.peak
    assert none.body < one.body < both.body
    # Three units of work and the forward one again, but for a layer's last product, which nothing needs.
    assert 1.25 * none.body < both.body < 4 / 3 * none.body


def test_a_weightless_network_takes_no_memory() -> None:
    network = weightless(CONFIGS["llama"](), torch.bfloat16, lora_r=4, layers=1)
    assert all(p.device.type == "meta" for p in network.parameters())
    assert isinstance(LanguageModel(network, None, ""), LanguageModel)
    assert network.get_base_model().config.num_hidden_layers == 1
