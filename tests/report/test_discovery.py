"""The page of a search, from made-up searches of every kind that it has to speak of."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report.test_page import Page

from sartor.report.discovery import write_discovery
from sartor.report.plots import Route, formula, frontier

NAN, INF = math.nan, math.inf
Row = dict[str, Any]
NAMED = ("dpo", "ipo", "hinge", "simpo", "lrml", "apo_zero", "exo", "cell", "sppo", "dpop", "cpo", "orpo")
CANARIES = ("zero", "inverted", "constant")
ORIGINS = ("mutate", "cross", "tune", "random", "model")
FORMULA = "sigmoid(-(beta * margin) / 0.05) * softplus(-(beta * margin)) + 0.3 * relu(1 - beta * chosen_logratio)"
LATEX = (
    r"\sigma\left(\frac{-(\beta \, \rho)}{0.05}\right) \, \log\left(1 + e^{-(\beta \, \rho)}\right) + 0.3 \, "
    r"\left[1 - \beta \, r_w\right]_+"
)


def estimate(value: float, half: float, n: int = 28) -> Row:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def candidate(number: int, rng: np.random.Generator) -> Row:
    """A candidate of a search that worked: known losses first, then canaries, then 110 proposals."""
    known, canary = number <= len(NAMED), len(NAMED) < number <= len(NAMED) + len(CANARIES)
    name = (NAMED + CANARIES)[number - 1] if known or canary else f"#{number}"
    linear = rng.normal(0.0, 0.01) if canary else 0.12 + 0.05 * rng.normal() + 0.001 * number
    adapter = rng.normal(0.0, 0.01) if canary else 0.05 + 0.9 * linear + 0.03 * rng.normal()
    moved = 0.2 * rng.random() if canary else float(np.exp(1.5 + 6 * adapter + 0.7 * rng.normal()))
    trained = known or canary or number % 3 == 0
    origin = "named" if known else "canary" if canary else ORIGINS[int(rng.choice(5, p=[0.4, 0.25, 0.15, 0.1, 0.1]))]
    older = [n for n in range(1, number) if not len(NAMED) < n <= len(NAMED) + len(CANARIES)]
    count = {"cross": 2, "mutate": 1, "tune": 1, "model": 1}.get(origin, 0)
    return {
        "number": number,
        "name": name,
        "origin": origin,
        "parents": [int(n) for n in rng.choice(older, count, replace=False)],
        "generation": max(0, (number - 8) // 8),
        "formula": "-log_sigmoid(beta * margin)" if known else FORMULA,
        "likeness": f"{name} at β 0.1, 1.000" if known else "lrml at β 0.17, 0.962",
        "cosine": 1.0 if known else 0.962,
        "behaviour": "reference, not convex",
        "canary": canary,
        "tabular": estimate(0.4 + 0.1 * rng.normal(), 0.15, 24),
        "linear": estimate(linear, 0.04),
        "adapter": estimate(adapter, 0.05) if trained else None,
        "setting": "β 0.3, learning rate 0.0005",
        "measures": {"accuracy": 0.7, "margin": moved, "chosen": -0.4 * moved, "rejected": -0.6 * moved},
        "seconds": float(14 + 2 * rng.random()),
    }


def arm(number: int, name: str, score: float, kl: float) -> Row:
    measures = {"accuracy": (0.71, 0.05), "margin": (9.1, 2.0), "chosen": (-3.1, 1.0), "rejected": (-12.2, 2.0)}
    measures |= {"bits": (0.21, 0.03), "kl": (kl, 0.8), "length": (41.0, 2.1), "distinct_2": (0.86, 0.01)}
    return {
        "number": number,
        "name": name,
        "setting": "β 0.3, learning rate 0.0005",
        "seeds": 3,
        "score": estimate(score, 0.06, 32),
        "measures": {key: estimate(*value, 3) for key, value in measures.items()},
        "seconds": 31.0,
    }


def fake_search() -> Row:
    """What results.py writes of a search that found something: better than dpo, not shown to differ from others."""
    rng = np.random.default_rng(4)
    rows = [candidate(n, rng) for n in range(1, 126)]
    trained = [row for row in rows if row["adapter"]]
    leaders = sorted(
        (r for r in rows if not r["canary"]), key=lambda r: -(r["adapter"] or r["linear"])["value"], reverse=False
    )[:20]
    best = next(row for row in leaders if row["adapter"] and row["origin"] in ("mutate", "cross", "tune", "model"))
    wanted, waiting = set(), [row["number"] for row in leaders]
    while waiting:
        n = waiting.pop()
        wanted.add(n)
        waiting += [p for p in rows[n - 1]["parents"] if p not in wanted]
    margin = np.linspace(-40, 40, 801)
    curve = {"margin": margin, "loss": np.log1p(np.exp(-0.3 * margin)) + 0.3 * np.maximum(0, 1 - 0.15 * margin)}
    curve |= {"chosen": 0.3 / (1 + np.exp(0.3 * margin)) + 0.09 * (margin < 6.7)}
    curve |= {"rejected": 0.3 / (1 + np.exp(0.3 * margin)) - 0.02 * (margin > 4)}
    gaps = {"dpo": (0.094, 0.061), "simpo": (0.031, 0.071), "lrml": (-0.012, 0.058)}
    name = best["name"]
    return {
        "task": "sentiment",
        "model": "smollm2",
        "seed": 0,
        "budget": "2h",
        "plan": "1,000 candidates through the linear rung, 40 really trained, 3 fresh seeds for the retrial: about 1 h",
        "spent": {"answers": 310.0, "reference and features": 205.0, "propose and screen": 402.0, "tabular": 188.0}
        | {"linear": 1800.0, "adapter": 2460.0, "retrial": 1110.0},
        "headline": [
            f"On prompts and seeds that the search never touched, {name} is better than dpo by 0.094 [0.033, 0.155] "
            "points of vader; not shown to differ from simpo (0.031 [−0.040, 0.102]) points of vader; not shown to "
            "differ from lrml (−0.012 [−0.070, 0.046]) points of vader.",
            f"{name} is {FORMULA}; most like lrml at β 0.17, 0.962.",
            "Seeds: 3. Intervals hold all 3 comparisons together at 95 %.",
        ],
        "faults": [],
        "unit": "points of vader",
        "comparisons": [
            {
                "winner": name,
                "other": other,
                "difference": estimate(*gap, 32),
                "verdict": "better" if other == "dpo" else "no difference shown",
            }
            for other, gap in gaps.items()
        ],
        "retrial": [
            arm(1, "dpo", 0.38, 3.1),
            arm(4, "simpo", 0.44, 6.2),
            arm(5, "lrml", 0.486, 4.4),
            arm(best["number"], name, 0.474, 3.9),
        ],
        "correlations": [
            {"from": "tabular", "to": "linear", "measure": "fitness", "rho": estimate(0.21, 0.19, 110)},
            {"from": "linear", "to": "adapter", "measure": "fitness", "rho": estimate(0.72, 0.14, 55)},
            {"from": "linear", "to": "adapter", "measure": "accuracy", "rho": estimate(0.55, 0.2, 55)},
            {"from": "linear", "to": "adapter", "measure": "margin", "rho": estimate(0.11, 0.26, 55)},
        ],
        "counts": {"proposed": 1640, "refused": 402, "recognised": 238, "tabular": 1000, "linear": 1000, "adapter": 40},
        "refusals": [["weak on the tabular", 201], ["its sign is wrong", 160], ["not finite", 41]],
        "proposers": [
            {"name": origin, "proposed": 328, "refused": 80, "recognised": 48, "linear": 200, "adapter": 8}
            | {"best": next((row for row in leaders if row["origin"] == origin), None)}
            for origin in ORIGINS
        ],
        "winner": best
        | {"thought": "", "refusal": "", "twin": None, "text": FORMULA, "latex": LATEX, "beta": 0.3}
        | {"words": ["slope at margin 0: -0.24", "convex: no", "lowers the margin from 4 to 40 nats"]}
        | {"curve": {key: values.tolist() for key, values in curve.items()}},
        "leaders": leaders,
        "known": rows[: len(NAMED) + len(CANARIES)],
        "trained": trained,
        "lineage": [
            {key: rows[n - 1][key] for key in ("number", "name", "origin", "generation", "parents")}
            | {"fitness": (rows[n - 1]["adapter"] or rows[n - 1]["linear"])["value"]}
            | {"trained": rows[n - 1]["adapter"] is not None}
            for n in sorted(wanted)
        ],
        "machine": {"cpu": "AMD EPYC", "cores": 2, "device": "cpu", "torch": "2.13.0", "sartor": None},
        "command": "sartor discover --model smollm2 --task sentiment --budget 2h --output runs/found",
    }
