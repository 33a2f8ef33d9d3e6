"""A run's time, memory and FLOPs before it starts, and what would make it fit where it does not."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sartor.data.trees import TokenTree
from sartor.model.tree_attention import scores_of
from sartor.plan.devices import BANDWIDTH_REACHED, PRODUCTS_REACHED, SECONDS_PER_LAYER, Device
from sartor.plan.probe import Pass, seconds_per_update, time_decoding, time_passes
from sartor.plan.shape import GIB, MARGIN, Group, Memory, Shape
from sartor.plan.trace import Work

DISK = 5e8  # bytes a second that checkpoints are taken to be written at
TIMED = "timed on this machine"
# What a run's passes take longer than a thin model's: it gives freed memory back now and then, fetches it afresh, and
# leaves holes in it (docs/log.md, 2026-11-21).
SLOWER = 1.1
TOO_SMALL = 5e12  # FLOPs of a training that is over in the seconds that timing takes


@dataclass(frozen=True)
class Load:
    """How much passes through a model: tokens, those scored, the scores of a head's attention, in so many passes."""

    tokens: int = 0
    scored: int = 0
    attended: int = 0
    passes: int = 0

    @classmethod
    def of(cls, trees: Iterable[TokenTree]) -> "Load":
        """One pass of some trees."""
        found = cls(passes=1)
        for tree in trees:
            scored = sum(tree.counts)
            found += cls(tree.size, scored, scores_of(tree))
        return found

    def __add__(self, other: "Load") -> "Load":
        return Load(*(a + b for a, b in zip(self._parts(), other._parts(), strict=True)))

    def __mul__(self, times: int) -> "Load":
        return Load(*(times * part for part in self._parts()))

    def _parts(self) -> tuple[int, int, int, int]:
        return self.tokens, self.scored, self.attended, self.passes


@dataclass(frozen=True)
class Sampled:
    """Answers of a run: how many in all, ``rows`` at a time, of how many tokens at most, after prompts how long."""

    answers: int
    rows: int
    new_tokens: int
    usual_prompt: int
    longest_prompt: int

    @property
    def decode_steps(self) -> int:
        """Decoding steps at most."""
        return -(-self.answers // self.rows) * self.new_tokens


@dataclass(frozen=True)
class Workload:
    """What a run does: passes of each stage, the micro-batches that may need most memory, and usual ones to time."""

    reference: Load
    training: Load
    evaluation: Load
    steps: int
    largest: Sequence[Group]
    usual: Sequence[Group]
    sampled: Sampled | None = None
    checkpoints: int = 1


@dataclass(frozen=True)
class Stage:
    """Seconds and FLOPs of a part of a run."""

    name: str
    seconds: float
    flops: float
    at_most: bool = False


@dataclass(frozen=True)
class Forecast:
    """What a run will cost. ``basis`` says where its times come from; there are no stages where none could be had."""

    stages: list[Stage]
    memory: Memory
    checkpointed: int
    layers: int
    basis: str
    advice: str | None = None

    @property
    def seconds(self) -> float:
        """All stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def flops(self) -> float:
        """All stages."""
        return sum(stage.flops for stage in self.stages)

    def record(self) -> dict[str, Any]:
        """As ``summary.json`` keeps it."""
        return {
            "seconds": round(self.seconds, 1) if self.stages else None,
            "stages": {stage.name: round(stage.seconds, 1) for stage in self.stages},
            "peak_memory_gib": round(self.memory.total / GIB, 2),
            "flops": self.flops,
            "checkpointed_layers": self.checkpointed,
            "basis": self.basis,
        }


@dataclass(frozen=True)
class Place:
    """Where a run would be: a device of the table, or this machine; bytes that the process takes, and all there are."""

    device: Device | None
    baseline: float
    available: float

    @property
    def room(self) -> float:
        """Bytes for weights and all else."""
        return MARGIN * self.available - self.baseline


# A setting to try where a run does not fit: the option, its LoRA rank, and the neediest micro-batches under it.
Smaller = tuple[str, int, Sequence[Group]]


def forecast(
    shape_of: Callable[[int], Shape],
    lora_r: int,
    work: Workload,
    place: Place,
    *,
    checkpointing: str = "auto",
    smaller: Callable[[], Iterable[Smaller]] = lambda: (),
    tokenizer: Any = None,
    elapsed: float = 0.0,
) -> Forecast:
    """What a run of this shape will cost.

    Args:
        shape_of: the model's shape with an adapter of a given rank, or with none.
        lora_r: rank of the run's adapter; 0 trains all weights.
        work: what the run does.
        place: where; this machine is timed for some ten seconds.
        checkpointing: ``auto``, ``always`` or ``never``.
        smaller: settings to try where the run does not fit, nearest first.
        tokenizer: with it, sampling is timed too.
        elapsed: seconds that were spent already, on loading.
    """
    start = time.perf_counter()
    shape = shape_of(lora_r)
    count = {"always": shape.layers, "never": 0}.get(checkpointing)
    if count is None:
        count = shape.checkpointing(work.largest, place.room)
    memory = _memory(shape, work, place, count)
    advice = None if memory.fits else _advice(shape_of, lora_r, work, place, checkpointing, smaller)
    usual = work.usual[0]
    forward, both = (shape.trace(usual, backward, count) for backward in (False, True))
    try:
        speed = _speed(shape, work, both, place.device, tokenizer)
    except Exception as error:  # an architecture may be traced and yet not run in this thin form: memory is known then
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        return Forecast([], memory, count, shape.layers, f"time unknown, {reason}", advice)
    written = work.checkpoints * (12 * shape.trained + shape.written) + shape.written
    stages = [
        Stage("load", elapsed + time.perf_counter() - start if elapsed else 0.0, 0.0),
        _stage("reference", work.reference, Load.of(usual), forward, speed.forward),
        _stage("training", work.training, Load.of(usual), both, speed.both),
        Stage("optimizer", work.steps * shape.trained * speed.update, 0.0),
        _stage("evaluation", work.evaluation, Load.of(usual), forward, speed.forward),
        Stage("save", written / DISK, 0.0),
    ]
    if work.sampled:
        load = Load.of(usual)
        per_token = forward.body / load.tokens + forward.head / max(1, load.scored)
        flops = work.sampled.decode_steps * work.sampled.rows * per_token
        stages.insert(-1, Stage("sampling", work.sampled.decode_steps * speed.decode, flops, at_most=True))
    return Forecast([s for s in stages if s.seconds], memory, count, shape.layers, speed.basis, advice)


def _memory(shape: Shape, work: Workload, place: Place, checkpointed: int) -> Memory:
    """Of the stage that needs most."""
    stages = {"training": shape.training(work.largest, checkpointed)}
    if work.sampled:
        length = work.sampled.longest_prompt + work.sampled.new_tokens
        stages["sampling"] = shape.sampling(work.sampled.rows, length, packed=not shape.flash)
    name = max(stages, key=lambda stage: sum(stages[stage].values()))
    return Memory(name, {"process": place.baseline, **stages[name]}, place.available)


def _advice(
    shape_of: Callable[[int], Shape],
    lora_r: int,
    work: Workload,
    place: Place,
    checkpointing: str,
    smaller: Callable[[], Iterable[Smaller]],
) -> str | None:
    """The nearest setting that fits."""
    options: list[Smaller] = [("--checkpointing auto", lora_r, work.largest)] if checkpointing == "never" else []
    for option, rank, groups in [*options, *smaller()]:
        shape = shape_of(rank)
        count = 0 if checkpointing == "never" and "auto" not in option else shape.checkpointing(groups, place.room)
        total = place.baseline + sum(shape.training(groups, count).values())
        if total <= MARGIN * place.available:
            return f"{option} fits: {total / GIB:.1f} GiB"
    return None


@dataclass(frozen=True)
class _Speed:
    """Seconds: a pass of FLOPs x takes ``fixed + x·rate``; of an update per parameter; of a decoding step."""

    forward: tuple[float, float]
    both: tuple[float, float]
    update: float
    decode: float
    basis: str


def _flops(load: Load, usual: Load, work: Work) -> float:
    """FLOPs of a load, by those of the usual one."""
    return (
        work.body / usual.tokens * load.tokens
        + work.head / max(1, usual.scored) * load.scored
        + work.attention / usual.attended * load.attended
    )


def _stage(name: str, load: Load, usual: Load, work: Work, speed: tuple[float, float]) -> Stage:
    flops = _flops(load, usual, work)
    fixed, rate = speed
    return Stage(name, load.passes * fixed + flops * rate, flops)


def _speed(shape: Shape, work: Workload, both: Work, device: Device | None, tokenizer: Any) -> _Speed:
    if device is not None:
        return _there(shape, work, device)
    if both.flops / Load.of(work.usual[0]).tokens * work.training.tokens < TOO_SMALL:
        return _Speed((0.0, 1e-11), (0.0, 1e-11), 1e-9, 1e-3, "too short a run to be timed first")
    return _here(shape, work, tokenizer)


def _here(shape: Shape, work: Workload, tokenizer: Any) -> _Speed:
    """Timed on this machine: usual micro-batches, and one tree alone for what a pass costs however small."""
    alone = [min((tree for group in work.usual for tree in group), key=lambda tree: tree.size)]
    halves = ((False, work.usual[::2]), (True, work.usual[1::2]))
    roads = [[Pass(trees, backward) for trees in (*groups, alone)] for backward, groups in halves]
    seconds = iter(time_passes(shape.config, shape.dtype, shape.lora_r, [one for road in roads for one in road]))
    lines = []
    for road in roads:
        # Checkpointed layers were not timed: their second forward pass is more FLOPs at the same rate.
        usual, traced = Load.of(work.usual[0]), shape.trace(work.usual[0], road[0].backward)
        lines.append(_line([(next(seconds), _flops(Load.of(one.trees), usual, traced)) for one in road]))
    decode = 0.0
    if work.sampled and tokenizer:
        prompts = [(0,) * work.sampled.usual_prompt] * work.sampled.rows
        decode = time_decoding(shape.config, shape.dtype, shape.lora_r, tokenizer, prompts, work.sampled.new_tokens)
    return _Speed(lines[0], lines[1], seconds_per_update(shape.dtype), decode, TIMED)


def _line(timed: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Seconds as fixed + rate·FLOPs, both at least 0: through the last measurement, and the mean of all others."""
    *usual, small = timed
    seconds, flops = (sum(one[place] for one in usual) / len(usual) for place in (0, 1))
    if flops < 2 * small[1]:  # too near for a difference to tell anything
        return 0.0, SLOWER * seconds / flops
    rate = max(0.0, (seconds - small[0]) / (flops - small[1]))
    fixed = max(0.0, seconds - rate * flops)
    return SLOWER * fixed, SLOWER * (seconds - fixed) / flops


def _there(shape: Shape, work: Workload, device: Device) -> _Speed:
    """From a data sheet: no measurement, and said so."""
    rate = 1 / (PRODUCTS_REACHED * device.flops)
    bandwidth = BANDWIDTH_REACHED * device.bandwidth
    launch = shape.layers * SECONDS_PER_LAYER
    decode = 0.0
    if work.sampled:
        length = work.sampled.usual_prompt + work.sampled.new_tokens
        decode = launch + (shape.weights + work.sampled.rows * length * shape.bytes_per_token) / bandwidth
    basis = f"assumed, not measured: {round(100 * PRODUCTS_REACHED)} % of the {device.name}'s matrix peak"
    # An update reads and writes 34 bytes a parameter: master, gradient and moments, and the copy in bf16.
    return _Speed((launch, rate), (3 * launch, rate), 34 / bandwidth, decode, basis)
