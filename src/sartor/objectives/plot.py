"""Objectives drawn: the loss, and how hard it pulls either side, over the margin."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sartor.objectives.objective import Term
from sartor.objectives.shape import shape

MIXABLE = 20.0  # scales further apart than this do not read in one panel
COLOURS = ("#3b76d6", "#d9722b", "#3a9a5b", "#a4508b", "#8a7a1f", "#c23b4a", "#4aa3a2", "#6b6b6b")
POINTS = 100  # per line: more cannot be seen
GREY = "#808080"  # reads on white and on black
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sartor",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
}


def draw(terms: Sequence[Term], path: Path, reach: float = 40.0) -> Path:
    """Three panels side by side, one line per loss, written to ``path`` (.png, .svg or .pdf); returns it.

    Losses of very unlike scale are each divided by their largest weight, and the panels say so: under AdamW the scale
    of a loss hardly matters. Where a loss belongs to a batch and not to a pair, the first panel shows what changes
    with the margin of one pair.
    """
    shapes = [shape(term, reach) for term in terms]
    scales = [float(np.abs([s.chosen, s.rejected]).max()) or 1.0 for s in shapes]
    # One loss at several β is drawn as it is: there the scale is the question.
    scaled = max(scales) > MIXABLE * min(scales) and len({term.name for term in terms}) > 1
    relative = scaled or any(term.traits.whole_batch for term in terms)
    titles = (
        "loss" + ", from its value at ρ = 0" * relative + ", scaled" * scaled,
        "pull up on chosen, −∂L/∂log π_w" + ", scaled" * scaled,
        "push down on rejected, ∂L/∂log π_l" + ", scaled" * scaled,
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 3)
        for i, (term, drawn, scale) in enumerate(zip(terms, shapes, scales, strict=True)):
            start = drawn.loss[np.abs(drawn.margin).argmin()] if relative else 0.0
            thin = slice(None, None, max(1, len(drawn.margin) // POINTS))
            for axes, values in zip(panels, (drawn.loss - start, drawn.chosen, drawn.rejected), strict=True):
                y = values[thin] / (scale if scaled else 1.0)
                axes.plot(drawn.margin[thin], y, color=COLOURS[i % len(COLOURS)], linewidth=1.8, label=_label(term))
        for axes, title in zip(panels, titles, strict=True):
            _finish(axes, title)
        panels[0].legend(frameon=False, labelcolor=GREY)
        figure.savefig(path, transparent=path.suffix == ".svg", dpi=160, metadata=_undated(path))
    if path.suffix == ".svg":
        path.write_text(_compact(path.read_text(encoding="utf-8")), encoding="utf-8")
    return path


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.axvline(0, color=GREY, linewidth=0.8, alpha=0.6)
    axes.axhline(0, color=GREY, linewidth=0.8, alpha=0.6)
    axes.set_xlabel("margin ρ, nats", loc="right")
    axes.grid(axis="y")


def _label(term: Term) -> str:
    options = [part for part in term.given.split(", ") if part and not part.startswith("beta ")]
    beta = [] if term.beta is None else [f"β {term.beta:g}"]
    return ", ".join([term.name, *beta, *options])


def _compact(svg: str) -> str:
    """The drawing without line breaks, metadata and digits of coordinates that nobody sees."""
    svg = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' (d|x|y)="[^"]*"', lambda found: re.sub(r"(\d\.\d)\d+", r"\1", found[0]), svg)
    return re.sub(r"\s*\n\s*", " ", svg).strip() + "\n"


def _undated(path: Path) -> dict[str, Any]:
    """The same drawing is the same file, whenever it is made."""
    return {"Date": None, "Creator": None} if path.suffix == ".svg" else {}
