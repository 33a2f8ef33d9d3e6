"""Where the time of a run goes."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from sartor.machine import release_freed_memory


class Stopwatch:
    """Seconds per named stage. A stage inside another stops the outer one's clock, so that the stages add up.

    Memory that a stage freed goes back to the system at its end, and when another one starts inside it: the next one
    takes other shapes of it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = time.perf_counter()

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

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add what earlier processes of the same run took."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @staticmethod
    def timed(steps: Iterable[dict[str, float]]) -> Iterator[dict[str, float]]:
        """The same dictionaries with the ``seconds`` that each took to make."""
        iterator = iter(steps)
        while True:
            start = time.perf_counter()
            try:
                metrics = next(iterator)
            except StopIteration:
                return
            yield {**metrics, "seconds": round(time.perf_counter() - start, 4)}
