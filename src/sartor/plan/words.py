"""A forecast as people read it."""

from sartor.console import duration
from sartor.plan.forecast import Forecast
from sartor.plan.shape import GIB


def flops(number: float) -> str:
    """FLOPs with the prefix that keeps them short.

    >>> flops(2.5e12), flops(3.1e17)
    ('2.5 TFLOP', '310.0 PFLOP')
    """
    return f"{number / 1e15:.1f} PFLOP" if number >= 1e15 else f"{number / 1e12:.1f} TFLOP"


def one_line(found: Forecast) -> str:
    """What a run says before it starts."""
    if not found.stages:
        return f"{memory(found)}; {found.basis}"
    parts = ", ".join(
        f"{'at most ' * stage.at_most}{duration(stage.seconds)} {stage.name}"
        for stage in found.stages
        if stage.seconds >= 0.02 * found.seconds
    )
    return f"about {duration(found.seconds)} ({parts}), {memory(found)}"


def memory(found: Forecast) -> str:
    """Peak memory beside what there is, and what is done to keep it there."""
    kept = f", {found.checkpointed} of {found.layers} layers checkpointed" if found.checkpointed else ""
    return f"{_peak(found)}{kept}"


def _peak(found: Forecast) -> str:
    return f"{found.memory.total / GIB:.1f} of {found.memory.available / GIB:.1f} GiB"


def warning(found: Forecast) -> str | None:
    """One line where a run would not fit, with the nearest setting that does."""
    if found.memory.fits:
        return None
    checkpointed = ", every layer checkpointed" * (found.checkpointed == found.layers)
    out = found.advice or "neither smaller micro-batches nor an adapter do: try a smaller --max-length or model"
    return f"does not fit: wants {_peak(found)}{checkpointed}; {out}"


def table(found: Forecast) -> str:
    """The whole forecast, for ``sartor plan``."""
    rows = [
        (stage.name, f"{'≤ ' * stage.at_most}{duration(stage.seconds)}", flops(stage.flops) if stage.flops else "")
        for stage in found.stages
    ]
    rows += [("total", duration(found.seconds), flops(found.flops))] if rows else []
    times = "".join(f"\n  {name:<12} {time:>14} {work:>16}".rstrip() for name, time, work in rows)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in found.memory.parts.items())
    return f"time, {found.basis}{times}\n\nmemory  {memory(found)}, in {found.memory.stage}\n        {parts}"
