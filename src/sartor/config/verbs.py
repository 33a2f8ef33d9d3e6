"""The options of the verbs that do not train, or train by way of another verb."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sartor.config.fields import (
    AsChat,
    Checked,
    Count,
    Dtype,
    NotNegative,
    OptionalPath,
    OptionalPositive,
    OptionalText,
    Seed,
    Wanted,
)


@dataclass(kw_only=True)
class SampleConfig(Checked):
    """Answer prompts with a model, several samples each."""

    model: str
    """Hub id, folder (a run's model/ too), .gguf file, or 'smollm2'."""
    prompts: str
    """Text file with one prompt a line, or data with a 'prompt' column (strings or role/content lists)."""
    output: OptionalPath = None
    """JSONL file to write (prompt, completions); by default they are shown."""
    n: Annotated[Count, tyro.conf.arg(aliases=("-n",))] = 1
    """Samples per prompt."""
    max_new_tokens: Count = 256
    """Longest completion, in tokens."""
    temperature: NotNegative = 1.0
    """0 always takes the likeliest token."""
    top_p: Annotated[float, Wanted("above 0 and at most 1", lambda value: 0 < value <= 1)] = 1.0
    """Sample from the likeliest tokens that make up this much probability."""
    batch_size: Count = 64
    """Completions decoded at a time."""
    max_length: Count = 4096
    """Tokens of the prompt; longer ones lose their start."""
    as_chat: AsChat = "auto"
    """Plain strings as a user turn of the chat template: always, never (as they stand), auto: where there is one."""
    dtype: Dtype = "auto"
    """bfloat16, float32, or auto."""
    seed: Seed = 0
    """Same seed, same machine, same samples."""


@dataclass(kw_only=True)
class LossesConfig(Checked):
    """The catalogue of objectives; with names, what each does, what it needs and what was measured of it."""

    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME ...]")] = ()
    """Losses to show in full: NAME[,OPTION=VALUE], or file.py:function; all in a table where none is named."""
    plot: bool = False
    """Draw loss and gradient weights over the margin."""
    output: Path = Path("losses.png")
    """Where to draw: .png, .svg or .pdf."""
    beta: OptionalPositive = None
    """β for all of them; by default each one's own."""
    reach: Annotated[float, Wanted("above 0, and below a million nats", lambda value: 0 < value < 1e6)] = 40.0
    """Largest margin drawn, in nats."""


@dataclass(kw_only=True)
class DemoConfig(Checked):
    """The whole road in ten minutes: answers, preferences, training, evidence on prompts never trained on."""

    model: str = "smollm2"
    """Model to fit."""
    data: OptionalText = None
    """Your own preferences instead of the built-in stand-in for a person."""
    output: OptionalPath = None
    """Run folder; by default runs/demo, or the next free number after a finished one."""
    seed: Seed = 0
    """Same seed, same machine, same result."""
