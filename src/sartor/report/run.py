"""A run folder as the report sees it: every file optional, every line that cannot be read counted."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sartor.evaluate.statistics import Estimate
from sartor.report.words import as_float, read_estimate

FILES = {
    "summary.json": "the result in one sentence, the comparison, the cost and the machine",
    "metrics.jsonl": "the curves",
    "samples.jsonl": "the texts before and after",
    "margins.json": "the histogram of margins",
    "config.yaml": "the options",
}
# What a verb does not write is not missing.
UNWRITTEN = {
    "sft": ("margins.json",),
    "ppo": ("margins.json",),
    "dpo --online": ("margins.json",),
    "reward": ("samples.jsonl",),
    "reward --evaluate": ("samples.jsonl", "metrics.jsonl"),
}
Series = list[tuple[float, Estimate]]


@dataclass(slots=True)
class Run:
    """What a run folder holds; ``missing`` and ``problems`` are sentences for the reader."""

    path: Path
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def part(self, name: str) -> dict[str, Any]:
        """A mapping in the summary; empty where there is none."""
        value = self.summary.get(name)
        return dict(value) if isinstance(value, Mapping) else {}

    def estimate(self, name: str) -> Estimate | None:
        """An estimate of the comparison of samples before and after."""
        return read_estimate(self.part("comparison").get(name))

    def held_out(self, metric: str) -> Series:
        """A metric of the evaluation rows over steps."""
        found = [(as_float(row.get("step")), read_estimate(row.get(metric))) for row in self.evals]
        return [(step, e) for step, e in found if e is not None]


def read_run(path: Path) -> Run:
    """Read what there is. What is not there or not readable ends in ``missing`` or ``problems``."""
    run = Run(path)
    run.missing = [name for name in FILES if not (path / name).is_file()]
    summary, config, margins = (_document(run, name) for name in ("summary.json", "config.yaml", "margins.json"))
    run.summary = dict(summary) if isinstance(summary, Mapping) else {}
    run.config = {str(key): value for key, value in config.items()} if isinstance(config, Mapping) else {}
    raw = margins.get("margins") if isinstance(margins, Mapping) else None
    run.margins = [as_float(m) for m in raw] if isinstance(raw, list) else []
    rows = _lines(run, "metrics.jsonl")
    run.train, run.evals = _by_step(rows, "train"), _by_step(rows, "eval")
    run.samples = _lines(run, "samples.jsonl")
    _check_finite(run)
    unwritten = UNWRITTEN.get(str(run.summary.get("verb")), ())
    run.missing = [name for name in run.missing if name not in unwritten]
    return run


def _document(run: Run, name: str) -> Any:
    if name in run.missing:
        return None
    try:
        text = (run.path / name).read_text(encoding="utf-8", errors="replace")
        document = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        run.problems.append(f"{name} could not be read: {str(error).splitlines()[0]}")
        return None
    if not isinstance(document, Mapping):
        run.problems.append(f"{name} could not be read: wanted a mapping, got {type(document).__name__}")
    return document


def _lines(run: Run, name: str) -> list[dict[str, Any]]:
    if name in run.missing:
        return []
    rows, broken = [], []
    # Not splitlines(): it also cuts at U+2028 and its kin, which JSON allows inside a string.
    for i, line in enumerate((run.path / name).read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = line
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None:
            broken.append(i)
    if broken:
        run.problems.append(
            f"{name}: {len(broken)} of {len(rows) + len(broken)} lines could not be read (line {broken[0]})"
        )
    return rows


def _by_step(rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    # A resumed run writes some steps twice: the later row is of the weights that went on.
    latest = {as_float(row.get("step")): row for row in rows if row.get("split") == split}
    return [latest[step] for step in sorted(step for step in latest if math.isfinite(step))]


def _check_finite(run: Run) -> None:
    bad = [row["step"] for row in run.train if "loss" in row and not math.isfinite(as_float(row["loss"]))]
    if bad:
        run.problems.append(
            f"Training loss: not finite in {len(bad)} of {len(run.train)} steps, first at step {bad[0]}"
        )
    lost = sum(not math.isfinite(m) for m in run.margins)
    if lost:
        run.problems.append(f"Margins: {lost} of {len(run.margins)} are not finite and left out of the histogram")
