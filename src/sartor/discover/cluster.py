"""Jobs as Ray tasks, on this machine or on many (``sartor[ray]``).

Driver and workers share the run folder and nothing else: it has to be on a file system that all nodes see under the
same path, and so have a model and a scorer that are given as files. The driver has put answers, reference log-probs and
features there before it sends a job; a worker process opens its workbench from them at its first job, and keeps it.

A worker that is killed, or a node that goes, costs the one job that it had, which is run again. Where no node is left,
jobs wait for one to come.
"""

import logging
import math
import os
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sartor.config import DiscoverConfig
from sartor.console import say
from sartor.discover.rungs.outcome import Outcome
from sartor.discover.workbench import Job, Workbench
from sartor.errors import UserError
from sartor.machine import set_up_memory

TRIES = 3  # of a job: one that kills its workers itself, by its memory say, must not go on for ever
PATIENCE = 10.0  # seconds that the cluster to join may take to answer
OBJECTS = 100 * 2**20  # bytes of shared memory that Ray takes: jobs and outcomes are small


class Cluster:
    """A ``Runner`` whose jobs are Ray tasks.

    Raises:
        UserError: Ray is not installed, or the cluster does not answer.
    """

    def __init__(self, config: DiscoverConfig) -> None:
        self.slots = config.workers
        self._folder = config.output.absolute()
        self._ray = import_ray()
        self._ours = not self._ray.is_initialized()
        if self._ours:
            _join(self._ray, config)
        errors = self._ray.exceptions
        self._lost = errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.ObjectLostError
        # Ray's own retries are off: those after a lack of memory have no end. And a worker stays, for its workbench.
        self._task = self._ray.remote(max_retries=0, max_calls=0)(_execute)
        self._open: dict[Any, tuple[Job, int]] = {}  # by task, and which try it is

    def submit(self, job: Job) -> None:
        """Send a job."""
        self._send(job, 1)

    def wait(self) -> tuple[Job, list[Outcome]]:
        """The next job that ended; ``seconds`` are those of the worker that ended it.

        Raises:
            UserError: as the worker raised it; or the job lost its worker too often.
        """
        while True:
            done, _ = self._ray.wait(list(self._open), num_returns=1)
            job, tries = self._open.pop(done[0])
            try:
                return job, self._ray.get(done[0])
            except self._lost as error:
                what = f"{', '.join(f'#{n}' for n in job.candidates)} on the {job.rung} rung"
                if tries == TRIES:
                    raise UserError(
                        f"{what} lost its worker {TRIES} times, at last so: {_sentence(error)}; fewer --workers leave "
                        "more memory to each, and --resume goes on"
                    ) from error
                # What the lost try took of its device nobody knows: it is in no outcome's seconds, and so the budget
                # does not count it.
                say(f"note    {what} lost its worker and is run again")
                self._send(job, tries + 1)
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise

    def close(self) -> None:
        """Drop the jobs that are open, and Ray where it was started here; a cluster that was joined goes on."""
        if self._ours:
            self._ray.shutdown()
        else:
            for task in self._open:
                self._ray.cancel(task, force=True)

    def _send(self, job: Job, tries: int) -> None:
        cpus, gpus = share(self._ray.nodes(), self.slots)  # asked each time: nodes come and go
        task = self._task.options(num_cpus=cpus, num_gpus=gpus)
        self._open[task.remote(self._folder, Path.cwd(), max(1, int(cpus)), job)] = job, tries


def share(nodes: Sequence[Mapping[str, Any]], workers: int) -> tuple[float, float]:
    """CPUs and GPUs of a task, such that all workers find room at once; where there are GPUs, on nodes with GPUs.

    Args:
        nodes: as ``ray.nodes()`` tells them.
        workers: tasks at a time.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    some = [node for node in alive if node.get("GPU")] or alive
    cpus, gpus = (_part([int(node.get(what, 0)) for node in some], workers) for what in ("CPU", "GPU"))
    return cpus or 1.0, min(1.0, gpus)


def _part(units: Sequence[int], workers: int) -> float:
    """The most that each of some workers may have of what nodes have: units of one node, else a fraction of a unit."""
    whole = next((s for s in range(max(units, default=0), 0, -1) if sum(n // s for n in units) >= workers), 0)
    if whole or not sum(units):
        return float(whole)
    return math.floor(1e4 / math.ceil(workers / sum(units))) / 1e4  # Ray counts in ten-thousandths


def import_ray() -> Any:
    """Ray, where it is installed."""
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--workers: Ray is not installed; pip install 'sartor[ray]', or leave --workers out to search in this "
            "process"
        ) from error
    return ray


def _join(ray: Any, config: DiscoverConfig) -> None:
    """Join the cluster that was named, or start one on this machine; neither says anything."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.ray_address is None:
        cpus = max(config.workers, os.cpu_count() or 1)
        ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECTS, **quiet)
        return
    try:
        _reach(config.ray_address)
        ray.init(config.ray_address, **quiet)
    except (OSError, ValueError, ImportError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(
            f"--ray-address {config.ray_address}: {_sentence(error)}; wanted auto, HOST:PORT or ray://HOST:PORT of a "
            "cluster that runs (one that asks for a token: with RAY_AUTH_MODE=token), or leave it out for one on this "
            "machine"
        ) from error


def _reach(address: str) -> None:
    """See that somebody listens there: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()


def _sentence(error: Exception) -> str:
    """The first of what Ray has to say."""
    return re.split(r"\.(?:\s|$)|\n", str(error).strip())[0]


def _execute(folder: Path, home: Path, threads: int, job: Job) -> list[Outcome]:
    """What a worker does."""
    torch.set_num_threads(threads)
    return _bench(folder, home).execute(job)


@lru_cache(maxsize=1)
def _bench(folder: Path, home: Path) -> Workbench:
    """The workbench of this worker process; ``home`` is where the driver was started."""
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"--output {folder} is not there on the node {socket.gethostname()}: wanted a folder on a file system that "
            "all nodes share"
        )
    with suppress(OSError):
        os.chdir(home)  # paths in the options may be relative
    bench = Workbench(folder)
    set_up_memory(bench.config.token_budget)
    return bench
