"""One dataclass per verb. YAML files and the command line fill the same fields; the strings under them are the help."""

import dataclasses
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from sartor.errors import UserError, unknown

# What help shows for an option that may be left out: FLOAT and not {None}|FLOAT.
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]
OptionalText = Annotated[str | None, tyro.conf.arg(metavar="STR")]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]


@dataclass(kw_only=True)
class DpoConfig:
    """Fit a model to comparisons, rankings or judged completions: DPO (arXiv 2305.18290) and its kin."""

    model: str
    """Hub id, folder, .gguf file, or 'smollm2' (135M chat model, no Hub account needed)."""
    data: str
    """JSON, JSONL, CSV or Parquet file (.gz too), or Hub id: pairs, HH, rankings, judged answers."""
    output: Path
    """Run folder to create: config, metrics, checkpoints, model/, report.html."""

    eval_data: OptionalText = None
    """Held-out preferences. By default a share of --data, split by prompt."""
    eval_fraction: float = 0.1
    """Share of --data to hold out where there is no --eval-data."""
    limit: OptionalInt = None
    """Train on at most so many rows, for a quick try."""
    eval_limit: OptionalInt = None
    """Hold out at most so many rows."""
    split: str = "train"
    """Split to read of a Hub data set."""
    eval_split: OptionalText = None
    """Split to read of --eval-data; as --split by default."""
    on_bad_row: str = "skip"
    """skip: leave out up to 1 % of rows and say so; drop: any number; error: stop at the first."""
    as_chat: str = "auto"
    """Plain strings as turns of the chat template: always, never (continued as they stand), auto: if it has one."""
    max_length: int = 1024
    """Tokens of prompt and completion; longer prompts lose their start, longer completions are left out."""

    loss: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ("dpo",)
    """Objective, NAME[:WEIGHT][,OPTION=VALUE]; several are mixed. `sartor losses` lists them; or file.py:function."""
    beta: OptionalFloat = None
    """KL leash; higher stays closer to the reference. By default each objective's own, 0.1 for DPO."""
    wpo: bool = False
    """Weigh pairs by how likely the policy itself would write them (WPO, arXiv 2406.11827)."""
    ld_alpha: OptionalFloat = None
    """Weight of the tokens that one answer has beyond the other's length (LD-DPO, arXiv 2409.06411); 1 is none."""
    learning_rate: OptionalFloat = None
    """Peak learning rate. Default by size: full 2e-5 to 0.5B, 5e-6 to 3B, 1e-6 above; LoRA 10 times that."""
    schedule: str = "cosine"
    """How the learning rate falls after warm-up: cosine, linear, or constant."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Clip the gradient's norm to this."""
    epochs: float = 1.0
    """Passes over the training data."""
    max_steps: OptionalInt = None
    """Stop after so many optimizer steps, whatever --epochs says."""
    batch_size: int = 8
    """Prompts per optimizer step (a ranking of K answers counts as one)."""
    token_budget: int = 2048
    """Tokens per forward pass: bounds memory, never changes the result."""
    lora_r: int = 0
    """Rank of a LoRA adapter on all linear layers; 0 trains all weights."""
    lora_alpha: OptionalInt = None
    """LoRA scale; twice the rank by default."""
    dtype: str = "auto"
    """bfloat16, float32, or auto: bfloat16 where the hardware multiplies in it. Optimizer state is always fp32."""
    checkpointing: str = "auto"
    """Layers to run again in the backward pass, to save memory: always all, never any, auto: as many as must be."""

    eval_every: OptionalInt = None
    """Steps between evaluations; by default four in all."""
    eval_prompts: int = 32
    """Held-out prompts to answer before and after, and to measure KL on. 0: none."""
    eval_samples: int = 1
    """Answers to each of them."""
    max_new_tokens: int = 64
    """Length of these answers, in tokens."""
    temperature: float = 0.7
    """Temperature of these answers (KL is always measured at 1)."""
    score: OptionalText = None
    """Scorer for the answers: a registered name (vader), or file.py:function with TRL's reward signature."""
    save_every: int = 100
    """Steps between checkpoints; the last one is kept."""
    seed: int = 0
    """Fixes split, order, adapter and samples: same seed, same machine, same result."""
    resume: bool = False
    """Go on with the run in --output, bit for bit where it was interrupted."""

    def __post_init__(self) -> None:
        specs = (self.loss,) if isinstance(self.loss, str) else self.loss
        # "dpo sft:0.1" in quotes means the same as without; a path may have spaces in it.
        self.loss = tuple(part for spec in specs for part in ([spec] if ".py" in spec else spec.split()))
        positive = ("max_length", "batch_size", "token_budget", "max_grad_norm", "save_every", "max_new_tokens")
        for name in (*positive, "epochs", "eval_samples"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("beta", "learning_rate", "max_steps", "eval_every", "limit", "eval_limit"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "above 0")
        for name, number in vars(self).items():
            _require(not isinstance(number, float) or math.isfinite(number), name, number, "a finite number")
        for name in ("weight_decay", "temperature", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.lora_alpha is None or self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "above 0")
        _choose("schedule", self.schedule, ("cosine", "linear", "constant"))
        _choose("as_chat", self.as_chat, ("auto", "always", "never"))
        _choose("dtype", self.dtype, ("auto", "bfloat16", "float32"))
        _choose("on_bad_row", self.on_bad_row, ("skip", "error", "drop"))
        _choose("checkpointing", self.checkpointing, ("auto", "always", "never"))
        _require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "between 0 and 1")
        _require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "at least 0 and below 1")
        _require(self.lora_r >= 0, "lora_r", self.lora_r, "0 (full training) or a rank")
        _require(self.ld_alpha is None or 0 <= self.ld_alpha <= 1, "ld_alpha", self.ld_alpha, "between 0 and 1")
        _require(self.eval_prompts >= 0, "eval_prompts", self.eval_prompts, "0 or more")


@dataclass(kw_only=True)
class PlanConfig(DpoConfig):
    """What `sartor dpo` with the same options would take: time, memory, FLOPs; without weights, without the device."""

    model: str
    """As for dpo; a folder with nothing but a config.json will do."""
    data: str = ""
    """As for dpo; without it, --rows pairs of --prompt-tokens and twice --answer-tokens are assumed."""
    output: Path = Path()
    """Not written."""
    device: str = "here"
    """here: this machine, timed for a few seconds; or one of the table: h100, a100, l4, rtx4090 ..."""
    rows: int = 10_000
    """Pairs, where there is no --data."""
    prompt_tokens: int = 200
    """Tokens of a prompt, where there is no --data."""
    answer_tokens: int = 200
    """Tokens of an answer, where there is no --data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows", "prompt_tokens", "answer_tokens"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")


@dataclass(kw_only=True)
class SampleConfig:
    """Answer prompts with a model, several samples each."""

    model: str
    """Hub id, folder (a run's model/ too), .gguf file, or 'smollm2'."""
    prompts: str
    """Text file with one prompt a line, or data with a 'prompt' column (strings or role/content lists)."""
    output: OptionalPath = None
    """JSONL file to write (prompt, completions); by default they are shown."""
    n: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 1
    """Samples per prompt."""
    max_new_tokens: int = 256
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that make up this much probability."""
    batch_size: int = 64
    """Completions decoded at a time."""
    max_length: int = 4096
    """Tokens of the prompt; longer ones lose their start."""
    as_chat: str = "auto"
    """Plain strings as a user turn of the chat template: always, never (as they stand), auto: where there is one."""
    dtype: str = "auto"
    """bfloat16, float32, or auto."""
    seed: int = 0
    """Same seed, same machine, same samples."""

    def __post_init__(self) -> None:
        for name in ("n", "max_new_tokens", "batch_size", "max_length"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _choose("as_chat", self.as_chat, ("auto", "always", "never"))
        _choose("dtype", self.dtype, ("auto", "bfloat16", "float32"))
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        _require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")


@dataclass(kw_only=True)
class LossesConfig:
    """The catalogue of objectives; with names, what each does, what it needs and what was measured of it."""

    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME ...]")] = ()
    """Losses to show in full: NAME[,OPTION=VALUE], or file.py:function; all in a table where none is named."""
    plot: bool = False
    """Draw loss and gradient weights over the margin."""
    output: Path = Path("losses.png")
    """Where to draw: .png, .svg or .pdf."""
    beta: OptionalFloat = None
    """β for all of them; by default each one's own."""
    reach: float = 40.0
    """Largest margin drawn, in nats."""

    def __post_init__(self) -> None:
        _require(self.beta is None or self.beta > 0, "beta", self.beta, "above 0")
        _require(0 < self.reach < 1e6, "reach", self.reach, "above 0, and below a million nats")


@dataclass(kw_only=True)
class DemoConfig:
    """The whole road in ten minutes: answers, preferences, training, evidence on prompts never trained on."""

    model: str = "smollm2"
    """Model to fit."""
    data: OptionalText = None
    """Your own preferences instead of the built-in stand-in for a person."""
    output: OptionalPath = None
    """Run folder; by default runs/demo, or the next free number after a finished one."""
    seed: int = 0
    """Same seed, same machine, same result."""


def _choose(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise unknown(f"--{name.replace('_', '-')}", value, known)


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} {value}: wanted {wanted}")


def from_yaml(path: Path, config: type) -> dict[str, Any]:
    """The fields of ``config`` that a YAML file sets, with unknown names refused.

    Raises:
        UserError: no such file, no YAML mapping, or a name that the verb does not have.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: wanted lines of 'name: value', got {type(values).__name__}")
    names = {f.name.replace("-", "_"): f for f in dataclasses.fields(config)}
    fields = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name, value in fields.items():
        if name not in names:
            raise unknown(f"option in {path}", name, names)
        fields[name] = _coerce(value, typing.get_type_hints(config)[name], f"{path}: {name}")
    return fields


def to_yaml(config: Any) -> str:
    """A config as YAML that ``--config`` reads back."""
    values = {
        f.name: str(value) if isinstance(value := getattr(config, f.name), Path) else value
        for f in dataclasses.fields(config)
        if f.name != "resume"
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """A YAML value as the field's type: 2e-5 is a string to YAML, and an int will do for a float."""
    if typing.get_origin(hint) is tuple:
        # A mapping is what YAML makes of "sft: 0.1", with the space that it asks for.
        parts = [value] if isinstance(value, str | dict) else value if isinstance(value, list) else [None]
        found = [f"{k}:{v}" for part in parts if isinstance(part, dict) for k, v in part.items()]
        found = [*(part for part in parts if isinstance(part, str)), *found]
        if all(isinstance(part, str | dict) for part in parts):
            return tuple(found)
        raise UserError(f"{where}: wanted a name or a list of them, got {value!r}")
    allowed = typing.get_args(hint) or (hint,)
    if value is None and type(None) in allowed:
        return None
    for kind in allowed:
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is float and not isinstance(value, bool):
            try:
                return float(value)
            except (TypeError, ValueError):
                continue
        if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed if kind is not type(None))
    raise UserError(f"{where}: wanted {names}, got {value!r}")
