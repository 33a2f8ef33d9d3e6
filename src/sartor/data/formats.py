"""Rows of any usual shape to nouns: the shape is recognised by its columns, and bad rows are counted, never hidden.

The shapes are TRL's (https://huggingface.co/docs/trl/dataset_formats), Anthropic's HH transcripts, ShareGPT, and
rankings. To accept another, write a function from a row to a noun and add a line to ``FORMATS``.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from sartor.data.files import Where, read_rows
from sartor.errors import UserError, unknown
from sartor.types import (
    Comparison,
    Conversation,
    Demonstration,
    Document,
    Example,
    Judged,
    Message,
    Prompt,
    Ranking,
    Text,
)

Row = dict[str, Any]

POLICIES = ("skip", "error", "drop")
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
HH_MARK = re.compile(r"\n\n(Human|Assistant):")
TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


@dataclass(frozen=True, slots=True)
class Format:
    """A shape of rows: the columns that tell it, and the function from a row to its noun.

    Its str is for people: ``comparisons: prompt, chosen, rejected (conversations)``.
    """

    name: str
    columns: tuple[str, ...]
    noun: type
    serves: str
    read: Callable[[Row], Example]
    style: str = "text"

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(self.columns)} ({self.style})"


@dataclass(frozen=True, slots=True)
class Skipped:
    """Bad rows of one kind: how many, where the first of them stands, and the value that was at fault there."""

    count: int
    where: Where
    value: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """The examples of a source, in its order; ``where[i]`` is the place of ``examples[i]``.

    ``skipped`` maps what was wrong to the rows left out for it. Its str is a one-line account of all this.
    """

    source: str
    examples: list[Example]
    where: list[Where]
    format: str
    skipped: dict[str, Skipped]

    def __str__(self) -> str:
        read = f"{self.source}: {len(self.examples)} rows of {self.format}"
        bad = _bad(self.skipped)
        return f"{read}; {bad} bad rows skipped: {_tally(self.skipped)}" if bad else read


class _BadRow(Exception):
    """A row that cannot be used: the kind of fault, and the value at fault."""

    def __init__(self, reason: str, value: Any):
        super().__init__(reason)
        self.reason = reason
        text = repr(value[-1].content if isinstance(value, tuple) and value else value)
        self.value = text if len(text) <= 60 else text[:57] + "..."


def load_examples(source: str, *, wanted: tuple[type, ...], split: str = "train", on_bad_row: str = "skip") -> Loaded:
    """Read a file or Hub dataset (see ``read_rows``) whose columns fit a noun in ``wanted``, such as ``(Comparison,)``.

    Where the columns fit several shapes, the noun that stands first in ``wanted`` is read. ``on_bad_row`` says what
    to do about rows whose content is unusable: ``skip`` leaves up to 1 % of all rows out and refuses the source above
    that, ``error`` refuses the source at the first, ``drop`` leaves out any number.

    Raises UserError for whatever ``read_rows`` refuses, columns that fit no wanted shape, a row without a column
    that the first row has, bad rows beyond the policy, and a source without one usable row.
    """
    if on_bad_row not in POLICIES:
        raise unknown("on_bad_row", on_bad_row, POLICIES)
    rows = read_rows(source, split)
    first = next(rows)
    try:
        format = recognise(first[1], first[1], wanted)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    loaded = Loaded(source, [], [], str(format), {})
    for where, row in chain([first], rows):
        for column in format.columns:
            if column not in row:
                raise UserError(f"{where}: no column {column!r}, which {first[0]} has: add it, or remove the row")
        try:
            example = format.read(row)
        except _BadRow as bad:
            if on_bad_row == "error":
                raise UserError(
                    f"{where}: {bad.reason}: {bad.value} - mend it, or leave it out with --on-bad-row skip or drop"
                ) from None
            seen = loaded.skipped.get(bad.reason, Skipped(0, where, bad.value))
            loaded.skipped[bad.reason] = replace(seen, count=seen.count + 1)
        else:
            loaded.examples.append(example)
            loaded.where.append(where)
    _refuse_too_many(loaded, on_bad_row)
    return loaded


def recognise(columns: Iterable[str], row: Row, wanted: tuple[type, ...] | None = None) -> Format:
    """The format that ``columns`` fit; ``row`` tells its style (text, conversations, HH transcripts, ShareGPT).

    A format gives way to one that uses its columns and more: with a label, prompt and completion are no
    demonstration. Of what then remains, the noun first in ``wanted`` wins (None: any noun, first in ``FORMATS``).

    Raises UserError when the columns fit nothing, or nothing that is wanted.
    """
    names = list(columns)
    fitting = [format for format in FORMATS if set(format.columns) <= set(names)]
    best = [one for one in fitting if not any(set(one.columns) < set(other.columns) for other in fitting)]
    nouns = wanted if wanted is not None else tuple(format.noun for format in FORMATS)
    for noun in nouns:
        for format in best:
            if format.noun is noun:
                return replace(format, style=_style(format, row))
    accepted = [format for format in FORMATS if format.noun in nouns]
    shapes = " or ".join(dict.fromkeys(f"{format.name} ({', '.join(format.columns)})" for format in accepted))
    hint = _misspelt(names, accepted)
    if best and not hint:
        raise UserError(
            f"holds {best[0].name} ({', '.join(best[0].columns)}), which are for {best[0].serves}, wanted {shapes} - "
            f"name a source of that shape, or use this one for {best[0].serves}"
        )
    shown = ", ".join(" ".join(name.split()) or "(unnamed)" for name in names) or "(none)"
    shown = shown if len(shown) <= 200 else shown[:197] + "..."
    raise UserError(f"columns {shown} do not fit, wanted {shapes} - {hint or 'rename the columns to these'}")


def _misspelt(names: list[str], accepted: list[Format]) -> str:
    known = {column for format in accepted for column in format.columns}
    columns = {column for format in FORMATS for column in format.columns}  # a column of another shape is no slip
    for name in names:
        near = difflib.get_close_matches(name.strip().lower(), known - set(names), n=1, cutoff=0.8)
        if near and name not in columns:
            return f"did you mean {near[0]!r} by {name!r}?"
    return ""


def _style(format: Format, row: Row) -> str:
    values = [_decoded(row[column]) for column in format.columns]
    if format.columns == ("conversations",):
        return "ShareGPT"
    lists = [value for value in values if isinstance(value, list) and value]
    if any(_are_messages(value) or _are_messages(value[0]) for value in lists):
        return "conversations"
    if format.columns == ("chosen", "rejected") and any(isinstance(v, str) and _is_transcript(v) for v in values):
        return "HH transcripts"
    return "text"


def _refuse_too_many(loaded: Loaded, on_bad_row: str) -> None:
    bad = _bad(loaded.skipped)
    rows = bad + len(loaded.examples)
    problem = f"{loaded.source}: {bad} of {rows} rows are bad"
    if not loaded.examples:
        raise UserError(f"{problem}, none is left: {_tally(loaded.skipped)} - mend the file")
    if on_bad_row == "skip" and bad * 100 > rows:
        small = "; under 100 rows, a single one is more" if rows < 100 else ""
        raise UserError(
            f"{problem} ({100 * bad / rows:.3g} %, at most 1 % are skipped{small}): {_tally(loaded.skipped)} - "
            "mend the file, or leave out every bad row with --on-bad-row drop"
        )


def _bad(skipped: dict[str, Skipped]) -> int:
    return sum(one.count for one in skipped.values())


def _tally(skipped: dict[str, Skipped]) -> str:
    kinds = sorted(skipped.items(), key=lambda kind: -kind[1].count)
    return ", ".join(f"{one.count} {reason} (first: {one.where}: {one.value})" for reason, one in kinds)


# From a row to its noun, one function a format.


def _explicit_comparison(row: Row) -> Comparison:
    answers = [_text(row["chosen"], "chosen"), _text(row["rejected"], "rejected")]
    prompt, (chosen, rejected) = _split(_prompt_text(row), answers)
    return _comparison(row, prompt, chosen, rejected)


def _implicit_comparison(row: Row) -> Comparison:
    chosen, rejected = _text(row["chosen"], "chosen"), _text(row["rejected"], "rejected")
    if chosen == rejected:
        raise _BadRow("identical chosen and rejected", chosen)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if _is_transcript(chosen) or _is_transcript(rejected):
            return _comparison(row, *_split_transcripts(chosen, rejected))
        cut = len(_common_words(chosen, rejected))
        return _comparison(row, chosen[:cut], chosen[cut:], rejected[cut:])
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise _BadRow("one of chosen and rejected is text, the other a conversation", chosen)
    prompt, (better, worse) = _split_whole([chosen, rejected])
    return _comparison(row, prompt, better, worse)


def _comparison(row: Row, prompt: Text, chosen: Text, rejected: Text) -> Comparison:
    if chosen == rejected:
        raise _BadRow("identical chosen and rejected", chosen)
    tie = row.get("tie") not in (None, "") and _truth(row, "tie")
    column = "strength" if "strength" in row else "margin"
    strength = None if row.get(column) in (None, "") else _number(row[column], f"{column} is not a number")
    return Comparison(prompt, _answer(chosen), _answer(rejected), tie, strength)


def _ranking(row: Row) -> Ranking:
    completions, ranks = _list(row, "completions"), _list(row, "ranks")
    if len(completions) != len(ranks):
        raise _BadRow("unequal numbers of completions and ranks", ranks)
    if not 2 <= len(completions) <= 9:
        raise _BadRow("not 2 to 9 completions", len(completions))
    places = tuple(_number(rank, "a rank is not a number") for rank in ranks)
    answers = [_text(completion, "a completion") for completion in completions]
    if len(set(answers)) < 2:
        raise _BadRow("fewer than two distinct completions", answers[0])
    prompt, answers = _split(_prompt_text(row), answers)
    return Ranking(prompt, tuple(_answer(answer) for answer in answers), places)


def _judged(row: Row) -> Judged:
    answered = _demonstration(row)
    return Judged(answered.prompt, answered.completion, _truth(row, "label"))


def _demonstration(row: Row) -> Demonstration:
    prompt, (completion,) = _split(_prompt_text(row), [_text(row["completion"], "completion")])
    return Demonstration(prompt, _answer(completion))


def _corrected(row: Row) -> Demonstration:
    """The answer as people mended it."""
    pair = _corrected_pair(row)
    return Demonstration(pair.prompt, pair.chosen)


def _corrected_pair(row: Row) -> Comparison:
    """A correction is preferred to what it corrects."""
    answers = [_text(row["correction"], "correction"), _text(row["completion"], "completion")]
    prompt, (chosen, rejected) = _split(_prompt_text(row), answers)
    return _comparison(row, prompt, chosen, rejected)


def _conversation_in(column: str) -> Callable[[Row], Demonstration]:
    def read(row: Row) -> Demonstration:
        prompt, (answer,) = _split_whole([_messages(_list(row, column))])
        return Demonstration(prompt, _answer(answer))

    return read


def _document(row: Row) -> Document:
    text = _string(row["text"], "the text column")
    if not text.strip():
        raise _BadRow("empty text", text)
    return Document(text)


def _prompt(row: Row) -> Prompt:
    return Prompt(_prompt_text(row))


# Where the prompt ends and the answers begin.


def _split(prompt: Text, answers: list[Text]) -> tuple[Text, list[Text]]:
    """Prompt and answers in one style, all text or all conversations, with no prompt repeated in an answer."""
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        return prompt, answers
    turns = [(Message("assistant", answer),) if isinstance(answer, str) else answer for answer in answers]
    if all(turn[0].role == "assistant" for turn in turns):
        return ((Message("user", prompt),) if isinstance(prompt, str) else prompt), [*turns]
    if isinstance(prompt, str):  # as in UltraFeedback: the conversations are whole, and may open with a system turn
        shared, rest = _split_whole(turns)
        repeated = any(message.content.strip() == prompt.strip() for message in shared)
    else:
        shared, rest = prompt, [turn[len(prompt) :] for turn in turns]
        repeated = all(turn[: len(prompt)] == prompt for turn in turns)
    if not repeated:
        raise _BadRow("prompt column and conversation differ", prompt)
    return shared, [*rest]


def _split_whole(conversations: list[Conversation]) -> tuple[Conversation, list[Conversation]]:
    """The leading turns that whole conversations share, and what each of them says from there on.

    A single conversation is cut before its last turn.
    """
    for turns in conversations:
        _check_answered(turns)
    first = conversations[0]
    most = min(len(turns) for turns in conversations) - 1
    same = next((i for i in range(most) if any(turns[i] != first[i] for turns in conversations)), most)
    if not same:
        raise _BadRow("no common prompt", first)
    rest = [turns[same:] for turns in conversations]
    if any(turns[0].role != "assistant" for turns in rest):
        raise _BadRow("prompts that differ within the row", first)
    return first[:same], rest


def _split_transcripts(chosen: str, rejected: str) -> tuple[Conversation, Conversation, Conversation]:
    better, worse = _transcript(chosen), _transcript(rejected)
    _check_answered(better)
    _check_answered(worse)
    if better[:-1] != worse[:-1]:
        raise _BadRow("prompts that differ within the row", chosen)
    return better[:-1], better[-1:], worse[-1:]


def _check_answered(turns: Conversation) -> None:
    if turns[-1].role != "assistant":
        raise _BadRow("conversation that does not end in an assistant turn", turns)
    if len(turns) < 2:
        raise _BadRow("no turn before the answer", turns)


def _answer(answer: Text) -> Text:
    """The answer, once it is sure to be one: it says something and ends in an assistant turn."""
    spoken = [answer] if isinstance(answer, str) else [turn.content for turn in answer if turn.role == "assistant"]
    if not spoken or not all(text.strip() for text in spoken):
        raise _BadRow("empty completion", answer)
    if not isinstance(answer, str) and answer[-1].role != "assistant":
        raise _BadRow("conversation that does not end in an assistant turn", answer)
    return answer


def _common_words(chosen: str, rejected: str) -> str:
    """The shared opening of two texts up to a word's start; as in TRL, one space before it goes to the answers."""
    end = min(len(chosen), len(rejected))
    same = next((i for i in range(end) if chosen[i] != rejected[i]), end)
    word = next((i for i in range(same, 0, -1) if chosen[i - 1].isspace()), 0)
    if not chosen[:word].strip():
        raise _BadRow("no common prompt", chosen)
    return chosen[:word].removesuffix(" ")


def _is_transcript(text: str) -> bool:
    return HH_MARK.search("\n\n" + text.lstrip()) is not None


def _transcript(text: str) -> Conversation:
    """The turns of an HH transcript. Text before the first mark is the user's; where the user follows, the system's."""
    opening, *marked = HH_MARK.split("\n\n" + text.lstrip())
    turns = [
        Message(SPEAKERS[mark.lower()], said.strip()) for mark, said in zip(marked[::2], marked[1::2], strict=True)
    ]
    if opening.strip():
        turns.insert(0, Message("system" if turns and turns[0].role == "user" else "user", opening.strip()))
    return tuple(turns)


# From values to text and conversations.


def _prompt_text(row: Row) -> Text:
    prompt = _text(row["prompt"], "prompt")
    if isinstance(prompt, str) and not prompt.strip():
        raise _BadRow("empty prompt", prompt)
    return prompt


def _text(value: Any, column: str) -> Text:
    """The string or conversation that ``value`` is; ``column`` names it in complaints."""
    items = _decoded(value)
    # A string that merely looks like a list, say "[1, 2]", is text like any other.
    if isinstance(items, list) and (items is value or _are_messages(items)):
        return _messages(items)
    return _string(value, column)


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise _BadRow(f"{column} is not text", value)
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which a cut-off emoji leaves in JSON; no tokenizer takes it
        raise _BadRow(f"{column} is not valid Unicode", value) from None
    return value


def _decoded(value: Any) -> Any:
    """The list that a string spells in JSON, as CSV cells must; any other value as it is."""
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _list(row: Row, column: str) -> list[Any]:
    value = _decoded(row[column])
    if not isinstance(value, list):
        raise _BadRow(f"{column} is not a list", value)
    return value


def _are_messages(items: Any) -> bool:
    keys = [item.keys() if isinstance(item, dict) else set() for item in items] if isinstance(items, list) else []
    return bool(keys) and all({"role", "content"} <= one or {"from", "value"} <= one for one in keys)


def _messages(items: list[Any]) -> Conversation:
    if not items:
        raise _BadRow("empty conversation", items)
    return tuple(_message(item) for item in items)


def _message(item: Any) -> Message:
    fields = item if isinstance(item, dict) else {}
    speaker, said = (fields.get(key) for key in (("from", "value") if "from" in fields else ("role", "content")))
    if not isinstance(speaker, str) or not isinstance(said, str):
        raise _BadRow("a message without role and content as text", item)
    if "from" not in fields:
        return Message(speaker, _string(said, "a message"))
    if speaker not in SPEAKERS:
        raise _BadRow(f"unknown speaker, not one of {', '.join(SPEAKERS)}", speaker)
    return Message(SPEAKERS[speaker], _string(said, "a message"))


def _truth(row: Row, column: str) -> bool:
    truth = TRUTH.get(str(row[column]).strip().lower())
    if truth is None:
        raise _BadRow(f"{column} is not true or false (or 1 or 0)", row[column])
    return truth


def _number(value: Any, reason: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise _BadRow(reason, value)
    return number


# Where several fit equally, the first is taken.
FORMATS = (
    Format("comparisons", ("prompt", "chosen", "rejected"), Comparison, "DPO and reward models", _explicit_comparison),
    Format("comparisons", ("chosen", "rejected"), Comparison, "DPO and reward models", _implicit_comparison),
    Format(
        "corrections",
        ("prompt", "completion", "correction"),
        Demonstration,
        "supervised fine-tuning and DPO",
        _corrected,
    ),
    Format(
        "corrections",
        ("prompt", "completion", "correction"),
        Comparison,
        "supervised fine-tuning and DPO",
        _corrected_pair,
    ),
    Format("rankings", ("prompt", "completions", "ranks"), Ranking, "K-wise reward models and listwise DPO", _ranking),
    Format("judged answers", ("prompt", "completion", "label"), Judged, "KTO", _judged),
    Format("demonstrations", ("prompt", "completion"), Demonstration, "supervised fine-tuning", _demonstration),
    Format("demonstrations", ("messages",), Demonstration, "supervised fine-tuning", _conversation_in("messages")),
    Format(
        "demonstrations", ("conversations",), Demonstration, "supervised fine-tuning", _conversation_in("conversations")
    ),
    Format("documents", ("text",), Document, "pretraining", _document),
    Format("prompts", ("prompt",), Prompt, "PPO", _prompt),
)
