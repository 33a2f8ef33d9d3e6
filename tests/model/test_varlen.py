"""Which segments flash attention gets, and that attention over them is that of the tree.

The kernels themselves need a GPU; here a plain loop over segments stands in for them.
"""

import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PACKED, random_tree, tiny_model

from sartor.data.trees import TokenTree, TreeBatch, pack
from sartor.model import forward, tree_attention, varlen
from sartor.model.tree_attention import TreeAttention
from sartor.model.varlen import VarlenAttention, attention_for, fits, segments

Tensor = torch.Tensor


def loop_over_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """What ``varlen_attn`` promises: [T, heads, d] by [T', kv_heads, d], causal from the bottom right."""
    assert query_starts.dtype == key_starts.dtype == torch.int32
    assert longest_query == query_starts.diff().max()
    assert longest_key == key_starts.diff().max()
    assert window_size[1] == 0
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for i in range(len(query_starts) - 1):
        q = query[query_starts[i] : query_starts[i + 1]].transpose(0, 1)
        k, v = (x[key_starts[i] : key_starts[i + 1]].repeat_interleave(groups, 1).transpose(0, 1) for x in (key, value))
        assert 0 < q.shape[1] <= k.shape[1]
        back = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
        seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        scores = (scale * q @ k.transpose(1, 2)).masked_fill(~seen, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_flash", lambda: loop_over_segments)


def trees_of(shapes: list[tuple[int, tuple[int, ...]]]) -> list[TokenTree]:
    rng = random.Random(0)
    tokens = lambda n: tuple(rng.randrange(256) for _ in range(n))  # noqa: E731
    return [TokenTree(tokens(prompt), tuple(tokens(n) for n in branches)) for prompt, branches in shapes]


# Prompt length and branch lengths: K from 0 to 5, empty prompts, empty branches first, last, between and throughout.
SHAPES = [
    [(5, (3,))],
    [(0, (4,)), (0, (1,))],
    [(6, (3, 8))],
    [(0, (3, 8)), (4, (2, 2, 2))],
    [(7, (0, 5)), (7, (5, 0)), (7, (3, 0, 4)), (2, (0, 0)), (3, (0,)), (1, ())],
    [(0, (0, 4, 0, 2)), (0, (0,)), (0, ()), (9, (1, 1, 1, 1, 1))],
    [(1, (1,)), (20, (12, 3, 7, 9)), (2, (15, 1)), (11, (5, 6, 7, 8, 9))],
]


@pytest.mark.parametrize("shapes", SHAPES)
def test_segments_hold_the_tree(shapes: list[tuple[int, tuple[int, ...]]]) -> None:
    batch = pack(trees_of(shapes))
    found = segments(batch)
    assert found.query_starts[-1] == len(batch.ids)
    assert found.key_starts[-1] == len(found.rows)
    for i in range(len(found.query_starts) - 1):
        rows = found.rows[found.key_starts[i] : found.key_starts[i + 1]].tolist()
        queries = list(range(found.query_starts[i], found.query_starts[i + 1]))
        assert queries
        assert rows[-len(queries) :] == queries
        # Keys are one branch from its first position on, so places and positions differ by nothing.
        assert batch.positions[rows].tolist() == list(range(len(rows)))
        assert set(batch.branch_of_token[rows].tolist()) <= {0, int(batch.branch_of_token[rows[-1]])}
    copies = np.concatenate([found.first, *(places for places, _ in found.again)])
    assert sorted(copies.tolist()) == list(range(len(found.rows)))  # every key row falls into one round
    assert found.rows[found.first].tolist() == list(range(len(batch.ids)))
    for places, rows in found.again:
        assert found.rows[places].tolist() == rows.tolist()
        assert len(set(rows.tolist())) == len(rows)


def test_one_branch_needs_no_copies() -> None:
    assert segments(pack(trees_of([(5, (3,)), (0, (4,)), (6, (0, 2, 0))]))).again == ()


def outputs_and_gradients(attend: Callable[..., Tensor], qkv: list[Tensor], **options: object) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in qkv]
    output = attend(0, *leaves, **options)
    seed = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * seed).sum(), leaves)]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_varlen_equals_dense(
    shapes: list[tuple[int, tuple[int, ...]]],
    window: int | None,
    heads: int,
    kv_heads: int,
    in_blocks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if in_blocks:
        monkeypatch.setattr(tree_attention, "SHORT", 0)
        monkeypatch.setattr(tree_attention, "ROWS", 3)
    batch = pack([tree for tree in trees_of(shapes) if tree.size])  # the dense form knows no tree without tokens
    generator = torch.Generator().manual_seed(0)
    make = lambda n: torch.randn(1, n, len(batch.ids), 8, generator=generator, dtype=torch.float64)  # noqa: E731
    qkv = [make(heads), make(kv_heads), make(kv_heads)]
    options = {"window": window, "scaling": 0.3, "softcap": None}
    ours = outputs_and_gradients(VarlenAttention(batch).attend, qkv, **options)
    dense = outputs_and_gradients(TreeAttention(batch).attend, qkv, **options)
    for mine, theirs in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", [name for name in PACKED if name != "gemma2"])
def test_a_model_on_flash_gives_the_plain_log_probs(
    name: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name)
    batch = pack([random_tree(rng, prompt, branches) for prompt, branches in ((0, 2), (9, 2), (20, 5), (3, 1))])

    def gradients(logps: Tensor) -> dict[str, Tensor]:
        model.network.zero_grad()
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        return {key: p.grad.clone() for key, p in model.network.named_parameters() if p.grad is not None}

    def scored(shares_prompts: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model.shares_prompts = shares_prompts
        logps = forward.token_logps(model, batch)
        return logps.detach(), gradients(logps)

    # Both names under which forward may make the attention, now and once it asks ``attention_for``.
    monkeypatch.setattr(forward, "TreeAttention", VarlenAttention, raising=False)
    monkeypatch.setattr(varlen, "fits", lambda _: True)
    monkeypatch.setattr(varlen, "suits", lambda *_: True)
    (ours, our_gradients), (plain, plain_gradients) = scored(True), scored(False)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)
    assert our_gradients.keys() == plain_gradients.keys()
    for key, gradient in plain_gradients.items():
        torch.testing.assert_close(our_gradients[key], gradient, atol=1e-4, rtol=1e-4, msg=key)


def test_gradients_of_copies_add_up_in_fp32() -> None:
    """Nine copies of a row whose gradients lose bits when added in bf16 one by one."""
    batch = pack(trees_of([(2, (1,) * 9)]))
    attention = VarlenAttention(batch)
    x = torch.zeros(len(batch.ids), 1, 1, dtype=torch.bfloat16, requires_grad=True)
    pull = torch.full((len(attention.rows), 1, 1), 1.0 + 2**-7, dtype=torch.bfloat16)
    (gradient,) = torch.autograd.grad(varlen._Repeat.apply(x, attention.rows, *attention.copies), x, pull)
    assert gradient[0].item() == torch.tensor(9 * (1.0 + 2**-7)).bfloat16().item()


def test_capped_scores_are_refused(rng: random.Random) -> None:
    batch = pack([random_tree(rng, 3, 2)])
    x = torch.zeros(1, 2, len(batch.ids), 8)
    with pytest.raises(NotImplementedError, match="capped"):
        VarlenAttention(batch).attend(0, x, x, x, window=None, scaling=1.0, softcap=2.0)


def test_where_flash_fits(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    batch = pack([random_tree(rng, 3, 2)])
    assert not fits(torch.device("cpu"))
    assert isinstance(attention_for(batch, tiny_model().core), TreeAttention)
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fits(card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not fits(card)


@pytest.mark.parametrize(
    ("change", "suited"),
    [
        ({}, True),
        ({"head_dim": 256}, True),
        ({"head_dim": 264}, False),
        ({"head_dim": 4}, False),
        ({"attn_logit_softcapping": 50.0}, False),
        ({"kv_lora_rank": 512}, False),  # keys wider than values
    ],
)
def test_which_heads_flash_suits(change: dict[str, float], suited: bool) -> None:
    config = SimpleNamespace(hidden_size=1024, num_attention_heads=8, **change)
    assert varlen.suits(config, torch.bfloat16) == suited
    assert not varlen.suits(config, torch.float32)


def test_torch_has_the_function_in_a_form_we_know() -> None:
    assert varlen._flash() is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 4])
def test_flash_itself_equals_dense(window: int | None) -> None:
    batch: TreeBatch = pack(trees_of(SHAPES[-1])).to("cuda")
    qkv = [torch.randn(1, n, len(batch.ids), 64, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2)]
    options = {"window": window, "scaling": 0.125, "softcap": None}
    leaves = [x.clone().requires_grad_() for x in qkv]
    wide = [x.double().requires_grad_() for x in qkv]
    ours, dense = VarlenAttention(batch).attend(0, *leaves, **options), TreeAttention(batch).attend(0, *wide, **options)
    seed = torch.randn_like(ours)
    torch.testing.assert_close(ours.double(), dense, atol=2e-2, rtol=2e-2)
    theirs = torch.autograd.grad(dense, wide, seed.double())
    for mine, gradient in zip(torch.autograd.grad(ours, leaves, seed), theirs, strict=True):
        torch.testing.assert_close(mine.double(), gradient, atol=5e-2, rtol=5e-2)
