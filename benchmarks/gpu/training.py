"""Optimizer steps by Sartor and by TRL: the same weights, the same pairs in the same order."""

import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from shapes import (
    PAIRS,
    SHAPES,
    build,
    bytes_of_weights,
    draw_trees,
    lora_config,
    peak_flops,
    set_adapter,
    synchronize,
    token_budget,
    useful_flops,
)

from sartor.data.trees import split_by_budget
from sartor.machine import peak_memory_gib
from sartor.model.forward import check
from sartor.model.load import LanguageModel
from sartor.model.reference import score_trees
from sartor.objectives.specs import parse_objective
from sartor.train.gradient import batch_gradient
from sartor.train.loop import MasterWeights
from sartor.train.preferences import Preferences

LEARNING_RATE = 1e-5


def step_case(name: str, scale: float, device: Any, tiny: bool) -> dict[str, Any]:
    _, shape, trained, data, who = name.split("/")
    if who != "sartor" and find_spec("trl") is None:
        return {"skipped": "trl is not importable here"}
    lora, shape = trained == "lora", "tiny" if tiny else shape
    needed = bytes_of_weights(shape, lora, who) / 2**30
    if device.type == "cuda" and needed > 0.9 * torch.cuda.get_device_properties(device).total_memory / 2**30:
        return {"skipped": f"weights, gradients and moments alone take {needed:.0f} GiB"}
    warm, timed = (1, 2) if tiny else (2, 3) if shape == "8b" else (2, 6)
    vocabulary = SHAPES[shape][-1]
    trees = draw_trees(data, vocabulary, PAIRS * (warm + timed), scale=0.05 if tiny else 1.0)
    steps = [list(range(i, i + PAIRS)) for i in range(0, len(trees), PAIRS)]
    run = sartor_steps if who == "sartor" else trl_steps
    found = run(shape, lora, trees, steps, scale, device, tuned=who == "trl-tuned")
    seconds = found.pop("seconds")[warm:]
    flops = [useful_flops(found["config"], [trees[i] for i in step], lora) for step in steps[warm:]]
    rate = peak_flops()
    del found["config"]
    return {
        "ms_per_step": 1e3 * float(np.median(seconds)),
        "ms_each": [round(1e3 * s, 2) for s in seconds],
        "pairs_per_second": PAIRS * len(seconds) / sum(seconds),
        "tflops_useful": sum(flops) / sum(seconds) / 1e12,
        "mfu": sum(flops) / sum(seconds) / rate if rate else None,
        "tokens": [sum(trees[i].size for i in step) for step in steps],
        "peak_gib": peak_memory_gib(),
        **found,
    }


def sartor_trainer(shape: str, lora: bool, trees: list[Any], scale: float, device: Any) -> Any:
    """A function that takes one step on some items, and what was found on the way there."""
    network = build(shape, device, lora)
    model = LanguageModel(network, SimpleNamespace(eos_token_id=1, chat_template=None), shape)
    config = model.core.config
    budget = int(scale * token_budget(config, bytes_of_weights(shape, lora, "sartor"), device))
    reason = check(model, max(trees, key=lambda tree: tree.size))
    synchronize()
    begun = time.perf_counter()
    reference: list[Any] = [None] * len(trees)
    for group in split_by_budget([tree.size for tree in trees], budget):
        for i, values in zip(group, score_trees(model, [trees[i] for i in group], adapter=False), strict=True):
            reference[i] = values.cpu()
    facts = {
        "config": config,
        "plain_road_because": reason,
        "token_budget": budget,
        "reference_seconds": time.perf_counter() - begun,
    }
    data, objective = Preferences(trees, [], [], reference), parse_objective(["dpo"])
    weights = MasterWeights(network, weight_decay=0.0)

    def step(items: Sequence[int]) -> tuple[float, float]:
        metrics = batch_gradient(model, objective, data, items, budget)
        return metrics["loss"], weights.step(LEARNING_RATE, 1.0)

    return model, step, facts


def sartor_steps(
    shape: str, lora: bool, trees: list[Any], steps: list[list[int]], scale: float, device: Any, tuned: bool
) -> dict[str, Any]:
    _, step, facts = sartor_trainer(shape, lora, trees, scale, device)
    losses, norms, seconds = [], [], []
    for items in steps:
        begun = time.perf_counter()
        loss, norm = step(items)
        synchronize()
        seconds.append(time.perf_counter() - begun)
        losses.append(loss)
        norms.append(norm)
    return {**facts, "loss": losses, "grad_norm": norms, "seconds": seconds}


def trl_steps(
    shape: str, lora: bool, trees: list[Any], steps: list[list[int]], scale: float, device: Any, tuned: bool
) -> dict[str, Any]:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        reference_seconds = 0.0

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # token ids already

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def _precompute_ref_logps(self, *args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            found = super()._precompute_ref_logps(*args, **options)
            self.reference_seconds += time.perf_counter() - begun
            return found

    class Stamps(TrainerCallback):
        def __init__(self) -> None:
            self.at: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._stamp()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self._stamp()

        def _stamp(self) -> None:
            synchronize()
            self.at.append(time.perf_counter())

    # Full training keeps fp32 weights under autocast, or AdamW would lose updates below 1/256 of a weight.
    dtype = torch.bfloat16 if lora and tuned else torch.float32
    network = build(shape, device, lora=False, dtype=dtype)
    micro = PAIRS
    if tuned:  # no checkpointing, and so as many pairs at a time as fit
        budget = token_budget(network.config, bytes_of_weights(shape, lora, "trl-tuned"), device)
        longest = 2 * max(len(tree.prompt) + max(map(len, tree.branches)) for tree in trees)
        micro = max(n for n in (1, 2, 4, 8, 16) if n == 1 or n * longest <= budget)
    micro = max(1, int(micro * scale))
    rows = [
        {"prompt_ids": list(t.prompt), "chosen_ids": list(t.branches[0]), "rejected_ids": list(t.branches[1])}
        for t in trees
    ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    stamps = Stamps()
    better = {"precompute_ref_log_probs": True, "gradient_checkpointing": False} if tuned else {}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=network,
            ref_model=None if lora or tuned else build(shape, device, lora=False, dtype=dtype),
            args=DPOConfig(
                output_dir=scratch,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=PAIRS // micro,
                max_steps=len(steps),
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=1.0,
                max_length=4096,
                bf16=device.type == "cuda",
                use_cpu=device.type == "cpu",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                **better,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora_config() if lora else None,
            callbacks=[stamps],
        )
        if lora:
            set_adapter(trainer.model)
        trainer.train()
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    return {
        "config": network.config.get_text_config(),
        "loss": [row["loss"] for row in logged],
        "grad_norm": [row["grad_norm"] for row in logged],
        "seconds": np.diff(stamps.at).tolist(),
        "reference_seconds": trainer.reference_seconds,
        "pairs_at_a_time": micro,
    }
