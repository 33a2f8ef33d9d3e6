"""The last word of a run: what changed, how sure that is, what it cost. Written for the report and the model card."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sartor.config import TrainingConfig, to_yaml
from sartor.evaluate.answers import Answers
from sartor.evaluate.statistics import ONE_UNIT, Estimate
from sartor.rewards.scoring import as_rows
from sartor.train.stopwatch import MEASURING, Stopwatch


def percent(share: Estimate) -> str:
    """A share with its interval in percent.

    >>> percent(Estimate(0.65, 0.553, 0.736, 100))
    '65.0 % [55.3, 73.6]'
    """
    known = math.isfinite(share.high)
    interval = f"[{100 * share.low:.1f}, {100 * share.high:.1f}]" if known else ONE_UNIT
    return f"{100 * share.value:.1f} % {interval}"


def headline(
    estimates: Mapping[str, Estimate], held_out: str, comparison: Mapping[str, Any] | None, scorer: str | None
) -> str:
    """The result in one sentence with its 95 % interval, and no more than the interval allows to say."""
    if comparison and comparison.get("win_rate"):
        share = comparison["win_rate"]
        what = (
            f"by {scorer}, its answers to {share.n} held-out prompts score better than the original "
            f"model's in {percent(share)} of comparisons."
        )
    else:
        share = estimates["rewards/accuracies"]
        what = f"in {percent(share)} of {held_out} held out, the chosen answer gained on the rejected one."
        if "judged" in held_out:
            what = f"of {held_out} held out, a good one gained on a bad one in {percent(share)} of their meetings."
    if not math.isfinite(share.value):
        return "Not measurable: one of the labels is missing from what was held out."
    return f"No difference shown: {what}" if share.low <= 0.5 <= share.high else what[0].upper() + what[1:]


def cut_answers(before: Answers, after: Answers, limit: int) -> list[str]:
    """A note where answers were cut at the limit of new tokens: their lengths are then floors."""
    counts = [sum(length >= limit for row in answers.lengths for length in row) for answers in (before, after)]
    total = sum(map(len, after.lengths))
    return [f"answers cut at {limit} tokens: {counts[0]} of {total} before, {counts[1]} after"] if any(counts) else []


def side_by_side(before: Answers, after: Answers) -> list[dict[str, Any]]:
    """Rows of ``samples.jsonl``."""
    none: list[Any] = [None] * len(before.prompts)
    columns = zip(before.prompts, before.texts, after.texts, before.scores or none, after.scores or none, strict=True)
    return [
        {"prompt": as_rows(prompt), "before": old, "after": new, "score_before": old_score, "score_after": new_score}
        for prompt, old, new, old_score, new_score in columns
    ]


def model_card(config: TrainingConfig, summary: Mapping[str, Any]) -> str:
    """``README.md`` of a run, with the metadata block that the Hub reads."""
    base = None if Path(config.model).exists() or config.model == "smollm2" else config.model
    meta = {"library_name": "peft" if config.lora_r else "transformers", "tags": ["sartor", summary["verb"]]}
    front = yaml.safe_dump({**meta, **({"base_model": base} if base else {})}, sort_keys=False)
    notes = "".join(f"- {note}\n" for note in summary["data"]["notes"])
    return f"""---
{front}---

# {summary["title"]}

{summary["headline"]}

Trained on {summary["data"]["train"]}; held out: {summary["data"]["eval"]}.
{notes}
The model is in `model/`, every number with its interval in `report.html` and `metrics.jsonl`. Repeat it with

    {summary["command"]}

```yaml
{to_yaml(config)}```
"""


def cost(watch: Stopwatch, training: Sequence[Mapping[str, Any]], peak_memory_gib: float, unit: str) -> dict[str, Any]:
    """What the run cost: seconds and FLOPs by stage, all told and without measuring, tokens, speed in ``unit`` (pairs,
    completions) per second, memory.
    """
    busy, spent = sum(row["seconds"] for row in training), watch.record()
    needed = {kind: sum(v for name, v in by.items() if name not in MEASURING) for kind, by in spent.items()}
    return {
        "seconds": watch.total,
        "stages": [
            {"name": name, "seconds": round(value, 1), "flops": watch.flops.get(name, 0.0)}
            for name, value in watch.seconds.items()
        ],
        "without_measuring": needed,
        "peak_memory_gib": round(peak_memory_gib, 2),
        "train_tokens": int(sum(row["tokens"] for row in training)),
        "speed": sum(row["examples"] for row in training) / busy if busy else None,
        "unit": unit,
    }
