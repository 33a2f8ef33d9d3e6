"""TRL's side of ppo_step.py: rollouts of its last PPOTrainer (1.12), in its own environment; argv[1] is a job.json.

Policy with a LoRA adapter, the reference by switching it off, as TRL does under PEFT; reward and value are sequence
classifiers. ``trl`` trains the value model whole, as TRL's own example does; ``trl-lora`` puts an adapter of the same
rank on it, which is the work that Sartor does; both decode and score all answers of a rollout at once, up to 64 as TRL
does by default. ``trl-small`` is trl-lora eight at a time: slower, and leaner. Weights are in bf16 where Sartor's are:
TRL's default, fp32 weights under autocast, casts every frozen weight anew in every product.
"""

import json
import os
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Stamps(TrainerCallback):
    """When each rollout and its updates ended."""

    def __init__(self) -> None:
        self.begin, self.ends = 0.0, []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begin = time.time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.time())


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Some rollouts of one contender."""
    dtype = getattr(torch, job["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(job["reward"], num_labels=1, dtype=dtype) for _ in range(2)
    )
    for model in (reward, value):
        model.config.pad_token_id = tokenizer.pad_token_id
    lora = LoraConfig(r=job["lora_r"], lora_alpha=2 * job["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM")
    if job["contender"] != "trl":
        value = get_peft_model(
            value, LoraConfig(r=job["lora_r"], lora_alpha=2 * job["lora_r"], target_modules="all-linear")
        ).base_model.model  # TRL looks for the body by the name that the model itself gives it
    answers = job["prompts_per_rollout"] * job["samples"]
    rows = [{"input_ids": ids} for ids in job["prompts"] for _ in range(job["samples"])]
    rows = (rows * (1 + job["rollouts"] * answers // len(rows)))[: job["rollouts"] * answers]
    stamps = Stamps()
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=job["output"],
            per_device_train_batch_size=job["micro_batch"],
            gradient_accumulation_steps=answers // job["micro_batch"],
            num_mini_batches=1,
            num_ppo_epochs=job["ppo_epochs"],
            total_episodes=job["rollouts"] * answers,
            local_rollout_forward_batch_size=job["micro_batch"] if job["contender"] == "trl-small" else 64,
            response_length=job["max_new_tokens"],
            stop_token="eos",
            missing_eos_penalty=1.0,
            learning_rate=job["learning_rate"],
            kl_coef=job["kl_coef"],
            temperature=1.0,
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[: job["micro_batch"]]),
        callbacks=[stamps],
        peft_config=lora,
    )
    trainer.train()
    begins = [stamps.begin, *stamps.ends]
    return {
        "seconds": [end - begin for begin, end in zip(begins, stamps.ends, strict=False)],
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "versions": {name: version(name) for name in ("trl", "torch", "transformers", "accelerate", "peft")},
    }


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["result"]).write_text(json.dumps(main(job)))
