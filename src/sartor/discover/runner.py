"""Who executes jobs: this process, one after the other. ``cluster`` does the same on many machines."""

from collections import deque
from typing import Protocol, runtime_checkable

from sartor.discover.rungs.outcome import Outcome
from sartor.discover.workbench import Job, Workbench


@runtime_checkable
class Runner(Protocol):
    """Takes jobs and gives back what came of them, in the order in which they end."""

    slots: int

    def submit(self, job: Job) -> None:
        """Take a job; at most ``slots`` are open at a time."""
        ...

    def wait(self) -> tuple[Job, list[Outcome]]:
        """The next job that ended, with its outcomes."""
        ...

    def close(self) -> None:
        """Let go of what was taken for the jobs."""
        ...


class Local:
    """Executes a job when its result is asked for."""

    slots = 1

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self._open: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        """Take a job."""
        self._open.append(job)

    def wait(self) -> tuple[Job, list[Outcome]]:
        """Execute the oldest job."""
        job = self._open.popleft()
        return job, self.bench.execute(job)

    def close(self) -> None:
        """Nothing was taken."""
