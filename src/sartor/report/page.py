"""A run folder to one HTML page: the answer first, then the evidence, then the details."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from sartor.console import duration
from sartor.report.charts import charts
from sartor.report.run import FILES, Run, read_run
from sartor.report.texts import read_samples
from sartor.report.tiles import Tile, strip, tiles
from sartor.report.words import as_float, figure, number, shift

SHOWN = 12  # prompts before the fold
LONGER = 1.2  # completions that grew by more than a fifth "grew a lot"


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the run folder and return its path.

    Every input file is optional; the page says which are not there. The page is one file with no scripts and nothing
    from outside.
    """
    return write_page(Path(run), "page.html", _context(read_run(Path(run))))


def write_page(folder: Path, template: str, context: Mapping[str, Any]) -> Path:
    """Write ``report.html`` whole or not at all, since it marks a run as finished; returns its path."""
    scratch, report = folder / ".report.html.partial", folder / "report.html"
    page = environment().get_template(template).render(context)
    # Half a surrogate pair, which a tokenizer can emit and JSON can carry, has no UTF-8: it becomes a question mark.
    scratch.write_text(page, encoding="utf-8", errors="replace")
    scratch.replace(report)
    return report


def environment() -> jinja2.Environment:
    """Where the templates are, and how they are read."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("sartor.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _context(run: Run) -> dict[str, Any]:
    shown = tiles(run)
    samples = read_samples(run.samples)
    comparison = run.part("comparison")
    return {
        "verb": _text(run.summary.get("verb")),
        "title": _text(run.summary.get("title")) or _title(run),
        "date": _text(run.summary.get("date")),
        "headline": _text(run.summary.get("headline")) or _headline(shown),
        "tiles": shown,
        "missing": [(name, FILES[name]) for name in run.missing],
        "problems": run.problems,
        "seed": run.config.get("seed"),
        "samples": samples,
        "answers": not str(run.summary.get("verb")).startswith("reward"),
        "shown": SHOWN,
        "scorer": _text(run.summary.get("scorer")),
        "prompts": {key: comparison.get(key) for key in ("prompts", "samples")},
        "charts": [(chart, Markup(chart.svg)) for chart in charts(run)],
        "spread": _spread(run),
        "warnings": _warnings(run),
        "cost": _cost(run),
        "machine": [(key, _text(value)) for key, value in run.part("machine").items() if value is not None],
        "command": _text(run.summary.get("command")),
        "commit": _text(run.summary.get("commit")),
        "config": [(key, _option(value)) for key, value in run.config.items()],
        "data": [(key, _text(value)) for key, value in run.part("data").items() if key != "notes" and value],
        "notes": [_text(note) for note in run.part("data").get("notes") or []],
    }


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _option(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, Mapping | list):
        return yaml.safe_dump(value, default_flow_style=True, width=1_000_000, allow_unicode=True).strip()
    return str(value)


def _title(run: Run) -> str:
    model, data = run.config.get("model"), run.config.get("data")
    return f"{model} fitted to {data}" if model and data else f"Run {run.path.resolve().name}"


def _headline(figures: list[Tile]) -> str:
    if not figures:
        return "No result yet: this run folder holds no estimate."
    first = figures[0]
    shown = " → ".join(str(f) for f in first.figures)
    return f"{first.label} {shown}, {first.figures[0].n}: {first.verdict}."


def _spread(run: Run) -> list[dict[str, Any]]:
    """Rows of the table of what alignment tends to change besides the goal."""
    rows = []
    for label, name, gloss in (
        ("Diversity", "distinct_2", "distinct-2: different word pairs as a share of all word pairs; lower is narrower"),
        ("Length", "length", "mean length of a completion; preference data often rewards length for its own sake"),
    ):
        before, after = run.estimate(f"{name}_before"), run.estimate(f"{name}_after")
        if before is None or after is None:
            continue
        top = max(before.high, after.high)
        placed = strip({"muted": before, "blue": after}, 0.0, 1.05 * top, None)
        shown = [figure(before, "prompts"), figure(after, "prompts")]
        rows.append(
            {"label": label, "gloss": gloss, "figures": shown, "verdict": shift(before, after), "strip": placed}
        )
    return rows


def _warnings(run: Run) -> list[str]:
    """Side effects that the intervals show; silence where they overlap."""
    found = []
    before, after = run.estimate("distinct_2_before"), run.estimate("distinct_2_after")
    if before and after and shift(before, after) == "lower":
        found.append(
            f"The model became narrower: distinct-2 fell from {figure(before)} to {figure(after)}, and the intervals "
            "do not overlap. Read the samples for stock phrases; a larger beta (kl_coef in ppo) or fewer steps would "
            "keep more variety."
        )
    before, after = run.estimate("length_before"), run.estimate("length_after")
    if before and after and shift(before, after) == "higher" and after.value > LONGER * before.value:
        found.append(
            f"Completions grew {100 * (after.value / before.value - 1):.0f} % longer, from {figure(before)} to "
            f"{figure(after)}, and the intervals do not overlap. Part of the preference gain may be length alone."
        )
    return found


def _cost(run: Run) -> dict[str, Any]:
    cost = run.part("cost")
    stages = [
        (_text(stage.get("name")), as_float(stage.get("seconds")))
        for stage in cost.get("stages") or []
        if isinstance(stage, Mapping)
    ]
    stages = [(name, seconds) for name, seconds in stages if math.isfinite(seconds) and seconds >= 0]
    total, known = as_float(cost.get("seconds")), sum(seconds for _, seconds in stages)
    if stages and total > 1.01 * known:
        stages.append(("everything else", total - known))
    whole = sum(seconds for _, seconds in stages) or 1.0
    rows = [
        ("Wall-clock time", duration(total), "seconds"),
        ("Peak memory", f"{number(as_float(cost.get('peak_memory_gib')))} GiB", "peak_memory_gib"),
        ("Tokens trained on", number(as_float(cost.get("train_tokens"))), "train_tokens"),
        ("Speed", f"{number(as_float(cost.get('speed')))} {_text(cost.get('unit'))} per second", "speed"),
    ]
    told = run.part("forecast")
    foreseen = [("seconds", duration), ("peak_memory_gib", lambda gib: f"{number(gib)} GiB")]
    said = [say(as_float(told.get(key))) for key, say in foreseen if math.isfinite(as_float(told.get(key)))]
    facts = [(label, text) for label, text, key in rows if math.isfinite(as_float(cost.get(key)))]
    return {
        "stages": [(name, duration(seconds), round(100 * seconds / whole, 2)) for name, seconds in stages],
        "facts": [*facts, *([("Said before the run", ", ".join(said))] if said else [])],
    }
