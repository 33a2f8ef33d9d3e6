"""A whole search on a tiny model: what it leaves behind, interrupted and resumed, and what it says of itself."""

import itertools
import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sartor import plugins
from sartor.cli import main
from sartor.config import DiscoverConfig
from sartor.discover import budget, race
from sartor.discover.archive import Archive, Candidate
from sartor.discover.budget import PER_ADAPTER, Clock, make_budget
from sartor.discover.command import run_discover
from sartor.discover.language.expression import Expression
from sartor.discover.language.known import KNOWN
from sartor.discover.language.parse import parse
from sartor.discover.language.program import BETA, as_loss
from sartor.discover.race import BY_LOT
from sartor.discover.rungs.adapter import Adapters
from sartor.discover.rungs.outcome import Outcome, Setting
from sartor.discover.source import loss_source
from sartor.discover.state import State
from sartor.errors import UserError
from sartor.objectives.contract import evaluate, moderate
from sartor.objectives.specs import parse_objective
from sartor.train.run import RunFolder

KILLS = 10


def contents(folder: Path) -> dict[str, Any]:
    """All that an archive holds but times: what must be the same however often a search was interrupted."""
    db = sqlite3.connect(folder / "archive.sqlite")
    # But for likeness: the searches of this process look for few known losses, that of another for all.
    proposed = "number, generation, origin, name, parents, tree, text, thought, exchange, refusal, twin, behaviour"
    columns = "candidate, rung, seed, beta, learning_rate, vals, measures"
    budget = json.loads(db.execute("SELECT value FROM meta WHERE name = 'budget'").fetchone()[0])
    return {
        "candidates": db.execute(f"SELECT {proposed} FROM candidates ORDER BY number").fetchall(),
        "results": db.execute(f"SELECT {columns} FROM results ORDER BY candidate, rung, seed").fetchall(),
        "finalists": db.execute("SELECT value FROM meta WHERE name = 'finalists'").fetchall(),
        "plan": (budget["linear"], budget["adapters"], budget["seeds"]),
    }


def test_a_search_leaves_an_archive_a_loss_and_a_page(whole: Path, small: dict[str, Any]) -> None:
    folder = whole
    said = run_discover(DiscoverConfig(**small, output=folder, resume=True))  # which is finished, and says so again
    state = State(Archive(folder / "archive.sqlite", reads_only=True), BETA)
    names = [one.name for one in state.candidates.values() if one.generation == 0]
    assert names == ["dpo", "hinge", "simpo", "lrml", "zero", "inverted", "constant"]
    new = [n for n in state.on("linear") if state.candidates[n].generation > 0]
    assert len(new) == 40
    trained = [n for n in state.on("adapter") if state.candidates[n].generation > 0]
    assert len(trained) in (2, 3)  # and the winner in fewer words, where there is such a one
    assert state.on("adapter")[:7] == list(range(1, 8))
    assert BY_LOT > 2  # so both went up for what was expected of them
    assert set(trained) <= set(state.leaders())
    retried = {(r.candidate, r.seed) for r in state.archive.results() if r.rung == "retrial"}
    (winner,) = state.archive.read_meta("finalists")
    assert state.shortest()[winner] in {winner, *state.started()}
    assert retried == {(n, seed) for n in (winner, 1, 3, 4) for seed in (1, 2)}
    # What was found trains like any other loss, and is the function that was searched with.
    (loss,) = (folder / "losses").glob("*.py")
    objective = parse_objective([f"{loss}:{loss.stem}"], beta=None)
    tree = state.candidates[winner].tree
    assert tree is not None
    batch = moderate("pairs", 12)
    setting = state.results["adapter", winner].setting
    theirs = evaluate("found", objective.terms[0].loss, batch)
    ours = evaluate("ours", lambda pair: as_loss(tree)(pair, beta=setting.beta), batch)
    assert torch.allclose(theirs[0], ours[0], rtol=1e-4, atol=1e-5)
    for side in ("policy_chosen", "policy_rejected"):
        assert torch.allclose(theirs[1][side], ours[1][side], rtol=1e-4, atol=1e-6)
    assert callable(plugins.resolve("losses", f"{loss}:{loss.stem}"))
    page = (folder / "report.html").read_text()
    assert state.candidates[winner].title in page
    assert state.candidates[winner].title in said


def test_interrupted_ten_times_it_ends_with_the_same_archive(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "_share", lambda correlation: 0.5)  # the tabular rung stops some, which must stay known
    whole = tmp_path / "whole"
    run_discover(DiscoverConfig(**{**options, "output": whole}))
    draw, writing = random.Random(0), Archive.writing
    left = [0]

    def interrupted(self: Archive) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return writing(self)

    monkeypatch.setattr(Archive, "writing", interrupted)
    kills = 0
    while True:
        left[0] = draw.randint(4, 7) if kills < KILLS else -1  # of which three or four come before the race goes on
        try:
            run_discover(DiscoverConfig(**options, resume=kills > 0))
        except KeyboardInterrupt:
            kills += 1
        else:
            break
    assert kills == KILLS
    assert any("weak on the tabular rung" in str(row) for row in contents(whole)["candidates"])
    assert contents(options["output"]) == contents(whole)


def test_killed_by_the_system_it_goes_on(options: dict[str, Any], whole: Path) -> None:
    words = ["discover"]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    folder, draw = options["output"], random.Random(1)
    for run in range(3):
        command = [sys.executable, "-m", "sartor", *words, *(["--resume"] if run else [])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if run == 2:
            _, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
            break
        rows = 0
        wanted = 30 * run + draw.randint(8, 30)  # results: somewhere in the middle of the race
        while process.poll() is None and rows < wanted:
            time.sleep(0.02)
            rows = _results(folder)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert contents(folder) == contents(whole)


def _results(folder: Path) -> int:
    try:
        archive = Archive(folder / "archive.sqlite", reads_only=True)
        return len(archive.results())
    except (UserError, sqlite3.Error):
        return 0


def test_show_explains_any_candidate(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(whole)
    state = State(Archive(whole / "archive.sqlite", reads_only=True), BETA)
    refused = next(n for n, one in state.candidates.items() if one.refusal and one.generation)
    twin = next((n for n, one in state.candidates.items() if one.twin), None)
    for name, wanted in {"dpo": KNOWN["dpo"], "#1": KNOWN["dpo"], str(refused): "refused     "}.items():
        with pytest.raises(SystemExit) as stop:
            main(["discover", "show", name, "--output", folder])
        assert stop.value.code == 0
        assert wanted in capsys.readouterr().out
    if twin is not None:
        with pytest.raises(SystemExit):
            main(["discover", "show", str(twin), "--output", folder])
        assert "same as" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["discover", "show", "9999", "--output", folder])
    assert stop.value.code == 2
    assert "no candidate '9999'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"budget": "soon"}, "--budget soon: wanted a time such as 30m, 2h or 1h30m"),
        ({"task": "sentiment"}, "--task preferences and --data go together"),
        ({"proposer": ("model",)}, "--proposer model and --endpoint go together"),
        ({"proxy": "smollm2", "seeds": 0}, "--proxy: the retrial alone trains --model"),
        ({"proposer": ("mutant",)}, "unknown proposer 'mutant'"),
        ({"start": ("dop",)}, "unknown loss to start with 'dop': did you mean 'dpop' or 'dpo'?"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(options: dict[str, Any], changed: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted.replace("?", r"\?")) as error:
        run_discover(DiscoverConfig(**{**options, **changed}))
    assert "\n" not in str(error.value)


def test_a_budget_that_pays_for_too_little_is_said_in_a_line(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = {**options, "candidates": None, "adapters": None, "budget": "2h"}
    wait = "a real training takes 1 h 7 min here, and 6 known losses and canaries wait for theirs with 5. min"
    priced(monkeypatch, lambda before: 4000.0)
    with pytest.raises(UserError, match=f"--budget 2h: {wait}"):
        run_discover(DiscoverConfig(**timed))
    monkeypatch.setattr(Clock, "left", property(lambda clock: -60.0))
    late = {**timed, "output": options["output"] / "late"}
    with pytest.raises(UserError, match="--budget 2h: answers, reference and kernel took 2 h 1 min"):
        run_discover(DiscoverConfig(**late))


@pytest.mark.parametrize(
    ("first", "later", "limit", "trained", "retried"),
    [
        (1250.0, 1250.0, 22000, 4, 2 * 4),  # the race ends early enough for two seeds of four arms
        (1500.0, 1500.0, 19500, 2, 4),  # too late for that: a second seed is not begun
        (2000.0, 1000.0, 22000, 6, 2 * 4),  # one that was slow changes nothing
    ],
)
def test_the_retrial_is_paid_at_the_price_that_was_seen(
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    first: float,
    later: float,
    limit: int,
    trained: int,
    retried: int,
) -> None:
    for module in (budget, race):
        monkeypatch.setattr(module, "PER_ADAPTER", 2)  # what comes between is not the matter here
    started = 6  # dpo, simpo and lrml, and three canaries
    priced(monkeypatch, lambda before: 1000.0 if before < started else first if before == started else later)
    timed = {**options, "candidates": None, "adapters": None, "start": ("dpo",), "budget": f"{limit}s"}
    run_discover(DiscoverConfig(**timed))
    archive = Archive(options["output"] / "archive.sqlite", reads_only=True)
    rungs = [result.rung for result in archive.results()]
    assert (rungs.count("adapter") - started, rungs.count("retrial")) == (trained, retried)
    assert sum(archive.spent().values()) < limit


def priced(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> None:
    """Have real trainings cost this many seconds, by how many there were before."""
    run, trained = Adapters.run, itertools.count()

    def at_a_price(self: Adapters, tree: Expression, setting: Setting, seed: int = 0) -> Outcome:
        return replace(run(self, tree, setting, seed), seconds=seconds(next(trained)))

    monkeypatch.setattr(Adapters, "run", at_a_price)


def test_with_a_proxy_only_the_retrial_trains_the_model(
    options: dict[str, Any], sharp_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, run = [], Adapters.run

    def watched(self: Adapters, tree: Expression, setting: Setting, seed: int = 0) -> Outcome:
        trained.append((self.material.model.name, seed, setting.learning_rate))
        return run(self, tree, setting, seed)

    monkeypatch.setattr(Adapters, "run", watched)
    proxy = options["model"]
    few = {"candidates": 4, "adapters": 1, "start": ("dpo",)}
    options |= {**few, "model": str(sharp_folder), "proxy": proxy}
    run_discover(DiscoverConfig(**options))
    assert {name for name, seed, _ in trained if seed == 0} == {proxy}
    assert {name for name, seed, _ in trained if seed > 0} == {str(sharp_folder)}
    assert len(trained) == 3 + 3 + 1 + 2 * 4  # known losses, canaries, a candidate; two seeds of it and the known
    winner = json.loads((options["output"] / "discovery.json").read_text())["winner"]
    assert winner["learning_rate"] in {rate for _, seed, rate in trained if seed > 0}
    assert winner["learning_rate"] not in {rate for _, seed, rate in trained if seed == 0}
    identity = options["output"] / "identity.json"
    identity.write_text(json.dumps({**json.loads(identity.read_text()), "proxy": "other weights"}))
    (options["output"] / "report.html").unlink()
    with pytest.raises(UserError, match="--resume: the proxy changed since"):
        run_discover(DiscoverConfig(**options, resume=True))


def test_a_longer_budget_plans_more_on_top_of_what_was_done(options: dict[str, Any]) -> None:
    timed = DiscoverConfig(**{**options, "candidates": None, "adapters": None})
    unit = {"tabular": 0.1, "linear": 0.1, "adapter": 40.0, "retrial": 50.0}
    hour = make_budget(replace(timed, budget="1h"), unit, 300.0)
    assert 3300 < hour.forecast < 3600
    more = make_budget(replace(timed, budget="2h"), unit, 3400.0, linear=hour.linear, adapters=hour.adapters)
    assert more.adapters > hour.adapters
    assert more.linear - hour.linear == PER_ADAPTER * (more.adapters - hour.adapters)
    assert 6900 < more.forecast < 7200


def test_little_time_takes_seeds_from_the_retrial_and_then_is_said_not_to_do(options: dict[str, Any]) -> None:
    timed = DiscoverConfig(**{**options, "candidates": None, "adapters": None, "seeds": 5})
    unit = {"tabular": 0.0, "linear": 0.0, "adapter": 40.0, "retrial": 50.0}
    assert make_budget(replace(timed, budget="1h"), unit, 300.0).seeds == 5
    short = make_budget(replace(timed, budget="20m"), unit, 300.0)
    assert (short.seeds, short.adapters) == (3, 6)
    with pytest.raises(UserError, match="with a retrial on 3 seeds takes about 11 min 12 s more; wanted 16 min 12 s"):
        make_budget(replace(timed, budget="15m"), unit, 300.0)


def test_a_search_that_nobody_judged_goes_on_with_a_longer_budget(options: dict[str, Any]) -> None:
    few = {**options, "candidates": 8, "adapters": 1, "start": ("dpo",), "seeds": 0}
    said = run_discover(DiscoverConfig(**few))
    longer = {**few, "budget": "5h", "resume": True}
    assert run_discover(DiscoverConfig(**longer)).splitlines()[1] == said.splitlines()[1]
    assert "budget: 5h" in (options["output"] / "config.yaml").read_text()
    assert Archive(options["output"] / "archive.sqlite", reads_only=True).read_meta("budget")["given"] == "5h"


def test_a_search_whose_time_is_over_still_tells_what_it_found(options: dict[str, Any]) -> None:
    few = {**options, "candidates": None, "adapters": 1, "start": ("dpo",), "seeds": 0, "budget": "10m"}
    run_discover(DiscoverConfig(**few))
    (options["output"] / "report.html").unlink()
    archive = Archive(options["output"] / "archive.sqlite")
    with archive.writing():
        archive.spend("linear", 900.0)  # it was killed between its last result and its page, over its budget
    assert "leads with" in run_discover(DiscoverConfig(**few, resume=True))


def test_a_judged_search_goes_on_no_more(whole: Path, small: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is finished and its winner judged"):
        run_discover(DiscoverConfig(**{**small, "output": whole, "budget": "5h", "resume": True}))


def test_two_processes_do_not_write_in_one_folder(options: dict[str, Any]) -> None:
    with RunFolder(options["output"]).alone(), pytest.raises(UserError, match="another process is at work there"):
        run_discover(DiscoverConfig(**options))


@pytest.mark.parametrize(
    "text",
    [
        "-log_sigmoid(mean(beta * margin))",
        "softplus(1 - std(beta * margin))",
        "softplus(-mean(margin)) - chosen_logratio",
    ],
)
def test_a_loss_file_has_a_number_for_each_pair(text: str, tmp_path: Path) -> None:
    tree = parse(text)
    one = Candidate(7, 1, "random", tree=tree, text=text)
    (tmp_path / "found_7.py").write_text(loss_source(one, Setting(0.1, 1e-4), "Nothing is known of it."))
    objective = parse_objective([f"{tmp_path / 'found_7.py'}:found_7"], beta=None)
    batch = moderate("pairs", 12)
    theirs = evaluate("found", objective.terms[0].loss, batch)[0]
    assert torch.allclose(theirs, evaluate("ours", as_loss(tree), batch)[0], rtol=1e-4, atol=1e-5)


def test_data_that_cannot_be_read_leaves_no_folder_behind(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("empty.jsonl", "missing.jsonl"):
        with pytest.raises(UserError, match=name):
            run_discover(DiscoverConfig(**{**options, "data": str(tmp_path / name)}))
        assert not options["output"].exists()
