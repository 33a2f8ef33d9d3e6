"""A reward model as a scorer: the same calling convention as a function of the user's."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sartor.data.chat import encode_demonstrations
from sartor.errors import UserError
from sartor.model.heads import score_rewards
from sartor.model.load import LanguageModel
from sartor.rewards.scoring import from_rows
from sartor.types import Demonstration


def reward_scale(folder: Path) -> dict[str, Any]:
    """``reward.json`` beside a reward model: mean and standard deviation of its rewards; 0 and 1 without one."""
    path = folder / "reward.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"mean": 0.0, "std": 1.0}


class RewardModelScorer:
    """Rewards of completions, their mean on demonstrations taken off, so that 0 is as good as what people wrote."""

    def __init__(self, model: LanguageModel, mean: float, token_budget: int, as_chat: str = "auto") -> None:
        self.model, self.mean, self.token_budget = model, mean, token_budget
        self.as_chat = model.reads_as_chat(as_chat)
        self.__name__ = model.name

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: object) -> list[float]:
        """The reward of each completion.

        Raises:
            UserError: an answer alone is longer than the model reads.
        """
        rows = [
            Demonstration(from_rows(prompt), from_rows(completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        context = self.model.context or 2**31
        found = encode_demonstrations(self.model.tokenizer, rows, context, self.as_chat)
        if found.too_long:
            raise UserError(f"reward model {self.model.name} reads {context} tokens, and an answer alone is longer")
        return [row[0] - self.mean for row in score_rewards(self.model, found.trees, self.token_budget)]
