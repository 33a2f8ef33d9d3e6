"""Every loss trains: ten golden steps each, and the roads that only some of them take, through the whole command."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from conftest import metrics

from sartor import plugins
from sartor.cli import main
from sartor.config import DpoConfig
from sartor.errors import UserError
from sartor.model.load import load
from sartor.objectives.specs import parse_objective
from sartor.train import dpo as training
from sartor.train.dpo import train_dpo
from sartor.train.gradient import batch_gradient
from sartor.train.loop import MasterWeights, Plan, Schedule, train_steps
from sartor.train.preferences import encode, read_preferences, with_reference

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden_losses.json"
STEPS = 10
LOSSES = sorted(point.name for point in entry_points(group="sartor.losses") if point.value.startswith("sartor."))


def word(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 8)))


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> DpoConfig:
    """Comparisons with strengths and some ties; upper case is better."""
    rng = random.Random(0)
    rows = [
        {
            "prompt": f"Say {word(rng)}: ",
            "chosen": word(rng).upper(),
            "rejected": word(rng),
            "strength": round(rng.random(), 2),
            "tie": i % 5 == 4,
        }
        for i in range(40)
    ]
    return DpoConfig(
        model=str(tiny_folder),
        data=write(tmp_path / "prefs.jsonl", rows),
        output=tmp_path / "run",
        eval_fraction=0.2,
        learning_rate=1e-3,
        dtype="float32",
        max_steps=STEPS,
        eval_prompts=0,
        token_budget=150,
    )


@pytest.fixture
def judged(config: DpoConfig, tmp_path: Path) -> DpoConfig:
    """All good completions first, all bad ones after."""
    rng = random.Random(1)
    rows = [{"prompt": f"Say {word(rng)}: ", "completion": word(rng).upper(), "label": True} for _ in range(24)]
    rows += [{"prompt": f"Say {word(rng)}: ", "completion": word(rng), "label": False} for _ in range(24)]
    return replace(config, data=write(tmp_path / "judged.jsonl", rows), loss=("kto",))


def ten_steps(config: DpoConfig, name: str) -> list[float]:
    """The losses of ten optimizer steps, as ``sartor dpo`` takes them, without what surrounds them."""
    objective = parse_objective([name])
    model = load(config.model, config.dtype)
    data = encode(model, read_preferences(config, objective)[0], config, objective)
    if objective.needs_reference:
        data = with_reference(model, data, config.token_budget, config.output / "reference.safetensors")
    rival = load(config.model, config.dtype) if objective.needs_kl else None
    weights = MasterWeights(model.network, 0.0)
    steps = train_steps(
        weights,
        Plan(len(data.trees), 8, STEPS, 0, data.labels),
        Schedule(1e-3, STEPS, 0, "constant"),
        lambda items: batch_gradient(model, objective, data, items, config.token_budget, rival),
        max_grad_norm=1.0,
    )
    return [step["loss"] for step in steps]


@pytest.mark.parametrize("name", LOSSES)
def test_ten_golden_steps(name: str, config: DpoConfig) -> None:
    """SARTOR_GOLDEN=write python -m pytest tests/train/test_losses.py -k golden writes the curves anew."""
    losses = ten_steps(config, name)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if os.environ.get("SARTOR_GOLDEN") == "write":
        golden = dict(sorted({**golden, name: [float(f"{loss:.6g}") for loss in losses]}.items()))
        GOLDEN.write_text("{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in golden.items()) + "\n}\n")
    assert losses == pytest.approx(golden[name], rel=2e-3, abs=1e-4)


def test_every_loss_has_its_golden_curve() -> None:
    assert sorted(json.loads(GOLDEN.read_text())) == LOSSES


def test_lrml_stays_finite_where_the_released_code_does_not(config: DpoConfig) -> None:
    run = train_dpo(replace(config, loss=("lrml,beta=5",), learning_rate=1e-2)).path
    rows = metrics(run, "train")
    assert len(rows) == STEPS
    assert all(abs(row["loss"]) < 1e6 and row["grad_norm"] < 1e9 for row in rows)


@pytest.mark.parametrize("loss", ["simpo", "plackett_luce_ties", "dpo_davidson", "tdpo2", "aql", "kto"])
@pytest.mark.parametrize("lora_r", [0, 4])
def test_each_kind_of_loss_runs_through_the_whole_command(config: DpoConfig, loss: str, lora_r: int) -> None:
    run = train_dpo(replace(config, loss=(loss,), lora_r=lora_r, max_steps=2)).path
    assert (run / "report.html").is_file()
    first, last = metrics(run, "eval")[0], metrics(run, "eval")[-1]
    assert first["rewards/accuracies"]["value"] == 0.5  # measured against its own start, whatever the objective
    assert first["rewards/margins"]["value"] == 0.0
    assert last["logps/chosen"]["value"] != first["logps/chosen"]["value"]


def test_a_loss_without_a_reference_has_none_computed_for_training(config: DpoConfig, monkeypatch) -> None:
    from sartor.model import reference

    scored: list[int] = []
    score = reference.score_trees
    monkeypatch.setattr(
        reference, "score_trees", lambda model, trees, **k: scored.append(len(trees)) or score(model, trees, **k)
    )
    run = train_dpo(replace(config, loss=("simpo",), max_steps=1)).path
    held_out = metrics(run, "eval")[0]["loss"]["n"]
    assert sum(scored) == held_out
    assert "rewards/margins" not in metrics(run, "train")[0]


def test_ties_are_kept_for_those_who_read_them(config: DpoConfig, capsys) -> None:
    train_dpo(replace(config, max_steps=1))
    assert "8 tied rows left out: dpo has no use for them" in capsys.readouterr().err
    train_dpo(replace(config, max_steps=1, loss=("dpo_rao_kupper",), output=config.output.with_name("ties")))
    said = capsys.readouterr().err
    assert "left out" not in said
    assert "tied pairs" in said


def test_kto_mixes_good_and_bad_in_every_batch(judged: DpoConfig, monkeypatch) -> None:
    """On data sorted by label, the worst case of the peers."""
    batches: list[set[bool]] = []
    gradient = training.batch_gradient

    def watched(model, objective, data, items, *rest):
        batches.append({verdict for i in items for verdict in data.trees[i].good})
        return gradient(model, objective, data, items, *rest)

    monkeypatch.setattr(training, "batch_gradient", watched)
    run = train_dpo(replace(judged, batch_size=2, max_steps=None, epochs=1)).path
    assert len(batches) >= 19
    assert all(batch == {True, False} for batch in batches)
    assert metrics(run, "eval")[-1]["rewards/accuracies"]["value"] > 0.9
    assert "a good one gained on a bad one" in json.loads((run / "summary.json").read_text())["headline"]


def test_kto_trains_one_completion_at_a_time(judged: DpoConfig) -> None:
    rows = metrics(train_dpo(replace(judged, batch_size=1, max_steps=4)).path, "train")
    assert [row["examples"] for row in rows] == [1, 1, 1, 1]
    assert all(row["grad_norm"] > 0 for row in rows)


def test_one_label_alone_is_refused(judged: DpoConfig, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": "yes", "label": True} for i in range(9)]
    with pytest.raises(UserError, match="all 9 completions are judged good: wanted both labels"):
        train_dpo(replace(judged, data=write(tmp_path / "one.jsonl", rows)))


def test_pairs_cannot_be_had_from_verdicts(judged: DpoConfig) -> None:
    with pytest.raises(UserError, match=r"holds judged answers.*, and loss dpo learns from comparisons; --loss kto"):
        train_dpo(replace(judged, loss=("dpo",)))


def ten_line_loss(pair, *, beta: float = 0.1):
    """A user's own: half DPO, half hinge."""
    z = beta * pair.margin
    return torch.nn.functional.softplus(-z) + torch.relu(1 - z)


def test_a_users_loss_keeps_every_feature(config: DpoConfig, tmp_path: Path, monkeypatch) -> None:
    """LoRA, the cached reference, metrics, and resuming after a stop in the middle."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n\n\ndef mine(pair, *, beta: float = 0.1, slope: float = 1.0):\n"
        "    z = beta * pair.margin\n    return torch.nn.functional.softplus(-z) + slope * torch.relu(1 - z)\n"
    )
    own = replace(config, loss=(f"{file}:mine,slope=0.5",), lora_r=4, learning_rate=1e-2, save_every=2, max_steps=6)
    whole = train_dpo(own).path
    assert (whole / "model" / "adapter_model.safetensors").is_file()
    rows = metrics(whole, "train")
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen"} <= set(rows[0])
    assert rows[-1]["loss"] < rows[0]["loss"]

    from sartor.model import reference

    monkeypatch.setattr(reference, "score_trees", lambda *a, **k: pytest.fail("the reference was computed again"))
    cut = replace(own, output=tmp_path / "cut")
    log, steps = training.RunFolder.log, []

    def stop_in_step_four(self, row):
        steps.append(row["step"])
        if row["step"] == 4 and row["split"] == "train":
            raise KeyboardInterrupt
        log(self, row)

    monkeypatch.setattr(training.RunFolder, "log", stop_in_step_four)
    with pytest.raises(KeyboardInterrupt):
        train_dpo(cut)
    monkeypatch.setattr(training.RunFolder, "log", log)
    resumed = train_dpo(replace(cut, resume=True)).path
    timed = ("seconds",)
    strip = lambda row: {k: v for k, v in row.items() if k not in timed}  # noqa: E731
    assert [strip(row) for row in metrics(resumed, "train")] == [strip(row) for row in rows]


def test_resuming_with_another_loss_of_the_same_name_is_noticed(config: DpoConfig, tmp_path: Path) -> None:
    file = tmp_path / "changing.py"
    file.write_text("def mine(pair):\n    return (pair.margin - 1) ** 2\n")
    own = replace(config, loss=(f"{file}:mine",), max_steps=2)
    run = train_dpo(own).path
    (run / "report.html").unlink()
    file.write_text("def mine(pair):\n    return (pair.margin - 2) ** 2\n")
    plugins._from_file.cache_clear()
    with pytest.raises(UserError, match="the loss changed since"):
        train_dpo(replace(own, resume=True))


def wrong_sign(pair):
    return pair.margin


def test_a_loss_with_the_wrong_sign_is_asked_about(config: DpoConfig, capsys) -> None:
    train_dpo(replace(config, max_steps=1), loss=wrong_sign)
    assert (
        "wrong_sign lowers the margin of chosen over rejected where it is 0: is its sign right?"
        in capsys.readouterr().err
    )


def test_mixtures_can_be_written_in_every_usual_way(tmp_path: Path) -> None:
    from sartor.config import from_yaml

    wanted = ("dpo:1.0", "sft:0.1")
    for text in ("dpo:1.0 sft:0.1", "[dpo:1.0, sft:0.1]", "{dpo: 1.0, sft: 0.1}", "\n- dpo:1.0\n- sft: 0.1"):
        (tmp_path / "loss.yaml").write_text(f"loss: {text}\n")
        values = from_yaml(tmp_path / "loss.yaml", DpoConfig)
        assert DpoConfig(model="m", data="d", output=tmp_path, **values).loss == wanted, text


def test_a_function_is_a_loss_too(config: DpoConfig) -> None:
    run = train_dpo(replace(config, max_steps=2), loss=ten_line_loss).path
    assert json.loads((run / "summary.json").read_text())["objective"] == "ten_line_loss"


def test_the_example_package_installs_and_trains(config: DpoConfig, tmp_path: Path) -> None:
    """As a stranger's package would: built, installed beside Sartor, found by its entry point."""
    site = tmp_path / "site"
    source = ROOT / "examples" / "plugin-loss"
    copy = tmp_path / "plugin-loss"
    subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(site),
    ]
    subprocess.run([*pip, str(copy)], check=True, capture_output=True)
    command = [
        *(sys.executable, "-c", f"import sys; sys.path.append({str(site)!r}); from sartor.cli import main; main()"),
        *("dpo", "--model", config.model, "--data", config.data, "--output", str(tmp_path / "plugged")),
        *("--loss", "caution,patience=3", "--max-steps", "2", "--eval-prompts", "0", "--dtype", "float32"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "caution" in done.stderr


def test_losses_are_shown_and_drawn(tmp_path: Path, capsys) -> None:
    for argv in (["losses"], ["losses", "dpo", "lrml", "--plot", "--output", str(tmp_path / "two.svg")]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in LOSSES)
    assert "training starts by lowering the margin" in shown
    assert (tmp_path / "two.svg").read_text().count("lrml") == 1
