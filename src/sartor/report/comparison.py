"""The page of ``sartor compare``: the answer, the frontier, the ends, cost and variety, each with its interval."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sartor.console import duration
from sartor.evaluate.statistics import Estimate
from sartor.report.page import write_page
from sartor.report.plots import Route, frontier
from sartor.report.tiles import Tile, strip
from sartor.report.words import Figure, figure, number, read_estimate, verdict

COLOURS = {"dpo": "blue", "dpo-other": "blue", "ppo": "orange", "ppo-true": "ink"}
LABELS = {"ppo": "PPO, reward model", "ppo-true": "PPO, truth"}
BEST_OF = "muted"
COSTS = {"seconds": "Time", "flops": "FLOPs"}
VARIETY = {
    "distinct_2": (
        "distinct-2",
        "different word pairs as a share of all, among the answers to a prompt; lower is narrower",
    ),
    "self_bleu": ("self-BLEU", "how well the other answers to a prompt foretell each one; higher is narrower"),
    "entropy": ("entropy", "nats per token of the policy's own answers; lower is narrower"),
    "length": ("length", "tokens of an answer"),
}


def write_comparison(folder: Path) -> Path:
    """Write ``report.html`` from ``compare.json`` and return its path."""
    found = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    return write_page(folder, "comparison.html", _context(found))


def _context(found: Mapping[str, Any]) -> dict[str, Any]:
    arms, best = found["arms"], found["best_of"]
    return {
        "title": f"DPO, or a reward model with PPO? {found['task']}, {found['model']}, seeds: {found['seeds']}",
        "headline": found["headline"][0],
        "second": found["headline"][1],
        "tiles": [
            *(
                _ratio(found, cost, label)
                for cost, label in (("seconds", "Time"), ("flops", "FLOPs"))
                if cost in found["ratio"]
            ),
            *([_difference(found)] if "reward" in found["at_equal_kl"] else []),
            _end(found, "dpo"),
            _end(found, "ppo"),
        ][:4],
        "seeds": found["seeds"],
        "task": found,
        "frontier": Markup(_frontier(found)),
        "legend": [
            ("blue", "DPO"),
            ("orange", "PPO on a reward model"),
            ("ink", "PPO on the truth"),
            (BEST_OF, "best of n answers of the start"),
        ],
        "arms": [_arm(row) for row in arms],
        "best_of": [(row["n"], _figure(row["reward"]), number(row["kl"], 2)) for row in best],
        "variety": list(VARIETY.values()),
        "accuracy": [_figure(row, percent=True) for row in found["reward_model"]],
        "feedback": _feedback(found["feedback"]),
        "command": found["command"],
        "machine": [(key, str(value)) for key, value in found["machine"].items()],
    }


def _feedback(rows: list[Mapping[str, Any]]) -> str:
    seconds, tokens, rankings = (sum(row[key] for row in rows) / len(rows) for key in ("seconds", "tokens", "rankings"))
    return f"{rankings:.0f} rankings from {number(tokens, 0)} sampled tokens in {duration(seconds)}"


def _estimate(raw: object) -> Estimate:
    return read_estimate(raw) or Estimate(math.nan, math.nan, math.nan, 0)


def _figure(raw: object, percent: bool = False) -> Figure:
    return figure(_estimate(raw), percent=percent)


def _ratio(found: Mapping[str, Any], cost: str, label: str) -> Tile:
    ratio = _estimate(found["ratio"][cost])
    word = verdict(ratio, 1.0, above="DPO is cheaper", below="DPO is dearer")
    gloss = (
        f"{label} that a reward model with PPO took, as a multiple of what DPO took, up to the reward that both "
        "reached; 1 would be no difference."
    )
    placed = strip({"blue": ratio}, 0.0, 1.1 * max(1.0, ratio.high), 1.0)
    return Tile(f"{label}: RLHF over DPO", [figure(ratio, "seeds")], word, "", gloss, placed)


def _difference(found: Mapping[str, Any]) -> Tile:
    gap = _estimate(found["at_equal_kl"]["reward"])
    word = verdict(gap, 0.0, above="RLHF earns more", below="DPO earns more")
    gloss = (
        "True reward of PPO on a reward model, less that of DPO, where both are as far from the start as the one that "
        f"went less far; 0 would be no difference. At their ends {_figure(found['difference']['reward'])}, "
        f"in nats {_figure(found['difference']['kl'])}."
    )
    reach = 1.15 * max(abs(gap.low), abs(gap.high))
    placed = strip({"blue": gap}, -reach, reach, 0.0)
    return Tile("Reward at equal KL: RLHF less DPO", [figure(gap, "prompts")], word, "", gloss, placed)


def _end(found: Mapping[str, Any], kind: str) -> Tile:
    row = next(row for row in found["arms"] if row["kind"] == kind)
    end, start = _estimate(row["end"]["reward"]), _estimate(found["best_of"][0]["reward"])
    word = verdict(_estimate(row["against_start"]), 0.0, "better than the start", "worse than the start")
    gloss = f"Mean true score of its answers to prompts never trained on; the start's is {figure(start).value}."
    placed = strip({"blue": end}, min(0.0, end.low), 1.1 * end.high, start.value)
    tone = {"better than the start": "good", "worse than the start": "bad"}.get(word, "")
    return Tile(f"Reward, {row['name']}", [figure(end, "prompts")], word, tone, gloss, placed)


def _frontier(found: Mapping[str, Any]) -> str:
    routes = [
        Route(
            COLOURS[row["kind"]],
            [(_estimate(point["kl"]), _estimate(point["reward"])) for point in row["points"]],
            LABELS.get(row["kind"], row["name"].removeprefix("DPO, ")),
        )
        for row in found["arms"]
    ]
    best = [(Estimate(row["kl"], row["kl"], row["kl"], 1), _estimate(row["reward"])) for row in found["best_of"]]
    routes.append(Route(BEST_OF, best, f"best of {found['best_of'][-1]['n']}"))
    return frontier(routes, name="True reward against KL", wide=True)


def _arm(row: Mapping[str, Any]) -> dict[str, Any]:
    cost, last = row["cost"], row["end"]
    return {
        "name": row["name"],
        "colour": COLOURS[row["kind"]],
        "reward": _figure(last["reward"]),
        "kl": _figure(last["kl"]),
        "against_start": _figure(row["against_start"]),
        "against_best_of_2": _figure(row["against_best_of_2"]),
        "seconds": duration(cost["seconds"]["value"]),
        "flops": f"{number(cost['flops']['value'] / 1e12, 0)}",
        "memory": number(cost["peak_memory_gib"], 1),
        "networks": cost["networks"],
        "tokens": number(cost["tokens_sampled"]["value"], 0),
        "variety": [
            (_figure(v["before"]).value, _figure(v["after"]).value, _figure(v["change"]))
            for v in (row["variety"][name] for name in VARIETY)
        ],
        "runs": row["runs"],
    }
