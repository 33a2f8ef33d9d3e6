"""Sartor's side of preference_step.py: one fresh process, one contender, what it is to do in a folder's job.json.

It loads, scores the reference into a folder of its own, takes every step of the case, and writes what each step cost
and gave to the path that the job names.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from sartor.data.trees import TokenTree
from sartor.machine import machine, set_up_memory
from sartor.model.forward import check
from sartor.model.heads import new_reward_model
from sartor.model.load import LanguageModel, fingerprint, load
from sartor.model.reference import reference_logps
from sartor.objectives.specs import parse_objective
from sartor.train.gradient import batch_gradient
from sartor.train.loop import MasterWeights, Plan, Schedule, train_steps
from sartor.train.preferences import Preferences
from sartor.train.reward import reward_gradient, reward_objective
from sartor.train.sft import sft_gradient

Gradient = Callable[[Sequence[int]], dict[str, float]]
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
ROWS, REPEATS = 2048, 20


def main(job: dict[str, Any]) -> dict[str, Any]:
    """All steps of one case."""
    limit_memory(job["memory_gib"])
    set_up_memory()
    case = json.loads(Path(job["case"]).read_text())
    trees = [tree_of(row) for row in case["trees"]]
    model = load_model(job)
    gradient, reference_seconds = gradient_of(model, job, trees)
    weights = MasterWeights(model.network, weight_decay=0.0)
    plan = Plan(len(trees), case["batch_size"], len(case["steps"]), seed=case["seed"])
    schedule = Schedule(job["learning_rate"], plan.steps, 0, "constant")
    last, steps = time.time(), []
    for metrics in train_steps(weights, plan, schedule, gradient, max_grad_norm=job["max_grad_norm"]):
        now = time.time()
        if not steps:
            first = now - job["started"]
        seconds, last = now - last, now
        kept = {name: metrics[name] for name in ("loss", "grad_norm", "tokens")}
        steps.append({**kept, "seconds": seconds, "pairs": metrics["examples"]})
    assert [plan.batch(step) for step in range(plan.steps)] == case["steps"]
    result = {
        "steps": steps,
        "first_step_seconds": first,
        "reference_seconds": reference_seconds,
        "peak_gib": peak_gib(),
        "shares_prompts": model.shares_prompts,
        **parameter_counts(model),
        "versions": {**machine(), "dtype": str(model.core.dtype).removeprefix("torch.")},
    }
    if job["profile"]:  # one step more than the others took, after all that is timed
        result["matrix_share"] = matrix_share(lambda: (gradient(plan.batch(0)), weights.step(0.0, 1.0)))
    return result


def load_model(job: dict[str, Any]) -> LanguageModel:
    if job["kind"] == "reward":
        return new_reward_model(job["model"], job["dtype"])
    return load(job["model"], job["dtype"], lora_r=job["lora_r"], lora_alpha=job["lora_alpha"])


def gradient_of(model: LanguageModel, job: dict[str, Any], trees: Sequence[TokenTree]) -> tuple[Gradient, float]:
    """The gradient of a batch, and the seconds that the reference took."""
    budget = job["token_budget"]
    if job["kind"] == "reward":
        objective = reward_objective(("bradley_terry",))
        return lambda items: reward_gradient(model, objective, trees, items, budget), 0.0
    check(model, max(trees, key=lambda tree: tree.size))
    if job["kind"] == "sft":
        return lambda items: sft_gradient(model, trees, items, budget), 0.0
    start = time.time()
    fresh = Path(job["scratch"]) / "reference" / fingerprint(model)
    reference = reference_logps(model, trees, token_budget=budget, folder=fresh)
    data, objective = Preferences(list(trees), [], [], reference), parse_objective([f"dpo,beta={job['beta']}"])
    return lambda items: batch_gradient(model, objective, data, items, budget), time.time() - start


def tree_of(row: dict[str, Any]) -> TokenTree:
    return TokenTree(tuple(row["prompt"]), tuple(map(tuple, row["branches"])), tuple(row["ranks"]))


def parameter_counts(model: LanguageModel) -> dict[str, int]:
    """Parameters in the body's products, and in those of the head; what looks up tokens multiplies nothing."""
    embedding = model.core.get_input_embeddings().weight
    body = [p for n, p in model.core.base_model.named_parameters() if p is not embedding and "lora_" not in n]
    head = model.core.score if hasattr(model.core, "score") else model.core.get_output_embeddings()
    return {"body_parameters": sum(p.numel() for p in body), "head_parameters": head.weight.numel()}


def matrix_share(step: Callable[[], object]) -> float:
    """Share of matrix products in the wall time of a step, what Python takes between operations included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(times.get(name, 0.0) for name in PRODUCTS) / 1e6 / seconds


def matrix_peak(name: str) -> float:
    """FLOP/s of the best bf16 product among the model's own shapes."""
    config = AutoConfig.from_pretrained(name)
    hidden, width = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    best = 0.0
    for inner, outer in {(hidden, width), (width, hidden), (hidden, heads), (hidden, config.vocab_size)}:
        a, b = torch.randn(ROWS, inner).bfloat16(), torch.randn(outer, inner).bfloat16()
        for _ in range(REPEATS):
            start = time.perf_counter()
            a @ b.t()
            best = max(best, 2 * ROWS * inner * outer / (time.perf_counter() - start))
    return best


def limit_memory(gib: float) -> None:
    """Fail with an error that can be read before the system ends some process for want of memory."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30),) * 2)


def peak_gib() -> float:
    """Peak resident memory of this process: not ``ru_maxrss`` where that counts the parent's from before the start."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    work = json.loads(Path(sys.argv[1]).read_text())
    try:
        found = {"flops": matrix_peak(work["model"])} if work["kind"] == "peak" else main(work)
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        found = {"error": "memory"}
    Path(work["result"]).write_text(json.dumps(found))
