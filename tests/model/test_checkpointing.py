"""Checkpointed layers: less memory, the same gradient to the last bit."""

import random

import pytest
import torch
from conftest import VOCABULARY, random_tree, tiny_model
from transformers import AutoModelForCausalLM, OPTConfig

from sartor.data.trees import pack
from sartor.model.checkpointing import checkpoint_layers, layers_of
from sartor.model.forward import packed_logps
from sartor.model.load import LanguageModel, adapt


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_the_gradient_is_the_same_to_the_last_bit(lora: bool, count: int, rng: random.Random) -> None:
    model = tiny_model()
    if lora:
        model = LanguageModel(adapt(model.network, 2, 4, seed=0), model.tokenizer, "tiny")
    batch = pack([random_tree(rng, 6, 2) for _ in range(3)])
    found = []
    for layers in (0, count):
        checkpoint_layers(model, layers)
        calls = count_forwards(model)
        model.network.zero_grad()
        packed_logps(model, batch).sum().backward()
        assert calls() == 2 + layers  # each checkpointed layer runs twice
        found.append([p.grad.clone() for p in model.network.parameters() if p.grad is not None])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


def count_forwards(model: LanguageModel):  # type: ignore[no-untyped-def]
    calls: list[int] = []
    inner = [layer.self_attn for layer in layers_of(model)]
    handles = [module.register_forward_pre_hook(lambda *_: calls.append(1)) for module in inner]

    def total() -> int:
        for handle in handles:
            handle.remove()
        return len(calls)

    return total


def test_dropout_inside_a_layer_stays_off(rng: random.Random) -> None:
    """OPT drops out in its layers' own forward, where they are in training mode."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
    config = OPTConfig(**shape, vocab_size=VOCABULARY, max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.5)
    torch.manual_seed(0)
    model = LanguageModel(AutoModelForCausalLM.from_config(config).eval(), None, "opt")
    tokens = torch.tensor([random_tree(rng, 9, 1).prompt])
    found = []
    for layers in (0, 2):
        checkpoint_layers(model, layers)
        model.network.zero_grad()
        model.network(tokens, labels=tokens).loss.backward()
        found.append([p.grad.clone() for p in model.network.parameters() if p.grad is not None])
    assert len(layers_of(model)) == 2
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


def test_switching_off_leaves_no_trace() -> None:
    model = tiny_model()
    checkpoint_layers(model, 2)
    assert all("forward" in vars(layer) for layer in layers_of(model))
    checkpoint_layers(model, 0)
    assert not any("forward" in vars(layer) for layer in layers_of(model))
