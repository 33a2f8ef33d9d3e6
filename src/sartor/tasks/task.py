"""A task: prompts to train on, others to measure on, and the score that stands for what people want."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from sartor.errors import unknown
from sartor.tasks import summary
from sartor.types import Text


@dataclass(frozen=True)
class Task:
    """``score`` names a registered scorer; answers have up to ``max_new_tokens`` tokens."""

    name: str
    train: Sequence[Text]
    held_out: Sequence[Text]
    score: str
    max_new_tokens: int


def task_named(name: str) -> Task:
    """One of the tasks that ship with Sartor.

    Raises:
        UserError: no task of that name.
    """
    tasks = {"sentiment": _sentiment, "summary": _summary}
    if name not in tasks:
        raise unknown("task", name, tasks)
    return tasks[name]()


def _sentiment() -> Task:
    """Controlled sentiment (arXiv 2305.18290, section 6.1): say it gladly, by the lexicon VADER."""
    folder = files("sartor.data") / "prompts"
    train, held_out = (
        (folder / f"sentiment_{part}.txt").read_text(encoding="utf-8").splitlines() for part in ("train", "eval")
    )
    return Task("sentiment", train, held_out, "vader", 48)


def _summary() -> Task:
    """Say a short report in one sentence, by a score that counts facts, words and copied runs."""
    return Task("summary", summary.prompts(120, seed=1), summary.prompts(60, seed=2), "summary", 48)
