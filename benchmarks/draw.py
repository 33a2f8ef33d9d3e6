"""The plot of preference_step.py: speed and memory per case, contenders beside each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LOOKS = {
    "sartor": ("Sartor", "#3b76d6"),
    "trl-tuned": ("TRL 1.16, tuned", "#d9722b"),
    "trl-small": ("tuned, batch in parts", "#b0884f"),
    "trl": ("as shipped", "#e9c3a0"),
    "trl-pure": ("tuned, pure bf16", "#8a7a1f"),
}
LABELS = {
    "full": "DPO\nall weights",
    "lora": "DPO\nLoRA",
    "long": "DPO\nlong prompts",
    "reward": "reward model\n4 answers",
    "ranking": "DPO\n4 answers",
    "sft": "SFT",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sartor",
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 11,
}
WIDTH = 0.82  # of a case's place, for all its bars


def draw(cases: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Two panels over the same cases, written to ``path`` (.svg, .png or .pdf)."""
    names = [name for name in cases if any(row["case"] == name for row in rows)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 1.2 + 0.82 * len(names)), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        speed, memory = figure.subplots(1, 2, sharey=True)
        bars(speed, names, rows, ("pairs_per_second", "speed_ratio"))
        speed.set_title("Pairs per second; examples for SFT (more is better)", loc="left", color="#222222")
        bars(memory, names, rows, ("peak_gib", "memory_ratio"))
        memory.set_title("Peak memory, GiB (less is better)", loc="left", color="#222222")
        speed.set_yticks(range(len(names)), [LABELS.get(name, name) for name in names])
        speed.invert_yaxis()
        handles, labels = speed.get_legend_handles_labels()
        if any("speed_ratio" in row for row in rows):
            labels = [f"{label} (× tuned TRL)" if label == LOOKS["sartor"][0] else label for label in labels]
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def bars(axes: Axes, names: Sequence[str], rows: Sequence[Mapping[str, Any]], columns: tuple[str, str]) -> None:
    """One group of bars per case; sartor's say how many times tuned TRL they are, which is the second column."""
    what, ratio_to_tuned = columns
    shown = [name for name in LOOKS if any(row["contender"] == name for row in rows)]
    height = WIDTH / len(shown)
    for place, contender in enumerate(shown):
        label, colour = LOOKS[contender]
        own = [row for row in rows if row["contender"] == contender]
        at = [names.index(row["case"]) + (place + 0.5) * height - WIDTH / 2 for row in own]
        axes.barh(at, [row[what] for row in own], height * 0.92, color=colour, label=label)
        for y, row in zip(at, own, strict=True):
            ratio = f"  ({row[ratio_to_tuned]:.3g}×)" if contender == "sartor" and ratio_to_tuned in row else ""
            axes.annotate(
                f"{row[what]:.3g}{ratio}",
                (row[what], y),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                size=8,
                color="#222222" if contender == "sartor" else "#666666",
            )
    axes.margins(x=0.2)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors="#888888", labelsize=8)
    axes.spines["bottom"].set_color("#cccccc")
