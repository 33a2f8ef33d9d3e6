"""Pairs per second and peak memory of full DPO steps, against what the machine's matrix products give.

usage: python benchmarks/preference_step.py [--data FILE] [--pairs 64] [--batch-size 8] [--max-length 512]

Trains `smollm2` on real comparisons with the reference log-probs at hand (timed apart), two steps to warm up, and
writes the raw numbers to benchmarks/results/. Times are for one process on an otherwise idle machine.
"""

import json
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import tyro

from sartor.data.chat import encode_preferences
from sartor.data.formats import load_examples
from sartor.machine import keep_freed_memory, machine, peak_memory_gib
from sartor.model.forward import check
from sartor.model.load import load
from sartor.model.reference import score_trees
from sartor.objectives.specs import parse_objective
from sartor.train.gradient import batch_gradient
from sartor.train.loop import MasterWeights, Plan, Schedule, train_steps
from sartor.train.preferences import Preferences
from sartor.types import Comparison

HERE = Path(__file__).parent


@dataclass
class Options:
    """What to measure."""

    data: str = str(HERE.parents[1] / "shared/data/hh-rlhf/harmless-base-2000.jsonl.gz")
    pairs: int = 64
    batch_size: int = 8
    max_length: int = 512
    token_budget: int = 2048
    warm_up: int = 2


def matrix_peak() -> float:
    """FLOP/s of the best bf16 product among the model's own shapes."""
    best = 0.0
    for inner, outer in ((576, 1536), (1536, 576), (576, 576)):
        a, b = torch.randn(2048, inner).bfloat16(), torch.randn(outer, inner).bfloat16()
        for _ in range(20):
            start = time.perf_counter()
            a @ b.t()
            best = max(best, 2 * 2048 * inner * outer / (time.perf_counter() - start))
    return best


def main(options: Options) -> None:
    keep_freed_memory()
    peak_flops = matrix_peak()
    model = load("smollm2")
    rows = load_examples(options.data, wanted=(Comparison,)).examples[: options.pairs]
    trees = encode_preferences(model.tokenizer, rows, options.max_length).trees
    check(model, max(trees, key=lambda tree: tree.size))
    start = time.perf_counter()
    reference = [score_trees(model, [tree])[0] for tree in trees]
    reference_seconds = time.perf_counter() - start
    data = Preferences(trees, [], [], reference)
    weights = MasterWeights(model.network, weight_decay=0.0)
    objective = parse_objective(["dpo"])
    steps = train_steps(
        weights,
        Plan(len(trees), options.batch_size, len(trees) // options.batch_size, seed=0),
        Schedule(5e-6, len(trees), 0, "constant"),
        lambda items: batch_gradient(model, objective, data, items, options.token_budget),
        max_grad_norm=1.0,
    )
    pairs = tokens = 0
    for metrics in steps:
        if metrics["step"] == options.warm_up:
            start = time.perf_counter()
        elif metrics["step"] > options.warm_up:
            pairs, tokens = pairs + int(metrics["examples"]), tokens + int(metrics["tokens"])
    seconds = time.perf_counter() - start
    flops = 6 * model.parameters * tokens / seconds
    result = {
        "case": "full DPO, reference cached",
        "options": vars(options) | {"data": Path(options.data).name},
        "pairs_per_second": round(pairs / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "tflops_useful": round(flops / 1e12, 3),
        "tflops_matrix_peak": round(peak_flops / 1e12, 3),
        "share_of_peak": round(flops / peak_flops, 3),
        "reference_pairs_per_second": round(len(trees) / reference_seconds, 3),
        "peak_memory_gib": round(peak_memory_gib(), 2),
        "last_loss": metrics["loss"],
        "machine": machine(),
        "date": date.today().isoformat(),
    }
    print(json.dumps(result, indent=1))
    name = f"preference_step-{date.today().isoformat()}.json"
    (HERE / "results" / name).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
