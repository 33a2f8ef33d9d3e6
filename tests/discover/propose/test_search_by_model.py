"""A whole search by a language model at a scripted server: good, malformed and hostile answers, and what is kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sartor.config import DiscoverConfig
from sartor.discover.archive import Archive
from sartor.discover.command import run_discover
from sartor.discover.language.program import BETA
from sartor.discover.state import State
from sartor.errors import UserError

KEY = "sk-very-secret"
HOSTILE = "__import__('pathlib').Path('owned').write_text('x')"
GOOD = {
    "steep": "softplus(-2 * beta * margin) + 0.1 * square(beta * margin - 1)",
    "lifted": "-log_sigmoid(beta * margin) + 0.3 * relu(-chosen_logratio)",
    "gated": "sigmoid(-margin) * softplus(-(beta * margin)) + sigmoid(margin) * relu(1 - beta * margin)",
}


def reply(codes: dict[str, str]) -> str:
    return json.dumps([{"name": name, "thought": f"why {name}", "code": code} for name, code in codes.items()])


def test_a_language_model_drives_a_search(
    options: dict[str, Any], script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INVENTOR_KEY", KEY)
    script.key = KEY
    script.says("I would rather talk about the weather.")
    script.says(reply({**GOOD, "escape": HOSTILE, "again": "3 * softplus(-(0.1 * margin))"}))
    script.says(f"Sure! ```python\n{GOOD['gated']} + 0.01 * square(chosen_logratio)\n```")
    model = {
        "proposer": ("model",),
        "endpoint": script.url,
        "endpoint_model": "inventor",
        "endpoint_key": "INVENTOR_KEY",
    }
    few = {"candidates": 4, "adapters": 1, "seeds": 0}
    run_discover(DiscoverConfig(**{**options, **model, **few}))
    state = State(Archive(options["output"] / "archive.sqlite", reads_only=True), BETA)
    asked = [one for one in state.candidates.values() if one.origin == "model"]
    by_name = {one.name: one for one in asked if one.name}
    assert {name for name, one in by_name.items() if one.trains} >= set(GOOD)
    assert by_name["lifted"].thought == "why lifted"
    assert "is not part of the language" in by_name["escape"].refusal or "unknown" in by_name["escape"].refusal
    assert by_name["again"].twin == state.named("dpo")
    assert not (tmp_path / "owned").exists()
    (winner,) = state.archive.read_meta("finalists")
    assert state.candidates[winner].origin == "model"
    # What failed is shown with the next question, and every exchange is kept, without the key.
    assert "avoid what they have done" in script.asked[1]["messages"][1]["content"]
    exchanges = state.archive.exchanges()
    assert len(exchanges) == len(script.asked)
    assert {one.exchange for one in asked} <= {exchange["number"] for exchange in exchanges}
    for path in options["output"].rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("answers", [0, 1])
def test_questions_without_an_answer_do_not_end_a_search_in_silence(
    options: dict[str, Any], script: Any, answers: int
) -> None:
    script.refuses(400, "not now")
    for _ in range(answers):
        script.says(reply(GOOD))
    model = {"proposer": ("model",), "endpoint": script.url, "endpoint_model": "inventor"}
    config = DiscoverConfig(**{**options, **model, "candidates": 3, "adapters": 1, "seeds": 0})
    if answers:
        assert "leads with" in run_discover(config)
        return
    for _ in range(2):
        script.refuses(400, "not now")
    with pytest.raises(UserError, match="nothing new was tried, since --proposer model: 3 questions in a row without"):
        run_discover(config)
    script.says(reply(GOOD))
    assert "leads with" in run_discover(replace(config, resume=True))


def test_an_endpoint_that_is_not_there_is_told_before_anything_slow(options: dict[str, Any]) -> None:
    model = {"proposer": ("model",), "endpoint": "http://127.0.0.1:9/v1", "endpoint_model": "inventor"}
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        run_discover(DiscoverConfig(**{**options, **model}))
    assert not (options["output"] / "search.jsonl").exists()
