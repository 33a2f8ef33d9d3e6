"""The page of a search, from made-up searches of every kind that it has to speak of."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report.test_page import Page

from sartor.discover.results import BITS
from sartor.evaluate.statistics import Estimate
from sartor.report.discovery import _lineage, write_discovery
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
        "behaviour": "reference, slope falls",
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
    able = [row for row in rows if not row["canary"]]
    leaders = sorted(able, key=lambda row: -(row["adapter"] or row["linear"])["value"])[:20]
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
        "lora_r": 16,
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
        "linear_unit": "points of vader",
        "score": {"name": "Value of answers", "unit": "points of vader", "about": "Score: what answers are worth."},
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
        | {
            "thought": "",
            "refusal": "",
            "twin": None,
            "text": FORMULA,
            "latex": LATEX,
            "beta": 0.3,
            "learning_rate": 0.0005,
        }
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


def page_of(folder: Path, found: Row) -> tuple[Page, str]:
    (folder / "discovery.json").write_text(json.dumps(found), encoding="utf-8")
    report = write_discovery(folder)
    assert report == folder / "report.html"
    html = report.read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open, "unbalanced tags"
    return page, html


def without_retrial(found: Row) -> Row:
    found["headline"] = ["#1 leads with 0.34 bits per pair; there was no retrial, so this is a lead and no finding."]
    return found | {"comparisons": [], "retrial": []}


def plots(html: str) -> int:
    return html.count("<svg ")


def test_the_answer_stands_first_and_what_it_rests_on_follows(tmp_path: Path) -> None:
    found = fake_search()
    text = page_of(tmp_path, found)[0].text
    name = found["winner"]["name"]
    marks = [
        found["headline"][0],
        f"{name} less dpo 0.09 [0.03, 0.15]n = 32 prompts better On the retrial, in points of vader",
        f"{name} less simpo 0.03 [−0.04, 0.10]n = 32 prompts no difference shown",
        f"{name} less lrml −0.01 [−0.07, 0.05]n = 32 prompts no difference shown",
        "1,000→40 on the linear rung → really trainedof 1,640 proposed 1 h 48 min",
        "The search never saw these prompts, nor these seeds. Each loss was trained afresh 3 times",
        "Bonferroni-corrected for the 3 comparisons",
        "lrmlβ 0.3, learning rate 0.0005 0.49 [0.43, 0.55] 4.4 [3.6, 5.2] 0.210 [0.180, 0.240] 41.0 [38.9, 43.1]",
        f"The winner: {name}",
        "Most like lrml at β 0.17, 0.962",
        FORMULA,
        "slope at margin 0: −0.24",
        "Linear → real trainingscore0.72 [0.58, 0.86] n = 55 candidates foretells it",
        "Linear → real trainingmargin0.11 [−0.15, 0.37] n = 55 candidates no relation shown",
        "canary, should come last",
        "Value of answers against distance",
        "The same as a table",
        "12 more",
        "inverted (canary)",
        "1,640 proposals: 402 refused by the screens, 238 recognised",
        "its sign is wrong: 160",
        "1 h 48 min of device time. The plan was: 1,000 candidates",
        "real training (adapters)41 min 0 s38 %",
        "--budget 2h --output runs/found --resume",
        f"sartor discover show {found['winner']['number']} --output {tmp_path}",
        "AMD EPYC",
    ]
    at = 0
    for mark in marks:
        assert mark in text[at:], f"{mark}: missing, or out of its place"
        at = text.index(mark, at)


def test_one_file_without_scripts_or_anything_from_outside(tmp_path: Path) -> None:
    page, html = page_of(tmp_path, fake_search())
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert "http" not in html.replace("http-equiv", "")
    assert "#01020" not in html, "a plot kept a colour that is not the page's"
    assert plots(html) == 9  # score against KL, maths, three curves, rungs, two fronts, lineage


def test_the_loss_file_is_said_where_it_is(tmp_path: Path) -> None:
    found = fake_search()
    assert "Its loss file is not in this folder" in page_of(tmp_path, found)[0].text
    (tmp_path / "losses").mkdir()
    for number in (found["winner"]["number"], 7):
        (tmp_path / "losses" / f"found_{number}.py").write_text(f"found by search: candidate {number}, mutate of 5.")
    name = f"found_{found['winner']['number']}"
    assert f"--loss {tmp_path}/losses/{name}.py:{name}" in page_of(tmp_path, found)[0].text


def test_an_invalid_search_says_so_loudly_and_gives_no_verdict(tmp_path: Path) -> None:
    found = fake_search() | {"faults": ["on the linear rung the canary inverted is no worse than 6 of 12 known losses"]}
    text = page_of(tmp_path, found)[0].text
    assert text.index("This search must not be believed.") < text.index("less dpo")
    assert "On the linear rung the canary inverted is no worse than 6 of 12 known losses." in text
    assert text.count("not to be believed") == 3
    assert found["headline"][0] not in text
    assert " better On the retrial" not in text


def test_without_a_retrial_there_is_a_lead_and_no_finding(tmp_path: Path) -> None:
    found = without_retrial(fake_search())
    page, html = page_of(tmp_path, found)
    assert found["headline"][0] in page.text
    assert "There was no retrial, so nothing on this page is a finding." in page.text
    assert f"{found['winner']['name']} in the search 0.33 [0.28, 0.38]n = 28 prompts a lead and no finding" in page.text
    assert "The best known loss, cpo, has 0.25 [0.20, 0.30] (grey)." in page.text
    assert plots(html) == 8
    assert "not to be believed" in page_of(tmp_path, found | {"faults": ["it is broken"]})[0].text


def test_a_search_that_trained_nothing_new(tmp_path: Path) -> None:
    found = without_retrial(fake_search())
    found |= {"winner": None, "trained": found["known"], "proposers": [], "refusals": [], "plan": None, "lineage": []}
    page, html = page_of(tmp_path, found)
    assert "No new candidate was really trained, so there is no winner." in page.text
    assert "sartor discover show 1 --output" in page.text
    assert plots(html) == 4


def test_a_retrial_by_bits_shows_what_was_measured(tmp_path: Path) -> None:
    found = fake_search() | {"unit": BITS["unit"], "score": BITS}
    for row in found["retrial"]:
        row["measures"] = {key: row["measures"][key] for key in ("accuracy", "margin", "chosen", "rejected")}
    page, html = page_of(tmp_path, found)
    assert "Accuracy: share of held-out pairs" in page.text
    assert "KL, nats" not in page.text
    assert plots(html) == 8


def test_every_comparison_of_several_finalists_is_shown(tmp_path: Path) -> None:
    found = fake_search()
    other = [row | {"winner": "#99", "verdict": "worse"} for row in found["comparisons"]]
    text = page_of(tmp_path, found | {"comparisons": found["comparisons"] + other})[0].text
    assert "so that all 6 hold together" in text
    assert "#99 less simpo0.03 [−0.04, 0.10] worse" in text


@pytest.mark.parametrize("bad", [NAN, -INF, None])
def test_values_that_are_not_numbers(tmp_path: Path, bad: float | None) -> None:
    found = fake_search()
    broken = {"value": bad, "low": bad, "high": bad, "n": 0}
    for row in found["trained"]:
        row |= {"adapter": broken, "linear": broken, "seconds": bad}
        row["measures"] |= {"chosen": bad}
    for row in found["comparisons"]:
        row["difference"] = broken
    for row in found["correlations"]:
        row["rho"] = broken
    for row in found["retrial"]:
        row |= {"score": broken, "measures": {"kl": broken}}
    for row in found["lineage"]:
        row["fitness"] = bad
    found["winner"]["curve"] |= {"chosen": [NAN if bad is None else bad] * 801}
    for each in (found, without_retrial(found)):
        text = page_of(tmp_path, each)[0].text
        assert "not measurable" in text
        for word in ("nan", "inf", "None", "−inf"):
            assert word not in text.split(), word


def test_a_broken_candidate_does_not_flatten_the_others(tmp_path: Path) -> None:
    found = fake_search()
    found["trained"][20]["adapter"] = estimate(-41.0, 70.0)
    text = page_of(tmp_path, found)[0].text
    assert re.search(r"Scores below −?0\.\d+ are drawn there: 1 of them in real training\.", text)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    found, evil = fake_search(), '<script>alert("x")</script> $x$'
    for row in [*found["leaders"], *found["known"], *found["lineage"], *found["trained"]]:
        row |= {"name": evil, "formula": evil, "origin": evil, "likeness": evil}
    found["winner"] |= {"name": evil, "thought": evil, "latex": "\\nothing{$", "formula": evil}
    found |= {"headline": [evil, evil], "command": evil, "task": evil, "unit": evil, "refusals": [[evil, 1]]}
    page, html = page_of(tmp_path, found)
    assert "script" not in page.tags
    assert page.text.count("alert(") > 20
    assert 'class="maths"' not in html


def test_maths_that_cannot_be_drawn_is_left_out() -> None:
    assert formula(r"\beta \, \rho").startswith("<svg aria-hidden")
    assert "currentColor" in formula(r"\frac{1}{2}")
    assert formula(r"\no{such}$") == ""


def test_the_lineage_has_every_candidate_right_of_its_parents() -> None:
    rows = fake_search()["lineage"]
    drawn = _lineage(rows, rows[-1]["number"])
    at = {node["number"]: (node["x"], node["y"]) for node in drawn["nodes"]}
    assert len(set(at.values())) == len(rows), "two stand on one place"
    assert all(at[p][0] < at[row["number"]][0] for row in rows for p in row["parents"])
    assert all(0 < x < drawn["width"] and 0 < y < drawn["height"] for x, y in at.values())
    assert _lineage([], None)["nodes"] == []


def test_labels_of_points_in_one_place_are_all_there() -> None:
    one = Estimate(1.0, 1.0, 1.0, 1)
    svg = frontier([Route("ink", [(one, one)], f"loss_{i}", "o") for i in range(15)], name="f", log=True)
    assert all(f"loss_{i}<" in svg for i in range(15))
