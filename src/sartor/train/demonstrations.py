"""Demonstrations on their way to training: answers worth imitating, corrections, text; of preferences the best."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from sartor.config import SftConfig
from sartor.data.chat import as_conversation, encode_demonstrations, encode_documents
from sartor.data.rows import Rows, hold_out, read_rows
from sartor.data.trees import TokenTree
from sartor.errors import UserError
from sartor.model.load import LanguageModel
from sartor.model.reference import key_of
from sartor.types import Comparison, Demonstration, Document, Ranking, Text

WANTED = (Demonstration, Document, Comparison, Ranking)


@dataclass(frozen=True)
class Demonstrations:
    """Token trees of one branch each, with the prompts that they answer; a document answers none.

    ``documents`` says which one each tree is a piece of, where they are.
    """

    trees: list[TokenTree]
    prompts: list[Text]
    notes: list[str]
    documents: tuple[int, ...] = ()
    labels: tuple[()] = ()

    def sizes(self) -> list[int]:
        """Tokens of each."""
        return [tree.size for tree in self.trees]

    @cached_property
    def scored(self) -> int:
        """Tokens to learn."""
        return sum(sum(tree.counts) for tree in self.trees)

    @cached_property
    def prompt_numbers(self) -> list[int]:
        """For each tree the first one with the same prompt, or its document: the units of every interval."""
        first: dict[Text, int] = {}
        return [*self.documents] or [first.setdefault(prompt, i) for i, prompt in enumerate(self.prompts)]

    def __str__(self) -> str:
        return f"{len(self.trees)} demonstrations of {self.scored:,} tokens to learn"


def read_demonstrations(config: SftConfig) -> tuple[Rows, Rows]:
    """Training and held-out demonstrations, no prompt in both.

    Raises:
        UserError: whatever ``load_examples`` refuses, or too few prompts to hold any out.
    """
    return hold_out(config, lambda source, split: _demonstrated(read_rows(source, split, WANTED, config), source))


def _demonstrated(rows: Rows, source: str) -> Rows:
    """Preferences as demonstrations of what people liked best, which is where DPO's paper starts (section 6)."""
    if not any(isinstance(example, Comparison | Ranking) for example in rows.examples):
        return rows
    found = [(i, best) for i, example in enumerate(rows.examples) if (best := _best(example)) is not None]
    if not found:
        raise UserError(f"{source}: all {len(rows.examples)} rows are ties: nothing in them is worth imitating")
    kept = replace(rows.take([i for i, _ in found]), examples=[best for _, best in found])
    left = len(rows.examples) - len(found)
    notes = [f"{source}: of each row the preferred answer is the demonstration"]
    notes += [f"{source}: {left} tied rows left out"] * bool(left)
    return replace(kept, notes=[*rows.notes, *notes])


def _best(example: Comparison | Ranking) -> Demonstration | None:
    if isinstance(example, Comparison):
        return None if example.tie else Demonstration(example.prompt, example.chosen)
    top = min(example.ranks)
    if example.ranks.count(top) == len(example.ranks):
        return None
    return Demonstration(example.prompt, example.completions[example.ranks.index(top)])


def encode(model: LanguageModel, rows: Rows, config: SftConfig) -> Demonstrations:
    """Token trees of ``rows``, with notes on what was cut or left out.

    Raises:
        UserError: no row fits ``max_length``.
    """
    longest = min(config.max_length, model.context or config.max_length)
    if isinstance(rows.examples[0], Document):
        found = encode_documents(model.tokenizer, [document.text for document in rows.examples], longest)
        pieces = len(found.trees) - len(set(found.index))
        notes = [f"long documents are cut: {pieces} pieces more than documents"] * bool(pieces)
        return Demonstrations(found.trees, [""] * len(found.trees), [*rows.notes, *notes], tuple(found.index))
    as_chat = model.reads_as_chat(config.as_chat)
    plain = sum(isinstance(example.prompt, str) for example in rows.examples)
    how = "as turns of the chat template" if as_chat else "continued as they stand, without a chat template"
    notes = [f"{plain} prompts are plain strings, read {how} (--as-chat always|never decides)"] if plain else []
    found = encode_demonstrations(model.tokenizer, rows.examples, longest, as_chat, rows.where, config.train_on)
    if not found.trees:
        raise UserError(f"no demonstration fits --max-length {longest}; raise it")
    prompts = [rows.examples[i].prompt for i in found.index]
    if as_chat:
        prompts = [as_conversation(prompt, "user") for prompt in prompts]
    return Demonstrations(found.trees, prompts, [*rows.notes, *notes, *found.notes(longest)])


def digest(parts: Sequence[Demonstrations]) -> str:
    """Hash of all token ids and of what is learned of them, in order: what a run is about."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        for tree in part.trees:
            found.update(key_of(tree) + repr((len(tree.prompt), sorted(tree.unscored))).encode())
        found.update(b"|")
    return found.hexdigest()
