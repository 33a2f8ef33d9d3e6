"""The options of ``sartor discover``."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sartor.config.fields import (
    NOT_BELOW_0,
    Checked,
    Count,
    Dtype,
    NotNegative,
    OneOf,
    OptionalCount,
    OptionalPositive,
    OptionalText,
    Positive,
    Seed,
    Wanted,
)
from sartor.config.training import words
from sartor.errors import UserError

NAMES = tyro.conf.arg(metavar="NAME ...")
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
NAMED = ("dpo", "ipo", "hinge", "simpo", "lrml", "apo_zero", "sft", "dpop")


def seconds_of(text: str) -> float:
    """A time as people type it, in seconds; 0 for what is none.

    >>> seconds_of("30m"), seconds_of("1h30m"), seconds_of("45"), seconds_of("soon")
    (1800.0, 5400.0, 45.0, 0.0)
    """
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)([smhd]))+", text)
    if found:
        return sum(float(n) * UNITS[unit] for n, unit in re.findall(r"(\d+(?:\.\d+)?)([smhd])", text))
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0


@dataclass(kw_only=True)
class DiscoverConfig(Checked):
    """Search for a better preference objective, and say how sure it is: screens, cheap rungs, real training, retrial.

    `sartor discover show ID --output RUN` explains any candidate of a search.
    """

    output: Path
    """Folder of the search: archive.sqlite, report.html, losses/NAME.py to train with."""
    model: str = "smollm2"
    """Model that objectives are tried on: Hub id, folder, .gguf file, or 'smollm2'."""
    proxy: OptionalText = None
    """Smaller model to search on, such as 'smollm2': then only winners and known losses are trained on --model."""
    task: Annotated[str, OneOf("sentiment", "summary", "preferences")] = "sentiment"
    """sentiment, summary: the tasks of `sartor compare`, whose truth is known; preferences: your own --data."""
    data: OptionalText = None
    """With --task preferences: comparisons or rankings, a JSON, JSONL, CSV or Parquet file (.gz too), or Hub id."""
    score: OptionalText = None
    """With --task preferences: judge what is trained by this scorer of its answers, a name or file.py:function."""
    budget: Annotated[str, Wanted("a time such as 30m, 2h or 1h30m", lambda text: seconds_of(text) > 0)] = "1h"
    """Device time: set-up, search, and the retrial of the winners. What known losses cost here decides the plan."""
    proposer: Annotated[tuple[str, ...], NAMES] = ("random", "mutate", "cross", "tune", "prune")
    """Who invents: random, mutate, cross, tune, prune (of the grammar), model (needs --endpoint); a bandit mixes."""
    start: Annotated[tuple[str, ...], NAMES] = NAMED
    """Losses of the catalogue that the search begins with, and is compared with."""
    candidates: OptionalCount = None
    """Candidates through the linear rung, in place of what the budget allows."""
    adapters: OptionalCount = None
    """Of these, how many are really trained, in place of what the budget allows."""
    finalists: Count = 1
    """Winners to train again on data and prompts that the search never touched."""
    seeds: Annotated[int, Wanted("0, or 2 and more: one has no interval", lambda value: value == 0 or value > 1)] = 3
    """Fresh seeds of that retrial, for winners and for dpo, simpo and lrml alike; 0: none, and no verdict."""

    endpoint: OptionalText = None
    """Base URL of an OpenAI-compatible server (vLLM, llama.cpp, Ollama, hosted): http://localhost:8000/v1."""
    endpoint_model: OptionalText = None
    """What the model is called there."""
    endpoint_key: str = "OPENAI_API_KEY"
    """NAME of the environment variable that holds the key; the key itself is written nowhere."""
    max_tokens: Count = 500_000
    """Tokens to and from the endpoint, at most."""
    max_cost: OptionalPositive = None
    """Money for it, at most, in the unit of the two prices."""
    price_in: NotNegative = 0.0
    """Price of a million tokens sent."""
    price_out: NotNegative = 0.0
    """Price of a million tokens received."""

    prompts: OptionalCount = None
    """Prompts to train candidates on, at most; by default 32 of a task, 96 of --data."""
    held_out_prompts: OptionalCount = None
    """Prompts to judge candidates by, at most; by default 32 of a task, 96 of --data."""
    answers: Annotated[int, Wanted("2 to 9", lambda value: 2 <= value <= 9)] = 8
    """Answers to each prompt of a task that are ranked: candidates learn from the best and the worst."""
    max_new_tokens: Count = 24
    """Length of answers, in tokens."""
    max_length: Count = 512
    """Tokens of prompt and completion."""
    batch_size: Count = 2
    """Prompts per optimizer step."""
    epochs: Positive = 1.0
    """Passes of a candidate over its training data."""
    lora_r: Count = 16
    """Rank of the adapter that every candidate trains."""
    token_budget: Count = 2048
    """Tokens per forward pass: bounds memory, never changes the result."""
    dtype: Dtype = "auto"
    """bfloat16, float32, or auto."""
    workers: Annotated[int, NOT_BELOW_0] = 0
    """Run rungs as so many Ray tasks at a time (sartor[ray]); 0: in this process."""
    ray_address: OptionalText = None
    """Ray cluster to join, HOST:PORT or auto; by default one on this machine."""
    seed: Seed = 0
    """Same seed, same machine, same search."""
    resume: bool = False
    """Go on with the search in --output."""

    def __post_init__(self) -> None:
        self.proposer, self.start = words(self.proposer), words(self.start)
        super().__post_init__()
        if (self.task == "preferences") != (self.data is not None):
            raise UserError("--task preferences and --data go together: the one says what the other is for")
        if self.proxy and not self.seeds:
            raise UserError("--proxy: the retrial alone trains --model, and --seeds 0 leaves it out")
        if self.score and self.task != "preferences":
            raise UserError(f"--score: the task {self.task} has its own; it goes with --task preferences")
        if ("model" in self.proposer) != (self.endpoint is not None):
            raise UserError("--proposer model and --endpoint go together: name a server, and ask for it")
        if self.endpoint and not self.endpoint_model:
            raise UserError("--endpoint: --endpoint-model says what the model is called there")
        if self.ray_address and not self.workers:
            raise UserError("--ray-address: --workers says how many tasks to run at a time")
