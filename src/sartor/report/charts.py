"""Which curves the report shows, and what it says about each: how to read it and what a healthy one looks like."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sartor.evaluate.statistics import Estimate
from sartor.report.plots import Route, curve, frontier, histogram, reliability, shares
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
    truth = [_true_score, _learned_against_true] if run.held_out("objective/true_scores") else []
    rewarded = [_rewards, *truth, _frontier]
    drawn: dict[str, list[Callable[[Run], Chart]]] = {
        "sft": [_perplexity, _loss],
        "reward": [_accuracy, _loss, _calibration, _by_strength, _by_length, _histogram],
        "dpo --online": [*rewarded, _divergence, _loss, _variety],
        "ppo": [*rewarded, _divergence, _policy_steps, _values, _variety],
        "reward --evaluate": [_calibration, _by_strength, _by_length, _histogram],
    }
    usual = [_accuracy, _margins, _divergence, _loss, _logps, _histogram]
    return [chart(run) for chart in drawn.get(str(run.summary.get("verb")), usual)]


def _absent(title: str, what: str) -> Chart:
    return Chart(title, "", f"Not shown: this run has no {what}.", [])


def _finite(points: Series) -> Series:
    return [(step, e) for step, e in points if math.isfinite(e.value) and math.isfinite(step)]


def _accuracy(run: Run) -> Chart:
    title, points = "Held-out accuracy", _finite(run.held_out("rewards/accuracies"))
    if not points:
        return _absent(title, "held-out accuracy (evaluation rows in metrics.jsonl)")
    what = (
        "whose preferred answer has the higher reward. Dashed: chance."
        if run.part("evaluation")
        else "in which the chosen text gained more than the rejected one. Dashed: 50 %, the start."
    )
    caption = (
        f"Share of held-out pairs {what} Healthy: the band climbs clear of the line, then levels off; a later fall is "
        "overfitting."
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
        f"Held-out turning up while training falls means fewer epochs{' or a larger beta' * _has_beta(run)}."
    )
    steps, losses = [step for step, _ in rows], [loss for _, loss in rows]
    svg = curve({"blue": points}, name="Loss over steps", faint=(steps, losses) if rows else None)
    lines: list[tuple[str, str, Figure | None]] = [("muted", "training", None)] if rows else []
    lines += [("blue", "held-out", figure(points[-1][1], "prompts"))] if points else []
    return Chart(title, svg, caption, lines)


def _has_beta(run: Run) -> bool:
    return str(run.summary.get("verb")).startswith("dpo")


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


def _perplexity(run: Run) -> Chart:
    title, points = "Held-out perplexity", _finite(run.held_out("perplexity_ratio"))
    if not points:
        return _absent(title, "perplexity (evaluation rows in metrics.jsonl)")
    caption = (
        "Perplexity per token as a share of what it was at the start. Healthy: it falls and levels off. A later "
        "rise is overfitting: fewer epochs, or more data."
    )
    svg = curve({"blue": points}, name="Held-out perplexity over steps", neutral=1.0, percent=True)
    return Chart(title, svg, caption, [("", "", figure(points[-1][1], "prompts", percent=True))])


def _rewards(run: Run) -> Chart:
    title, points = "Reward", _finite(run.held_out("objective/scores"))
    if not points:
        return _absent(title, "scores (evaluation rows in metrics.jsonl)")
    caption = "Mean of what is maximised, over answers to held-out prompts. Healthy: it rises and levels off."
    svg = curve({"blue": points}, name="Reward over steps")
    return Chart(title, svg, caption, [("blue", "reward", figure(points[-1][1], "prompts"))])


def _true_score(run: Run) -> Chart:
    points = _finite(run.held_out("objective/true_scores"))
    caption = (
        "Mean of what is only watched, on the same answers. Healthy: it rises while the reward rises. Where it stops "
        "and the reward goes on, the reward is being gamed: take an earlier step, or a larger kl_coef."
    )
    svg = curve({"orange": points}, name="True score over steps")
    return Chart("True score", svg, caption, [("orange", "true score", figure(points[-1][1], "prompts"))])


def _learned_against_true(run: Run) -> Chart:
    points = _pairs(run, "objective/scores", "objective/true_scores")
    caption = (
        "Each dot is an evaluation. Healthy: the path climbs to the upper right. Going right without going up is "
        "reward hacking: the policy has found what the reward likes and the truth does not."
    )
    svg = frontier([Route("orange", points)], name="True score against reward", across="reward")
    return Chart("True score against reward", svg, caption, [])


def _frontier(run: Run) -> Chart:
    title, truth = "Reward against KL", bool(run.held_out("objective/true_scores"))
    points = _pairs(run, "objective/kl", "objective/true_scores" if truth else "objective/scores")
    if not points:
        return _absent(title, "scores and KL (evaluation rows in metrics.jsonl)")
    caption = (
        "What the reward cost: each dot is an evaluation, further right is further from the start. Healthy: steep "
        "at first. A path that goes right without going up buys nothing."
    )
    colour, what = ("orange", "true score") if truth else ("blue", "reward")
    return Chart(title, frontier([Route(colour, points)], name=title), caption, [(colour, what, None)])


def _pairs(run: Run, across: str, up: str) -> list[tuple[Estimate, Estimate]]:
    rows = [(read_estimate(row.get(across)), read_estimate(row.get(up))) for row in run.evals]
    return [(x, y) for x, y in rows if x is not None and y is not None]


def _policy_steps(run: Run) -> Chart:
    title, rows = "How far a rollout moves the policy", _trained(run, "policy/approxkl")
    if not rows[0]:
        return _absent(title, "policy/approxkl (training rows in metrics.jsonl)")
    shares = _trained(run, "policy/clipfrac")[1]
    usual = f" Clipped on average: {100 * sum(shares) / len(shares):.1f} % of tokens." if shares else ""
    caption = (
        "KL from the policy that drew a rollout to the one it became, nats per token. Healthy: below some 0.02. Spikes "
        f"ask for a smaller learning rate or fewer ppo_epochs.{usual}"
    )
    return Chart(
        title, curve({}, name="KL of each rollout's updates", faint=rows), caption, [("muted", "training", None)]
    )


def _values(run: Run) -> Chart:
    title, rows = "Error of the value model", _trained(run, "value/error")
    if not rows[0]:
        return _absent(title, "value/error: RLOO and GRPO learn no values")
    caption = (
        "Mean distance of value and return. Healthy: it falls. A critic that errs by more than rewards scatter helps "
        "nobody."
    )
    return Chart(title, curve({}, name="Error of the value model", faint=rows), caption, [("muted", "training", None)])


def _variety(run: Run) -> Chart:
    title, points = "Variety", _finite(run.held_out("completions/distinct_2"))
    if not points:
        return _absent(title, "distinct-2 (evaluation rows in metrics.jsonl)")
    caption = (
        "distinct-2, different word pairs as a share of all, among the answers to a prompt. Reinforcement narrows a "
        "model; a steep fall is a stock phrase that the reward likes."
    )
    return Chart(
        title, curve({"blue": points}, name="Variety over steps"), caption, [("", "", figure(points[-1][1], "prompts"))]
    )


def _trained(run: Run, name: str) -> tuple[list[float], list[float]]:
    rows = [(as_float(row.get("step")), as_float(row.get(name))) for row in run.train]
    rows = [(step, value) for step, value in rows if math.isfinite(value)]
    return [step for step, _ in rows], [value for _, value in rows]


def _calibration(run: Run) -> Chart:
    title = "Calibration"
    rows = [(as_float(row.get("predicted")), read_estimate(row.get("right"))) for row in _evaluated(run, "calibration")]
    points = [(x, e) for x, e in rows if e is not None and math.isfinite(x)]
    if not points:
        return _absent(title, "calibration (evaluation.json)")
    caption = (
        "Pairs by how sure the model is, σ(margin), and how often it is right. Healthy: the dots lie on the dashed "
        "line. Below it the model is too sure of itself, which PPO will exploit."
    )
    error = as_float(run.part("evaluation").get("calibration_error"))
    caption += f" Expected calibration error: {100 * error:.1f} points." if math.isfinite(error) else ""
    return Chart(title, reliability(points, name="Calibration of the reward"), caption, [])


def _by_strength(run: Run) -> Chart:
    title, rows = "Accuracy by how clear the preference was", _evaluated(run, "by_strength")
    found = [(str(row.get("value")), e) for row in rows if (e := read_estimate(row.get("right")))]
    if not found:
        return _absent(title, "preferences of unlike strength, nor rankings of more than two")
    caption = "Healthy: accuracy rises with it. Where people were nearly indifferent, so may the model be."
    svg = shares(found, name="Accuracy by strength of the preference", label=str(rows[0].get("of")))
    return Chart(title, svg, caption, [])


def _by_length(run: Run) -> Chart:
    title, found = "Accuracy by length", run.part("evaluation").get("by_length")
    found = found if isinstance(found, Mapping) else {}
    names = {"longer": "better one longer", "shorter": "better one shorter"}
    rows = [(text, e) for key, text in names.items() if (e := read_estimate(found.get(key))) and math.isfinite(e.value)]
    if not rows:
        return _absent(title, "pairs of unlike length (evaluation.json)")
    caption = (
        "Healthy: both dots lie alike. A model that is right only where the better answer is the longer one has "
        "learned length, and a policy trained on it will talk at length."
    )
    return Chart(title, shares(rows, name="Accuracy by which answer is longer", label=""), caption, [])


def _evaluated(run: Run, name: str) -> list[Mapping[str, Any]]:
    rows = run.part("evaluation").get(name)
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _histogram(run: Run) -> Chart:
    title, margins = "Margins, pair by pair", [m for m in run.margins if math.isfinite(m)]
    if not margins:
        return _absent(title, "margins by pair (margins.json)")
    caption = (
        "Held-out pairs by their margin after training. Right of zero the chosen text is ahead. Healthy: the "
        "bulk lies right, without a long left tail of pairs it has come to get badly wrong."
    )
    svg = histogram(margins, name="Histogram of held-out margins")
    points = run.held_out("rewards/accuracies")  # the same share, with the interval that knows the prompts
    share = figure(points[-1][1], "prompts", percent=True) if points else None
    return Chart(title, svg, caption, [("blue", "right of zero", share)])
