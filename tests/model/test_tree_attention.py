"""The tree against the plain one-sequence-at-a-time forward: log-probs, gradients, and what a branch may see."""

import random

import pytest
import torch
from conftest import CONFIGS, PACKED, RECURRENT, random_tree, tiny_model

from sartor.data.trees import TokenTree, pack
from sartor.model import forward, tree_attention
from sartor.model.load import LanguageModel
from sartor.plan.trace import trace, weightless


def sequence_logps(model: LanguageModel, trees: list[TokenTree]) -> torch.Tensor:
    """The plain truth, written as simply as can be: each prompt + branch alone through the model."""
    model.core.set_attn_implementation(model.own_attention)
    scored = []
    for tree in trees:
        for branch in tree.branches:
            ids = torch.tensor([tree.prompt + branch])
            logps = model.core(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            start = max(1, len(tree.prompt))
            scored.append(logps[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0])
    return torch.cat(scored)


def gradients(model: LanguageModel, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    model.network.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return {name: p.grad.clone() for name, p in model.network.named_parameters() if p.grad is not None}


# Prompts empty, short and long (beyond the sliding windows of 6); K from 1 to 9.
SHAPES = [(0, 1), (0, 3), (1, 2), (9, 4), (40, 9), (17, 5), (5, 6), (30, 7), (3, 8)]


@pytest.mark.parametrize("in_blocks", [False, True], ids=["whole", "in blocks"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_equals_plain(name: str, in_blocks: bool, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    if in_blocks:
        monkeypatch.setattr(tree_attention, "SHORT", 8)
        monkeypatch.setattr(tree_attention, "ROWS", 5)
    model = tiny_model(name)
    trees = [random_tree(rng, prompt, branches) for prompt, branches in SHAPES]
    assert forward.check(model, trees[4]) is None
    packed, plain = forward.packed_logps(model, pack(trees)), sequence_logps(model, trees)
    torch.testing.assert_close(packed, plain, atol=1e-4, rtol=0)

    ours = gradients(model, forward.packed_logps(model, pack(trees)))
    theirs = gradients(model, sequence_logps(model, trees))
    assert ours.keys() == theirs.keys()
    for parameter, gradient in theirs.items():
        torch.testing.assert_close(ours[parameter], gradient, atol=1e-4, rtol=1e-4, msg=parameter)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_models_take_the_plain_road(name: str, rng: random.Random) -> None:
    model = tiny_model(name)
    trees = [random_tree(rng, prompt, branches) for prompt, branches in ((0, 2), (9, 3), (20, 2))]
    with torch.no_grad():
        logps = forward.token_logps(model, pack(trees))
    assert model.shares_prompts is False
    torch.testing.assert_close(logps, sequence_logps(model, trees), atol=1e-4, rtol=0)


def test_the_check_says_why_not(rng: random.Random) -> None:
    assert "linear_attention" in str(forward.check(tiny_model("qwen3_next"), random_tree(rng, 5, 2)))
    assert "linear_attention" in str(forward.check(tiny_model("mamba"), random_tree(rng, 5, 2)))


def test_one_token_is_not_held_to_the_mean_of_many(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding of bf16 reaches 0.2 nats at one token; over many it averages out, and a mean so large is a fault."""
    plain = forward._plain_logps
    monkeypatch.setattr(forward, "_plain_logps", lambda model, batch: plain(model, batch) + 0.2)
    model = tiny_model()
    monkeypatch.setitem(forward.TOLERANCE, torch.float32, forward.TOLERANCE[torch.bfloat16])
    tree = random_tree(rng, 9, 1)
    assert forward.check(model, TokenTree(tree.prompt, (tree.branches[0][:1],))) is None
    assert "differ by up to 0.2" in str(forward.check(model, TokenTree(tree.prompt, (tuple(range(40)),))))


def test_the_check_catches_a_branch_that_sees_another(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    everything_is_prompt = property(lambda batch: torch.zeros_like(batch.ids))
    monkeypatch.setattr(tree_attention.TreeBatch, "branch_of_token", everything_is_prompt)
    model = tiny_model()
    assert "differ by up to" in str(forward.check(model, random_tree(rng, 9, 3)))
    assert model.shares_prompts is False


def test_the_check_catches_a_lost_window(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    with_window = tree_attention.TreeAttention.attend

    def without_window(self, *qkv, window, **options):
        return with_window(self, *qkv, window=None, **options)

    monkeypatch.setattr(tree_attention.TreeAttention, "attend", without_window)
    assert "differ by up to" in str(forward.check(tiny_model("gemma3"), random_tree(rng, 20, 2)))


def test_blocks_of_a_long_tree_leave_out_what_no_query_sees() -> None:
    tree = TokenTree((1,) * 300, ((2,) * 100, (3,) * 600))
    (blocks,) = tree_attention.TreeAttention(pack([tree])).blocks(None, torch.float32)
    rows = [(block.rows.start, block.rows.stop) for block in blocks]
    assert rows == [(0, 150), (150, 300), (300, 400), (400, 600), (600, 800), (800, 1000)]
    assert [block.bias.shape[1] for block in blocks] == [150, 300, 400, 500, 700, 900]
    hidden = sum(int(block.bias.isinf().sum()) for block in blocks)
    assert sum(block.bias.numel() for block in blocks) - hidden == 300 * 301 / 2 + sum(
        300 * length + length * (length + 1) / 2 for length in (100, 600)
    )


def test_no_scores_of_a_long_tree_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, network = TokenTree((1,) * 200, ((2,) * 600,)), weightless(CONFIGS["llama"](), torch.float32)
    in_blocks = trace(network, [tree], backward=True).peak
    monkeypatch.setattr(tree_attention, "KEPT", 0)
    monkeypatch.setattr(tree_attention, "SHORT", 1000)
    again = trace(network, [tree], backward=True).peak
    monkeypatch.setattr(tree_attention, "KEPT", 2**40)
    kept = trace(network, [tree], backward=True).peak
    scores = 4 * 800**2 * 4  # bytes of one layer's
    assert kept > again
    assert again - in_blocks > 2 * scores


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_blocks_equal_the_whole_square(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the width of values is not that of keys, and where a branch or all of them are missing."""
    shapes = [(9, (7, 0, 12)), (0, (5, 6)), (1, (1, 1)), (20, ())]
    batch = pack([TokenTree((1,) * p, tuple((2,) * n for n in branches)) for p, branches in shapes])
    generator = torch.Generator().manual_seed(0)
    make = lambda *size: torch.randn(1, *size, generator=generator, dtype=torch.float64)  # noqa: E731
    qkv = [make(heads, len(batch.ids), width).requires_grad_() for heads, width in ((4, 8), (2, 8), (2, 5))]

    def attended(window: int | None) -> list[torch.Tensor]:
        output = tree_attention.TreeAttention(batch).attend(0, *qkv, window=window, scaling=0.3, softcap=softcap)
        pull = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        return [output, *torch.autograd.grad(output, qkv, pull)]

    for window in (None, 1, 6):
        whole = attended(window)
        with monkeypatch.context() as patch:
            patch.setattr(tree_attention, "SHORT", 0)
            patch.setattr(tree_attention, "ROWS", 3)
            in_blocks = attended(window)
        for ours, theirs in zip(in_blocks, whole, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_branches_are_blind_to_each_other_bit_for_bit(rng: random.Random) -> None:
    model = tiny_model()
    tree = random_tree(rng, 9, 3)
    other = TokenTree(tree.prompt, (tree.branches[0], tuple(255 - t for t in tree.branches[1]), tree.branches[2]))
    first, second = (forward.packed_logps(model, pack([t])).detach() for t in (tree, other))
    length = len(tree.branches[0])
    assert torch.equal(first[:length], second[:length])
    assert not torch.equal(first[length:-1], second[length:-1])


def test_attention_without_layout_is_refused(rng: random.Random) -> None:
    model = tiny_model()
    model.core.set_attn_implementation(tree_attention.NAME)
    with pytest.raises(NotImplementedError, match="layout"):
        model.core(input_ids=torch.tensor([[1, 2, 3]]))
