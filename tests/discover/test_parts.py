"""Where the data of a search come from, and what of them is compared."""

import json
from pathlib import Path

import pytest
import torch

from sartor.config import DiscoverConfig
from sartor.data.trees import TokenTree
from sartor.discover import parts
from sartor.discover.material import Part
from sartor.discover.parts import PARTS, read_part, write_parts
from sartor.errors import UserError
from sartor.model.load import load
from sartor.tasks.task import Task
from sartor.train.preferences import Preferences
from sartor.train.run import RunFolder

TREE = TokenTree((1, 2), ((3,), (4, 5), (6, 7, 8)), ranks=(2.0, 3.0, 1.0))
REFERENCE = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0])


def value(text: str) -> float:
    """A score like any other."""
    return sum(map(ord, text)) % 97


def ranked(extremes: bool) -> Part:
    """Two prompts with three ranked answers each."""
    data = Preferences([TREE, TREE], ["a", "b"], [], [REFERENCE, 10 * REFERENCE])
    return Part(data, scores=[0.5, 0.0, 1.0] * 2, extremes=extremes)


def test_extremes_are_the_best_and_the_worst() -> None:
    assert ranked(extremes=False).pairs().better.tolist() == [0, 2, 2, 3, 5, 5]
    found = ranked(extremes=True).pairs()
    assert (found.better.tolist(), found.worse.tolist(), found.prompt.tolist()) == ([2, 5], [1, 4], [0, 1])


def test_what_is_compared_can_stand_alone() -> None:
    whole = ranked(extremes=True)
    alone = whole.compared
    assert [tree.branches for tree in alone.data.trees] == [((4, 5), (6, 7, 8))] * 2
    for ours, theirs in (("better", "better"), ("worse", "worse")):
        at, there = getattr(alone.pairs(), ours), getattr(whole.pairs(), theirs)
        assert torch.equal(alone.reference[at], whole.reference[there])
    everything = ranked(extremes=False)
    assert everything.compared is everything


def test_no_prompt_is_in_two_parts(tmp_path: Path) -> None:
    rows = [{"prompt": f"Name {i % 40}. ", "chosen": f"A{i}", "rejected": f"b{i}"} for i in range(120)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    folder.mkdir()
    config = DiscoverConfig(output=folder, task="preferences", data=str(data), prompts=12, held_out_prompts=8)
    write_parts(config, RunFolder(folder))
    prompts = []
    for name in PARTS:
        own = [json.loads(line)["prompt"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert len(own) == 3 * len(set(map(str, own)))  # all rows of a prompt stay together
        prompts += sorted(set(map(str, own)))
    assert len(prompts) == len(set(prompts)) == 40


def test_a_part_without_a_preference_is_told_in_a_line(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = tmp_path / "same.py"
    scorer.write_text("def same(prompts, completions, **columns):\n    return [0.0 for _ in completions]\n")
    task = Task("sentiment", [f"Name {i}. " for i in range(20)], [], f"{scorer}:same", 4)
    monkeypatch.setattr(parts, "task_named", lambda name: task)
    config = DiscoverConfig(output=tmp_path, model=str(tiny_folder), answers=2, max_new_tokens=4)
    with pytest.raises(UserError, match="prompts of search alike") as error:
        write_parts(config, RunFolder(tmp_path))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.jsonl"))


def test_answers_of_a_task_are_learned_from_at_their_extremes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = tmp_path / "some.py"
    worth = 'sum(map(ord, turns[0]["content"])) % 97 for turns in completions'
    scorer.write_text(f"def some(prompts, completions, **columns):\n    return [{worth}]\n")
    task = Task("sentiment", [f"Name {i}. " for i in range(30)], [], f"{scorer}:some", 8)
    monkeypatch.setattr(parts, "task_named", lambda name: task)
    config = DiscoverConfig(
        output=tmp_path, model=str(tiny_folder), prompts=6, held_out_prompts=4, answers=5, max_new_tokens=8
    )
    run, model = RunFolder(tmp_path), load(str(tiny_folder), "float32")
    write_parts(config, run)
    for name in PARTS:
        part = read_part(config, run, model, "weights", name)
        # Trees are what was drawn, token for token: an answer that was cut at the limit has no end.
        assert all(len(branch) <= 8 for tree in part.data.trees for branch in tree.branches)
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        sizes = [len(row["completions"]) for row in rows]
        if name.endswith("held-out"):
            assert sizes == [5] * 4
        else:
            assert sizes == [2] * 6
            better, worse = zip(*(row["completions"] for row in rows), strict=True)
            assert all(value(a) > value(b) for a, b in zip(better, worse, strict=True))
