"""The machine: what the numbers of a run were seen on, and how its memory is kept."""

import ctypes
import os
import platform
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
import transformers

import sartor

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from <malloc.h>

# Kernels that oneDNN keeps, one for each shape of a product. A micro-batch of 2,048 tokens needs some hundred, and each
# layer asks for all of them in turn, so fewer would be made anew in every layer. It would keep 1,024: at a third of a
# MiB each they grew by a few hundred MiB over a run whose batches differ in length (docs/log.md, 2026-11-21).
KERNELS, TOKENS_PER_KERNEL = 256, 8


def peak_memory_gib() -> float:
    """Peak memory of this process so far, in GiB: on the device where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def physical_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()


def available_memory() -> int:
    """Bytes that this process may come to hold on its device, what it holds now included."""
    if torch.cuda.is_available():
        free, _total = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    found = [physical_memory()]
    with suppress(OSError):
        info = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(info["MemAvailable"].split()[0]) * 1024 + resident_memory())
    return min([*found, *_container_limits()])


def _container_limits() -> Iterator[int]:
    """What a container's own limit leaves, by cgroup version 2 or 1; files that it keeps in memory can go."""
    group = Path("/sys/fs/cgroup")
    for folder, limit, used, idle in (
        (group, "memory.max", "memory.current", "inactive_file"),
        (group / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError, KeyError):
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            most, taken = (int((folder / name).read_text()) for name in (limit, used))
            yield most - taken + int(statistics[idle]) + resident_memory()


def set_up_memory(token_budget: int = 2048) -> None:
    """Tell glibc's allocator to keep what is freed instead of giving it back to the system, and oneDNN to keep less.

    A training step frees and takes again the same gigabytes of activations; fetching them as fresh pages costs a tenth
    of the step (`docs/log.md`, 2026-11-21). The allocator is left alone where the C library is another. To be called
    before the first matrix product: oneDNN looks once.

    Args:
        token_budget: tokens of a micro-batch, which bound how many unlike shapes it has.
    """
    capacity = max(KERNELS, token_budget // TOKENS_PER_KERNEL)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(capacity))
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)


def release_freed_memory() -> None:
    """Give back what :func:`set_up_memory` kept: between stages of unlike shape it would only pile up."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def machine() -> dict[str, str | int]:
    """Processor, device and versions."""
    return {
        "cpu": _cpu(),
        "cores": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sartor": sartor.__version__,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
