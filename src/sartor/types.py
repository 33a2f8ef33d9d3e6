"""The nouns: what every stage of Sartor speaks in.

A prompt or a completion is a ``Text``: a plain string, continued as it stands, or a conversation, a tuple of
messages that the tokenizer's chat template renders. Tensors appear in one noun only, ``PairLogps``, the argument of
every pairwise objective.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Conversation = tuple[Message, ...]
Text = str | Conversation


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text to pretrain on."""

    text: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to answer, with no answer yet."""

    prompt: Text


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt with an answer worth imitating."""

    prompt: Text
    completion: Text


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer that somebody called good or bad (the data of KTO)."""

    prompt: Text
    completion: Text
    good: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to one prompt; people preferred ``chosen``, or could not tell (``tie``).

    ``strength`` is by how much, in the annotators' own units, where they said so.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    tie: bool = False
    strength: float | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """K answers to one prompt. ``ranks[i]`` is the place of ``completions[i]``: 1 is best, equal places are ties."""

    prompt: Text
    completions: tuple[Text, ...]
    ranks: tuple[float, ...]

    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Every (better, worse) pair of completion indices; tied answers make no pair."""
        places = range(len(self.ranks))
        return tuple((i, j) for i in places for j in places if self.ranks[i] < self.ranks[j])


Example = Document | Prompt | Demonstration | Judged | Comparison | Ranking


@dataclass(frozen=True)
class PairLogps:
    """What a pairwise objective sees: four log-probabilities per pair, in nats, summed over completion tokens.

    Log-probabilities are fp32 whatever the model computes in. Lengths count completion tokens.
    """

    policy_chosen: Float[Tensor, " pairs"]
    policy_rejected: Float[Tensor, " pairs"]
    reference_chosen: Float[Tensor, " pairs"]
    reference_rejected: Float[Tensor, " pairs"]
    chosen_length: Int[Tensor, " pairs"]
    rejected_length: Int[Tensor, " pairs"]
