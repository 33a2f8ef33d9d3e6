"""``sartor compare`` on a tiny model: every arm leaves a run, the results add up, and it goes on where it broke."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SCORER

from sartor.cli import main
from sartor.compare import experiment
from sartor.compare.arms import Arm, arms_of
from sartor.compare.experiment import run_compare
from sartor.config import CompareConfig
from sartor.errors import UserError

ARMS = ["dpo-0.05", "ppo", "ppo-true", "reward"]


@pytest.fixture
def config(sharp_folder: Path, tmp_path: Path) -> CompareConfig:
    (tmp_path / "scorer.py").write_text(SCORER)
    (tmp_path / "prompts.txt").write_text("".join(f"prompt number {i}\n" for i in range(18)))
    return CompareConfig(
        model=str(sharp_folder),
        output=tmp_path / "out",
        prompts=str(tmp_path / "prompts.txt"),
        score=f"{tmp_path / 'scorer.py'}:even",
        size="quick",
        seeds=2,
        max_new_tokens=6,
        lora_r=4,
        dpo=("dtype=float32", "learning_rate=0.01"),
        reward=("dtype=float32", "learning_rate=0.01"),
        ppo=("dtype=float32", "learning_rate=0.01", "batch_size=6"),
    )


class Here:
    """Arms in this process, which saves starting Python for each; the one at ``breaks`` ends with an error."""

    def __init__(self, breaks: int = 10**6) -> None:
        self.calls, self.breaks = 0, breaks

    def __call__(self, command: Sequence[str]) -> int:
        self.calls += 1
        if self.calls == self.breaks:
            return 1
        with pytest.raises(SystemExit) as stop:
            main(command)
        return int(stop.value.code or 0)


def read(config: CompareConfig) -> dict:
    return json.loads((config.output / "compare.json").read_text())


def test_every_arm_runs_and_the_results_tell_of_them(config: CompareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "_call", Here())
    told = run_compare(config, "sartor compare")
    for seed in range(2):
        assert sorted(p.parent.name for p in (config.output / f"seed-{seed}").glob("*/report.html")) == ARMS
    found = read(config)
    assert told.split("\n")[1:3] == found["headline"]
    assert found["prompts"] == {"train": 6, "held_out": 6}
    arms = {row["name"]: row for row in found["arms"]}
    assert list(arms) == ["DPO, β = 0.05", "PPO on a reward model", "PPO on the truth"]
    for row in arms.values():
        assert row["cost"]["networks"] == 1
        assert row["points"][0]["kl"]["value"] == pytest.approx(0.0, abs=1e-5)
        assert row["cost"]["flops"]["value"] > 0
    sampled = {name: row["cost"]["tokens_sampled"]["value"] for name, row in arms.items()}
    assert sampled["DPO, β = 0.05"] == 0 < sampled["PPO on a reward model"]
    # The reward model is part of what its PPO cost.
    reward = json.loads((config.output / "seed-0" / "reward" / "summary.json").read_text())
    assert arms["PPO on a reward model"]["cost"]["flops"]["value"] > reward["cost"]["without_measuring"]["flops"] > 0
    # What the page of an arm says of its end is what the comparison says.
    ends = []
    for seed in range(2):
        lines = (config.output / f"seed-{seed}" / "ppo-true" / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["split"] == "eval"]
        ends.append(rows[-1]["objective/true_scores"]["value"])
    assert arms["PPO on the truth"]["end"]["reward"]["value"] == pytest.approx(sum(ends) / 2)
    assert all(row["against_start"]["n"] == 6 for row in arms.values())
    page = (config.output / "report.html").read_text()
    assert found["headline"][0] in page
    assert all(name in page for name in arms)
    assert 'href="seed-1/ppo-true/report.html"' in page


def test_goes_on_with_the_arm_that_broke(config: CompareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "_call", Here(breaks=3))
    config = replace(config, seeds=1)
    with pytest.raises(UserError, match=r"arm PPO on a reward model ended with exit code 1.*--resume"):
        run_compare(config)
    assert not (config.output / "compare.json").exists()
    monkeypatch.setattr(experiment, "_call", again := Here())
    run_compare(replace(config, resume=True))
    assert again.calls == 2
    assert "one seed, its intervals over prompts alone" in read(config)["headline"][0]
    run_compare(replace(config, resume=True, seeds=2))  # one more seed, later
    assert again.calls == 6
    assert read(config)["seeds"] == 2
    Path(config.score.partition(":")[0]).write_text(SCORER.replace("== 0", "== 1"))
    with pytest.raises(UserError, match="the scorer changed since"):
        run_compare(replace(config, resume=True, seeds=3))


def test_every_policy_learns_at_the_same_rate(config: CompareConfig, tmp_path: Path) -> None:
    task = experiment._task(config)
    arms = arms_of(replace(config, dpo=(), ppo=()), task, tmp_path, 0, rankings=6, parameters=135_000_000)
    rates = {arm.name: arm.command[arm.command.index("--learning-rate") + 1] for arm in arms if arm.kind != "reward"}
    assert rates == dict.fromkeys(rates, "0.0005")
    assert len(rates) == 3


def test_the_reward_model_takes_twice_the_steps(config: CompareConfig, tmp_path: Path) -> None:
    task = replace(experiment._task(config), held_out=[])
    arms = {arm.kind: arm.command for arm in arms_of(replace(config, size="small"), task, tmp_path, 0, 100, 1)}

    def option(kind: str, name: str) -> int:
        return int(arms[kind][arms[kind].index(name) + 1])

    assert option("reward", "--batch-size") == 4
    assert option("reward", "--eval-every") == 25  # of 50 steps
    assert "--batch-size" not in arms["dpo"]
    assert option("dpo", "--eval-every") == 13  # of 26
    assert option("ppo", "--eval-every") == 4  # of 8


def test_options_of_an_arm_become_words_as_users_type_them(tmp_path: Path) -> None:
    passed = ("loss=dpo sft:0.1", "wpo: true", "learning_rate=1e-4")
    arm = Arm("DPO", "dpo", tmp_path / "run", {"learning-rate": 1, "reference-cache": False}, passed)
    words = ["dpo", "--learning-rate", "0.0001", "--no-reference-cache", "--loss", "dpo sft:0.1", "--wpo"]
    assert arm.command == [*words, "--output", str(tmp_path / "run")]


def test_each_arm_is_a_command_that_could_be_typed(config: CompareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in a process of its own, as users have it."""
    called = experiment._call
    monkeypatch.setattr(experiment, "_call", lambda command: called(command) or 7)
    with pytest.raises(UserError, match="exit code 7"):
        run_compare(replace(config, seeds=1))
    assert (config.output / "seed-0" / "dpo-0.05" / "report.html").is_file()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score": None}, "--prompts and --score: a task of your own needs both"),
        ({"prompts": None, "score": None, "task": "even"}, "unknown task 'even'"),
        ({"ppo": ("clip=-1",)}, "--clip -1"),
        ({"dpo": ("eval_samples=1",)}, "--dpo eval_samples: this is the same for all arms"),
        ({"dpo": ("betta=1",)}, "unknown option of dpo 'betta'"),
        ({"size": "huge"}, "--size 'huge'"),
        ({"score": "gone.py:even"}, "gone.py"),
    ],
)
def test_bad_input_is_told_before_anything_runs(config: CompareConfig, changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        run_compare(replace(config, **changes))
    assert not config.output.exists()


@pytest.mark.skipif(experiment.PRCTL is None, reason="only Linux ends children with their parent")
def test_an_arm_ends_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    source = """
import os, signal, subprocess, sys
from sartor.compare.experiment import _die_with_parent
child = subprocess.Popen(["sleep", "600"], preexec_fn=_die_with_parent)
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, check=False)
    status = Path(f"/proc/{int(done.stdout)}/status")
    for _ in range(100):
        if not status.is_file() or "\nState:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    raise AssertionError("the arm lives on")
