"""The demo at a size for tests: the real road with fewer prompts, and the user's own data with a tiny model."""

import json
from pathlib import Path

import pytest

from sartor import demo
from sartor.config import DemoConfig
from sartor.demo import run_demo


@pytest.mark.real
def test_the_whole_road(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = demo._prompts
    monkeypatch.setattr(demo, "_prompts", lambda part: whole(part)[: {"train": 8, "eval": 4}[part]])
    monkeypatch.setattr(demo, "TOKENS", 16)
    run = run_demo(DemoConfig(), "sartor demo").path
    assert run == Path("runs/demo")
    ranked = [json.loads(line) for line in (run / "rankings.jsonl").read_text().splitlines()]
    assert all(len(row["completions"]) == len(row["ranks"]) == 4 for row in ranked)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["comparison"]["win_rate"]["n"] == summary["comparison"]["prompts"] <= 4
    assert "in place of a person" in (run / "report.html").read_text()
    assert demo._next_folder(Path("runs/demo"), DemoConfig()) == Path("runs/demo-2")
    (run / "report.html").unlink()  # as if killed before its end: the same folder goes on
    assert demo._next_folder(Path("runs/demo"), DemoConfig()) == run
    assert run_demo(DemoConfig(), "sartor demo").path == run


def test_your_own_preferences(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Name {i}. ", "chosen": f"A{i} yes", "rejected": f"b{i} no"} for i in range(30)]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_demo(DemoConfig(model=str(tiny_folder), data="prefs.jsonl")).path
    summary = json.loads((run / "summary.json").read_text())
    assert "fitted to prefs.jsonl" in summary["title"]
    assert summary["comparison"]["win_rate"] is None


def test_built_in_prompts_are_many_and_apart() -> None:
    train, held_out = demo._prompts("train"), demo._prompts("eval")
    assert (len(train), len(held_out)) == (100, 60)
    assert len(set(train) | set(held_out)) == 160
