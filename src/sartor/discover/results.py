"""What a search found, for its page and for people: the answer first, then how sure it is and what it rests on."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sartor.config import DiscoverConfig
from sartor.console import duration
from sartor.discover.budget import BASELINES, kept_budget
from sartor.discover.language.printing import to_latex, to_python
from sartor.discover.language.program import as_term
from sartor.discover.parts import scorer_of
from sartor.discover.rungs.outcome import Outcome
from sartor.discover.screens import in_words
from sartor.discover.source import loss_name
from sartor.discover.state import CANARY, RUNGS, State
from sartor.discover.verdict import Comparison, comparisons, mean_over_seeds, retrial_results
from sartor.evaluate.statistics import Estimate, mean
from sartor.objectives.shape import shape
from sartor.report import words
from sartor.report.words import number

LEADERS = 20
MEASURES = ("accuracy", "margin", "chosen", "rejected", "reward", "kl")  # the last two where answers have a score
# What a score is, where answers have a true score and where they have none.
BITS = {
    "name": "Bits per pair",
    "unit": "bits per pair",
    "about": "Score: 1 + mean log₂ σ(t·margin) of held-out pairs at the best t, in bits: 0 is a coin, 1 certainty.",
}
VALUE = {
    "name": "Value of answers",
    "unit": "points of {scorer} less the price of KL",
    "about": "Score: the mean {scorer} score of answers drawn to held-out prompts, less a tenth of its spread for each "
    "nat of KL: what RLHF maximises.",
}
# How refusals begin, and what they have in common.
REFUSALS = {
    "its sign is wrong": "its sign is wrong",
    "its gradient is zero": "its gradient is zero everywhere",
    "it does not read": "it does not read what the policy says",
    "its value is": "not finite",
    "its weight is": "not finite",
    "weak on the tabular rung": "weak on the tabular rung",
    "no objective found": "a model's answer without an objective",
    "the answer ended": "a model's answer that was cut off",
}
PAIRS_OF_RUNGS = (("tabular", "linear"), ("linear", "adapter"))


def score_of(config: DiscoverConfig) -> dict[str, str]:
    """What candidates are judged by, in words: name, unit, and what it is."""
    scorer = scorer_of(config)
    return BITS if scorer is None else {name: text.format(scorer=scorer) for name, text in VALUE.items()}


def linear_unit(config: DiscoverConfig) -> str:
    """What a score on the linear rung is in: bits where the held-out texts are not answers that the reference drew."""
    return BITS["unit"] if config.task == "preferences" else score_of(config)["unit"]


def results(config: DiscoverConfig, state: State) -> dict[str, Any]:
    """Everything that ``discovery.json`` holds."""
    score = score_of(config)
    finalists = state.archive.read_meta("finalists") or []
    found = comparisons(state, finalists)
    faults = state.faults()
    budget, spent = kept_budget(state.archive), state.archive.spent()
    return {
        "task": config.task,
        "model": f"{config.proxy}, the retrial on {config.model}" if config.proxy else config.model,
        "seed": config.seed,
        "lora_r": config.lora_r,
        "budget": config.budget,
        "plan": None if budget is None else str(budget),
        "spent": spent,
        "headline": headline(state, finalists, found, faults, score["unit"]),
        "said": {state.candidates[n].title: headline(state, [n], found, faults, score["unit"])[0] for n in finalists},
        "faults": faults,
        "unit": score["unit"],
        "score": score,
        "linear_unit": linear_unit(config),
        "comparisons": [
            {"winner": c.winner, "other": c.other, "difference": c.difference, "verdict": c.verdict} for c in found
        ],
        "retrial": retrial_rows(state),
        "correlations": correlations(state),
        "counts": counts(state),
        "refusals": Counter(_kind(one.refusal) for one in state.candidates.values() if one.refusal).most_common(),
        "proposers": proposers(state),
        "winner": describe(state, finalists[0]) if finalists else None,
        "leaders": [row(state, n) for n in state.leaders()[:LEADERS]],
        "known": [row(state, n) for n in state.started()],
        "trained": [row(state, n) for n in state.on("adapter")],
        "lineage": lineage(state, [*finalists, *state.leaders()[:LEADERS]]),
    }


def headline(
    state: State, finalists: Sequence[int], found: Sequence[Comparison], faults: Sequence[str], unit: str
) -> list[str]:
    """The answer in two sentences or three."""
    if faults:
        return [f"This search must not be believed: {fault}." for fault in faults]
    if not finalists:
        return ["No new candidate was really trained, so there is nothing to say of any."]
    best = state.candidates[finalists[0]]
    if not found:
        outcome, rival = (state.results["adapter", n] for n in (best.number, _best_known(state)))
        return [
            f"{best.title} leads with {outcome.score} {unit}, the best known loss has {rival.score}; there was no "
            "retrial, so this is a lead and no finding."
        ]
    shown = [c for c in found if c.winner == best.title]
    against = {c.other: c for c in shown}
    seeds = len(retrial_results(state.archive)[best.number])
    said = [_said(against[name]) for name in BASELINES if name in against]
    first = f"On prompts and seeds that the search never touched, {best.title} is {'; '.join(said)}, in {unit}."
    return [
        first,
        f"{best.title} is {to_python(best.tree) if best.tree else ''}; most like {best.likeness or 'nothing known'}.",
        f"Seeds: {seeds}. Intervals hold all {len(found)} comparisons together at 95 %.",
    ]


def _said(comparison: Comparison) -> str:
    gap, other = comparison.difference, comparison.other
    interval = f"{number(abs(gap.value))} [{number(gap.low)}, {number(gap.high)}]"
    match comparison.verdict:
        case "better":
            return f"better than {other} by {interval}"
        case "worse":
            return f"worse than {other} by {number(abs(gap.value))} [{number(-gap.high)}, {number(-gap.low)}]"
        case words.NO_INTERVAL:
            return f"{number(gap.value)} from {other}, of which no interval can be told"
    return f"not shown to differ from {other} ({number(gap.value)} [{number(gap.low)}, {number(gap.high)}])"


def _best_known(state: State) -> int:
    canaries = state.canaries()
    known = [n for n in state.started() if n not in canaries and ("adapter", n) in state.results]
    return max(known, key=lambda n: state.results["adapter", n].fitness)


def correlations(state: State) -> list[dict[str, Any]]:
    """Spearman's ρ between neighbouring rungs, of the fitness and of what else both measure."""
    rows = [{"from": a, "to": b, "measure": "fitness", "rho": state.correlation(a, b)} for a, b in PAIRS_OF_RUNGS]
    both = [state.results[rung, n] for rung in ("linear", "adapter") for n in state.on("adapter")]
    for measure in [name for name in MEASURES if any(name in outcome.measures for outcome in both)]:
        rho = state.correlation("linear", "adapter", _reads(measure))
        rows.append({"from": "linear", "to": "adapter", "measure": measure, "rho": rho})
    return rows


def _reads(measure: str) -> Any:
    return lambda outcome: outcome.measures.get(measure, math.nan)


def counts(state: State) -> dict[str, int]:
    """How many were proposed, refused, recognised, and tried on each rung."""
    new = [one for one in state.candidates.values() if one.generation > 0]
    return {
        "proposed": len(new),
        "refused": sum(bool(one.refusal) for one in new),
        "recognised": sum(one.twin is not None for one in new),
        **{rung: sum(state.candidates[n].generation > 0 for n in state.on(rung)) for rung in RUNGS},
    }


def _kind(refusal: str) -> str:
    """A refusal without its particulars."""
    return next((kind for start, kind in REFUSALS.items() if refusal.startswith(start)), "not of the language")


def proposers(state: State) -> list[dict[str, Any]]:
    """For each origin how many it proposed, how many of them were tried, and the best."""
    expected = state.expected()
    rows = []
    for origin in dict.fromkeys(one.origin for one in state.candidates.values() if one.generation > 0):
        own = [n for n, one in state.candidates.items() if one.origin == origin]
        judged = [n for n in own if n in expected]
        best = max(judged, key=expected.__getitem__, default=None)
        rows.append(
            {
                "name": origin,
                "proposed": len(own),
                "refused": sum(bool(state.candidates[n].refusal) for n in own),
                "recognised": sum(state.candidates[n].twin is not None for n in own),
                "linear": sum(("linear", n) in state.results for n in own),
                "adapter": sum(("adapter", n) in state.results for n in own),
                "best": None if best is None else row(state, best),
            }
        )
    return rows


def row(state: State, n: int) -> dict[str, Any]:
    """A candidate in a table."""
    one = state.candidates[n]
    found: dict[str, Outcome | None] = {rung: state.results.get((rung, n)) for rung in RUNGS}
    top = found["adapter"]
    judged = top or found["linear"]
    return {
        "number": n,
        "name": one.title,
        "origin": one.origin,
        "parents": list(one.parents),
        "generation": one.generation,
        "formula": to_python(one.tree) if one.tree else one.text,
        "likeness": one.likeness,
        "cosine": one.cosine,
        "behaviour": one.behaviour,
        "canary": one.origin == CANARY,
        **{rung: None if o is None else o.score for rung, o in found.items()},
        "setting": None if judged is None else str(judged.setting),
        "measures": {} if top is None else top.measures,
        "seconds": None if top is None else top.seconds,
    }


def describe(state: State, n: int) -> dict[str, Any]:
    """A candidate in full: for the page's winner, and for ``sartor discover show``."""
    one = state.candidates[n]
    found = row(state, n)
    found |= {"thought": one.thought, "refusal": one.refusal, "twin": one.twin, "text": one.text}
    if one.tree is None:
        return found
    retried = retrial_results(state.archive).get(n)  # with a proxy this alone trained --model, at a rate of its own
    searched = state.results.get(("adapter", n)) or state.results.get(("linear", n))
    outcome = retried[0].outcome if retried else searched
    beta = outcome.setting.beta if outcome else state.beta
    drawn = shape(as_term(one.tree, beta=beta))
    found |= {
        "latex": to_latex(one.tree),
        "loss": loss_name(one),
        "beta": beta,
        "learning_rate": outcome.setting.learning_rate if outcome else None,
        "words": in_words(one.tree, beta),
        "curve": {
            "margin": drawn.margin.tolist(),
            "loss": drawn.loss.tolist(),
            "chosen": drawn.chosen.tolist(),
            "rejected": drawn.rejected.tolist(),
        },
    }
    return found


def retrial_rows(state: State) -> list[dict[str, Any]]:
    """Every arm of the retrial: its score, and what else was measured, over seeds."""
    rows = []
    for n, found in retrial_results(state.archive).items():
        names = [name for name in found[0].outcome.measures if all(name in r.outcome.measures for r in found)]
        rows.append(
            {
                "number": n,
                "name": state.candidates[n].title,
                "setting": str(found[0].outcome.setting),
                "seeds": len(found),
                "score": mean_over_seeds(found),
                "measures": {name: mean([r.outcome.measures[name] for r in found]) for name in names},
                "seconds": sum(r.outcome.seconds for r in found) / len(found),
            }
        )
    return rows


def lineage(state: State, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Some candidates and all that they descend from, oldest first."""
    wanted: set[int] = set()
    waiting = list(numbers)
    while waiting:
        n = waiting.pop()
        if n not in wanted:
            wanted.add(n)
            waiting += state.candidates[n].parents
    expected = state.expected()
    return [
        {
            "number": n,
            "name": state.candidates[n].title,
            "origin": state.candidates[n].origin,
            "generation": state.candidates[n].generation,
            "parents": list(state.candidates[n].parents),
            "fitness": state.results["adapter", n].fitness if ("adapter", n) in state.results else expected.get(n),
            "trained": ("adapter", n) in state.results,
        }
        for n in sorted(wanted)
    ]


def spent_in_words(spent: dict[str, float]) -> str:
    """Where the time went, the most first."""
    return ", ".join(f"{what} {duration(s)}" for what, s in sorted(spent.items(), key=lambda item: -item[1]))


def best_so_far(state: State) -> str:
    """The leader and the best known loss, for the progress line."""
    leaders = [n for n in state.leaders() if ("adapter", n) in state.results] or state.leaders()
    if not leaders:
        return ""
    n = leaders[0]
    rung = "adapter" if ("adapter", n) in state.results else "linear"
    score: Estimate = state.results[rung, n].score
    return f"best {state.candidates[n].title} {score}"
