"""The code around the measurements: tables, verdicts, plot, the worker on a tiny model. Nothing here is timed."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import random_tree

from sartor.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import preference_step

    return preference_step


def run(contender: str, seconds: float, gib: float, loss: float = 0.69, **more: Any) -> dict[str, Any]:
    step = {"loss": loss, "grad_norm": 4.0, "tokens": 100, "seconds": seconds, "pairs": 8}
    return {
        "case": "full",
        "contender": contender,
        "steps": [{**step, "seconds": 99.0}, step, step],
        "first_step_seconds": 120.0,
        "reference_seconds": 10.0,
        "peak_gib": gib,
        **more,
    }


def ours(loss: float = 0.69) -> dict[str, Any]:
    counts = {"body_parameters": 1000, "head_parameters": 500, "matrix_share": 0.7}
    return run("sartor", 2.0, 3.0, loss, **counts)


def rows_of(bench: Any, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    cases = {"full": {"lora": False, "scored_tokens": [40, 40, 40]}}
    return bench.summary(cases, runs, warm_up=1, peak=1e6)


def test_a_row_says_how_fast_how_large_and_how_far_from_tuned_trl(bench: Any) -> None:
    row, tuned = rows_of(bench, [ours(), run("trl-tuned", 20.0, 12.0), ours(), run("trl-tuned", 24.0, 12.0)])
    assert row["pairs_per_second"] == pytest.approx(4.0)
    assert tuned["range"] == pytest.approx([8 / 24, 8 / 20])
    assert row["speed_ratio"] == pytest.approx(4.0 / ((8 / 24 + 8 / 20) / 2))
    assert row["memory_ratio"] == pytest.approx(0.25)
    assert row["gaps"] == {"first_norm": 0.0, "loss": 0.0, "grad_norm": 0.0}
    # 6 FLOPs a parameter and token: 1000 on each of 100 tokens, 500 on each of 40, every 2 seconds.
    assert row["share_of_peak"] == pytest.approx(6 * (1000 * 100 + 500 * 40) / 2 / 1e6)


def test_targets_are_met_or_missed(bench: Any) -> None:
    lines = "\n".join(bench.verdicts(rows_of(bench, [ours(), run("trl-tuned", 22.0, 6.0)])))
    assert "full speed × tuned TRL: 11.00, at least 10: met" in lines
    assert "full memory × tuned TRL: 0.50, at most 0.35: MISSED" in lines
    assert "70%, at least 60%: met" in lines
    assert "fastest" not in lines


def test_a_faster_way_to_run_trl_is_not_passed_over(bench: Any) -> None:
    rows = rows_of(bench, [ours(), run("trl-tuned", 22.0, 6.0), run("trl-small", 6.0, 4.0)])
    assert "beside trl-small, TRL's fastest: speed × 3.00, memory × 0.75" in "\n".join(bench.verdicts(rows))


@pytest.mark.parametrize(("loss", "verdict"), [(0.70, "agree"), (0.8, "DIFFERS in full"), (float("nan"), "DIFFERS")])
def test_other_steps_than_trls_are_a_failure(bench: Any, loss: float, verdict: str) -> None:
    rows = rows_of(bench, [ours(loss), run("trl-tuned", 22.0, 6.0)])
    limits = bench.TOLERANCE["bfloat16"]
    assert verdict in bench.agreement(rows, limits)[1]
    assert bench.differs(rows[0], limits) == verdict.startswith("DIFFERS")


def test_the_table_stands_without_trl_too(bench: Any) -> None:
    lines = bench.table(rows_of(bench, [ours()])).splitlines()
    assert "sartor" in lines[2]
    several = [ours(), run("trl-tuned", 22.0, 6.0), run("trl", 40.0, 5.0)]
    assert len(bench.table(rows_of(bench, several)).splitlines()) == 5


def test_the_plot_shows_every_contender(bench: Any, tmp_path: Path) -> None:
    from draw import draw

    rows = rows_of(bench, [ours(), run("trl-tuned", 22.0, 6.0), run("trl", 40.0, 5.0)])
    draw({"full": {}}, rows, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert all(words in text for words in ("Sartor", "TRL 1.16, tuned", "as shipped", "(11×)"))


def test_bad_input_is_refused_in_one_line(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown case 'ful': did you mean 'full'"):
        bench.main(bench.Options(cases="ful"))
    with pytest.raises(UserError, match="unknown dtype 'bf16'"):
        bench.main(bench.Options(dtype="bf16"))
    with pytest.raises(UserError, match="--warm-up must be at least 1, got 0"):
        bench.main(bench.Options(warm_up=0))
    with pytest.raises(UserError, match="no such file"):
        list(bench.rankings(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="--peer /nowhere/python: No such file"):
        bench.main(bench.Options(peer="/nowhere/python"))
    with pytest.raises(UserError, match="case full needs 16 rows that fit it, got 3"):
        bench.in_steps(bench.CASES[0], [random_tree(random.Random(0), 5, 2)] * 3, 8, bench.Options())


def test_rankings_come_out_of_open_assistant_trees(bench: Any, tmp_path: Path) -> None:
    replies = [{"role": "assistant", "text": f"a{i}", "rank": 3 - i, "replies": []} for i in range(4)]
    replies[0]["replies"] = [{"role": "prompter", "text": "and?", "replies": replies[1:3]}]
    tree = {"prompt": {"role": "prompter", "text": "why?", "replies": [*replies, {**replies[0], "rank": 4}]}}
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps(tree) + "\n")
    (found,) = bench.rankings(path)  # two answers are too few, and a fifth is left out
    assert found.ranks == (3.0, 2.0, 1.0, 0.0)
    assert [answer[0].content for answer in found.completions] == ["a0", "a1", "a2", "a3"]


@pytest.mark.parametrize("name", ["full", "lora", "reward", "sft"])
def test_the_worker_takes_the_steps_it_is_given(
    bench: Any,
    tiny_folder: Path,
    tmp_path: Path,
    rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    import steps

    case = next(case for case in bench.CASES if case.name == name)
    trees = [random_tree(rng, 10, 1 if case.rows == "chosen" else 4) for _ in range(5)]
    data = bench.in_steps(case, trees, 2, bench.Options(warm_up=1, steps=1, by_length=True))
    (tmp_path / f"{name}.json").write_text(json.dumps(data))
    monkeypatch.setattr(steps, "limit_memory", lambda gib: None)  # this process is pytest's
    job = bench.job_of(tmp_path, bench.Options(), str(tiny_folder), case, "sartor", profile=True)
    found = steps.main({**job, "scratch": str(tmp_path), "started": time.time()})
    assert len(found["steps"]) == 2
    assert [step["pairs"] for step in found["steps"]] == [2 if name == "sft" else 12] * 2
    assert all(step["grad_norm"] > 0 and step["seconds"] > 0 for step in found["steps"])
    assert found["first_step_seconds"] >= found["steps"][0]["seconds"]
    assert 0 < found["matrix_share"] < 1
    assert found["peak_gib"] > 0
    sizes = [max(len(tree["prompt"]) + len(b) for b in tree["branches"]) for tree in data["trees"]]
    assert sorted(i for step in data["steps"] for i in step) == list(range(4))
    assert min(sizes[i] for i in data["steps"][0]) >= max(sizes[i] for i in data["steps"][1])


@pytest.mark.parametrize("case", ["check", "repeat", "head", "profile", "1b/lora/hh/sartor"])
def test_what_needs_a_gpu_walks_through_without_one(tmp_path: Path, case: str) -> None:
    out = tmp_path / "gpu.json"
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--device", "cpu", "--tiny", "--only", case, "--out", str(out)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHON": sys.executable}, stdout=subprocess.DEVNULL)
    (result,) = json.loads(out.read_text())["results"]
    assert "error" not in result
    if case == "check":
        assert result["check_roads"]["packed fp32"]["gradient_error"] < 1e-5
    if case == "repeat":
        assert result["default"]["largest_difference"] == 0
    if "sartor" in case:
        assert len(result["loss"]) == 3
        assert min(result["grad_norm"]) > 0
