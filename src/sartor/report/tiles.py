"""The key figures at the top of the report: what each is, what its interval allows one to say, and how it looks."""

import math
from dataclasses import dataclass

from sartor.evaluate.statistics import Estimate
from sartor.report.run import Run
from sartor.report.words import Figure, as_float, figure, number, read_estimate, shift, verdict


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


def strip(marks: dict[str, Estimate], low: float, high: float, neutral: float | None) -> Strip | None:
    """Where the estimates lie between ``low`` and ``high``; None where one of them has no finite interval."""
    if any(not math.isfinite(x) for e in marks.values() for x in (e.low, e.value, e.high)) or not low < high:
        return None

    def at(x: float) -> float:
        return round(100 * (min(max(x, low), high) - low) / (high - low), 2)

    placed = [(colour, at(e.low), at(e.value), at(e.high)) for colour, e in marks.items()]
    return Strip(placed, None if neutral is None else at(neutral))


def tiles(run: Run) -> list[Tile]:
    """The key figures that the run has, four at most, the one closest to the purpose first."""
    found = [_win_rate(run), _score(run), _perplexity(run)]
    found += _of_reward(run) if run.part("evaluation") else [_accuracy(run), _divergence(run), _margin(run)]
    return [tile for tile in found if tile is not None][:4]


def _tone(word: str, good: str, bad: str) -> str:
    return "good" if word == good else "bad" if word == bad else ""


def _share_tile(label: str, estimate: Estimate, unit: str, above: str, gloss: str) -> Tile:
    word = verdict(estimate, 0.5, above=above, below=above.replace("better", "worse"))
    tone = _tone(word, above, above.replace("better", "worse"))
    placed = strip({"blue": estimate}, 0.0, 1.0, 0.5)
    return Tile(label, [figure(estimate, unit, percent=True)], word, tone, gloss, placed)


def _win_rate(run: Run) -> Tile | None:
    rate = run.estimate("win_rate")
    if rate is None:
        return None
    scorer = str(run.summary.get("scorer") or "") or "score"
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


def _perplexity(run: Run) -> Tile | None:
    ratios, points = run.held_out("perplexity_ratio"), run.held_out("perplexity")
    if not ratios or not points:
        return None
    ratio = ratios[-1][1]
    word = verdict(ratio, 1.0, above="harder to guess", below="easier to guess")
    gloss = (
        f"Perplexity per token of held-out demonstrations, as a share of the start's; it is "
        f"{number(points[-1][1].value)} now, from {number(points[0][1].value)}. 100 % would be no change."
    )
    placed = strip({"blue": ratio}, 0.0, max(1.15, 1.05 * ratio.high), 1.0)
    shown = [figure(ratio, "prompts", percent=True)]
    return Tile(
        "Perplexity against the start", shown, word, _tone(word, "easier to guess", "harder to guess"), gloss, placed
    )


def _score(run: Run) -> Tile | None:
    before, after = run.estimate("score_before"), run.estimate("score_after")
    if before is None or after is None:
        return None
    word = shift(before, after)
    ends = [x for e in (before, after) for x in (e.low, e.high)]
    room = 0.15 * (max(ends) - min(ends))
    placed = strip({"muted": before, "blue": after}, min(ends) - room, max(ends) + room, None)
    scorer = str(run.summary.get("scorer") or "")
    gloss = f"Mean score of the samples: {scorer}." if scorer else "Mean score of the samples."
    shown = [figure(before, "prompts"), figure(after, "prompts")]
    return Tile("Score before and after", shown, word, _tone(word, "higher", "lower"), gloss, placed)


def _divergence(run: Run) -> Tile | None:
    points, kl, unit = run.held_out("objective/kl"), run.estimate("kl"), "prompts"
    if kl is None and points:
        kl, unit = points[-1][1], "samples"
    if kl is None:
        return None
    word = verdict(kl, 0.0, above="moved from the start", below="below zero: estimation noise")
    low, high = min(kl.low, 0.0), 1.15 * max(kl.high, 0.0)
    gloss = "KL from the reference, nats per completion: the price paid. 0 would be no change; less is cheaper."
    return Tile("Distance from the start", [figure(kl, unit)], word, "", gloss, strip({"blue": kl}, low, high, 0.0))


def _margin(run: Run) -> Tile | None:
    points = run.held_out("rewards/margins")
    if not points:
        return None
    margin = points[-1][1]
    word = verdict(margin, 0.0, above="better than the start", below="worse than the start")
    tone = _tone(word, "better than the start", "worse than the start")
    reach = 1.15 * max(abs(margin.low), abs(margin.high))
    gloss = "Mean implicit reward of chosen minus rejected on held-out pairs; 0 is the start."
    placed = strip({"blue": margin}, -reach, reach, 0.0)
    return Tile("Held-out margin", [figure(margin, "prompts")], word, tone, gloss, placed)


def _of_reward(run: Run) -> list[Tile | None]:
    """Figures of a reward model, from its evaluation."""
    evaluation = run.part("evaluation")
    accuracy, picks = (read_estimate(evaluation.get(name)) for name in ("accuracy", "pick_rate"))
    chance = as_float(evaluation.get("pick_rate_chance"))
    found: list[Tile | None] = []
    if accuracy:
        # Of pairs that were only looked at, nobody knows here whether they were trained on.
        alone = str(run.summary.get("verb")).endswith("--evaluate")
        pairs, label = ("pairs", "Accuracy") if alone else ("held-out pairs", "Held-out accuracy")
        gloss = f"Share of {pairs} whose preferred answer has the higher reward; 50 % would be chance."
        found.append(_share_tile(label, accuracy, "prompts", "better than chance", gloss))
    if picks and math.isfinite(chance):
        word = verdict(picks, chance, above="better than chance", below="worse than chance")
        gloss = f"Share of rankings whose best-rewarded answer people put first; {100 * chance:.0f} % would be chance."
        placed = strip({"blue": picks}, 0.0, 1.0, chance)
        shown = [figure(picks, "prompts", percent=True)]
        tone = _tone(word, "better than chance", "worse than chance")
        found.append(Tile("Best of K", shown, word, tone, gloss, placed))
    return [*found, _length_bias(run)]


def _length_bias(run: Run) -> Tile | None:
    found = run.part("evaluation").get("longer_preferred")
    model, people = (
        (read_estimate(found.get(who)) for who in ("model", "people")) if isinstance(found, dict) else (None, None)
    )
    if model is None or people is None or not math.isfinite(model.value):
        return None
    word = shift(people, model, up="likes length more than people", down="likes length less than people")
    tone = "bad" if word.startswith("likes length more") else ""
    gloss = "Share of pairs in which the longer answer is preferred: by people → by the reward."
    placed = strip({"muted": people, "blue": model}, 0.0, 1.0, 0.5)
    shown = [figure(people, "prompts", percent=True), figure(model, "prompts", percent=True)]
    return Tile("Longer answer preferred", shown, word, tone, gloss, placed)
