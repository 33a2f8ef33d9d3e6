"""The page of ``sartor discover``: what was found and how sure that is, then why to believe it."""

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from sartor.console import duration
from sartor.evaluate.statistics import Estimate
from sartor.objectives.shape import shape
from sartor.objectives.specs import parse_objective
from sartor.report.page import write_page
from sartor.report.plots import Route, formula, frontier, lines
from sartor.report.tiles import Tile, strip
from sartor.report.words import NO_DIFFERENCE, Figure, as_float, figure, number, read_estimate, verdict

Row = Mapping[str, Any]

RUNGS = {"tabular": "Tabular", "linear": "Linear", "adapter": "Real training"}
STAGES = {"linear": "linear rung", "tabular": "tabular rung", "adapter": "real training (adapters)"}
DOUBTED = "not to be believed"
# What a point is, in the order in which they are drawn.
COLOURS = {"found": "muted", "canary": "orange", "known": "ink", "finalist": "blue"}
MEASURES = {
    "kl": ("KL, nats", "how far its answers are from the start’s, per answer: the price of the score"),
    "bits": ("Bits per pair", "what its implicit reward says of held-out preferences: 0 is a coin, 1 certainty"),
    "accuracy": ("Accuracy", "share of held-out pairs whose chosen text has the higher implicit reward"),
    "length": ("Length", "tokens of an answer"),
    "distinct_2": ("distinct-2", "different word pairs as a share of all, among the answers to a prompt"),
    "chosen": ("Chosen", "nats that training added to the log-probability of held-out chosen texts"),
    "rejected": ("Rejected", "the same for rejected texts"),
}
WITHOUT_ANSWERS = ("accuracy", "chosen", "rejected")  # what the table shows where no answers were sampled
KL = "the KL of its own answers to held-out prompts, in nats"
MOVED = "|chosen| + |rejected|: how many nats training moved held-out chosen and rejected texts by"
BROKEN = 3.0  # quartile distances below the lower quartile, beyond which a score would flatten all others if drawn
SEEN, NEAR = 20.0, 10.0  # nats: margins that curves are drawn over, and those that they are scaled by
ORIGINS = ("named", "random", "mutate", "cross", "tune", "prune", "model")
STEP, ROW = 118, 26  # of the lineage, in pixels


def write_discovery(folder: Path) -> Path:
    """Write ``report.html`` from ``discovery.json`` and return its path."""
    found = json.loads((folder / "discovery.json").read_text(encoding="utf-8"))
    return write_page(folder, "discovery.html", _context(found, folder))


def _context(found: Row, folder: Path) -> dict[str, Any]:
    winner = found["winner"]
    names = {row["number"]: row["name"] for part in ("lineage", "known", "trained") for row in found[part]}
    finalists = {row["winner"] for row in found["comparisons"]} | ({winner["name"]} if winner else set())
    rows = sorted(found["trained"], key=lambda row: list(COLOURS).index(_kind(row, finalists)))
    return {
        "title": f"A search for a preference objective: {found['task']}, {found['model']}, budget {found['budget']}",
        "headline": found["headline"][0],
        "second": found["headline"][1:],
        "faults": found["faults"],
        "model": found["model"],
        "lora_r": found["lora_r"],
        "tiles": [*_verdicts(found), _tried(found)],
        "unit": found["unit"],
        "score": found["score"],
        "foretold": found["task"] != "preferences",
        "distance_is": KL if _has_kl(rows) else MOVED,
        "retrial": _retrial(found),
        "winner": _winner(winner, folder, names) if winner else None,
        "rungs": [_correlation(row) for row in found["correlations"]],
        "linear_unit": found["linear_unit"],
        "points": Markup(_rungs(found, rows, finalists)),
        "distance": Markup(_pareto(found, rows, finalists, _distance, "distance, nats", wide=True)),
        "seconds": Markup(_pareto(found, rows, finalists, _seconds, "seconds of training", wide=False)),
        "front": [
            {
                "name": row["name"],
                "score": _figure(row["adapter"]),
                "distance": number(_distance(row)),
                "seconds": duration(_seconds(row)),
            }
            for row in _front(rows, _distance, _nothing(found))
        ],
        "floor": number(floor := _floor(rows, "adapter")),
        "below": sum(_estimate(row["adapter"]).value < floor for row in rows),
        "lineage": _lineage(found["lineage"], winner["number"] if winner else None),
        "leaders": [_candidate(row, names) for row in found["leaders"]],
        "known": [_candidate(row, names) for row in found["known"]],
        "proposers": [_proposer(row) for row in found["proposers"]],
        "refusals": found["refusals"],
        "counts": {name: number(count) for name, count in found["counts"].items()},
        "stages": _stages(found["spent"]),
        "total": duration(sum(found["spent"].values())),
        "plan": found["plan"],
        "seed": found["seed"],
        "command": found["command"],
        "folder": shlex.quote(str(folder)),
        "machine": [(key, str(value)) for key, value in found["machine"].items() if value is not None],
    }


def _estimate(raw: object) -> Estimate:
    return read_estimate(raw) or Estimate(math.nan, math.nan, math.nan, 0)


def _figure(raw: object) -> Figure:
    return figure(_estimate(raw))


def _kind(row: Row, finalists: set[str]) -> str:
    """What a point or a row is: canary, known, finalist, or found."""
    if row["origin"] in ("named", "canary"):
        return {"named": "known"}.get(row["origin"], "canary")
    return "finalist" if row["name"] in finalists else "found"


def _verdicts(found: Row) -> list[Tile]:
    """The winner against each known loss of the retrial; where there was none, the lead that it has."""
    winner = found["winner"]
    own = [row for row in found["comparisons"] if winner and row["winner"] == winner["name"]]
    if not own:
        return [_lead(found)] if winner else []
    gaps = [_estimate(row["difference"]) for row in own]
    reach = 1.15 * max((abs(x) for gap in gaps for x in (gap.low, gap.high) if math.isfinite(x)), default=1.0)
    tiles = []
    for row, gap in zip(own, gaps, strict=True):
        word = DOUBTED if found["faults"] else verdict(gap, 0.0)
        tone = {"better": "good", "worse": "bad", DOUBTED: "bad"}.get(word, "")
        gloss = f"On the retrial, in {found['unit']}; 0 would be no difference."
        placed = strip({"blue": gap}, -reach, reach, 0.0)
        tiles.append(Tile(f"{row['winner']} less {row['other']}", [figure(gap, "prompts")], word, tone, gloss, placed))
    return tiles


def _lead(found: Row) -> Tile:
    """What the search itself says of its winner, which is no finding."""
    own = _estimate(found["winner"]["adapter"])
    known = [row for row in found["known"] if not row["canary"] and math.isfinite(_estimate(row["adapter"]).value)]
    rival = max(known, key=lambda row: _estimate(row["adapter"]).value, default=None)
    other = _estimate(rival["adapter"]) if rival else own
    ends = [x for one in (own, other) for x in (one.low, one.high) if math.isfinite(x)]
    placed = strip({"muted": other, "blue": own}, min([0.0, *ends]), max([0.0, *ends]), 0.0)
    gloss = f"{found['score']['name']} where it was searched for: too high, as the best of many is lucky too."
    if rival:
        gloss += f" The best known loss, {rival['name']}, has {figure(other)} (grey)."
    word = DOUBTED if found["faults"] else "a lead and no finding"
    label = f"{found['winner']['name']} in the search"
    return Tile(label, [figure(own, "prompts")], word, "bad" if found["faults"] else "", gloss, placed)


def _tried(found: Row) -> Tile:
    counts = found["counts"]
    shown = [
        Figure(number(counts["linear"]), "on the linear rung", ""),
        Figure(number(counts["adapter"]), "really trained", f"of {number(counts['proposed'])} proposed"),
    ]
    gloss = "Device time of all of it. Known losses and canaries are none of these candidates, and are in the time."
    return Tile("Candidates tried", shown, duration(sum(found["spent"].values())), "", gloss, None)


def _retrial(found: Row) -> dict[str, Any] | None:
    """The arms and, where there are several finalists, every comparison."""
    arms = found["retrial"]
    if not arms:
        return None
    measured = {name for row in arms for name in row["measures"]}
    shown = [name for name in MEASURES if name in measured and ("kl" not in measured or name not in WITHOUT_ANSWERS)]
    best = sorted(arms, key=lambda row: -_estimate(row["score"]).value)
    winners = {row["winner"] for row in found["comparisons"]}
    routes = [
        Route(
            "blue" if row["name"] in winners else "ink",
            [(_estimate(row["measures"].get("kl")), _estimate(row["score"]))],
            row["name"],
        )
        for row in best
    ]
    return {
        "seeds": max(row["seeds"] for row in arms),
        "measures": [MEASURES[name] for name in shown],
        "arms": [
            {
                "name": row["name"],
                "colour": "blue" if row["name"] in winners else "",
                "setting": row["setting"],
                "score": _figure(row["score"]),
                "measures": [_figure(row["measures"].get(name)) for name in shown],
            }
            for row in best
        ],
        "pairs": [
            (row["winner"], row["other"], _figure(row["difference"]), DOUBTED if found["faults"] else row["verdict"])
            for row in found["comparisons"]
        ],
        "winners": len(winners),
        "frontier": Markup(frontier(routes, name="Score against KL on the retrial")) if "kl" in measured else "",
    }


def _winner(winner: Row, folder: Path, names: Mapping[int, str]) -> dict[str, Any]:
    files = sorted((folder / "losses").glob("*.py"))
    number_of = f"candidate {winner['number']},"
    loss = next((path for path in files if number_of in path.read_text(encoding="utf-8")), None)
    return {
        **_candidate(winner, names),
        "thought": winner["thought"],
        "behaviour": winner["behaviour"],
        "maths": Markup(formula(winner["latex"])),
        "words": [words.replace("-", "−") for words in winner["words"]],
        "curves": _curves(winner),
        "beta": winner["beta"],
        "rate": f"{winner['learning_rate']:g}",
        "loss": f"{shlex.quote(str(loss))}:{loss.stem}" if loss else "",
    }


def _curves(winner: Row) -> list[tuple[str, Markup]]:
    """Its loss and both weights beside DPO's at the same β, each loss divided by its largest weight near 0."""
    dpo = shape(parse_objective(["dpo"], winner["beta"]).terms[0])
    names = ("margin", "loss", "chosen", "rejected")
    both = [{name: np.asarray(winner["curve"][name], dtype=float) for name in names}]
    both.append({name: getattr(dpo, name) for name in names})
    drawn: list[dict[str, np.ndarray]] = []
    for one in both:
        near = np.abs(one["margin"]) <= NEAR
        pulls = np.abs([one["chosen"][near], one["rejected"][near]])
        scale = pulls.max(initial=0.0, where=np.isfinite(pulls)) or 1.0
        start = one["loss"][np.abs(one["margin"]).argmin()]
        seen = {"margin": one["margin"], "loss": (one["loss"] - start) / scale}
        seen |= {name: one[name] / scale for name in ("chosen", "rejected")}
        keep = np.flatnonzero(np.abs(one["margin"]) <= SEEN)
        drawn.append({name: values[keep[:: max(1, len(keep) // 100)]] for name, values in seen.items()})
    titles = {"loss": "Loss, from its value at 0", "chosen": "Pull up on chosen", "rejected": "Push down on rejected"}
    curves = []
    for name, title in titles.items():
        close = np.concatenate([one[name][np.abs(one["margin"]) <= NEAR] for one in drawn])
        sound = np.isfinite(close)
        low, high = close.min(initial=0.0, where=sound), close.max(initial=0.0, where=sound)
        room = 0.08 * (high - low) or 1.0
        series = {
            c: (one["margin"].tolist(), one[name].tolist()) for c, one in zip(("blue", "muted"), drawn, strict=True)
        }
        svg = lines(series, name=title, across="margin, nats", within=(float(low - room), float(high + room)))
        curves.append((title, Markup(svg)))
    return curves


def _correlation(row: Row) -> dict[str, Any]:
    rho = _estimate(row["rho"])
    word = verdict(rho, 0.0, above="foretells it", below="foretells the opposite")
    return {
        "rungs": f"{RUNGS[row['from']]} → {RUNGS[row['to']].lower()}",
        "measure": {"fitness": "score"}.get(row["measure"], row["measure"]),
        "figure": figure(rho, "candidates"),
        "verdict": "no relation shown" if word == NO_DIFFERENCE else word,
        "strip": strip({"blue": rho}, -1.0, 1.0, 0.0),
    }


def _certain(value: float) -> Estimate:
    return Estimate(value, value, value, 1)


def _drawn(raw: object, floor: float) -> Estimate:
    """A score as it is drawn: no interval, and not below the floor."""
    value = _estimate(raw).value
    return _certain(value if math.isnan(value) else max(value, floor))


def _floor(rows: Sequence[Row], rung: str) -> float:
    """Where scores that are far below all others are drawn."""
    values = [value for row in rows if math.isfinite(value := _estimate(row[rung]).value)]
    low, high = np.percentile(values, [25, 75]) if values else (0.0, 0.0)
    return float(low - BROKEN * (high - low))


def _has_kl(rows: Sequence[Row]) -> bool:
    return any("kl" in row["measures"] for row in rows)


def _distance(row: Row) -> float:
    """Nats from the start: the KL of its answers, or where it drew none how far training moved held-out texts."""
    if "kl" in row["measures"]:
        return as_float(row["measures"]["kl"])
    return abs(as_float(row["measures"].get("chosen"))) + abs(as_float(row["measures"].get("rejected")))


def _seconds(row: Row) -> float:
    return as_float(row["seconds"])


def _rungs(found: Row, rows: Sequence[Row], finalists: set[str]) -> str:
    """Every candidate that was on both rungs, and where they would lie if both said the same."""
    floors = [_floor(rows, rung) for rung in ("linear", "adapter")]
    points = {row["number"]: (_drawn(row["linear"], floors[0]), _drawn(row["adapter"], floors[1])) for row in rows}
    finite = [x.value for a, b in points.values() for x in (a, b) if math.isfinite(a.value + b.value)]
    alike = finite and found["linear_unit"] == found["score"]["unit"]
    ends = [(_certain(x), _certain(x)) for x in (min(finite), max(finite))] if alike else []
    same = Route("rule", ends, "", "--")
    routes = _placed(rows, points, finalists)
    return frontier(
        [same, *routes], name="Score in real training against the linear rung", across="linear rung", wide=True
    )


def _placed(rows: Sequence[Row], points: Mapping[int, tuple[Estimate, Estimate]], finalists: set[str]) -> list[Route]:
    """Points by number as routes: each that is named alone, and below them the others together."""
    others = [points[row["number"]] for row in rows if _kind(row, finalists) == "found"]
    named = [row for row in rows if _kind(row, finalists) != "found"]
    alone = [Route(COLOURS[_kind(row, finalists)], [points[row["number"]]], row["name"], "o") for row in named]
    return [Route(COLOURS["found"], others, "", "o"), *alone]


def _nothing(found: Row) -> float:
    """The score of no training at all, which the canary of zero has."""
    zero = next((row for row in found["known"] if row["canary"] and row["name"] == "zero"), None)
    value = _estimate(zero["adapter"]).value if zero else 0.0
    return value if math.isfinite(value) else 0.0


def _front(rows: Sequence[Row], price: Callable[[Row], float], least: float) -> list[Row]:
    """Better than ``least``, and nothing else both better and cheaper; cheapest first. Canaries stay out of it."""
    able = [r for r in rows if not r["canary"] and math.isfinite(price(r)) and _estimate(r["adapter"]).value > least]
    front: list[Row] = []
    for row in sorted(able, key=lambda r: (price(r), -_estimate(r["adapter"]).value)):
        if not front or _estimate(row["adapter"]).value > _estimate(front[-1]["adapter"]).value:
            front.append(row)
    return front


def _pareto(
    found: Row, rows: Sequence[Row], finalists: set[str], price: Callable[[Row], float], across: str, *, wide: bool
) -> str:
    """Score against a price on a scale of powers, with the front as stairs."""
    able = [row for row in rows if not row["canary"] and price(row) > 0]
    floor = _floor(rows, "adapter")
    points = {row["number"]: (_certain(price(row)), _drawn(row["adapter"], floor)) for row in able}
    front = [points[row["number"]] for row in _front(able, price, _nothing(found))]
    corners = [(right, up) for (_, up), (right, _) in pairwise(front)]
    stairs = [point for pair in zip(front, [*corners, *front[-1:]], strict=True) for point in pair]
    routes = _placed(able, points, finalists)
    name = f"{found['score']['name']} against {across}"
    return frontier([Route("blue", stairs, "", "-"), *routes], name=name, across=across, wide=wide, log=True)


def _lineage(rows: Sequence[Row], winner: int | None) -> dict[str, Any]:
    """Where each candidate stands: steps from a root to the right, and each leaf on a row of its own."""
    numbers = {row["number"] for row in rows}
    parents = {row["number"]: [n for n in row["parents"] if n in numbers] for row in rows}
    depth: dict[int, int] = {}
    children: dict[int, list[int]] = {n: [] for n in numbers}
    for n in sorted(numbers):  # parents are older than their children
        depth[n] = max((depth[p] + 1 for p in parents[n]), default=0)
        if parents[n]:
            children[parents[n][0]].append(n)
    y = _rows([n for n in sorted(numbers) if not parents[n]], children)
    names = {row["number"]: row["name"] for row in rows}
    line = {winner} if winner in numbers else set()
    for n in sorted(numbers, reverse=True):
        line |= set(parents[n]) if n in line else set()
    at = {n: (12 + STEP * depth[n], 24 + round(ROW * y[n])) for n in numbers}
    edges = [
        (*at[p], *at[n], "on" if {n, p} <= line else "other" if p != parents[n][0] else "")
        for n in sorted(numbers)
        for p in parents[n]
    ]
    return {
        "width": STEP * (1 + max(depth.values(), default=0)),
        "height": 32 + ROW * (sum(not c for c in children.values())),
        "half": STEP // 2,
        "edges": sorted(edges, key=lambda edge: edge[-1] == "on"),
        "nodes": [_node(row, at[row["number"]], row["number"] in line, names) for row in rows],
        "origins": [name for name in ORIGINS if any(row["origin"] == name for row in rows)],
    }


def _rows(roots: Sequence[int], children: Mapping[int, Sequence[int]]) -> dict[int, float]:
    """A tidy tree's rows: leaves in their order, and each parent amid its children."""
    order, waiting = [], list(reversed(roots))
    while waiting:
        order.append(waiting.pop())
        waiting += reversed(children[order[-1]])
    y: dict[int, float] = {}
    for n in order:
        if not children[n]:
            y[n] = float(len(y))
    for n in reversed(order):
        if children[n]:
            y[n] = (y[children[n][0]] + y[children[n][-1]]) / 2
    return y


def _node(row: Row, at: tuple[int, int], on: bool, names: Mapping[int, str]) -> dict[str, Any]:
    fitness = number(as_float(row["fitness"]))
    return {
        "x": at[0],
        "y": at[1],
        "on": on,
        "name": row["name"],
        "number": row["number"],
        "origin": row["origin"],
        "generation": row["generation"],
        "parents": ", ".join(names.get(n, f"#{n}") for n in row["parents"]),
        "trained": row["trained"],
        "fitness": fitness if row["trained"] else f"{fitness} expected",
    }


def _candidate(row: Row, names: Mapping[int, str]) -> dict[str, Any]:
    parents = ", ".join(names.get(n, f"#{n}") for n in row["parents"])
    begun = row["origin"] in ("named", "canary")  # these are nearest to themselves
    origin = {"named": "known loss"}.get(row["origin"], row["origin"])
    return {
        "name": row["name"],
        "number": row["number"],
        "formula": row["formula"],
        "scores": [(label, _figure(row[rung]) if row[rung] else None) for rung, label in RUNGS.items()],
        "likeness": "" if begun else row["likeness"] or "nothing known",
        "origin": f"{origin} of {parents}" if parents else origin,
        "generation": row["generation"],
        "setting": row["setting"],
        "canary": row["canary"],
    }


def _proposer(row: Row) -> dict[str, Any]:
    best = row["best"]
    rung = "adapter" if best and best["adapter"] else "linear"
    return {
        "name": row["name"],
        "counts": [
            (label, number(row[key]))
            for key, label in (
                ("proposed", "Proposed"),
                ("refused", "Refused"),
                ("recognised", "Recognised"),
                ("linear", "Linear"),
                ("adapter", "Really trained"),
            )
        ],
        "best": f"{best['name']}: {_figure(best[rung])}, {RUNGS[rung].lower()}" if best else "none tried",
    }


def _stages(spent: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """Name, time and share in per cent of each, the dearest first."""
    whole = sum(spent.values()) or 1.0
    ordered = sorted(spent.items(), key=lambda item: -item[1])
    return [(STAGES.get(name, name), duration(s), round(100 * s / whole, 2)) for name, s in ordered]
