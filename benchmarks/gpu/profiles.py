"""Where the time goes: the head's passes one by one, the waits of the host, the kernels of a step."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import PAIRS, SHAPES, draw_trees, synchronize
from torch.profiler import ProfilerActivity, profile
from training import sartor_trainer

from sartor.model.logprobs import Head, chunked_logps
from sartor.model.triton_logprobs import available, d_logits_, logsumexp_and_target


def milliseconds(work: Callable[[], Any], repeats: int = 10) -> float:
    """Median time of ``work`` once warm."""
    times = []
    for i in range(repeats + 3):
        synchronize()
        begun = time.perf_counter()
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            took = start.elapsed_time(end)
        else:
            work()
            took = 1e3 * (time.perf_counter() - begun)
        if i >= 3:
            times.append(took)
    return float(np.median(times))


def head_case(device: Any, tiny: bool) -> dict[str, Any]:
    """One chunk of logits: torch's passes and Triton's, beside the product that made it; then the whole head."""
    found: dict[str, Any] = {}
    shapes = [(64, 32, 300)] if tiny else [(8192, 2048, 128256), (8192, 4096, 128256)]
    for tokens, hidden, vocabulary in shapes:
        rows = min(tokens, 2048)
        h = torch.randn(tokens, hidden, device=device).bfloat16()
        w = (hidden**-0.5 * torch.randn(vocabulary, hidden, device=device)).bfloat16()
        target = torch.randint(vocabulary, (tokens,), device=device)
        to, grad = target[:rows], torch.randn(rows, device=device)
        logits = h[:rows] @ w.t()

        def torch_forward(logits: Any = logits, to: Any = to) -> Any:
            wide = logits.float()
            log_z = torch.logsumexp(wide, -1)
            return log_z, wide.gather(1, to[:, None])[:, 0] - log_z

        log_z = torch_forward()[0]

        def torch_backward(logits: Any = logits, to: Any = to, log_z: Any = log_z, grad: Any = grad) -> Any:
            slope = logits.float().sub_(log_z[:, None]).exp_().neg_()
            slope.scatter_add_(1, to[:, None], torch.ones_like(slope[:, :1]))
            return slope.mul_(grad[:, None]).to(logits.dtype)

        times = {
            "product": milliseconds(lambda h=h, w=w, rows=rows: h[:rows] @ w.t()),
            "torch_forward": milliseconds(torch_forward),
            "torch_backward": milliseconds(torch_backward),
        }
        if available(logits):
            times["triton_forward"] = milliseconds(lambda x=logits, to=to: logsumexp_and_target(x, to))
            scratch = logits.clone()  # overwritten again and again, which changes nothing about the time
            times["triton_backward"] = milliseconds(lambda x=scratch, to=to, z=log_z, g=grad: d_logits_(x, to, z, g))
            bytes_ = logits.numel() * logits.element_size()
            times["triton_forward_gb_per_s"] = bytes_ / times["triton_forward"] / 1e6
            times["triton_backward_gb_per_s"] = 2 * bytes_ / times["triton_backward"] / 1e6
        found[f"chunk {rows}x{hidden}x{vocabulary}"] = times
        del logits
        for trained in (False, True):
            leaf, matrix = h.clone().requires_grad_(), w.clone().requires_grad_(trained)

            def whole(leaf: Any = leaf, matrix: Any = matrix, target: Any = target) -> None:
                leaf.grad = matrix.grad = None
                chunked_logps(leaf, target, Head(matrix)).sum().backward()

            took = milliseconds(whole, repeats=5)
            flops = 2 * tokens * hidden * vocabulary * (3 if trained else 2)
            kind = "trained" if trained else "frozen"
            found[f"head {tokens}x{hidden}x{vocabulary} {kind}"] = {"ms": took, "tflops_useful": flops / took / 1e9}
    return found


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Counts where the host waited for the device, by line of Python."""
    found: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            found["/".join(Path(warning.filename).parts[-2:]) + f":{warning.lineno}"] += 1


def profile_case(device: Any, tiny: bool) -> dict[str, Any]:
    """One LoRA step of the 1B model: where the host waits, and the kernels with the most time."""
    shape = "tiny" if tiny else "1b"
    trees = draw_trees("uf", SHAPES[shape][-1], PAIRS, scale=0.05 if tiny else 1.0)
    _, step, facts = sartor_trainer(shape, True, trees, 1.0, device)
    for _ in range(2):
        step(range(PAIRS))
    found: dict[str, Any] = {"token_budget": facts["token_budget"]}
    if device.type == "cuda":
        with waits() as places:
            step(range(PAIRS))
        found |= {"waits": sum(places.values()), "waits_at": dict(places.most_common(20))}
    synchronize()
    begun = time.perf_counter()
    step(range(PAIRS))
    synchronize()
    found["ms_unprofiled"] = 1e3 * (time.perf_counter() - begun)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as trace:
        step(range(PAIRS))
        synchronize()
    on_device = device.type == "cuda"
    time_of = lambda row: row.self_device_time_total if on_device else row.self_cpu_time_total  # noqa: E731
    events = trace.key_averages()
    rows = [row for row in events if not on_device or row.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(map(time_of, rows)) / 1e3
    rows = sorted(rows, key=time_of, reverse=True)[:25]
    found["device_ms"] = total
    found["kernels"] = [{"name": row.key[:90], "ms": time_of(row) / 1e3, "calls": row.count} for row in rows]
    return found
