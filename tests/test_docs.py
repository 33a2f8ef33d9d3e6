"""Documentation is executed: Python blocks run, `sartor` commands run on a tiny model, links and options exist."""

import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SCORER

from sartor import config as configs
from sartor.cli import HELP, main
from sartor.compare import experiment

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _here(command: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(command)
    return int(stop.value.code or 0)


@pytest.fixture
def workplace(tmp_path: Path, few_known_losses: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "_call", _here)  # arms of compare in this process: starting Python takes longer
    rows = [{"prompt": f"Name {i}. ", "chosen": f"A{i} yes", "rejected": f"b{i} no"} for i in range(16)]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = [{"prompt": f"Name {i}. ", "completion": f"A{i} yes", "label": i % 2 == 0} for i in range(12)]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    shown = [{"prompt": f"Name {i}. ", "completion": f"A{i} yes"} for i in range(12)]
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))
    ranked = [{"prompt": f"Name {i}. ", "completions": ["A", "b", "c"], "ranks": [1, 2, 3]} for i in range(12)]
    (tmp_path / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "prompts.txt").write_text("Name a colour.\nName a fruit.\nName a tree.\nName a town.\n")
    (tmp_path / "scorer.py").write_text(SCORER)
    for page in PAGES:
        for block in blocks(page, "python") + blocks(page, "yaml"):
            if name := re.match(r"# (\w+\.(py|yaml))", block):
                (tmp_path / name[1]).write_text(block)
    return tmp_path


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("tour.md", "2 rows of comparisons"),
        ("performance.md", r"\d+ MFLOP, of which head \d+%"),
        ("discovery.md", r"lrml at β 0\.05"),
    ],
)
def test_code_of_pages_runs(page: str, says: str, workplace: Path) -> None:
    source = "\n".join(blocks(ROOT / "docs" / page, "python"))
    paths = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
    done = subprocess.run([sys.executable, "-c", paths + source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(says, done.stdout)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_run(page: Path, workplace: Path, tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for line in "\n".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["sartor"] or words[1:2] == ["demo"]:  # the demo has a test of its own, with the real model
            continue
        with pytest.raises(SystemExit) as stop:
            main([word if word != "smollm2" else str(tiny_folder) for word in _tiny(words[1:], tiny_folder)])
        assert stop.value.code == 0, f"{line}\n{capfd.readouterr().err}"


def _tiny(words: list[str], tiny_folder: Path) -> list[str]:
    """The same command at a size for tests; config files name the real model too."""
    for file in Path().glob("*.yaml"):
        file.write_text(file.read_text().replace("smollm2", str(tiny_folder)))
    if words[0] in ("dpo", "sft", "reward") and "--resume" not in words:
        short = [] if "--max-steps" in words else ["--max-steps", "2"]
        return [*words, *short, *(["--eval-prompts", "2", "--max-new-tokens", "4"] if words[0] != "reward" else [])]
    if words[0] == "rlhf":
        quick = ["--sft", "max_steps=1", "eval_prompts=2", "--ppo", "max_steps=1", "eval_fraction=0.5"]
        return [*words, *quick, "--max-new-tokens", "4", "--no-judge-stages"]
    if words[0] == "compare":
        # A scorer that answers of random bytes differ by.
        own = ["--prompts", "prompts.txt", "--score", "scorer.py:even"]
        return [*words, *own, "--size", "quick", "--seeds", "1", "--max-new-tokens", "4"]
    if words[0] == "discover" and words[1] != "show":
        own = ["--task", "preferences", "--data", "prefs.jsonl", "--candidates", "16", "--adapters", "1"]
        task = words.index("--task")
        own += ["--seeds", "0", "--start", "dpo", "--model", str(tiny_folder)]
        return [*words[:task], *words[task + 2 :], *own]
    if words[0] == "ppo":
        return [*words, "--max-new-tokens", "4", "--max-steps", "1", "--eval-fraction", "0.5"]
    return [*words, "--max-new-tokens", "4"] if words[0] == "sample" else words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z]+)`?$", text, re.MULTILINE)) <= targets
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_that_pages_name_exist(page: Path) -> None:
    fields = {
        sign + f.name.replace("_", "-")
        for name in configs.__all__
        if name.endswith("Config")
        for f in dataclasses.fields(getattr(configs, name))
        for sign in ("", *["no-"] * (f.type is bool))
    }
    named = set(re.findall(r"--([a-z][a-z-]+)", "\n".join(re.findall(r"`[^`\n]*`", page.read_text(encoding="utf-8")))))
    outside = {"help", "config", "debug", "durations"}
    assert named <= fields | outside


def test_every_verb_is_on_the_first_screen() -> None:
    assert re.findall(r"^  sartor (\w+)", HELP, re.MULTILINE) == [
        "demo",
        "dpo",
        "sft",
        "reward",
        "ppo",
        "rlhf",
        "compare",
        "discover",
        "plan",
        "losses",
        "sample",
    ]


def test_the_pages_of_the_losses_are_up_to_date(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_losses", ROOT / "docs" / "make_losses.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    maker.write(tmp_path, plots=False)
    kept = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "losses").glob("*.md")}
    assert {path.name for path in tmp_path.iterdir()} == set(kept)
    for path in tmp_path.iterdir():
        assert path.read_text(encoding="utf-8") == kept[path.name], f"{path.name} is out of date: make docs"
