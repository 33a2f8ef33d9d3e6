"""The leaner layers: the same numbers and gradients, put on where they hold and nowhere else."""

import gc
import random
import weakref

import pytest
import torch
from conftest import random_tree, tiny_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from sartor.data.trees import TreeBatch, pack
from sartor.model import lean
from sartor.model.forward import Head, check, head_of, packed_hidden, packed_logps, plain_rows, use_lean_layers
from sartor.model.lean import _judged, lean_forwards, rms_norm, swiglu
from sartor.model.load import LanguageModel, adapt
from sartor.model.logprobs import chunked_logps


def kinds(model: LanguageModel) -> set[str]:
    return {type(module).__name__ for module in lean_forwards(model.network)}


def gradients(model: LanguageModel, batch: TreeBatch, lean: bool) -> dict[str, torch.Tensor]:
    """By the packed road with lean layers, or by the plain road with the model's own."""
    model.network.zero_grad()
    if lean:
        logps = packed_logps(model, batch)
    else:
        rows, _ = plain_rows(model, batch)
        logps = rows.log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    return {name: p.grad.clone() for name, p in model.network.named_parameters() if p.grad is not None}


def adapted(model: LanguageModel) -> LanguageModel:
    network = adapt(model.network, 3, 5, seed=0)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return LanguageModel(network, model.tokenizer, model.name)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_those_of_the_models_own_layers(name: str, lora: bool, rng: random.Random) -> None:
    model = adapted(tiny_model(name)) if lora else tiny_model(name)
    batch = pack([random_tree(rng, 7, 2), random_tree(rng, 3, 3)])
    ours, theirs = gradients(model, batch, lean=True), gradients(model, batch, lean=False)
    assert ours.keys() == theirs.keys()
    for parameter, expected in theirs.items():
        torch.testing.assert_close(ours[parameter], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_what_is_replaced() -> None:
    assert kinds(tiny_model("llama")) == {"LlamaRMSNorm", "LlamaMLP"}
    assert kinds(adapted(tiny_model("llama"))) == {"LlamaRMSNorm", "LlamaMLP", "Linear"}
    # Gemma scales by 1 + w and gates with GELU: neither agrees, so both are left alone.
    assert kinds(tiny_model("gemma3")) == set()


def test_a_layer_that_computes_something_else_is_left_alone() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1.001 * rms_norm(x, self.weight, self.eps)

    assert lean_forwards(nn.Sequential(OddRMSNorm())) == {}


def test_a_norm_without_a_weight_is_left_alone() -> None:
    class BareRMSNorm(nn.Module):
        eps = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class ScalelessRMSNorm(BareRMSNorm):
        weight = None

    assert lean_forwards(nn.Sequential(BareRMSNorm(), ScalelessRMSNorm())) == {}


def test_an_adapter_is_judged_where_it_does_something(rng: random.Random) -> None:
    """A fresh adapter adds 0, whatever a wrong form of it would make of its scale."""
    model = adapted(tiny_model())
    wrong = next(module for module in model.network.modules() if isinstance(module, LoraLinear))
    assert wrong in _judged(model.network)
    own = type(wrong).forward
    type(wrong).forward = lambda self, x: self.base_layer(x) + 0.9 * (own(self, x) - self.base_layer(x))
    try:
        assert wrong not in _judged(model.network)
    finally:
        type(wrong).forward = own


def test_the_self_check_goes_back_too(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = lean._SwiGlu.backward

    def wrong(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        by_gate, by_up = backward(ctx, grad)
        return 0.9 * by_gate, by_up

    monkeypatch.setattr(lean._SwiGlu, "backward", staticmethod(wrong))
    model = tiny_model()
    assert check(model, random_tree(rng, 6, 3)) == "packed and plain gradients differ"
    assert model.shares_prompts is False


def test_the_self_check_runs_on_the_untouched_layers(rng: random.Random) -> None:
    model = tiny_model()
    use_lean_layers(model, True)
    forwards = lean_forwards(model.network)
    forwards[next(iter(forwards))] = torch.zeros_like
    use_lean_layers(model, False)
    assert "differ" in (check(model, random_tree(rng, 6, 2)) or "")


def test_a_network_with_lean_layers_goes_when_nobody_needs_it(rng: random.Random) -> None:
    """Without waiting for the collector: a second model in memory would be a second model too many."""
    gc.disable()
    try:
        model = adapted(tiny_model())
        packed_hidden(model, pack([random_tree(rng, 4, 2)])).sum().backward()
        norm = next(module for module in model.network.modules() if type(module).__name__ == "LlamaRMSNorm")
        weight = weakref.ref(norm.weight)
        del model, norm
        assert weight() is None
    finally:
        gc.enable()


def test_switching_back_leaves_no_trace(rng: random.Random) -> None:
    model = adapted(tiny_model())
    packed_hidden(model, pack([random_tree(rng, 4, 2)]))
    use_lean_layers(model, False)
    assert not any("forward" in vars(module) for module in model.network.modules())


def test_an_adapter_switched_off_answers_as_its_base(rng: random.Random) -> None:
    model, base = adapted(tiny_model()), tiny_model()
    batch = pack([random_tree(rng, 6, 2)])
    with model.without_adapter(), torch.no_grad():
        off = packed_logps(model, batch)
    torch.testing.assert_close(off, packed_logps(base, batch).detach())
    assert any(isinstance(module, LoraLinear) for module in lean_forwards(model.network))


def test_bf16_norm_is_as_exact_as_autograds() -> None:
    torch.manual_seed(0)
    x, weight, pull = torch.randn(50, 64), torch.rand(64) + 0.5, torch.randn(50, 64)

    def gradient(form: object, dtype: torch.dtype) -> torch.Tensor:
        leaf = x.to(dtype, copy=True).requires_grad_()
        form(leaf, weight.to(dtype)).backward(pull.to(dtype))  # type: ignore[operator]
        assert leaf.grad is not None
        return leaf.grad.float()

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    exact = gradient(plain, torch.float32)
    ours, autograds = (gradient(form, torch.bfloat16) - exact for form in (lambda x, w: rms_norm(x, w, 1e-6), plain))
    assert ours.norm() <= 1.05 * autograds.norm()


def test_swiglu_against_finite_differences() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_frozen_heads_gradient_is_made_in_the_forward_pass(softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(700, 6), torch.randn(11, 6), torch.randint(11, (700,))
    pull = torch.randn(700)
    found = []
    for frozen in (True, False):
        leaf = hidden.clone().requires_grad_()
        head = Head(weight.clone().requires_grad_(not frozen), None, 0.7, softcap)
        logps = chunked_logps(leaf, target, head)
        assert logps.grad_fn is not None
        # What is kept: [N, H] for a frozen head, and what makes the logits again for one that is trained.
        assert len(logps.grad_fn.saved_tensors) == (1 if frozen else 5)
        logps.backward(pull)
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


def test_a_frozen_head_costs_no_backward_where_nothing_asks_for_it(rng: random.Random) -> None:
    model = adapted(tiny_model())
    assert not head_of(model).weight.requires_grad
    with torch.no_grad():
        assert not packed_logps(model, pack([random_tree(rng, 4, 2)])).requires_grad
