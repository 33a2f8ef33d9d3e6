"""What a user types wrong, and the one line that tells them. No traceback, exit code 2, nothing left half done."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import byte_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

from sartor.cli import main, parse
from sartor.config import DpoConfig, from_yaml, to_yaml
from sartor.errors import UserError

ROWS = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text(lines(ROWS))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text(lines(ROWS[:2]) + "{not json\n")
    (tmp_path / "columns.jsonl").write_text(lines([{"prompt": "p", "choosen": "a", "rejected": "b"}] * 3))
    (tmp_path / "same.jsonl").write_text(lines([*ROWS, {"prompt": "p", "chosen": "x", "rejected": "x"}]))
    (tmp_path / "blank.jsonl").write_text(lines([*ROWS, {"prompt": "p", "chosen": " ", "rejected": "x"}]))
    (tmp_path / "number.jsonl").write_text(lines([*ROWS, {"prompt": "p", "chosen": 7, "rejected": "x"}]))
    (tmp_path / "judged.jsonl").write_text(lines([{"prompt": "p", "completion": "a", "label": True}] * 3))
    (tmp_path / "ties.jsonl").write_text(lines([{**row, "tie": True} for row in ROWS]))
    differ = {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"}
    same = [
        {"chosen": f"\n\nHuman: a\n\nAssistant: x{i}", "rejected": f"\n\nHuman: a\n\nAssistant: y{i}"} for i in range(9)
    ]
    (tmp_path / "differ.jsonl").write_text(lines([*same, differ]))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode())[:60])
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "options.yaml").write_text("bta: 0.1\n")
    (tmp_path / "types.yaml").write_text("beta: lots\n")
    (tmp_path / "list.yaml").write_text("- beta\n")
    (tmp_path / "syntax.yaml").write_text("beta: [\n")
    (tmp_path / "broken_loss.py").write_text("def good(pair, *, beta): return pair.policy_chosen\nvalue = 1 / 0\n")
    (tmp_path / "loss.py").write_text("def good(pair, *, beta): return pair.policy_chosen\n")
    (tmp_path / "not_a_model").mkdir()
    (tmp_path / "model").symlink_to(tiny_folder)
    classifier = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tiny_folder))
    classifier.save_pretrained(tmp_path / "classifier")
    byte_tokenizer().save_pretrained(tmp_path / "classifier")
    shutil.copytree(tiny_folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"0" * 100)
    return tmp_path


DPO = ["dpo", "--output", "run", "--eval-prompts", "0", "--max-steps", "1"]
GOOD = [*DPO, "--model", "model", "--data", "good.jsonl"]
BAD = {
    "no verb of that name": (["trian"], "unknown verb 'trian'"),
    "option": ([*GOOD, "--lerning-rate", "1"], "unknown option --lerning-rate: did you mean --learning-rate?"),
    "missing options": (["dpo", "--model", "m"], "dpo: missing --data, --output; wanted: sartor dpo --model MODEL"),
    "not a number": ([*GOOD, "--beta", "lots"], "--beta 'lots': wanted a number"),
    "out of range": ([*GOOD, "--beta", "-1"], "--beta -1.0: wanted above 0"),
    "no such schedule": ([*GOOD, "--schedule", "cosin"], "unknown --schedule 'cosin': did you mean 'cosine'?"),
    "no such dtype": ([*GOOD, "--dtype", "fp8"], "unknown --dtype 'fp8'"),
    "no such loss": ([*GOOD, "--loss", "dop"], "unknown loss 'dop': did you mean 'dpop' or 'dpo'?"),
    "no such loss file": ([*GOOD, "--loss", "nowhere.py:f"], "no such file nowhere.py"),
    "no such function": ([*GOOD, "--loss", "loss.py:god"], "did you mean 'good'?"),
    "loss file that fails": ([*GOOD, "--loss", "broken_loss.py:good"], "ZeroDivisionError: division by zero"),
    "no such scorer": ([*GOOD, "--score", "vadr"], "unknown reward 'vadr': did you mean 'vader'?"),
    "no such data": ([*DPO, "--model", "model", "--data", "gone.jsonl"], "gone.jsonl"),
    "empty data": ([*DPO, "--model", "model", "--data", "empty.jsonl"], "empty.jsonl"),
    "bad JSON line": ([*DPO, "--model", "model", "--data", "broken.jsonl"], "broken.jsonl, line 3"),
    "missing column": ([*DPO, "--model", "model", "--data", "columns.jsonl"], "chosen"),
    "identical answers": ([*DPO, "--model", "model", "--data", "same.jsonl"], "1 of 21 rows"),
    "identical, at once": (
        [*DPO, "--model", "model", "--data", "same.jsonl", "--on-bad-row", "error"],
        "same.jsonl, row 21",
    ),
    "empty answer": ([*DPO, "--model", "model", "--data", "blank.jsonl"], "blank.jsonl, row 21"),
    "no text": ([*DPO, "--model", "model", "--data", "number.jsonl"], "number.jsonl, row 21"),
    "prompts differ": ([*DPO, "--model", "model", "--data", "differ.jsonl"], "differ.jsonl, row 10"),
    "other kind of data": ([*DPO, "--model", "model", "--data", "judged.jsonl"], "holds judged answers"),
    "all ties": ([*DPO, "--model", "model", "--data", "ties.jsonl"], "all 20 rows are ties"),
    "cut gzip": ([*DPO, "--model", "model", "--data", "cut.jsonl.gz"], "cut.jsonl.gz"),
    "TRL's name": ([*GOOD, "--per_device_train_batch_size", "4"], "did you mean --batch-size?"),
    "no such flag": ([*GOOD, "--no-batch-size"], "unknown option --no-batch-size"),
    "not a rate": ([*GOOD, "--learning-rate", "abc"], "--learning-rate 'abc': wanted a number"),
    "resume of nothing, documented form": (["dpo", "--output", "run", "--resume"], "run holds no run"),
    "nearly smollm2": ([*DPO, "--model", "smolm2", "--data", "good.jsonl"], "did you mean 'smollm2'?"),
    "policy": ([*GOOD, "--on-bad-row", "skp"], "unknown --on-bad-row 'skp': did you mean 'skip'?"),
    "nothing fits": ([*GOOD, "--max-length", "2"], "no completion fits --max-length 2; raise it"),
    "no such model": ([*DPO, "--model", "./gone", "--data", "good.jsonl"], "model './gone': no such folder"),
    "model without files": ([*DPO, "--model", "not_a_model", "--data", "good.jsonl"], "model 'not_a_model'"),
    "model is a file": ([*DPO, "--model", "good.jsonl", "--data", "good.jsonl"], "is a file: wanted a folder"),
    "output is a file": ([*DPO[:1], "--output", "good.jsonl", *GOOD[3:]], "good.jsonl exists already"),
    "output cannot be made": ([*DPO[:1], "--output", "good.jsonl/run", *GOOD[3:]], "good.jsonl/run"),
    "output has files": ([*DPO[:1], "--output", "not_a_model/..", *GOOD[3:]], "has files in it that are no run"),
    "scorer that fails": ([*GOOD[:3], *GOOD[5:], "--score", "loss.py:good"], "scorer good failed: TypeError"),
    "infinite": ([*GOOD, "--learning-rate", "inf"], "--learning-rate inf: wanted a finite number"),
    "negative seed": ([*GOOD, "--seed", "-1"], "--seed -1: wanted 0 or more"),
    "reward model": (
        [*DPO, "--model", "classifier", "--data", "good.jsonl"],
        "lacks 1 weights of a causal language model",
    ),
    "damaged model": ([*DPO, "--model", "damaged", "--data", "good.jsonl"], "model 'damaged'"),
    "sample into nowhere": (
        ["sample", "--model", "model", "--prompts", "good.jsonl", "--output", "good.jsonl/x"],
        "--output good.jsonl/x cannot be written",
    ),
    "sample over a file": (
        ["sample", "--model", "model", "--prompts", "good.jsonl", "--output", "good.jsonl"],
        "--output good.jsonl exists already",
    ),
    "too long an answer": (
        ["sample", "--model", "model", "--prompts", "good.jsonl", "--max-new-tokens", "900"],
        "exceed the 512 positions of model",
    ),
    "nothing to resume": ([*GOOD, "--resume"], "holds no run"),
    "no such config": ([*GOOD, "--config", "gone.yaml"], "--config gone.yaml: No such file"),
    "config with an unknown name": ([*GOOD, "--config", "options.yaml"], "'bta': did you mean 'beta'?"),
    "config with a wrong type": ([*GOOD, "--config", "types.yaml"], "types.yaml: beta: wanted float, got 'lots'"),
    "config that is a list": ([*GOOD, "--config", "list.yaml"], "wanted lines of 'name: value', got list"),
    "config that is no YAML": ([*GOOD, "--config", "syntax.yaml"], "syntax.yaml is not YAML"),
    "config without a path": ([*GOOD, "--config"], "--config: wanted a path after it"),
    "no prompts": (["sample", "--model", "model", "--prompts", "empty.txt"], "empty.txt is empty"),
    "no prompt file": (
        ["sample", "--model", "model", "--prompts", "gone.txt"],
        "gone.txt: No such file or directory; wanted a text file",
    ),
    "top-p": (["sample", "--model", "model", "--prompts", "p.txt", "--top-p", "1.5"], "--top-p 1.5: wanted above 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_line_and_exit_code_2(case: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, wanted = BAD[case]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert said[-1].startswith("sartor: ")
    assert wanted in said[-1], said[-1]
    assert not any("Traceback" in line for line in said)
    assert len([line for line in said if line.startswith("sartor: ")]) == 1
    assert not (files / "run").exists()  # a mistake costs no folder to clean up


def test_debug_shows_the_traceback(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*GOOD, "--loss", "dop", "--debug"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("verb", "most"), [((), 20), (("dpo",), 120), (("sample",), 60), (("demo",), 30)])
def test_help_fits_a_screen_or_two(verb: tuple[str, ...], most: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert 5 < len(text.splitlines()) <= most
    assert "usage" in text.lower() or not verb


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("model: m\ndata: d\nbeta: 0.3\nlearning_rate: 2e-5\nas-chat: always\nschedule: linear\n")
    config = parse("dpo", DpoConfig, ["--config", str(file), "--output", "o", "--beta", "0.5"])
    assert (config.beta, config.learning_rate, config.as_chat, config.schedule) == (0.5, 2e-5, "always", "linear")
    assert config.output == Path("o")


def test_config_survives_its_file(tmp_path: Path) -> None:
    config = DpoConfig(model="m", data="d", output=Path("o"), beta=0.25, max_steps=7, as_chat="never")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert DpoConfig(**from_yaml(tmp_path / "config.yaml", DpoConfig)) == config


def test_the_command_line_stays_small() -> None:
    from dataclasses import fields

    assert len(fields(DpoConfig)) <= 41  # TRL has 177: another option must be worth its place


def test_sample_writes_and_shows(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "prompts.txt").write_text("Hello\nWorld\n")
    command = ["sample", "--model", "model", "--prompts", "prompts.txt", "-n", "3", "--max-new-tokens", "4"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--output", "answers/out.jsonl"])
    assert stop.value.code == 0
    rows = [json.loads(line) for line in (files / "answers" / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Hello", "World"]
    assert all(len(row["completions"]) == len(row["finished"]) == 3 for row in rows)
    with pytest.raises(SystemExit):
        main(command)
    assert "Hello\n" in capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f'{sys.executable} -c \'from sartor.cli import main; main(["dpo", "--help"])\' | head -1'
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_unknown_option_in_python_names_it() -> None:
    with pytest.raises(UserError, match="--epochs 0: wanted above 0"):
        DpoConfig(model="m", data="d", output=Path("o"), epochs=0)
