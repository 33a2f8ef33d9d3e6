import pytest
import torch
from conftest import tiny_model
from torch import nn

from sartor.rollout import local, packed
from sartor.rollout.local import Sampling, sample
from sartor.rollout.packed import packed_weights


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.SiLU(), nn.Linear(96, 20, bias=False)).to(dtype)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bf16 products in oneDNN to pack for"
)
def test_packed_layers_give_what_plain_ones_give_and_go_back() -> None:
    layers, x = network(torch.bfloat16), torch.randn(1, 7, 48).bfloat16()
    with torch.no_grad():
        plain = layers(x)
        with packed_weights(layers, 64):
            assert all("forward" in vars(layers[i]) for i in (0, 2))
            torch.testing.assert_close(layers(x), plain, rtol=0.02, atol=0.02)
        assert not any("forward" in vars(layer) for layer in layers)
        assert torch.equal(layers(x), plain)


def test_an_error_inside_leaves_the_layers_as_they_were() -> None:
    layers = network(torch.bfloat16)
    with pytest.raises(ZeroDivisionError), packed_weights(layers, 64):
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize("reason", ["float32", "no such operator", "other results"])
def test_where_packing_does_not_suit_nothing_changes(reason: str, monkeypatch) -> None:
    layers = network(torch.float32 if reason == "float32" else torch.bfloat16)
    if reason == "no such operator":

        def missing(*_: object) -> None:
            raise NotImplementedError

        monkeypatch.setattr(packed, "_pack", missing)
    if reason == "other results":
        monkeypatch.setattr(packed, "_pack", lambda layer, rows: lambda x: layer(x) + 1)
    with packed_weights(layers, 64):
        assert not any("forward" in vars(layer) for layer in layers)


def test_samples_are_the_same_from_packed_weights(monkeypatch) -> None:
    model = tiny_model()
    model.core.bfloat16()
    ids = [(5, 6, 7), (100,) * 20]
    runs = []
    for steps in (0, 10**9):
        monkeypatch.setattr(local, "PACK_STEPS", steps)
        runs.append(sample(model, ids, 2, Sampling(8, temperature=0.0)))
    assert runs[0] == runs[1]
