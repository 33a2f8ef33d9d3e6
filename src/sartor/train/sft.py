"""Supervised fine-tuning: demonstrations to a model that answers as they do.

The first step of RLHF (Ouyang et al. 2022, arXiv 2203.02155, section 3.1), and pretraining on plain text by the same
step: the mean negative log-prob per token. A demonstration is a tree with one branch; packed flat, none sees another,
and only the tokens to learn meet the head. Evaluated by perplexity per token on prompts never trained on.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sartor import plugins
from sartor.config import SftConfig
from sartor.console import say
from sartor.data.trees import TokenTree, pack, split_by_budget
from sartor.evaluate.statistics import Estimate, mean
from sartor.model.forward import check, token_logps
from sartor.model.load import LanguageModel, fingerprint, load
from sartor.model.reference import score_trees
from sartor.rewards.scoring import score_texts
from sartor.train.demonstrations import Demonstrations, digest, encode, read_demonstrations
from sartor.train.forecast import announce, workload
from sartor.train.run import RunFolder
from sartor.train.showcase import Showcase
from sartor.train.stopwatch import Stopwatch
from sartor.train.summary import percent
from sartor.train.trainer import Trainer, begin, resolved


def sft_gradient(
    model: LanguageModel, trees: Sequence[TokenTree], items: Sequence[int], token_budget: int
) -> dict[str, float]:
    """Add the gradient of the trees at ``items`` to the weights; returns loss, tokens and examples of the batch.

    The mean is over all tokens to learn in the batch, as in every trainer of language models: a long demonstration
    weighs more than a short one.
    """
    batch = [trees[i] for i in items]
    sizes = [tree.size for tree in batch]
    scored = max(1, sum(sum(tree.counts) for tree in batch))
    total = torch.zeros((), device=model.device)
    for group in split_by_budget(sizes, token_budget):
        loss = -token_logps(model, pack([batch[i] for i in group]).to(model.device)).sum() / scored
        loss.backward()
        total += loss.detach()
    return {"loss": float(total), "tokens": sum(sizes), "examples": len(batch)}


def train_sft(config: SftConfig, command: str = "") -> RunFolder:
    """Run ``sartor sft`` from data to report.

    Raises:
        UserError: input that the user can mend; nothing that was written is lost.
    """
    run, finished = begin(config)
    if finished:
        return run
    watch = Stopwatch()
    scorer = plugins.resolve("rewards", config.score) if config.score else None
    if scorer:
        score_texts(scorer, ["Is it well?"], ["It is."])  # a scorer that fails should not wait for the training to end
    with watch.stage("load"):
        rows = read_demonstrations(config)
        model = load(config.model, config.dtype, config.lora_r, config.lora_alpha, config.seed)
        say(f"model   {model}")
        training, held_out = (encode(model, part, config) for part in rows)
        reason = check(model, max([*training.trees, *held_out.trees], key=lambda tree: tree.size))
        if reason:
            say(f"note    sequences are padded, which is slower: {reason}")
        notes = list(dict.fromkeys([*training.notes, *held_out.notes]))
        for note in notes:
            say(f"note    {note}")
        config = resolved(config, model, len(training.trees))
        run.open(config, {"model": fingerprint(model), "data": digest((training, held_out))}, command)
        model.keep_base_if_needed(run.path / "base")
    with watch.stage("forecast"):
        announce(run, watch, config, model, partial(workload, config, None, training, held_out, [], model.context))
    showcase = Showcase(model, [prompt for prompt in held_out.prompts if prompt], config, scorer)
    sft = Sft(config, run, watch, model, training, held_out, showcase)
    trainer = Trainer(config, run, watch, model, len(training.trees))
    sft.finish(trainer, trainer.train(sft), notes)
    return run


class Sft:
    """One run: what it learns from, and what is measured before, during and after."""

    unit = "demonstrations"

    def __init__(
        self,
        config: SftConfig,
        run: RunFolder,
        watch: Stopwatch,
        model: LanguageModel,
        training: Demonstrations,
        held_out: Demonstrations,
        showcase: Showcase,
    ) -> None:
        self.config, self.run, self.watch, self.model = config, run, watch, model
        self.training, self.held_out, self.showcase = training, held_out, showcase

    def __str__(self) -> str:
        return str(self.training)

    def steps(self, trainer: Trainer, first: int) -> Iterator[dict[str, Any]]:
        """One optimizer step a batch."""
        return trainer.steps(self.gradient, first)

    def gradient(self, items: Sequence[int]) -> dict[str, float]:
        """Add the gradient of one optimizer batch to the weights; returns its metrics."""
        return sft_gradient(self.model, self.training.trees, items, self.config.token_budget)

    def note(self, metrics: Mapping[str, float]) -> str:
        """What the progress bar shows of a step."""
        return f"loss {metrics['loss']:.3f}"

    def measure(self, step: int) -> dict[str, Estimate]:
        """Loss and perplexity per held-out token, and by what factor perplexity changed since the start.

        Prompts are the units of the intervals. How much a text is easier to guess than before varies far less than how
        hard texts are, so the change has an interval of its own.
        """
        if step == 0:
            self.showcase.ask_before(self.run)
        losses = self._losses()
        if step == 0:
            self.run.write_json("losses_before.json", losses)
        change = np.subtract(losses, self.run.read_json("losses_before.json"))
        loss = self._per_token(losses)
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "perplexity_ratio": perplexity(self._per_token(change.tolist())),
        }

    def _losses(self) -> list[float]:
        """Negative log-prob of each held-out tree, in nats."""
        trees = self.held_out.trees
        found = [0.0] * len(trees)
        for group in split_by_budget(self.held_out.sizes(), self.config.token_budget):
            for i, logps in zip(group, score_trees(self.model, [trees[i] for i in group]), strict=True):
                found[i] = -float(logps.sum())
        return found

    def _per_token(self, sums: Sequence[float]) -> Estimate:
        counts = [sum(tree.counts) for tree in self.held_out.trees]
        # Every token of a tree stands for the tree's mean: the sum over a prompt is all that its interval depends on.
        values = [total / count for total, count in zip(sums, counts, strict=True) for _ in range(count)]
        units = [unit for unit, count in zip(self.held_out.prompt_numbers, counts, strict=True) for _ in range(count)]
        return mean(values, units)

    def in_words(self, measured: Mapping[str, Estimate]) -> str:
        """Perplexity, and its change."""
        return (
            f"held-out perplexity {measured['perplexity'].value:.3g}, "
            f"{percent(measured['perplexity_ratio'])} of what it was"
        )

    def finish(self, trainer: Trainer, estimates: Mapping[str, Estimate], notes: Sequence[str]) -> None:
        """Answers after, and all that is left behind."""
        config, run = self.config, self.run
        with self.watch.stage("evaluate"):
            comparison, cut = self.showcase.ask_after(run)
        summary = {
            "verb": "sft",
            "title": f"{config.model} fitted to demonstrations in {Path(config.data).name}",
            "headline": sft_headline(estimates, len(self.held_out.trees)),
            "scorer": config.score,
            "comparison": comparison,
            "data": {
                "train": f"{self.training}, {config.data}",
                "eval": f"{self.held_out}, of held-out prompts",
                "notes": [*notes, *cut],
            },
        }
        trainer.finish(summary, self.unit)


def perplexity(loss: Estimate) -> Estimate:
    """exp of a loss in nats per token, interval and all.

    >>> print(perplexity(Estimate(2.0, 1.9, 2.1, 100)))
    7.39 [6.69, 8.17]
    >>> print(perplexity(Estimate(2.0, -math.inf, math.inf, 1)))
    7.39 [no interval: one unit]
    """
    if math.isinf(loss.high):  # of one unit
        return Estimate(math.exp(loss.value), -math.inf, math.inf, loss.n)
    value, low, high = (math.exp(min(x, 700.0)) for x in (loss.value, loss.low, loss.high))
    return Estimate(value, low, high, loss.n)


def sft_headline(estimates: Mapping[str, Estimate], held_out: int) -> str:
    """The result in one sentence, and no more than the interval allows to say."""
    after, ratio = estimates["perplexity"].value, estimates["perplexity_ratio"]
    what = f"on {held_out} held-out demonstrations, perplexity is {after:.3g}, {percent(ratio)} of what it was."
    return f"No gain shown: {what}" if ratio.high >= 1 else what[0].upper() + what[1:]
