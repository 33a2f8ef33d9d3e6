"""The cache: found by content, safe under kills and company."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_tree, tiny_model

from sartor.data.trees import TokenTree
from sartor.model import reference
from sartor.model.load import fingerprint
from sartor.model.reference import key_of, read_shard, reference_logps, write_shard


def trees(rng, n=12):
    return [random_tree(rng, rng.randint(0, 9), rng.randint(1, 4)) for _ in range(n)]


def test_values_are_the_models_own_and_survive_on_disk(rng, tmp_path: Path, monkeypatch) -> None:
    model, data = tiny_model(), trees(rng)
    first = reference_logps(model, data, token_budget=60, folder=tmp_path)
    for tree, values in zip(data, first, strict=True):
        (alone,) = reference.score_trees(model, [tree])
        torch.testing.assert_close(values, alone, atol=1e-5, rtol=0)
    monkeypatch.setattr(reference, "score_trees", None)  # from here on everything must come from disk
    again = reference_logps(model, data[::-1], token_budget=1000, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, again[::-1], strict=True))


def test_the_key_is_the_content() -> None:
    tree = TokenTree((1, 2), ((3,), (4, 5)))
    assert key_of(tree) == key_of(TokenTree((1, 2), ((3,), (4, 5)), ranks=(1.0, 2.0)))
    others = [TokenTree((1,), ((2, 3), (4, 5))), TokenTree((1, 2), ((4, 5), (3,))), TokenTree((1, 2), ((3, 4), (5,)))]
    assert len({key_of(t) for t in (tree, *others)}) == 4


def test_another_model_another_fingerprint() -> None:
    first, same, other = tiny_model(seed=0), tiny_model(seed=0), tiny_model(seed=1)
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)
    with torch.no_grad():
        next(same.network.parameters()).view(-1)[0] += 1e-6
    assert fingerprint(first) != fingerprint(same)


def test_what_is_computed_is_fingerprinted_too() -> None:
    """The same weights with longer rotary waves are another reference."""
    first, stretched = tiny_model(), tiny_model()
    stretched.core.config.rope_parameters["rope_theta"] = 500.0
    assert fingerprint(first) != fingerprint(stretched)


def test_a_killed_run_keeps_its_shards_and_ends_with_the_same_bits(rng, tmp_path: Path, monkeypatch) -> None:
    model, data = tiny_model(), trees(rng, 20)
    smooth = reference_logps(model, data, token_budget=80, folder=tmp_path / "smooth")
    monkeypatch.setattr(reference, "SHARD_TOKENS", 1)
    score, calls = reference.score_trees, []

    def killed(*arguments, **options):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return score(*arguments, **options)

    monkeypatch.setattr(reference, "score_trees", killed)
    with pytest.raises(KeyboardInterrupt):
        reference_logps(model, data, token_budget=80, folder=tmp_path / "killed")
    assert len(list((tmp_path / "killed").glob("*.safetensors"))) == 3
    calls[:] = [1, 1, 1, 1]
    resumed = reference_logps(model, data, token_budget=80, folder=tmp_path / "killed")
    assert all(torch.equal(a, b) for a, b in zip(smooth, resumed, strict=True))


def test_damaged_and_partial_shards_are_passed_over(rng, tmp_path: Path) -> None:
    model, data = tiny_model(), trees(rng, 4)
    (tmp_path / "damaged.safetensors").write_bytes(b"not a shard")
    (tmp_path / "half.partial").write_bytes(b"")
    assert len(reference_logps(model, data, token_budget=1000, folder=tmp_path)) == 4


def test_two_runs_may_write_at_once(rng, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    keys = [[bytes([i, j] * 8) for j in range(20)] for i in range(2)]
    jobs = [context.Process(target=_write_many, args=(tmp_path, mine)) for mine in keys]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    found = {key for path in tmp_path.glob("*.safetensors") for key in read_shard(path)}
    assert found == {key for mine in keys for key in mine}


def _write_many(folder: Path, keys: list[bytes]) -> None:
    for key in keys:
        write_shard(folder / f"{key.hex()}.safetensors", {key: np.ones(3, dtype=np.float32)})


def test_the_reference_of_an_adapted_model_is_its_base(rng, tmp_path: Path, tiny_folder: Path) -> None:
    from sartor.model.load import load

    plain, adapted = load(str(tiny_folder), "float32"), load(str(tiny_folder), "float32", lora_r=2)
    with torch.no_grad():
        for name, parameter in adapted.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    data = trees(rng, 5)
    ours, theirs = (
        reference_logps(model, data, token_budget=1000, folder=tmp_path / name)
        for name, model in {"a": adapted, "b": plain}.items()
    )
    assert fingerprint(plain) == fingerprint(adapted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    (moved,) = reference.score_trees(adapted, data[:1])
    assert not torch.allclose(moved, theirs[0], atol=1e-3)
