"""Tokens per second of the local sampler beside transformers' generate, in turns, on the same prompts.

usage: OMP_PROC_BIND=true python benchmarks/sampling.py [--cases short mixed distinct] [--rounds 3] [--no-peer]

Both sample at temperature 1 from bfloat16 weights, stop at the same end tokens, and count what comes up to and with
the first of those. ``generate`` gets what a knowledgeable user would give it: one batch, padding on the left,
inference mode, and the better of its growing and its static cache. Before any timing, greedy answers of both are
compared in float32 (in bfloat16 near-ties fall either way); if they differ, the exit code is 1. Raw numbers go to
benchmarks/results/. Without OMP_PROC_BIND both threads may come to wait for each other on one core, 8 ms at a time.
"""

import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from pathlib import Path

import torch
import tyro

from sartor.console import progress
from sartor.data.chat import encode_prompts
from sartor.machine import machine, peak_memory_gib, release_freed_memory, set_up_memory
from sartor.model.load import LanguageModel, load
from sartor.rollout.local import Sampling, sample

HERE = Path(__file__).parent
CACHES = {"generate": None, "generate, static cache": "static"}
Prompts = list[tuple[int, ...]]


@dataclass
class Options:
    """What to measure. ``short`` and ``mixed``: 16 prompts by 4 samples; ``distinct``: 64 prompts by one."""

    model: str = "smollm2"
    cases: tuple[str, ...] = ("short", "mixed", "distinct")
    max_new_tokens: int = 64
    rounds: int = 3
    peer: bool = True
    target: float = 3.0


def case(model: LanguageModel, name: str) -> tuple[Prompts, int]:
    """Prompts and the number of samples of each; ``mixed`` joins 1, 3, 5 or 7 lines to prompts of unlike length."""
    text = (files("sartor.data") / "prompts" / "sentiment_train.txt").read_text(encoding="utf-8").splitlines()
    prompts, samples = {
        "short": (text[:16], 4),
        "mixed": ([" ".join(text[i : i + 1 + 2 * (i % 4)]) for i in range(16)], 4),
        "distinct": (text[:64], 1),
    }[name]
    return [tuple(ids) for ids in encode_prompts(model.tokenizer, prompts, 512, as_chat=True)], samples


def ours(model: LanguageModel, prompts: Prompts, samples: int, new: int, seed: int) -> int:
    """Sample with Sartor; returns the number of tokens."""
    rows = sample(model, prompts, samples, Sampling(new, batch_size=len(prompts) * samples, seed=seed))
    return sum(len(one.tokens) for row in rows for one in row)


def generate(model: LanguageModel, prompts: Prompts, samples: int, new: int, seed: int, cache: str | None) -> int:
    """Sample with transformers in one batch; returns the number of tokens up to and with the end."""
    model.core.set_attn_implementation(model.own_attention)
    ends, width = sorted(model.end_tokens), max(map(len, prompts))
    repeated = [ids for ids in prompts for _ in range(samples)]
    rows = [[ends[0]] * (width - len(ids)) + list(ids) for ids in repeated]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in repeated]
    torch.manual_seed(seed)
    with torch.inference_mode():
        out = model.core.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new,
            eos_token_id=ends,
            pad_token_id=ends[0],
            use_cache=True,
            cache_implementation=cache,
        )
    answers = out[:, width:].tolist()
    return sum(next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in answers)


def greedy_equal(name: str) -> bool:
    """Whether greedy answers to a few prompts, short and long in one batch, are generate's, in float32."""
    model = load(name, "float32")
    prompts, _ = case(model, "mixed")
    rows = sample(model, prompts[:6], 1, Sampling(32, temperature=0.0, batch_size=4))
    model.core.set_attn_implementation(model.own_attention)
    for prompt, (one,) in zip(prompts, rows, strict=False):
        with torch.inference_mode():
            ids = torch.tensor([prompt], device=model.device)
            ends = sorted(model.end_tokens)
            out = model.core.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=ends, pad_token_id=ends[0])
        if tuple(out[0, len(prompt) :].tolist()) != one.tokens:
            return False
    return True


def measured(run: Callable[[], int]) -> dict[str, float]:
    """Tokens, seconds on the clock and of the processor, and the highest memory of one run."""
    _forget_peak()
    start, busy = time.perf_counter(), time.process_time()
    tokens = run()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return {"tokens": tokens, "seconds": seconds, "cpu_seconds": busy, "peak_memory_gib": _peak()}


def _forget_peak() -> None:
    release_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def _peak() -> float:
    """Highest memory since the last call of ``_forget_peak``; ``ru_maxrss`` alone never falls."""
    status = Path("/proc/self/status")
    if torch.cuda.is_available() or not status.is_file():
        return peak_memory_gib()
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
    return int(found[1]) / 2**20 if found else peak_memory_gib()


def main(options: Options) -> None:
    set_up_memory()
    equal = greedy_equal(options.model)
    print(f"greedy answers in float32 equal to generate's: {'yes' if equal else 'NO'}")
    if not equal:
        sys.exit(1)
    model = load(options.model)
    roads: dict[str, Callable[[Prompts, int, int], int]] = {
        "sartor": lambda prompts, n, seed: ours(model, prompts, n, options.max_new_tokens, seed)
    }
    for name, cache in CACHES.items() if options.peer else ():
        roads[name] = lambda prompts, n, seed, cache=cache: generate(
            model, prompts, n, options.max_new_tokens, seed, cache
        )
    sample(model, case(model, "short")[0][:2], 1, Sampling(2))
    runs: dict[str, dict[str, list[dict[str, float]]]] = {c: {road: [] for road in roads} for c in options.cases}
    with progress("sampling", options.rounds * len(options.cases) * len(roads)) as advance:
        for seed in range(options.rounds):
            for name in options.cases:
                prompts, n = case(model, name)
                for road, run in roads.items():
                    # Bound now: the loop's names mean something else at the next turn.
                    runs[name][road].append(measured(lambda run=run, p=prompts, n=n, seed=seed: run(p, n, seed)))
                    advance(1)
    _show(runs, options)
    result = {
        "case": "local sampler",
        "options": vars(options),
        "omp": {key: value for key, value in os.environ.items() if key.startswith("OMP_")},
        "greedy_equal": equal,
        "runs": runs,
        "machine": machine(),
        "date": date.today().isoformat(),
    }
    (HERE / "results" / f"sampling-{date.today().isoformat()}.json").write_text(json.dumps(result, indent=1) + "\n")


def _speeds(runs: Sequence[dict[str, float]]) -> list[float]:
    return [run["tokens"] / run["seconds"] for run in runs]


def _show(runs: dict[str, dict[str, list[dict[str, float]]]], options: Options) -> None:
    print(f"{'case':10}{'':24}{'tokens/s':>10}{'range':>14}{'memory':>12}{'ratio':>18}")
    ratios = []
    for name, roads in runs.items():
        best = max((road for road in roads if road != "sartor"), key=lambda r: _median(roads[r]), default=None)
        for road, measurements in roads.items():
            speeds, note = _speeds(measurements), ""
            if road == "sartor" and best:
                turns = [a / b for a, b in zip(speeds, _speeds(roads[best]), strict=True)]
                ratios.append(statistics.median(turns))
                note = f"{ratios[-1]:.2f} ({min(turns):.2f}-{max(turns):.2f})"
            memory = max(run["peak_memory_gib"] for run in measurements)
            span = f"{min(speeds):.0f}-{max(speeds):.0f}"
            print(f"{name:10}{road:24}{_median(measurements):10.0f}{span:>14}{memory:8.2f} GiB{note:>18}")
    if ratios:
        verdict = "met" if min(ratios) >= options.target else "missed"
        print(f"target: ≥ {options.target:g}x generate (its better cache, each case): {verdict}")


def _median(runs: Sequence[dict[str, float]]) -> float:
    return statistics.median(_speeds(runs))


if __name__ == "__main__":
    main(tyro.cli(Options))
