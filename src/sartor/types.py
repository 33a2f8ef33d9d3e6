"""The nouns: what every stage of Sartor speaks in.

A prompt or a completion is a ``Text``: a plain string, continued as it stands, or a conversation, a tuple of
messages that the tokenizer's chat template renders. Tensors appear in three nouns only, the arguments of objectives:
``PairLogps``, ``JudgedLogps`` and ``RankedLogps``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_UNSAID: Any = None  # a field that is filled in from the shape of the others


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


Example = Document | Prompt | Demonstration | Judged | Comparison | Ranking


@dataclass(frozen=True)
class PairLogps:
    """What a pairwise objective sees: four log-probabilities per pair, in nats, summed over completion tokens.

    Log-probabilities are fp32 whatever the model computes in. Lengths count completion tokens. The rest has defaults
    and is there for the objectives that read it: ``tie`` (people could not tell), ``strength`` (by how much they
    preferred, NaN where nobody said), and for each side the sum over its tokens of KL(π_ref ‖ π) between the two
    next-token distributions (TDPO). What an objective does not depend on is not computed, and is NaN.
    """

    policy_chosen: Float[Tensor, " pairs"]
    policy_rejected: Float[Tensor, " pairs"]
    reference_chosen: Float[Tensor, " pairs"]
    reference_rejected: Float[Tensor, " pairs"]
    chosen_length: Int[Tensor, " pairs"]
    rejected_length: Int[Tensor, " pairs"]
    tie: Bool[Tensor, " pairs"] = _UNSAID
    strength: Float[Tensor, " pairs"] = _UNSAID
    chosen_kl: Float[Tensor, " pairs"] = _UNSAID
    rejected_kl: Float[Tensor, " pairs"] = _UNSAID

    def __post_init__(self) -> None:
        if self.tie is _UNSAID:
            object.__setattr__(self, "tie", torch.zeros_like(self.policy_chosen, dtype=torch.bool))
        for name in ("strength", "chosen_kl", "rejected_kl"):
            if getattr(self, name) is _UNSAID:
                object.__setattr__(self, name, torch.full_like(self.policy_chosen, torch.nan))

    @property
    def chosen_logratio(self) -> Float[Tensor, " pairs"]:
        """log π_w - log π_w^ref."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_logratio(self) -> Float[Tensor, " pairs"]:
        """log π_l - log π_l^ref."""
        return self.policy_rejected - self.reference_rejected

    @property
    def margin(self) -> Float[Tensor, " pairs"]:
        """ρ: the chosen log-ratio minus the rejected one, what DPO multiplies with β."""
        return self.chosen_logratio - self.rejected_logratio


@dataclass(frozen=True)
class JudgedLogps:
    """What a pointwise objective sees: completions that are good or bad, their log-probs in nats, fp32.

    ``mismatched_policy`` and ``mismatched_reference`` are log-probs of completions under prompts that they do not
    answer: KTO estimates KL(π ‖ π_ref) from them. They are empty unless an objective depends on them.
    """

    policy: Float[Tensor, " completions"]
    reference: Float[Tensor, " completions"]
    good: Bool[Tensor, " completions"]
    length: Int[Tensor, " completions"]
    mismatched_policy: Float[Tensor, " mismatched"] = _UNSAID
    mismatched_reference: Float[Tensor, " mismatched"] = _UNSAID

    def __post_init__(self) -> None:
        for name in ("mismatched_policy", "mismatched_reference"):
            if getattr(self, name) is _UNSAID:
                object.__setattr__(self, name, self.policy.new_empty(0))

    @property
    def logratio(self) -> Float[Tensor, " completions"]:
        """log π - log π_ref."""
        return self.policy - self.reference


@dataclass(frozen=True)
class RankedLogps:
    """What a listwise objective sees: K answers to each prompt, padded to the longest list; log-probs in nats, fp32.

    ``rank`` is 1 for the best, equal for ties, and infinite where a list is shorter: there the log-probs are 0 and the
    length is 1.
    """

    policy: Float[Tensor, "prompts answers"]
    reference: Float[Tensor, "prompts answers"]
    rank: Float[Tensor, "prompts answers"]
    length: Int[Tensor, "prompts answers"]

    @property
    def present(self) -> Bool[Tensor, "prompts answers"]:
        """Where there is an answer."""
        return torch.isfinite(self.rank)

    @property
    def logratio(self) -> Float[Tensor, "prompts answers"]:
        """log π - log π_ref."""
        return self.policy - self.reference
