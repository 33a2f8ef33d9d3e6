import pytest
import torch
from conftest import PACKED, RECURRENT, tiny_model

from sartor.data.trees import TokenTree, pack
from sartor.model.forward import packed_logps
from sartor.rollout.local import Sample, Sampling, choose, sample


def prompts(rng, lengths=(3, 11, 7, 20, 5)):
    return [tuple(rng.randrange(256) for _ in range(n)) for n in lengths]


@pytest.mark.parametrize("name", [*PACKED, *RECURRENT])
def test_greedy_equals_generate(name: str, rng) -> None:
    model = tiny_model(name)
    ids = prompts(rng)
    ours = sample(model, ids, 1, Sampling(max_new_tokens=12, temperature=0.0, batch_size=3))
    assert model.shares_prompts is (name in PACKED)
    model.core.set_attn_implementation(model.own_attention)
    for prompt, (one,) in zip(ids, ours, strict=True):
        whole = model.core.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted(model.end_tokens),
            pad_token_id=257,
        )
        assert one.tokens == tuple(whole[0, len(prompt) :].tolist())


def test_samples_do_not_depend_on_the_batch(rng) -> None:
    model, ids = tiny_model(), prompts(rng)
    by_batch = [sample(model, ids, 3, Sampling(10, batch_size=size, seed=1)) for size in (1, 4, 64)]
    assert by_batch[0] == by_batch[1] == by_batch[2]
    assert [len(row) for row in by_batch[0]] == [3] * 5
    assert len({one.tokens for one in by_batch[0][0]}) == 3
    assert by_batch[0] != sample(model, ids, 3, Sampling(10, seed=2))


def test_finished_rows_leave_and_the_others_go_on(rng) -> None:
    """With an end token every few steps, rows end at different times; what is left must not notice."""
    model, ids = tiny_model(), prompts(rng)
    alone = sample(model, ids, 8, Sampling(40, temperature=3.0, seed=3, batch_size=1))
    model.core.generation_config.eos_token_id = list(range(0, 40))
    together = sample(model, ids, 8, Sampling(40, temperature=3.0, seed=3))
    ended = 0
    for row_alone, row in zip(alone, together, strict=True):
        for whole, one in zip(row_alone, row, strict=True):
            end = next((i + 1 for i, t in enumerate(whole.tokens) if t < 40 or t == 257), None)
            assert one.tokens == whole.tokens[:end]
            assert one.finished is (end is not None)
            ended += one.finished
    assert 20 < ended <= 40  # otherwise nothing was tested


def test_frequencies_match_the_model(rng) -> None:
    """A chi-square test of first tokens against the model's own distribution, for temperature and top-p."""
    from scipy import stats

    model = tiny_model()
    (prompt,) = prompts(rng, (6,))
    tree = pack([TokenTree(prompt, tuple((word,) for word in range(261)))])
    probs = packed_logps_checked(model, tree).exp()
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.6)):
        drawn = sample(model, [prompt], 4000, Sampling(1, temperature, top_p, batch_size=4000, seed=5))[0]
        counts = torch.bincount(torch.tensor([one.tokens[0] for one in drawn]), minlength=261)
        expected = torch.softmax(probs.log() / temperature, 0)
        order = expected.argsort(descending=True)
        kept = order[(expected[order].cumsum(0) - expected[order]) < top_p]
        assert counts.sum() == counts[kept].sum() == 4000
        expected = expected[kept] / expected[kept].sum() * 4000
        assert stats.chisquare(counts[kept].double().numpy(), expected.double().numpy()).pvalue > 1e-3


def packed_logps_checked(model, tree) -> torch.Tensor:
    with torch.no_grad():
        return packed_logps(model, tree).double()


def test_top_p_looks_past_its_shortlist(monkeypatch) -> None:
    from sartor.rollout import local

    logits = torch.zeros(1, 50)  # uniform: 90 % of the mass needs 45 words, the shortlist has 4
    monkeypatch.setattr(local, "TOP_P_WORDS", 4)
    words = {int(choose(logits, torch.tensor([u]), 1.0, 0.9)) for u in torch.linspace(0, 0.999, 200).tolist()}
    assert len(words) == 45


def test_the_last_word_with_weight_is_never_overshot() -> None:
    logits = torch.tensor([[0.0, 0.0, float("-inf")]])
    assert choose(logits, torch.tensor([0.99999994]), 1.0, 1.0).item() == 1


def test_sample_text_leaves_special_tokens_out(rng) -> None:
    model = tiny_model()
    model.core.generation_config.eos_token_id = list(range(256))
    (row,) = sample(model, prompts(rng, (4,)), 1, Sampling(3))
    assert isinstance(row[0], Sample)
    assert row[0].finished
    assert len(row[0].tokens) == 1


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_long_and_short_prompts_that_end_at_different_times(name: str, rng) -> None:
    """More samples than rows: rows are refilled, then dropped, and every answer stays what generate gives alone."""
    model, lengths = tiny_model(name), (60, 2, 33, 1, 90, 4, 12, 3, 41, 7)
    model.core.generation_config.eos_token_id = list(range(0, 90))
    ids, done = prompts(rng, lengths), []
    ours = sample(model, ids, 2, Sampling(24, temperature=0.0, batch_size=8), done.append)
    assert sum(done) == 20
    assert len({len(one.tokens) for row in ours for one in row}) > 1  # otherwise nothing was tested
    model.core.set_attn_implementation(model.own_attention)
    ends = sorted(model.end_tokens)
    for prompt, row in zip(ids, ours, strict=True):
        ask = torch.tensor([prompt])
        whole = model.core.generate(ask, max_new_tokens=24, do_sample=False, eos_token_id=ends, pad_token_id=257)
        assert [one.tokens for one in row] == [tuple(whole[0, len(prompt) :].tolist())] * 2


def test_a_prompt_is_computed_once_and_the_cache_allocated_once(rng, monkeypatch) -> None:
    from sartor.rollout import local

    model, caches, places, prefilled = tiny_model(), [], set(), []

    class Watched(local.KeyValueCache):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            caches.append(self)

        def attend(self, layer, *args, **options):
            places.add((layer, *(part.data_ptr() for part in self.layers[layer])))
            return super().attend(layer, *args, **options)

    class Counted(local.Prefill):
        def __init__(self, prompts, rows, cache) -> None:
            super().__init__(prompts, rows, cache)
            prefilled.extend(prompts)

    monkeypatch.setattr(local, "KeyValueCache", Watched)
    monkeypatch.setattr(local, "Prefill", Counted)
    model.core.generation_config.eos_token_id = list(range(0, 40))
    ids = prompts(rng)
    sample(model, ids, 4, Sampling(20, temperature=2.0, batch_size=20))
    assert sorted(prefilled) == sorted(ids)
    assert len(caches) == 1
    assert len(places) == 2  # one pair of tensors for each of two layers, however many rows left


def test_blockwise_inversion_is_plain_inversion() -> None:
    from sartor.rollout.local import BLOCK, _invert

    torch.manual_seed(0)
    for words in (3, BLOCK, 2 * BLOCK + 276):
        weights = torch.rand(400, words, dtype=torch.float64) * (torch.rand(400, words) < 0.3)
        weights[:, -1] += 1e-9  # no row without weight
        uniform = torch.rand(400, dtype=torch.float64)
        sums = weights.cumsum(-1)
        plain = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)[:, 0]
        assert torch.equal(_invert(weights, uniform), plain)
        for u in (0.0, 1.0):
            edge = _invert(weights.float(), torch.full((400,), u))
            assert (weights.gather(1, edge[:, None]) > 0).all()
