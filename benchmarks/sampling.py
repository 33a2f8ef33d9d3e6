"""Tokens per second of the local sampler, and of transformers' generate on the same prompts.

usage: python benchmarks/sampling.py [--batch-size 64] [--max-new-tokens 64] [--peer]

Raw numbers go to benchmarks/results/.
"""

import json
import time
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from pathlib import Path

import torch
import tyro

from sartor.data.chat import encode_prompts
from sartor.machine import keep_freed_memory, machine, peak_memory_gib
from sartor.model.load import load
from sartor.rollout.local import Sampling, sample

HERE = Path(__file__).parent


@dataclass
class Options:
    """What to measure. Sixteen prompts by four samples fill a batch of 64."""

    batch_size: int = 64
    samples: int = 4
    max_new_tokens: int = 64
    runs: int = 3
    peer: bool = False


def main(options: Options) -> None:
    keep_freed_memory()
    model = load("smollm2")
    text = (files("sartor.data") / "prompts" / "sentiment_train.txt").read_text(encoding="utf-8")
    prompts = text.splitlines()[: options.batch_size // options.samples]
    ids = encode_prompts(model.tokenizer, prompts, 512, as_chat=True)
    sample(model, ids[:2], 1, Sampling(2))
    speeds = []
    for run in range(options.runs):
        start = time.perf_counter()
        rows = sample(model, ids, options.samples, Sampling(options.max_new_tokens, seed=run))
        speeds.append(sum(len(one.tokens) for row in rows for one in row) / (time.perf_counter() - start))
    result = {
        "case": "local sampler",
        "options": vars(options),
        "tokens_per_second": [round(speed, 1) for speed in speeds],
        "peak_memory_gib": round(peak_memory_gib(), 2),
        "machine": machine(),
        "date": date.today().isoformat(),
    }
    if options.peer:
        result["generate_tokens_per_second"] = round(_generate(model, ids, options), 1)
    print(json.dumps(result, indent=1))
    (HERE / "results" / f"sampling-{date.today().isoformat()}.json").write_text(json.dumps(result, indent=1) + "\n")


def _generate(model, ids, options: Options) -> float:
    model.core.set_attn_implementation(model.own_attention)
    width, pad = max(map(len, ids)), model.tokenizer.eos_token_id
    rows = [[pad] * (width - len(row)) + list(row) for row in ids for _ in range(options.samples)]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids for _ in range(options.samples)]
    torch.manual_seed(0)
    start = time.perf_counter()
    with torch.no_grad():
        out = model.core.generate(
            input_ids=torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            do_sample=True,
            top_k=0,
            max_new_tokens=options.max_new_tokens,
            pad_token_id=pad,
        )
    seconds = time.perf_counter() - start
    ends = [(row[width:] == pad).nonzero() for row in out]
    tokens = sum(int(end[0]) + 1 if len(end) else out.shape[1] - width for end in ends)
    return tokens / seconds


if __name__ == "__main__":
    main(tyro.cli(Options))
