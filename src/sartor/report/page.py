"""A run folder to one HTML page: the answer first, then the evidence, then the details."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from sartor.console import duration
from sartor.evaluate.statistics import Estimate
from sartor.report.charts import charts
from sartor.report.run import FILES, Run, read_run
from sartor.report.texts import read_samples
from sartor.report.words import Figure, as_float, figure, number, shift, verdict

SHOWN = 12  # prompts before the fold
LONGER = 1.2  # completions that grew by more than a fifth "grew a lot"


@dataclass(frozen=True, slots=True)
class Strip:
    """Intervals on a common scale, in percent of its width: what the figures look like beside each other."""

    marks: list[tuple[str, float, float, float]]  # (colour, low, value, high)
    neutral: float | None


@dataclass(frozen=True, slots=True)
class Tile:
    """One key figure. ``figures`` has one entry, or two for before and after."""

    label: str
    figures: list[Figure]
    verdict: str
    tone: str  # "good", "bad" or "" for the colour of the verdict
    gloss: str
    strip: Strip | None


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the run folder and return its path.

    Every input file is optional; the page says which are not there. The page is one file with no scripts and nothing
    from outside.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sartor.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(_context(read_run(Path(run))))
    report = Path(run) / "report.html"
    # Half a surrogate pair, which a tokenizer can emit and JSON can carry, has no UTF-8: it becomes a question mark.
    report.write_text(page, encoding="utf-8", errors="replace")
    return report


def _context(run: Run) -> dict[str, Any]:
    tiles = _tiles(run)
    samples = read_samples(run.samples)
    comparison = run.part("comparison")
    return {
        "verb": _text(run.summary.get("verb")),
        "title": _text(run.summary.get("title")) or _title(run),
        "date": _text(run.summary.get("date")),
        "headline": _text(run.summary.get("headline")) or _headline(tiles),
        "tiles": tiles,
        "missing": [(name, FILES[name]) for name in run.missing],
        "problems": run.problems,
        "seed": run.config.get("seed"),
        "samples": samples,
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


def _headline(tiles: list[Tile]) -> str:
    if not tiles:
        return "No result yet: this run folder holds no estimate."
    first = tiles[0]
    shown = " → ".join(str(f) for f in first.figures)
    return f"{first.label} {shown}, {first.figures[0].n}: {first.verdict}."


def _strip(marks: dict[str, Estimate], low: float, high: float, neutral: float | None) -> Strip | None:
    """Where the estimates lie between ``low`` and ``high``; None where one of them has no finite interval."""
    if any(not math.isfinite(x) for e in marks.values() for x in (e.low, e.value, e.high)) or not low < high:
        return None

    def at(x: float) -> float:
        return round(100 * (min(max(x, low), high) - low) / (high - low), 2)

    placed = [(colour, at(e.low), at(e.value), at(e.high)) for colour, e in marks.items()]
    return Strip(placed, None if neutral is None else at(neutral))


def _tiles(run: Run) -> list[Tile]:
    """The key figures that the run has, four at most, the one closest to the purpose first."""
    found = [_win_rate(run), _score(run), _accuracy(run), _divergence(run), _margin(run)]
    return [tile for tile in found if tile is not None][:4]


def _tone(word: str, good: str, bad: str) -> str:
    return "good" if word == good else "bad" if word == bad else ""


def _share_tile(label: str, estimate: Estimate, unit: str, above: str, gloss: str) -> Tile:
    word = verdict(estimate, 0.5, above=above, below=above.replace("better", "worse"))
    tone = _tone(word, above, above.replace("better", "worse"))
    strip = _strip({"blue": estimate}, 0.0, 1.0, 0.5)
    return Tile(label, [figure(estimate, unit, percent=True)], word, tone, gloss, strip)


def _win_rate(run: Run) -> Tile | None:
    rate = run.estimate("win_rate")
    if rate is None:
        return None
    scorer = _text(run.summary.get("scorer")) or "score"
    gloss = f"Share of comparisons with the start's answers won by {scorer}, ties half; 50 % would be no change."
    return _share_tile("Win rate against the start", rate, "prompts", "scores better", gloss)


def _accuracy(run: Run) -> Tile | None:
    points = run.held_out("rewards/accuracies")
    if not points:
        return None
    gloss = "Share of held-out pairs whose chosen text gained more than the rejected one; 50 % is the start."
    if run.estimate("win_rate"):
        gloss += " Given texts, pair by pair: alike ones stay near 50 % even where new answers improve."
    return _share_tile("Held-out accuracy", points[-1][1], "prompts", "better than chance", gloss)


def _score(run: Run) -> Tile | None:
    before, after = run.estimate("score_before"), run.estimate("score_after")
    if before is None or after is None:
        return None
    word = shift(before, after)
    ends = [x for e in (before, after) for x in (e.low, e.high)]
    room = 0.15 * (max(ends) - min(ends))
    strip = _strip({"muted": before, "blue": after}, min(ends) - room, max(ends) + room, None)
    scorer = _text(run.summary.get("scorer"))
    gloss = f"Mean score of the samples: {scorer}." if scorer else "Mean score of the samples."
    shown = [figure(before, "prompts"), figure(after, "prompts")]
    return Tile("Score before and after", shown, word, _tone(word, "higher", "lower"), gloss, strip)


def _divergence(run: Run) -> Tile | None:
    points, kl, unit = run.held_out("objective/kl"), run.estimate("kl"), "prompts"
    if kl is None and points:
        kl, unit = points[-1][1], "samples"
    if kl is None:
        return None
    word = verdict(kl, 0.0, above="moved from the start", below="below zero: estimation noise")
    low, high = min(kl.low, 0.0), 1.15 * max(kl.high, 0.0)
    gloss = "KL from the reference, nats per completion: the price paid. 0 would be no change; less is cheaper."
    return Tile("Distance from the start", [figure(kl, unit)], word, "", gloss, _strip({"blue": kl}, low, high, 0.0))


def _margin(run: Run) -> Tile | None:
    points = run.held_out("rewards/margins")
    if not points:
        return None
    margin = points[-1][1]
    word = verdict(margin, 0.0, above="better than the start", below="worse than the start")
    tone = _tone(word, "better than the start", "worse than the start")
    reach = 1.15 * max(abs(margin.low), abs(margin.high))
    gloss = "Mean implicit reward of chosen minus rejected on held-out pairs; 0 is the start."
    strip = _strip({"blue": margin}, -reach, reach, 0.0)
    return Tile("Held-out margin", [figure(margin, "prompts")], word, tone, gloss, strip)


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
        strip = _strip({"muted": before, "blue": after}, 0.0, 1.05 * top, None)
        shown = [figure(before, "prompts"), figure(after, "prompts")]
        rows.append({"label": label, "gloss": gloss, "figures": shown, "verdict": shift(before, after), "strip": strip})
    return rows


def _warnings(run: Run) -> list[str]:
    """Side effects that the intervals show; silence where they overlap."""
    found = []
    before, after = run.estimate("distinct_2_before"), run.estimate("distinct_2_after")
    if before and after and shift(before, after) == "lower":
        found.append(
            f"The model became narrower: distinct-2 fell from {figure(before)} to {figure(after)}, and the intervals "
            "do not overlap. Read the samples for stock phrases; a larger beta or fewer steps would keep more variety."
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
