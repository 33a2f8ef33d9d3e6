"""Prompts to collect feedback on, and the answers to them."""

from collections.abc import Sequence

import numpy as np

from sartor.console import progress
from sartor.data.chat import as_conversation, encode_prompts
from sartor.errors import UserError
from sartor.evaluate.answers import Answers, answer
from sartor.model.load import LanguageModel
from sartor.rewards.scoring import Scorer
from sartor.rollout.local import Sampling
from sartor.types import Text


def split_prompts(prompts: Sequence[Text], share: float, seed: int) -> tuple[list[Text], list[Text]]:
    """Prompts to train on and about a ``share`` of them to measure on, each once, drawn by the seed.

    Raises:
        UserError: fewer than two prompts.
    """
    unlike = list(dict.fromkeys(prompts))
    if len(unlike) < 2:
        raise UserError("--prompts: wanted two prompts or more, some to train on and others to measure on")
    order = np.random.default_rng([seed, 1]).permutation(len(unlike))
    aside = min(len(unlike) - 1, max(1, round(share * len(unlike))))
    held_out, train = ([unlike[i] for i in sorted(part)] for part in (order[:aside], order[aside:]))
    return train, held_out


def collect(
    model: LanguageModel, prompts: Sequence[Text], n: int, sampling: Sampling, scorer: Scorer | None, label: str
) -> Answers:
    """``n`` answers to each prompt, plain strings as turns where the model is a chat model; scored by a stand-in for
    people where there is one. ``label`` names the progress bar.
    """
    as_chat = model.reads_as_chat("auto")
    texts = [as_conversation(text, "user") if as_chat else text for text in prompts]
    room = max(1, (model.context or 2**31) - sampling.max_new_tokens)
    with progress(label, len(texts) * n) as advance:
        ids = encode_prompts(model.tokenizer, texts, room)
        return answer(model, texts, ids, n, sampling, scorer, advance)
