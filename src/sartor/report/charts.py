"""Which curves the report shows, and what it says about each: how to read it and what a healthy one looks like."""

import math
from dataclasses import dataclass

from sartor.evaluate.statistics import Estimate
from sartor.report.plots import curve, histogram
from sartor.report.run import Run, Series
from sartor.report.words import Figure, as_float, figure, read_estimate, verdict


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot with its caption. ``svg`` is empty where the run lacks what it needs, and ``caption`` then says what."""

    title: str
    svg: str
    caption: str
    lines: list[tuple[str, str, Figure | None]]  # (colour, what it is, its last point)


def charts(run: Run) -> list[Chart]:
    """The small multiples, in reading order."""
    return [_accuracy(run), _margins(run), _divergence(run), _loss(run), _logps(run), _histogram(run)]


def _absent(title: str, what: str) -> Chart:
    return Chart(title, "", f"Not shown: this run has no {what}.", [])


def _finite(points: Series) -> Series:
    return [(step, e) for step, e in points if math.isfinite(e.value) and math.isfinite(step)]


def _accuracy(run: Run) -> Chart:
    title, points = "Held-out accuracy", _finite(run.held_out("rewards/accuracies"))
    if not points:
        return _absent(title, "held-out accuracy (evaluation rows in metrics.jsonl)")
    caption = (
        "Share of held-out pairs in which the chosen text gained more than the rejected one. Dashed: 50 %, the start. "
        "Healthy: the band climbs clear of the line, then levels off; a later fall is overfitting."
    )
    svg = curve({"blue": points}, name="Held-out accuracy over steps", neutral=0.5, percent=True)
    return Chart(title, svg, caption, [("", "", figure(points[-1][1], "prompts", percent=True))])


def _margins(run: Run) -> Chart:
    title, points = "Held-out margin", _finite(run.held_out("rewards/margins"))
    if not points:
        return _absent(title, "held-out margins (evaluation rows in metrics.jsonl)")
    caption = (
        "Mean implicit reward of chosen minus rejected. Healthy: it rises with the accuracy. A margin that keeps "
        "rising while accuracy stands still only makes the model surer of the same answers."
    )
    svg = curve({"blue": points}, name="Held-out margin over steps", neutral=0.0)
    return Chart(title, svg, caption, [("", "", figure(points[-1][1], "prompts"))])


def _divergence(run: Run) -> Chart:
    title, points = "KL from the reference", _finite(run.held_out("objective/kl"))
    if not points:
        return _absent(title, "KL estimates (objective/kl in metrics.jsonl; they need samples from the model)")
    caption = (
        "How far the model has moved, in nats per completion, from its own samples; noise can dip below 0. Healthy: a "
        "slow rise that flattens. A steep rise without gain in accuracy or win rate is drift."
    )
    svg = curve({"blue": points}, name="KL from the reference over steps", neutral=0.0)
    return Chart(title, svg, caption, [("", "", figure(points[-1][1], "samples"))])


def _loss(run: Run) -> Chart:
    title, points = "Loss", _finite(run.held_out("loss"))
    rows = [(as_float(row.get("step")), as_float(row.get("loss"))) for row in run.train]
    rows = [(step, loss) for step, loss in rows if math.isfinite(loss)]
    if not points and not rows:
        return _absent(title, "loss (metrics.jsonl)")
    caption = (
        "Thin: each training step; thick grey: running mean. Healthy: both fall and stay together. "
        "Held-out turning up while training falls means fewer epochs or a larger beta."
    )
    steps, losses = [step for step, _ in rows], [loss for _, loss in rows]
    svg = curve({"blue": points}, name="Loss over steps", faint=(steps, losses) if rows else None)
    lines: list[tuple[str, str, Figure | None]] = [("muted", "training", None)] if rows else []
    lines += [("blue", "held-out", figure(points[-1][1], "prompts"))] if points else []
    return Chart(title, svg, caption, lines)


def _logps(run: Run) -> Chart:
    title = "Change of log-probability"
    chosen, rejected = _finite(change(run, "chosen")), _finite(change(run, "rejected"))
    if not chosen or not rejected:
        return _absent(title, "held-out log-probs (logps/chosen and logps/rejected in metrics.jsonl)")
    caption = (
        "Nats per completion since the start. Healthy: rejected falls away from chosen. Chosen falling too is "
        "likelihood displacement: common with DPO, and a concern when it falls nearly as far as rejected. "
    )
    word = verdict(chosen[-1][1], 0.0, above="Here chosen rose.", below="Here chosen fell.")
    caption += word if word.startswith("Here") else "Here no change of chosen is shown."
    svg = curve({"blue": chosen, "orange": rejected}, name="Change of log-probability over steps", neutral=0.0)
    last = [figure(points[-1][1], "prompts") for points in (chosen, rejected)]
    return Chart(title, svg, caption, [("blue", "chosen", last[0]), ("orange", "rejected", last[1])])


def change(run: Run, side: str) -> Series:
    """Change of the held-out log-probs of ``side`` ("chosen" or "rejected") since the first evaluation.

    The interval of a level is that of how different texts are, far wider than that of their change. The implicit reward
    is beta times the change per pair, so its interval over beta is the right one. Where the two do not agree (the
    reference is not the start, or the loss has another reward) the change stands without an interval.
    """
    beta = as_float(run.summary.get("beta", run.config.get("beta")))
    rows: Series = []
    start: Estimate | None = None
    for row in run.evals:
        level, reward = read_estimate(row.get(f"logps/{side}")), read_estimate(row.get(f"rewards/{side}"))
        if level is None:
            continue
        start = start or level
        moved, paired = level.value - start.value, Estimate(math.nan, -math.inf, math.inf, level.n)
        if reward is not None and beta > 0:
            paired = Estimate(reward.value / beta, reward.low / beta, reward.high / beta, reward.n)
        agree = abs(paired.value - moved) <= 0.02 * max(1.0, abs(moved))
        rows.append((as_float(row.get("step")), paired if agree else Estimate(moved, -math.inf, math.inf, level.n)))
    return rows


def _histogram(run: Run) -> Chart:
    title, margins = "Margins, pair by pair", [m for m in run.margins if math.isfinite(m)]
    if not margins:
        return _absent(title, "margins by pair (margins.json)")
    caption = (
        "Held-out pairs by their margin after training. Right of zero the chosen text gained more. Healthy: the "
        "bulk lies right, without a long left tail of pairs it has come to get badly wrong."
    )
    svg = histogram(margins, name="Histogram of held-out margins")
    points = run.held_out("rewards/accuracies")  # the same share, with the interval that knows the prompts
    share = figure(points[-1][1], "prompts", percent=True) if points else None
    return Chart(title, svg, caption, [("blue", "right of zero", share)])
