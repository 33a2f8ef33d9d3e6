"""What the run folders say together: the frontier of reward against KL, differences, variety, and what each cost."""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from sartor.compare.arms import Arm
from sartor.config import CompareConfig
from sartor.config.compare import SIZES
from sartor.console import duration
from sartor.evaluate.diversity import distinct_n, self_bleu
from sartor.evaluate.statistics import Estimate, Sample, crossed, mean
from sartor.tasks.task import Task
from sartor.train.run import RunFolder

COSTS = ("seconds", "flops")
Values = dict[tuple[int, str], float]  # by seed and held-out prompt


@dataclass(frozen=True)
class Point:
    """An evaluation of one arm on one seed, prompt by prompt, and what had been spent until then."""

    step: int
    reward: Values
    kl: Values
    variety: Mapping[str, Values]
    spent: Mapping[str, float]

    def only(self, keys: Collection[tuple[int, str]]) -> "Point":
        """The same on some prompts."""
        variety = {name: _only(values, keys) for name, values in self.variety.items()}
        return Point(self.step, _only(self.reward, keys), _only(self.kl, keys), variety, self.spent)


def results(config: CompareConfig, task: Task, seeds: Sequence[Sequence[Arm]]) -> dict[str, Any]:
    """``compare.json``: every arm over the seeds that are finished, and the headline."""
    paths = {arm.folder: _path(arm, seed) for seed, arms in enumerate(seeds) for arm in arms if arm.kind != "reward"}
    start = [RunFolder(arms[0].folder.parent).read_jsonl("start.jsonl") for arms in seeds]
    powers = [2**k for k in range(SIZES[config.size].best_of.bit_length())]
    chosen = {n: _best_of(start, n) for n in powers}
    # An arm may lose a prompt, to a maximum length: all arms of a seed are told on those that all of them have.
    shared = [
        set.intersection(*(set(point.reward) for arm in arms if arm.folder in paths for point in paths[arm.folder]))
        for arms in seeds
    ]
    common = set(chosen[1]).intersection(key for keys in shared for key in keys)
    paths = {folder: [point.only(common) for point in path] for folder, path in paths.items()}
    chosen = {n: _only(values, common) for n, values in chosen.items()}
    kinds = [
        _arm([arm for arms in seeds for arm in arms if arm.name == name], paths, chosen)
        for name in dict.fromkeys(arm.name for arm in seeds[0] if arm.kind != "reward")
    ]
    by_kind = {
        kind: [paths[arm.folder] for arms in seeds for arm in arms if arm.kind == kind] for kind in ("dpo", "ppo")
    }
    ours, theirs = by_kind["dpo"], by_kind["ppo"]
    found = {
        "task": task.name,
        "score": task.score,
        "model": config.model,
        "size": config.size,
        "seeds": len(seeds),
        "prompts": {"train": len(task.train), "held_out": len({prompt for _, prompt in common})},
        "feedback": [RunFolder(arms[0].folder.parent).read_json("feedback.json") for arms in seeds],
        "reward_model": _accuracy(seeds),
        "arms": kinds,
        "best_of": [
            {"n": n, "kl": math.log(n) - (n - 1) / n, "reward": estimate(values)} for n, values in chosen.items()
        ],
        "difference": {
            "reward": estimate(_ends(theirs, "reward"), _ends(ours, "reward")),
            "kl": estimate(_ends(theirs, "kl"), _ends(ours, "kl")),
        },
        "at_equal_kl": _at_equal_kl(ours, theirs),
        "ratio": _ratio(ours, theirs, chosen[1]),
    }
    return {**found, "headline": headline(found)}


def estimate(values: Values, less: Values | None = None) -> Estimate:
    """Mean over prompts and seeds, or of the difference to ``less`` on the same prompts and seeds."""
    keys = list(values)
    differences = [values[key] - (less[key] if less else 0.0) for key in keys]
    by_prompt, by_seed = [prompt for _, prompt in keys], [seed for seed, _ in keys]
    if len(set(by_seed)) == 1:  # one seed says nothing of how seeds differ: its interval is that over prompts alone
        return mean(differences, by_prompt)
    return crossed([Sample(differences, by_prompt)], [by_seed])


def _arm(arms: Sequence[Arm], every: Mapping[Path, list[Point]], best_of: Mapping[int, Values]) -> dict[str, Any]:
    paths = [every[arm.folder] for arm in arms]
    summaries = [RunFolder(arm.folder).read_json("summary.json") for arm in arms]
    first, last = (
        {name: _joined(path[place].variety[name] for path in paths) for name in paths[0][0].variety}
        for place in (0, -1)
    )
    end = _ends(paths, "reward")
    return {
        "name": arms[0].name,
        "kind": arms[0].kind,
        "points": [
            {
                "step": paths[0][place].step,
                "kl": estimate(_joined(path[place].kl for path in paths)),
                "reward": estimate(_joined(path[place].reward for path in paths)),
            }
            for place in range(min(map(len, paths)))
        ],
        "end": {"reward": estimate(end), "kl": estimate(_ends(paths, "kl"))},
        "against_start": estimate(end, best_of[1]),
        "against_best_of_2": estimate(end, best_of[2]),
        "variety": {
            name: {
                "before": estimate(first[name]),
                "after": estimate(last[name]),
                "change": estimate(last[name], first[name]),
            }
            for name in last
        },
        "cost": {
            **{cost: mean([path[-1].spent[cost] for path in paths]) for cost in COSTS},
            "peak_memory_gib": max(
                RunFolder(one.folder).read_json("summary.json")["cost"]["peak_memory_gib"]
                for arm in arms
                for one in (arm, *arm.after)
            ),
            "networks": max(summary.get("networks", 1) for summary in summaries),
            "tokens_sampled": mean([_tokens_sampled(arm) for arm in arms]),
        },
        "runs": [str(Path(arm.folder.parent.name) / arm.folder.name) for arm in arms],
    }


def _joined(parts: Iterable[Values]) -> Values:
    return {key: value for part in parts for key, value in part.items()}


def _ends(paths: Sequence[Sequence[Point]], name: str) -> Values:
    return _joined(getattr(path[-1], name) for path in paths)


def _only(values: Values, keys: Collection[tuple[int, str]]) -> Values:
    return {key: value for key, value in values.items() if key in keys}


def _path(arm: Arm, seed: int) -> list[Point]:
    """The evaluations of a run in order."""
    run = RunFolder(arm.folder)
    rows = run.read_jsonl("metrics.jsonl")
    training = {row["step"]: row for row in rows if row["split"] == "train"}
    total = run.read_json("summary.json")["cost"]["without_measuring"]
    steps = {cost: sum(row[cost] for row in training.values()) for cost in COSTS}
    # What is spent whatever the number of steps: loading, reference, saving; and the arms that come before.
    fixed = {cost: total[cost] - steps[cost] + sum(_spent(before)[cost] for before in arm.after) for cost in COSTS}
    found = []
    for step in sorted({row["step"] for row in rows if row["split"] == "eval"}):
        answers = run.read_jsonl(f"answers-{step}.jsonl")
        keys = [(seed, json.dumps(row["prompt"])) for row in answers]
        spent = {c: fixed[c] + sum(row[c] for s, row in training.items() if s <= step) for c in COSTS}
        variety = {
            "distinct_2": [distinct_n(row["completions"]) for row in answers],
            "self_bleu": [self_bleu(row["completions"]) for row in answers],
            "entropy": [sum(row["surprise"]) / sum(row["lengths"]) for row in answers],
            "length": [float(np.mean(row["lengths"])) for row in answers],
        }
        found.append(
            Point(
                step,
                {key: float(np.mean(row[arm.truth])) for key, row in zip(keys, answers, strict=True)},
                {key: float(np.mean(row["kl"])) for key, row in zip(keys, answers, strict=True)},
                {name: dict(zip(keys, values, strict=True)) for name, values in variety.items()},
                spent,
            )
        )
    return found


def _spent(arm: Arm) -> dict[str, float]:
    return RunFolder(arm.folder).read_json("summary.json")["cost"]["without_measuring"]


def _tokens_sampled(arm: Arm) -> float:
    """Tokens that training had the policy write; the feedback's are told apart."""
    rows = [row for row in RunFolder(arm.folder).read_jsonl("metrics.jsonl") if row["split"] == "train"]
    return sum(row["completions/length"] * row["examples"] for row in rows if "completions/length" in row)


def _accuracy(seeds: Sequence[Sequence[Arm]]) -> list[Any]:
    """Held-out accuracy of each seed's reward model."""
    models = [arm for arms in seeds for arm in arms if arm.kind == "reward"]
    return [RunFolder(arm.folder).read_json("summary.json")["evaluation"]["accuracy"] for arm in models]


def _best_of(start: Sequence[Sequence[Mapping[str, Any]]], n: int) -> Values:
    return {
        (seed, json.dumps(row["prompt"])): best_of(row["scores"], n) for seed, rows in enumerate(start) for row in rows
    }


def best_of(scores: Sequence[float], n: int) -> float:
    """Mean score of the best of ``n`` answers, over all choices of n among these (no more than there are).

    The policy that answers so is log n - (n-1)/n nats from the start at most (Beirami et al. 2024, arXiv 2401.01879).

    >>> best_of([0.0, 0.0, 1.0], 2)
    0.6666666666666666
    """
    ordered = sorted(scores)
    return sum(comb(place, n - 1) * score for place, score in enumerate(ordered)) / comb(len(ordered), n)


def _at_equal_kl(ours: Sequence[Sequence[Point]], theirs: Sequence[Sequence[Point]]) -> dict[str, Any]:
    """What PPO earns more than DPO where both have gone equally far: as far as the one that went less far, by seed."""
    dpo: list[Values] = []
    ppo: list[Values] = []
    levels: list[float] = []
    for pair in zip(ours, theirs, strict=True):
        end = min((path[-1] for path in pair), key=lambda point: _mean(point.kl))
        levels.append(_mean(end.kl))
        if not estimate(end.kl).low > 0:  # equally near would say nothing of either
            return {"levels": [], "why_none": f"seed {len(levels) - 1} has an arm not shown to leave the start"}
        for path, rewards in zip(pair, (dpo, ppo), strict=True):
            rewards.append(end.reward if path[-1] is end else reward_at(path, end.kl))
    return {"levels": levels, "reward": estimate(_joined(ppo), _joined(dpo))}


def reward_at(path: Sequence[Point], kl: Values) -> Values:
    """Rewards where an arm first came as far as ``kl`` is on average, on lines between evaluations over √KL.

    Rewards grow about with √KL (Gao et al. 2022, arXiv 2210.10760). By how much a prompt's KL differs from its ``kl``
    is taken off its reward along the line, which changes no mean: so intervals know that distances are estimates too.
    """
    level = _mean(kl)
    for before, after in pairwise(path):
        low, high = _mean(before.kl), _mean(after.kl)
        if high >= level:
            break
    if level <= low:
        return before.reward
    if level > high:
        return after.reward
    roots = [math.sqrt(max(0.0, x)) for x in (low, level, high)]
    share, of_kl = (roots[1] - roots[0]) / (roots[2] - roots[0]), (level - low) / (high - low)
    slope = (_mean(after.reward) - _mean(before.reward)) / (roots[2] - roots[0]) / (2 * roots[1])
    return {
        key: _between(before.reward[key], after.reward[key], share)
        - slope * (_between(before.kl[key], after.kl[key], of_kl) - kl[key])
        for key in kl
    }


def _between(first: float, second: float, share: float) -> float:
    return (1 - share) * first + share * second


def _ratio(ours: Sequence[Sequence[Point]], theirs: Sequence[Sequence[Point]], start: Values) -> dict[str, Any]:
    """How many times dearer reward model and PPO were than DPO, up to the reward that both of a seed ended with.

    The level is the lower of the two ends; costs between two evaluations are interpolated. Seeds are the units of the
    interval, which is that of a geometric mean. There is no ratio where an end of a seed is not above its start, or
    where an arm's gain over all seeds has an interval that reaches 0: reaching nothing costs nothing.
    """
    for name, paths in (("DPO", ours), ("PPO on a reward model", theirs)):
        if not estimate(_ends(paths, "reward"), start).low > 0:
            return {"levels": [], "why_none": f"{name} shows no gain over the start"}
    levels: list[float] = []
    logs: dict[str, list[float]] = {cost: [] for cost in COSTS}
    for seed, pair in enumerate(zip(ours, theirs, strict=True)):
        begin = float(np.mean([value for (number, _), value in start.items() if number == seed]))
        level = min(_mean(path[-1].reward) for path in pair)
        if level <= begin:
            return {"levels": [], "why_none": f"seed {seed} has an arm that does not end above the start"}
        levels.append(level)
        for cost in COSTS:
            dpo, ppo = (cost_of(path, begin, level, cost) for path in pair)
            logs[cost].append(math.log(ppo / dpo))
    return {"levels": levels, **{cost: _exp(mean(values)) for cost, values in logs.items()}}


def cost_of(path: Sequence[Point], start: float, level: float, cost: str) -> float:
    """What was spent when the reward first came to ``level``, by straight lines between evaluations from ``start``."""
    points = [(path[0].spent[cost], start), *((point.spent[cost], _mean(point.reward)) for point in path[1:])]
    for (spent, reward), (later, higher) in pairwise(points):
        if higher >= level:
            return spent + max(0.0, (level - reward) / (higher - reward)) * (later - spent)
    raise ValueError(f"{level} is above all of {[reward for _, reward in points]}")


def _mean(values: Values) -> float:
    return float(np.mean([*values.values()]))


def _exp(log: Estimate) -> Estimate:
    low, high = (math.exp(end) if math.isfinite(end) else end for end in (log.low, log.high))
    return Estimate(math.exp(log.value), low, high, log.n)


def headline(found: Mapping[str, Any]) -> list[str]:
    """The result in two sentences, and no more than the intervals allow to say."""
    ratio, arms, best = found["ratio"], {row["kind"]: row for row in found["arms"]}, found["best_of"]
    ours, theirs = arms["dpo"], arms["ppo"]
    seeds = f"{found['seeds']} seeds" if found["seeds"] > 1 else "one seed, its intervals over prompts alone"
    where = f"on {found['task']} with {found['model']}, {seeds}"
    if "why_none" in ratio:
        dpo, ppo = (
            f"{_figure(row['against_start'])} above the start after {duration(row['cost']['seconds'].value)}"
            for row in (ours, theirs)
        )
        first = (
            f"{where[0].upper()}{where[1:]}, DPO ended {dpo}, and a reward model with PPO {ppo}: no ratio of costs, "
            f"since {ratio['why_none']}."
        )
    else:
        level = _range(ratio["levels"], 2)
        costs = f"{_times(ratio['seconds'])} the time and {_times(ratio['flops'])} the FLOPs of {ours['name']}"
        reached = f"up to the reward that both reached ({level} by {found['score']})"
        what = f"a reward model with PPO cost {costs} {reached}, {where}."
        if found["seeds"] > 1 and ratio["seconds"].low <= 1 <= ratio["seconds"].high:
            what = f"no difference in time shown: {what}"
        first = what[0].upper() + what[1:]
    ends = " and ".join(
        f"{name} {_figure(row['end']['reward'])} at {row['end']['kl'].value:.1f} nats"
        for name, row in (("DPO", ours), ("PPO", theirs))
    )
    start, two = (f"{row['reward'].value:.2f}" for row in best[:2])
    equal, gap = found["at_equal_kl"], found["difference"]["reward"]
    if "why_none" in equal:
        far = f"No comparison at equal distance: {equal['why_none']}"
    else:
        far = (
            f"At equal distance from the start ({_range(equal['levels'], 1)} nats) PPO less DPO is "
            f"{_figure(equal['reward'])}, {_verdict(equal['reward'])}"
        )
    second = f"{far}; at the end {ends}, {_figure(gap)}, {_verdict(gap)} (start {start}, best of 2 {two})."
    return [first, second]


def _verdict(gap: Estimate) -> str:
    return "PPO earned more" if gap.low > 0 else "PPO earned less" if gap.high < 0 else "no difference shown"


def _range(values: Sequence[float], digits: int) -> str:
    """The least to the greatest of some numbers; one, where they print alike."""
    return " to ".join(dict.fromkeys(f"{end(values):.{digits}f}" for end in (min, max)))


def _figure(value: Estimate) -> str:
    interval = f" [{value.low:.2f}, {value.high:.2f}]" if math.isfinite(value.low) else ""
    return f"{value.value:.2f}{interval}"


def _times(ratio: Estimate) -> str:
    interval = f" [{ratio.low:.1f}, {ratio.high:.1f}]" if math.isfinite(ratio.high) else ""
    return f"{ratio.value:.1f} times{interval}"
