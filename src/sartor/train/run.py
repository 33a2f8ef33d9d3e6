"""The run folder: what is written while training, whole or not at all, and found again after a kill."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from sartor.config import to_yaml
from sartor.console import duration
from sartor.errors import UserError
from sartor.evaluate.statistics import Estimate

CHECKPOINT = "checkpoint-"
LOCK = ".lock"


class RunFolder:
    """``config.yaml``, ``metrics.jsonl``, ``checkpoint-N/``, ``model/`` and what the report reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.path / "config.yaml").is_file()

    @property
    def finished(self) -> bool:
        """Whether all was written, the report last."""
        return (self.path / "report.html").is_file()

    def check(self, config: Any, allowed: Collection[str] = (), may_change: Collection[str] = ()) -> None:
        """Refuse early what could not be done later. ``allowed`` files may be in the folder before the run.

        ``may_change`` are options that a resumed run need not share with its start.

        Raises:
            UserError: files or a run are there already and no --resume, or no run to resume, or one made with other
                options, or a folder that cannot be written.
        """
        if config.resume:
            return self._check_same_options(config, {"output", *may_change})
        if self.path.is_file() or self.exists:
            raise UserError(f"--output {self.path} exists already: --resume goes on with it, or name a new folder")
        try:
            if self.path.is_dir() and {p.name for p in self.path.iterdir()} - {*allowed, LOCK}:
                raise UserError(f"--output {self.path} has files in it that are no run: name a new folder")
            above = next(parent for parent in self.path.absolute().parents if parent.exists())
            with tempfile.TemporaryFile(dir=above):
                pass
        except OSError as error:
            raise UserError(f"--output {self.path} cannot be written: {error.strerror or error}") from error
        return None

    def _check_same_options(self, config: Any, free: Collection[str]) -> None:
        if not self.exists:
            raise UserError(f"--resume: {self.path} holds no run (no config.yaml); leave --resume out to start one")
        theirs = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        ours = yaml.safe_load(to_yaml(config))
        changed = [
            f"{name} {value} (was {'not set' if theirs[name] is None else theirs[name]})"
            for name, value in ours.items()
            # What was left open is filled in by the run, and the folder may have moved.
            if name in theirs and name not in free and value is not None and value != theirs[name]
        ]
        if changed:
            raise UserError(
                f"--resume: {self.path} was started with other options: {'; '.join(changed)}; "
                "leave them out, or start a new run in another --output"
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Held while a process writes here, so that no other one does; a process that is killed lets go.

        Raises:
            UserError: another process writes here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"--output {self.path}: another process is at work there; wait for it, or end it first"
                ) from None
            yield

    def open(self, config: Any, identity: Mapping[str, str], command: str) -> None:
        """Start a run here, or make sure that the one here is about the same model and data.

        Raises:
            UserError: on resuming, the model's weights or the data are not what they were.
        """
        known = self.read_json("identity.json")
        if config.resume and known:
            changed = [name for name, value in identity.items() if known.get(name, value) != value]
            if changed:
                raise UserError(
                    f"--resume: the {' and the '.join(changed)} changed since {self.path} was started; "
                    "put it back, or start a new run in another --output"
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_json("identity.json", {**identity, "command": command})
        self.write_text("config.yaml", to_yaml(config))

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        scratch = self.path / f".{name}.partial"
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON; estimates become their records."""
        self.write_text(name, json.dumps(value, ensure_ascii=False, indent=1, default=_as_json))

    def read_json(self, name: str) -> Any:
        """A JSON file of this run, or None where it is missing."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write_jsonl(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows as JSON lines."""
        self.write_text(name, "".join(json.dumps(row, ensure_ascii=False, default=_as_json) + "\n" for row in rows))

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        """Rows of a JSONL file of this run; none where it is missing."""
        path = self.path / name
        if not path.is_file():
            return []
        # Not splitlines: JSON leaves characters in strings that Python takes for line ends.
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=_as_json) + "\n")

    def rewind(self, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drop the metrics that will be made again, and the line that a kill cut short."""
        kept = []
        with suppress(FileNotFoundError):
            for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").split("\n"):
                with suppress(json.JSONDecodeError):
                    row = json.loads(line)
                    if keep(row):
                        kept.append(row)
        self.write_jsonl("metrics.jsonl", kept)

    def closing_lines(self) -> str:
        """What the user reads last: the result, and where everything is."""
        summary = self.read_json("summary.json")
        cost, told = summary["cost"], summary.get("forecast") or {}
        time = duration(cost["seconds"]) + _foreseen(told.get("seconds"), duration)
        memory = f"{cost['peak_memory_gib']:.1f} GiB" + _foreseen(told.get("peak_memory_gib"), "{:.1f}".format)
        model = f"model   {self.path / 'model'}\n" if (self.path / "model").is_dir() else ""
        return f"\n{summary['headline']}\n\nreport  {self.path / 'report.html'}\n{model}cost    {time}, peak {memory}"

    def checkpoints(self) -> Iterator[tuple[int, Path]]:
        """Complete checkpoints, newest first."""
        found = [p for p in self.path.glob(f"{CHECKPOINT}*") if p.name.removeprefix(CHECKPOINT).isdigit()]
        for path in sorted(found, key=lambda p: -int(p.name.removeprefix(CHECKPOINT))):
            yield int(path.name.removeprefix(CHECKPOINT)), path

    def new_checkpoint(self, step: int) -> "NewCheckpoint":
        """A context that yields a folder to fill; on leaving, it takes its name and older checkpoints go."""
        return NewCheckpoint(self, step)


class NewCheckpoint:
    """A folder that counts only once everything in it was written."""

    def __init__(self, run: RunFolder, step: int) -> None:
        self.run, self.target = run, run.path / f"{CHECKPOINT}{step}"
        self.scratch = run.path / f".{CHECKPOINT}{step}.partial"

    def __enter__(self) -> Path:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        return self.scratch

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            return
        shutil.rmtree(self.target, ignore_errors=True)
        os.replace(self.scratch, self.target)
        for _step, older in list(self.run.checkpoints()):
            if older != self.target:
                shutil.rmtree(older)


def _foreseen(value: float | None, shown: Callable[[float], str]) -> str:
    return "" if value is None else f" (forecast {shown(value)})"


def _as_json(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.record()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
