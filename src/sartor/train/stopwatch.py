"""Where the time of a run goes, and its work."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from sartor.machine import release_freed_memory
from sartor.model.flops import flops_so_far

MEASURING = ("evaluate", "forecast")  # stages that a run could do without


class Stopwatch:
    """Seconds and FLOPs per named stage. A stage inside another stops the outer one's clock, so that they add up.

    Memory that a stage freed goes back to the system at its end, and when another one starts inside it: the next one
    takes other shapes of it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.flops: dict[str, float] = {}
        self._open: list[str] = []
        self._since, self._done = time.perf_counter(), flops_so_far()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside under ``name``."""
        release_freed_memory()
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()
            release_freed_memory()

    @property
    def total(self) -> float:
        """Seconds of all stages so far, the open one included."""
        self._turn()
        return sum(self.seconds.values())

    def record(self) -> dict[str, dict[str, float]]:
        """All stages so far, as :meth:`add` takes them."""
        self._turn()
        return {"seconds": self.seconds, "flops": self.flops}

    def add(self, record: Mapping[str, Mapping[str, float]]) -> None:
        """Add what earlier processes of the same run took."""
        for name, value in record.get("seconds", {}).items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        for name, value in record.get("flops", {}).items():
            self.flops[name] = self.flops.get(name, 0.0) + value

    def _turn(self) -> None:
        now, done = time.perf_counter(), flops_so_far()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
            self.flops[name] = self.flops.get(name, 0.0) + done - self._done
        self._since, self._done = now, done

    @staticmethod
    def timed(steps: Iterable[dict[str, float]]) -> Iterator[dict[str, float]]:
        """The same dictionaries with the ``seconds`` and ``flops`` that each took to make."""
        iterator = iter(steps)
        while True:
            start, done = time.perf_counter(), flops_so_far()
            try:
                metrics = next(iterator)
            except StopIteration:
                return
            yield {**metrics, "seconds": round(time.perf_counter() - start, 4), "flops": flops_so_far() - done}
