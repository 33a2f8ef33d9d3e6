"""Calling a scorer, built in or the user's own, in TRL's reward-function convention."""

import math
from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat

from sartor.errors import UserError
from sartor.types import Message, Text

Scorer = Callable[..., list[float]]


def score_texts(scorer: Scorer, prompts: Sequence[Text], texts: Sequence[str]) -> list[float]:
    """Score each text as the answer to its prompt.

    The scorer is called with the keyword arguments ``prompts`` and ``completions``: strings, or for a prompt that is a
    conversation lists of role/content dictionaries, as TRL does, so that reward functions carry over.

    Raises:
        UserError: it returns anything but one finite number per completion.
    """
    completions: list[Any] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    name = getattr(scorer, "__name__", str(scorer))
    try:
        scores = scorer(prompts=[as_rows(prompt) for prompt in prompts], completions=completions)
    except Exception as error:
        raise UserError(f"scorer {name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(scores, Sequence) or len(scores) != len(texts):
        got = f"{len(scores)} scores" if isinstance(scores, Sequence) else type(scores).__name__
        raise UserError(f"scorer {name}: wanted a list of {len(texts)} numbers, one per completion, got {got}")
    for score, text in zip(scores, texts, strict=True):
        if not isinstance(score, SupportsFloat) or not math.isfinite(float(score)):
            raise UserError(f"scorer {name}: wanted finite numbers, got {score} for the completion {text[:60]!r}")
    return [float(score) for score in scores]


def as_rows(text: Text) -> Any:
    """A conversation as role/content dictionaries; a string as it is."""
    return text if isinstance(text, str) else [_row(message) for message in text]


def from_rows(text: Any) -> Text:
    """What :func:`as_rows` made."""
    return text if isinstance(text, str) else tuple(Message(row["role"], row["content"]) for row in text)


def content(completion: str | Sequence[dict[str, str]]) -> str:
    """The words of a completion, whichever of the two forms it comes in."""
    return completion if isinstance(completion, str) else "\n".join(message["content"] for message in completion)


def _row(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}
