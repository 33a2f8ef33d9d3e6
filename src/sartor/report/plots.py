"""Small plots as inline SVG. They have no colours and no fonts of their own, only the page's CSS variables: one drawing
reads on light, on dark and on paper."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from sartor.evaluate.statistics import Estimate

Points = Sequence[tuple[float, Estimate]]

# Matplotlib accepts no CSS variables: draw in colours that nothing else uses, then put the variables in their place.
_PAINT = {"ink": "#010203", "muted": "#010204", "rule": "#010205", "blue": "#010206", "orange": "#010207"}
_WIDE = (760, 400)  # across the page
_WIDTH, _HEIGHT = 350, 205  # CSS pixels at the column width of the page, so that 11 units of type are 11 pixels
_BESIDE = (
    (6, -9),
    (6, 3),
    (-6, 3),
    (-6, -9),
    (2, 8),
    (2, -16),
    (-2, 10),
    (-2, -18),
    (9, 12),
    (9, -21),
    (-9, -21),
    (-9, 14),
)
_PEN = dict(zip((1, 2, 3, 4, 79), "MLQCZ", strict=True))  # matplotlib's codes of a path, and SVG's
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 11,
    "text.color": _PAINT["muted"],
    "axes.labelcolor": _PAINT["muted"],
    "axes.edgecolor": _PAINT["rule"],
    "xtick.color": _PAINT["rule"],
    "ytick.color": _PAINT["rule"],
    "xtick.labelcolor": _PAINT["muted"],
    "ytick.labelcolor": _PAINT["muted"],
    "grid.color": _PAINT["rule"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.left": False,
    "xtick.major.size": 3,
    "axes.unicode_minus": True,
}


def curve(
    lines: dict[str, Points], *, name: str, neutral: float | None = None, percent: bool = False, faint: Any = None
) -> str:
    """Estimates over steps with their interval bands, one line per colour (``"blue"``, ``"orange"``).

    ``neutral`` draws the line of no change. ``faint`` is a pair (steps, values) of a noisy series: drawn thin, with its
    running mean. ``name`` is the text for a screen reader.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, axes = _axes()
        if neutral is not None:
            axes.axhline(neutral, color=_PAINT["muted"], linewidth=1, dashes=(3, 3))
        if faint is not None:
            _faint(axes, *faint)
        for colour, points in lines.items():
            _band(axes, points, _PAINT[colour])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.set_xlabel("step", loc="right", labelpad=2)
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g} %"))
        return _svg(figure, name)


@dataclass(frozen=True, slots=True)
class Route:
    """Pairs, of KL and reward, that belong together; the label stands at the last one.

    ``mark`` is as matplotlib writes it: ``"o"`` is points without a line, ``"--"`` a line without points.
    """

    colour: str
    points: Sequence[tuple[Estimate, Estimate]]
    label: str = ""
    mark: str = "o-"


def frontier(
    routes: Sequence[Route], *, name: str, across: str = "KL, nats", wide: bool = False, log: bool = False
) -> str:
    """Reward against KL, or against what else ``across`` says, with the intervals of both."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, axes = _axes(*_WIDE) if wide else _axes()
        ends = []
        for route in routes:
            paint = _PAINT[route.colour]
            finite = [(kl, reward) for kl, reward in route.points if math.isfinite(kl.value + reward.value)]
            x, y = [kl.value for kl, _ in finite], [reward.value for _, reward in finite]
            axes.plot(x, y, route.mark, color=paint, linewidth=1.2, markersize=3.5)
            for kl, reward in finite:
                if math.isfinite(reward.low + reward.high) and reward.low < reward.high:
                    axes.vlines([kl.value], [reward.low], [reward.high], color=paint, linewidth=2, alpha=0.3)
                if math.isfinite(kl.low + kl.high) and kl.low < kl.high:
                    axes.hlines([reward.value], [kl.low], [kl.high], color=paint, linewidth=2, alpha=0.3)
            labels = ["" for _ in finite[1:]] + [route.label]
            ends += [(text, a, b, paint) for text, a, b in zip(labels, x, y, strict=False)]
        if wide:
            axes.margins(x=0.12)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        _label(axes, ends)
        axes.set_xlabel(across, loc="right", labelpad=2)
        return _svg(figure, name, *(_WIDE if wide else ()))


def _label(axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Texts beside their points, each where it covers fewest points and texts so far."""
    axes.autoscale_view()  # else places are those of the limits before
    points = 72 / axes.figure.dpi  # of a pixel
    places = [axes.transData.transform((x, y)) * points for _, x, y, _ in ends]
    taken = [(x - 2, y - 2, x + 2, y + 2, 1) for x, y in places]
    edge, ceiling = (points * end for end in axes.get_window_extent().max)
    for (text, x, y, paint), place in zip(ends, places, strict=True):
        if not text:
            continue
        boxes = []
        for right, up in _BESIDE:
            left = place[0] + right - (6 * len(text) if right < 0 else 0)
            boxes.append((left, place[1] + up, left + 6 * len(text), place[1] + up + 8))
        covered = [
            sum(weight for left, low, right, top, weight in taken if a < right and b > left and c < top and d > low)
            + 9 * (b > edge + 8 or d > ceiling + 8)
            for a, c, b, d in boxes
        ]
        best = covered.index(min(covered))
        taken.append((*boxes[best], 3))
        axes.annotate(
            text,
            (x, y),
            xytext=_BESIDE[best],
            textcoords="offset points",
            horizontalalignment="right" if _BESIDE[best][0] < 0 else "left",
            color=paint,
            fontsize=10,
            parse_math=False,
        )


def lines(
    drawn: dict[str, tuple[Sequence[float], Sequence[float]]], *, name: str, across: str, within: tuple[float, float]
) -> str:
    """Plain curves, the first one on top and the others dashed; ``within`` is the range of values that is seen."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, axes = _axes()
        axes.axhline(0, color=_PAINT["rule"], linewidth=1)
        axes.axvline(0, color=_PAINT["rule"], linewidth=1)
        for place, (colour, (x, y)) in enumerate(drawn.items()):
            style = "--" if place else "-"
            axes.plot(x, y, style, color=_PAINT[colour], linewidth=1.3 if place else 1.8, zorder=3 - 0.1 * place)
        axes.set_ylim(*within)
        axes.set_xlabel(across, loc="right", labelpad=2)
        return _svg(figure, name)


def formula(latex: str, size: int = 21) -> str:
    """Maths as one path in the colour of the text around it; nothing where matplotlib cannot read it."""
    if "$" in latex:  # it would end the maths, and the rest be drawn as text
        return ""
    try:
        path = TextPath((0, 0), f"${latex}$", size=size)
    except (ValueError, RecursionError):
        return ""
    box = path.get_extents().padded(1)
    drawn = "".join(
        _PEN[int(code)] + " ".join(f"{v:.1f}" for v in ([] if code == path.CLOSEPOLY else vertices))
        for vertices, code in path.iter_segments(simplify=False)
    )
    return (
        f'<svg aria-hidden="true" width="{box.width:.0f}" viewBox="{box.x0:.1f} {-box.y1:.1f} {box.width:.1f} '
        f'{box.height:.1f}"><path transform="scale(1 -1)" fill="currentColor" d="{drawn}"/></svg>'
    )


def reliability(points: Points, *, name: str) -> str:
    """How often a prediction was right against how sure it was, with intervals; dashed where both are equal."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, axes = _axes()
        axes.plot([0.5, 1], [0.5, 1], color=_PAINT["muted"], linewidth=1, dashes=(3, 3))
        _bars(axes, points)
        as_percent = FuncFormatter(lambda share, _: f"{100 * share:.3g} %")
        axes.xaxis.set_major_formatter(as_percent)
        axes.yaxis.set_major_formatter(as_percent)
        axes.set_xlim(0.48, 1.02)
        axes.set_xlabel("predicted", loc="right", labelpad=2)
        return _svg(figure, name)


def shares(rows: Sequence[tuple[str, Estimate]], *, name: str, label: str, neutral: float = 0.5) -> str:
    """Shares by group with their intervals, and the line of chance."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, axes = _axes()
        axes.axhline(neutral, color=_PAINT["muted"], linewidth=1, dashes=(3, 3))
        _bars(axes, [(float(place), estimate) for place, (_, estimate) in enumerate(rows)])
        axes.set_xticks(range(len(rows)), [text for text, _ in rows])
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
        axes.set_xlabel(label, loc="right", labelpad=2)
        return _svg(figure, name)


def _bars(axes: Axes, points: Points) -> None:
    x = [place for place, _ in points]
    low, high = [e.low for _, e in points], [e.high for _, e in points]
    axes.vlines(x, low, high, color=_PAINT["blue"], linewidth=2, alpha=0.4)
    axes.plot(x, [e.value for _, e in points], color=_PAINT["blue"], marker="o", markersize=4.5, linestyle="none")


def histogram(values: Sequence[float], *, name: str) -> str:
    """Histogram of finite ``values`` with edges on multiples of the width, so that no bar straddles zero."""
    x = np.asarray(values, dtype=float)
    step = _bin_width(x)
    first, last = math.floor(min(x.min(), 0.0) / step), math.floor(max(x.max(), 0.0) / step) + 1
    counts, _ = np.histogram(x, bins=np.arange(first, last + 1) * step)
    left = np.arange(first, last)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, axes = _axes()
        colours = [_PAINT["orange"] if k < 0 else _PAINT["blue"] for k in left]
        axes.bar(left * step, counts, width=0.9 * step, align="edge", color=colours, alpha=0.85)
        axes.axvline(0, color=_PAINT["ink"], linewidth=1)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.set_xlabel("margin", loc="right", labelpad=2)
        return _svg(figure, name)


def _axes(width: int = _WIDTH, height: int = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width / 72, height / 72))
    # Fixed margins: the axes of neighbouring plots line up.
    axes = figure.add_axes((42 / width, 38 / height, (width - 50) / width, (height - 46) / height))
    axes.grid(axis="y", linewidth=0.75)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    return figure, axes


def _band(axes: Axes, points: Points, colour: str) -> None:
    """A line through the estimates and the band of their intervals; a lone estimate gets a bar instead."""
    finite = [(step, e) for step, e in points if math.isfinite(e.value)]
    if not finite:
        return
    steps, values = [step for step, _ in finite], [e.value for _, e in finite]
    known = [math.isfinite(e.low) and math.isfinite(e.high) for _, e in finite]
    low = [e.low if k else e.value for k, (_, e) in zip(known, finite, strict=True)]
    high = [e.high if k else e.value for k, (_, e) in zip(known, finite, strict=True)]
    if len(finite) == 1:
        axes.vlines(steps, low, high, color=colour, linewidth=2, alpha=0.4)
    else:
        axes.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(steps, values, color=colour, linewidth=1.8, marker="o" if len(steps) <= 30 else None, markersize=3.5)


def _faint(axes: Axes, steps: Sequence[float], values: Sequence[float]) -> None:
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    keep = np.isfinite(y)
    x, y = x[keep], y[keep]
    axes.plot(x, y, color=_PAINT["muted"], linewidth=0.7, alpha=0.45)
    half = max(1, len(y) // 24)
    smooth = [float(y[max(0, i - half) : i + half + 1].mean()) for i in range(len(y))]
    axes.plot(x, smooth, color=_PAINT["muted"], linewidth=1.6)


def _bin_width(x: np.ndarray) -> float:
    """Width by numpy's "auto" rule, held to some 15 to 40 bins and rounded to 1, 2 or 5 times a power of ten."""
    spread = float(max(x.max(), 0.0) - min(x.min(), 0.0))
    if spread == 0:
        return 1.0
    edges = np.histogram_bin_edges(x, bins="auto") if len(x) < 100_000 else np.linspace(x.min(), x.max(), 41)
    rough = min(max(float(edges[1] - edges[0]), spread / 40), spread / 15)
    power = 10.0 ** math.floor(math.log10(rough))
    return min((m * power for m in (1, 2, 5, 10)), key=lambda width: abs(math.log(width / rough)))


def _svg(figure: Figure, name: str, width: int = _WIDTH, height: int = _HEIGHT) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # The page's <style> and ids are its own: drop matplotlib's, keep the ids that its <use> and clip-path refer to.
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<defs>\s*</defs>\s*", "", text)
    text = re.sub(r"font: (?:\w+ )*?([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for variable, sentinel in _PAINT.items():
        text = text.replace(sentinel, f"var(--{variable})")
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}"'
    return re.sub(r"<svg [^>]*>", head + ">", text, count=1).strip()
