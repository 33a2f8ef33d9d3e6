"""Prompts that a run never trains on, answered before and after, and the distance from the reference on them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sartor.config import AnsweringConfig
from sartor.console import progress
from sartor.data.chat import encode_prompts
from sartor.data.trees import TokenIds
from sartor.evaluate.answers import Answers, answer, answers_of, compare
from sartor.evaluate.on_policy import OnPolicy, look_at
from sartor.evaluate.statistics import Estimate
from sartor.model.load import LanguageModel, load
from sartor.rewards.scoring import Scorer
from sartor.rollout.local import Sampling, sample
from sartor.train.run import RunFolder
from sartor.train.summary import cut_answers, side_by_side
from sartor.types import Text


class Showcase:
    """Up to ``config.eval_prompts`` unlike prompts from the held-out data, chosen by the seed."""

    def __init__(
        self, model: LanguageModel, held_out: Sequence[Text], config: AnsweringConfig, scorer: Scorer | None
    ) -> None:
        self.model, self.config, self.scorer = model, config, scorer
        unlike = list(dict.fromkeys(held_out))
        order = np.random.default_rng([config.seed, 2]).permutation(len(unlike))
        self.prompts: list[Text] = [unlike[i] for i in sorted(order[: config.eval_prompts])]
        room = min(config.max_length, (model.context or 2**31) - config.max_new_tokens)
        self.ids: list[TokenIds] = encode_prompts(model.tokenizer, self.prompts, max(1, room))
        self.measured: Answers | None = None  # of the latest evaluation

    def answers(self, label: str) -> Answers:
        """``config.eval_samples`` answers to each prompt, scored where there is a scorer."""
        config, n = self.config, self.config.eval_samples
        sampling = Sampling(config.max_new_tokens, config.temperature, seed=config.seed)
        with progress(label, len(self.prompts) * n) as advance:
            return answer(self.model, self.prompts, self.ids, n, sampling, self.scorer, advance)

    def _shown(self, label: str) -> Answers:
        """Answers as people will see them: at temperature 1 those that were just measured."""
        return self.measured if self.measured and self.config.temperature == 1 else self.answers(label)

    def ask_before(self, run: RunFolder) -> None:
        """Have the model answer as it came, unless an earlier process of this run did."""
        known = Answers.from_rows(run.read_jsonl("samples_before.jsonl"))
        if known.prompts != self.prompts:
            run.write_jsonl("samples_before.jsonl", self._shown("answers before").rows())

    def ask_after(self, run: RunFolder) -> tuple[dict[str, Any] | None, list[str]]:
        """Have it answer again: how that compares with before, and notes. None where there are no prompts."""
        if not self.prompts:
            return None, []
        before = Answers.from_rows(run.read_jsonl("samples_before.jsonl"))
        after = self._shown("answers after")
        run.write_jsonl("samples.jsonl", side_by_side(before, after))
        return compare(before, after), cut_answers(before, after, self.config.max_new_tokens)

    def measure(self, run: RunFolder, step: int) -> dict[str, Estimate]:
        """KL to the reference, variety and, where there is a scorer, score of answers drawn at temperature 1.

        The random numbers are the same at every step. What was measured is kept answer by answer in
        ``answers-STEP.jsonl``.
        """
        # The reference of full training is not kept in memory: it is loaded for the moment.
        here = self.model.is_adapted or step == 0
        reference = self.model if here else load(str(self.model.path), self.config.dtype)
        reference.shares_prompts = self.model.shares_prompts
        n, sampling = self.config.eval_samples, Sampling(self.config.max_new_tokens, seed=self.config.seed)
        with progress("answers to measure", len(self.ids) * n) as advance:
            drawn = sample(self.model, self.ids, n, sampling, advance)
        kl, surprise = look_at(self.model, reference, self.ids, drawn, self.config.token_budget)
        self.measured = answers = answers_of(self.prompts, drawn, self.scorer)
        found = OnPolicy(answers, kl, surprise, {"scores": answers.scores} if answers.scores else {})
        run.write_jsonl(f"answers-{step}.jsonl", found.rows())
        return found.estimates()
