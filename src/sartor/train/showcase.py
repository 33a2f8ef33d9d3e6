"""Prompts that a run never trains on, answered before and after, and the distance from the reference on them."""

from collections.abc import Sequence

import numpy as np

from sartor.config import DpoConfig
from sartor.console import progress
from sartor.data.chat import encode_prompts
from sartor.data.trees import TokenIds
from sartor.evaluate.answers import Answers, answer, kl_to_reference
from sartor.evaluate.statistics import Estimate
from sartor.model.load import LanguageModel, load
from sartor.rewards.scoring import Scorer
from sartor.rollout.local import Sampling
from sartor.types import Text


class Showcase:
    """Up to ``config.eval_prompts`` unlike prompts from the held-out data, chosen by the seed."""

    def __init__(
        self, model: LanguageModel, held_out: Sequence[Text], config: DpoConfig, scorer: Scorer | None
    ) -> None:
        self.model, self.config, self.scorer = model, config, scorer
        unlike = list(dict.fromkeys(held_out))
        order = np.random.default_rng([config.seed, 2]).permutation(len(unlike))
        self.prompts: list[Text] = [unlike[i] for i in sorted(order[: config.eval_prompts])]
        room = min(config.max_length, (model.context or 2**31) - config.max_new_tokens)
        self.ids: list[TokenIds] = encode_prompts(model.tokenizer, self.prompts, max(1, room))

    def answers(self, label: str) -> Answers:
        """``config.eval_samples`` answers to each prompt, scored where there is a scorer."""
        config, n = self.config, self.config.eval_samples
        sampling = Sampling(config.max_new_tokens, config.temperature, seed=config.seed)
        with progress(label, len(self.prompts) * n) as advance:
            return answer(self.model, self.prompts, self.ids, n, sampling, self.scorer, advance)

    def kl(self, step: int) -> Estimate:
        """KL(policy ‖ reference) at this step, in nats per completion; 0 at step 0, where they are the same."""
        if step == 0:
            return Estimate(0.0, 0.0, 0.0, len(self.ids))
        # The reference of full training is not kept in memory: it is loaded for the moment.
        reference = self.model if self.model.is_adapted else load(str(self.model.path), self.config.dtype)
        reference.shares_prompts = self.model.shares_prompts
        sampling = Sampling(self.config.max_new_tokens, seed=self.config.seed + step)
        with progress("measuring KL", len(self.ids)) as advance:
            return kl_to_reference(self.model, reference, self.ids, sampling, self.config.token_budget, advance)
