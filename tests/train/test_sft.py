"""``sartor sft``: that it learns, what it learns of a conversation, and what it leaves behind."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

from sartor.config import SftConfig
from sartor.train.sft import train_sft


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> SftConfig:
    rows = [{"prompt": f"Count {i}: ", "completion": "abc" * (1 + i % 3)} for i in range(48)]
    return SftConfig(
        model=str(tiny_folder),
        data=write(tmp_path / "demos.jsonl", rows),
        output=tmp_path / "run",
        eval_fraction=0.25,
        learning_rate=1e-2,
        dtype="float32",
        epochs=3,
        eval_prompts=2,
        max_new_tokens=4,
    )


@pytest.mark.parametrize("lora_r", [0, 4])
def test_it_learns_and_leaves_a_model_behind(config: SftConfig, lora_r: int) -> None:
    run = train_sft(replace(config, lora_r=lora_r, learning_rate=3e-2 if lora_r else 1e-2)).path
    first, last = metrics(run, "eval")[0], metrics(run, "eval")[-1]
    assert first["perplexity_ratio"]["value"] == 1.0
    assert last["perplexity_ratio"]["high"] < 0.7
    assert last["perplexity"]["value"] == pytest.approx(math.exp(last["loss"]["value"]))
    assert last["perplexity"]["value"] / first["perplexity"]["value"] == pytest.approx(
        last["perplexity_ratio"]["value"], rel=1e-6
    )
    assert "Held-out perplexity" in (run / "report.html").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["headline"].startswith("On 12 held-out demonstrations, perplexity is ")
    if not lora_r:
        assert AutoModelForCausalLM.from_pretrained(run / "model") is not None


def test_perplexity_is_that_of_transformers(config: SftConfig) -> None:
    """Step 0 against the Hugging Face model's own loss, example by example."""
    run = train_sft(replace(config, max_steps=1, eval_prompts=0, data=config.data)).path
    network, tokenizer = AutoModelForCausalLM.from_pretrained(config.model), AutoTokenizer.from_pretrained(config.model)
    from sartor.model.load import load
    from sartor.train.demonstrations import encode, read_demonstrations

    held_out = encode(load(config.model, "float32"), read_demonstrations(config)[1], config)
    total, count = 0.0, 0
    with torch.no_grad():
        for tree in held_out.trees:
            row = torch.tensor([tree.prompt + tree.branches[0]])
            labels = row.clone()
            labels[0, : len(tree.prompt)] = -100
            total += float(network(row, labels=labels).loss) * len(tree.branches[0])
            count += len(tree.branches[0])
    assert tokenizer.decode(held_out.trees[0].branches[0]).startswith("abc")
    assert metrics(run, "eval")[0]["loss"]["value"] == pytest.approx(total / count, rel=1e-5)


def test_corrections_are_demonstrations(config: SftConfig, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": "wrong", "correction": "right"} for i in range(20)]
    run = train_sft(replace(config, data=write(tmp_path / "mended.jsonl", rows), max_steps=1)).path
    tokens = json.loads((run / "summary.json").read_text())["data"]["train"]
    assert tokens.startswith(f"15 demonstrations of {15 * (len('right') + 2)} tokens")  # bytes, the end and a newline


def test_of_preferences_the_best_answers_are_learned(config: SftConfig, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completions": ["x", "bestest", "y"], "ranks": [2, 1, 3]} for i in range(20)]
    run = train_sft(replace(config, data=write(tmp_path / "ranked.jsonl", rows), max_steps=1)).path
    data = json.loads((run / "summary.json").read_text())["data"]
    assert data["train"].startswith(f"15 demonstrations of {15 * (len('bestest') + 2)} tokens")
    assert any("the preferred answer is the demonstration" in note for note in data["notes"])


def test_documents_have_no_prompt_and_long_ones_are_cut(config: SftConfig, tmp_path: Path) -> None:
    rows = [{"text": f"{i} " + "never more " * (1 + 9 * (i % 2))} for i in range(20)]
    run = train_sft(replace(config, data=write(tmp_path / "text.jsonl", rows), max_steps=2, max_length=40)).path
    summary = json.loads((run / "summary.json").read_text())
    assert any("long documents are cut" in note for note in summary["data"]["notes"])
    assert summary["comparison"] is None
    assert metrics(run, "eval")[-1]["loss"]["n"] >= 5


def test_a_document_is_packed_with_others_and_sees_none_of_them(config: SftConfig, tmp_path: Path) -> None:
    rows = [{"text": f"document number {i}"} for i in range(20)]
    data = write(tmp_path / "text.jsonl", rows)
    norms = []
    for budget in (10, 100_000):
        run = train_sft(replace(config, data=data, max_steps=2, token_budget=budget, output=tmp_path / str(budget)))
        norms.append([row["grad_norm"] for row in metrics(run.path, "train")])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_killed_and_resumed_equals_uninterrupted(config: SftConfig, tmp_path: Path, monkeypatch) -> None:
    from safetensors.torch import load_file

    from sartor.train import trainer

    config = replace(config, epochs=1, save_every=2)
    smooth = train_sft(replace(config, output=tmp_path / "smooth")).path
    save = trainer.save_checkpoint

    def dies(run, step, *rest) -> None:
        save(run, step, *rest)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        train_sft(config)
    monkeypatch.setattr(trainer, "save_checkpoint", save)
    resumed = train_sft(replace(config, resume=True)).path
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (resumed, smooth))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (resumed / "samples.jsonl").read_text() == (smooth / "samples.jsonl").read_text()
