"""FLOPs are counted once for every pass, whoever makes it."""

import copy

import pytest
import torch
from conftest import tiny_model

from sartor.data.trees import TokenTree, pack
from sartor.model.flops import flops_so_far
from sartor.model.forward import check, token_logps
from sartor.model.load import FROZEN, load
from sartor.rollout.local import Sampling, sample

TREE = TokenTree((1, 2, 3), ((4, 5), (6,)))  # six tokens where the prompt is shared


def weights(model) -> int:
    layers = (p for name, p in model.core.base_model.named_parameters() if "lora_" not in name and "embed" not in name)
    return sum(p.numel() for p in layers if p.ndim > 1)


@pytest.mark.parametrize(("lora_r", "per_weight"), [(0, 6), (4, 4)])
def test_two_forward_and_backward_what_the_gradient_needs(tiny_folder, lora_r: int, per_weight: int) -> None:
    model = load(str(tiny_folder), "float32", lora_r)
    check(model, TREE)
    batch, before = pack([TREE]), flops_so_far()
    with torch.no_grad():
        token_logps(model, batch)
    forward = flops_so_far() - before
    assert forward == 2 * weights(model) * 6
    token_logps(model, batch).sum().backward()
    assert flops_so_far() - before - forward == per_weight * weights(model) * 6


def test_another_role_on_the_same_network_counts_once(tiny_folder) -> None:
    model = load(str(tiny_folder), "float32", 4)
    model.adapter = "default"
    reference = model.beside(adapter=FROZEN)
    check(model, TREE)
    reference.shares_prompts, before = True, flops_so_far()
    with torch.no_grad():
        token_logps(reference, pack([TREE]))
    assert flops_so_far() - before == 2 * weights(model) * 6


def test_sampling_counts_a_prompt_once_and_each_new_token() -> None:
    model = tiny_model()
    check(model, TREE)
    before = flops_so_far()
    drawn = sample(model, [(1, 2, 3)], 2, Sampling(4, seed=0, batch_size=2))
    longest = max(len(one.tokens) for one in drawn[0])
    most = 3 + 2 * (longest - 1)  # rows whose sample has ended may run along for a step
    passes = (flops_so_far() - before) / (2 * weights(model))
    assert 3 + sum(len(one.tokens) - 1 for one in drawn[0]) <= passes <= most


def test_a_copy_that_learns_counts_as_one_that_learns(tiny_folder) -> None:
    """The critic of full training is a copy of a reward model that does not."""
    frozen = load(str(tiny_folder), "float32")
    frozen.network.requires_grad_(False)
    learning = frozen.beside(network=copy.deepcopy(frozen.network).requires_grad_(True))
    check(learning, TREE)
    before = flops_so_far()
    token_logps(learning, pack([TREE])).sum().backward()
    assert flops_so_far() - before == 6 * weights(learning) * 6
