"""``sartor dpo --online``: the model learns from its own answers, ranked by a reward."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics
from safetensors.torch import load_file

from sartor.config import DpoConfig
from sartor.errors import UserError
from sartor.train import trainer
from sartor.train.dpo import train_dpo


@pytest.fixture
def config(rollouts: dict[str, Any], tmp_path: Path) -> DpoConfig:
    return DpoConfig(
        **rollouts,
        online=(f"{tmp_path / 'scorer.py'}:even",),
        max_steps=10,
        save_every=2,
    )


@pytest.mark.parametrize(("loss", "lora_r"), [("dpo", 4), ("plackett_luce", 0)])
def test_it_learns_from_its_own_answers(config: DpoConfig, loss: str, lora_r: int) -> None:
    run = train_dpo(replace(config, loss=(loss,), lora_r=lora_r, learning_rate=1e-2 if lora_r else 1e-3)).path
    first, last = metrics(run, "eval")[0], metrics(run, "eval")[-1]
    assert last["objective/scores"]["low"] > first["objective/scores"]["high"]
    assert abs(first["objective/kl"]["value"]) < 1e-5
    assert last["objective/kl"]["low"] > 0
    assert metrics(run, "train")[0]["examples"] > 6  # several pairs a prompt
    assert json.loads((run / "summary.json").read_text())["networks"] == (1 if lora_r else 2)
    assert "Reward against KL" in (run / "report.html").read_text()


def test_where_all_answers_are_worth_the_same_nothing_moves(config: DpoConfig, tmp_path: Path) -> None:
    run = train_dpo(replace(config, online=(f"{tmp_path / 'scorer.py'}:nothing",), max_steps=2)).path
    assert [row["examples"] for row in metrics(run, "train")] == [0, 0]
    assert metrics(run, "eval")[-1]["objective/kl"]["value"] == pytest.approx(0, abs=1e-6)


def test_killed_and_resumed_equals_uninterrupted(config: DpoConfig, tmp_path: Path, monkeypatch) -> None:
    config = replace(config, max_steps=4)
    smooth = train_dpo(replace(config, output=tmp_path / "smooth")).path
    save = trainer.save_checkpoint

    def dies(run, step, *rest) -> None:
        save(run, step, *rest)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        train_dpo(config)
    monkeypatch.setattr(trainer, "save_checkpoint", save)
    resumed = train_dpo(replace(config, resume=True)).path
    ours, theirs = (load_file(run / "model" / "adapter_model.safetensors") for run in (resumed, smooth))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": ("tdpo1",)}, "needs more than rankings"),
        ({"loss": ("kto",)}, "needs more than rankings"),
        ({"samples": 1}, "wanted 2 or more"),
        ({"online": ("vadr",)}, "did you mean 'vader'"),
    ],
)
def test_bad_input_is_one_line(config: DpoConfig, change: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        train_dpo(replace(config, **change))
    assert not config.output.exists()
