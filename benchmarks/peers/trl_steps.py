"""TRL's side of preference_step.py: one fresh process in TRL's own environment, what it is to do in a job.json.

TRL's own trainer takes every step of the case, on token ids that are given and in the order that is given. All
contenders share learning rate, β, clipping, batch and AdamW without weight decay, and have no dropout. They differ in

- ``trl``, as shipped: nothing but the defaults of TRL 1.16. Weights in fp32, bf16 by autocast, gradient checkpointing,
  a reference model (or the adapter switched off) asked in every step; and ``use_cpu``, without which it refuses bf16 on
  a machine that has no GPU.
- ``trl-tuned``: no checkpointing, and the reference scored once, ahead of training. Full training keeps fp32 weights
  under bf16 autocast: bf16 weights under TRL's AdamW lose updates below 1/256 of a weight. Under LoRA the frozen base
  is bf16, which loses nothing and spares autocast a fresh copy of every frozen weight in every product.
- ``trl-small``: as tuned, and the batch is taken in parts, added up by gradient accumulation. Not what TRL's settings
  suggest, but less padding, and on a CPU tiles that stay in the cache.
- ``trl-pure``, to see what the choice of precision costs: as tuned, with bf16 weights throughout.

``padding_free`` and ``packing`` need flash attention, which has no CPU build, and Liger needs Triton.
"""

import json
import os
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

TRAINERS = {"dpo": (DPOTrainer, DPOConfig), "reward": (RewardTrainer, RewardConfig), "sft": (SFTTrainer, SFTConfig)}
VERSIONS = ("trl", "torch", "transformers", "accelerate", "datasets", "peft")


def main(job: dict[str, Any]) -> dict[str, Any]:
    """All steps of one case."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(job["memory_gib"] * 2**30),) * 2)
    case, kind = json.loads(Path(job["case"]).read_text()), job["kind"]
    steps = [[row for item in step for row in rows_of(case["trees"][item], kind)] for step in case["steps"]]
    parts = max(job["accumulate"], job["parts"] if job["contender"] == "trl-small" else 1)
    parts = next(count for count in range(min(parts, len(steps[0])), 0, -1) if len(steps[0]) % count == 0)
    base, config_class = TRAINERS[kind]
    stamps = Stamps()
    trainer = timed(base)(
        model=job["model"],
        args=config_class(**settings(job, steps, parts)),
        train_dataset=Dataset.from_list([row for step in steps for row in step]),
        processing_class=tokenizer_of(job, steps),
        callbacks=[stamps],
        **adapter(job),
    )
    if job["start"]:  # adapter or head: a random start is no difference to measure
        start_from(trainer.model, load_file(job["start"]))
    trainer.train()
    ends = stamps.ends
    seconds = [end - start for start, end in zip([stamps.begin, *ends], ends, strict=False)]
    pairs = len(steps[0])
    micro = [trainer.micro[i : i + parts] for i in range(0, len(trainer.micro), parts)]
    return {
        "steps": [
            {
                "loss": sum(loss for loss, _ in losses),
                "grad_norm": norm,
                "tokens": sum(tokens for _, tokens in losses),
                "seconds": took,
                "pairs": pairs,
            }
            for losses, norm, took in zip(micro, trainer.norms, seconds, strict=True)
        ],
        "first_step_seconds": ends[0] - job["started"],
        "reference_seconds": trainer.reference_seconds,
        "peak_gib": peak_gib(),
        "accumulate": parts,
        "versions": {
            **{name: version(name) for name in VERSIONS},
            "cores": torch.get_num_threads(),
            "dtype": str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        },
    }


def rows_of(tree: dict[str, Any], kind: str) -> list[dict[str, list[int]]]:
    """What the trainer's own data preparation would have made of a tree."""
    prompt, branches, ranks = tree["prompt"], tree["branches"], tree["ranks"]
    if kind == "sft":
        return [{"input_ids": prompt + branch, "labels": [-100] * len(prompt) + branch} for branch in branches]
    places = range(len(branches))
    pairs = [(branches[i], branches[j]) for i in places for j in places if ranks[i] < ranks[j]]
    if kind == "reward":
        return [{"chosen_ids": prompt + better, "rejected_ids": prompt + worse} for better, worse in pairs]
    return [{"prompt_ids": prompt, "chosen_ids": better, "rejected_ids": worse} for better, worse in pairs]


def settings(job: dict[str, Any], steps: list[list[dict]], parts: int) -> dict[str, Any]:
    """Settings of the trainer: what all share, what the benchmark itself needs, and what makes the contender."""
    shared = {
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": job["max_grad_norm"],
        "per_device_train_batch_size": len(steps[0]) // parts,
        "gradient_accumulation_steps": parts,
        "max_steps": len(steps),
        "use_cpu": True,
        **({"bf16": False} if job["dtype"] == "float32" else {}),
    }
    harness = {
        "output_dir": str(Path(job["scratch"]) / "out"),
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if job["kind"] == "dpo":
        shared["beta"] = job["beta"]
    if job["kind"] == "sft":
        harness["dataset_kwargs"] = {"skip_prepare_dataset": True}
    if job["contender"] == "trl":
        return {**shared, **harness}
    tuned: dict[str, Any] = {"gradient_checkpointing": False, "dataloader_pin_memory": False}
    if job["kind"] == "dpo":
        tuned["precompute_ref_log_probs"] = True
    if job["dtype"] == "bfloat16" and (job["lora_r"] or job["contender"] == "trl-pure"):
        tuned["model_init_kwargs"] = {"dtype": "bfloat16"}
    return {**shared, **harness, **tuned}


def tokenizer_of(job: dict[str, Any], steps: list[list[dict]]) -> Any:
    """The tokenizer with a token for padding that ends no row: TRL reads a reward at the last one that is not padding,
    and would read it one token early where rows end on it."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    ends = {ids[-1] for step in steps for row in step for ids in row.values()}
    free = [t for t in tokenizer.all_special_tokens if tokenizer.convert_tokens_to_ids(t) not in ends]
    tokenizer.pad_token = (free or [tokenizer.pad_token or tokenizer.eos_token])[0]
    return tokenizer


def adapter(job: dict[str, Any]) -> dict[str, Any]:
    if not job["lora_r"]:
        return {}
    from peft import LoraConfig

    size = {"r": job["lora_r"], "lora_alpha": job["lora_alpha"], "lora_dropout": 0.0}
    return {"peft_config": LoraConfig(**size, target_modules="all-linear", task_type="CAUSAL_LM")}


@torch.no_grad()
def start_from(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    own = dict(model.named_parameters())
    for name, value in values.items():
        own[name].copy_(value)


def timed(base: type) -> Any:
    """The trainer as it is, with a record kept beside it."""

    class Timed(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.micro: list[tuple[float, int]] = []
            self.norms: list[float] = []
            self.reference_seconds = 0.0
            super().__init__(*args, **kwargs)

        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, *args: Any) -> Dataset:
            start = time.time()
            found = super()._precompute_ref_logps(*args)
            self.reference_seconds += time.time() - start
            return found

        def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
            tokens = inputs["input_ids"].numel()  # padding too: it is computed
            loss = super().training_step(model, inputs, *args)
            self.micro.append((float(loss), tokens))
            return loss

        def _clip_grad_norm(self, model: Any) -> Any:
            norm = super()._clip_grad_norm(model)
            self.norms.append(float(norm))
            return norm

    return Timed


class Stamps(TrainerCallback):
    """When training began and each optimizer step ended."""

    def __init__(self) -> None:
        self.begin, self.ends = 0.0, []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = time.time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.time())


def peak_gib() -> float:
    """Peak resident memory of this process: not ``ru_maxrss`` where that counts the parent's from before the start."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    work = json.loads(Path(sys.argv[1]).read_text())
    try:
        found = main(work)
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        found = {"error": "memory"}
    Path(work["result"]).write_text(json.dumps(found))
