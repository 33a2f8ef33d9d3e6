"""TRL's side of benchmarks/trl_losses.py: runs in TRL's own environment, with what it is given in a folder.

For each case it lets TRL's trainer take its own batch through its own loss, and writes down the batch as token ids, the
loss, and the gradient of every parameter.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "cpo": (CPOTrainer, CPOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
}


def run(folder: Path, case: dict) -> None:
    kind, options = case["trl"]
    trainer_class, config_class = TRAINERS[kind]
    rows = json.loads((folder / f"{case['rows']}.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    arguments = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": len(rows),
        "max_length": 256,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "gradient_checkpointing": False,
        **options,
    }
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # TRL's CPO and ORPO do not fall back to it
    reference = {}
    if kind in ("dpo", "kto"):
        reference["ref_model"] = AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=torch.float32)
    trainer = trainer_class(
        model=model,
        args=config_class(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **reference,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()  # no dropout in this model anyway
    if kind == "orpo":  # its other term counts the prompt's tokens, which is a difference agreed on
        chosen, rejected, *_ = trainer.concatenated_forward(model, batch)
        loss = -trainer.odds_ratio_loss(chosen, rejected)[0].mean()
    else:
        loss = trainer.compute_loss(model, batch)
    loss.backward()
    names = ("input_ids", "completion_mask", "KL_input_ids", "KL_completion_mask", "label", "attention_mask")
    sides = tuple(f"{side}_{what}" for side in ("chosen", "rejected") for what in ("input_ids", "labels"))
    kept = {name: torch.as_tensor(batch[name]).long() for name in (*names, *sides) if name in batch}
    gradients = {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    save_file({**kept, **gradients, "loss": loss.detach().float()}, folder / f"{case['name']}.safetensors")


if __name__ == "__main__":
    work = Path(sys.argv[1])
    for one in json.loads((work / "cases.json").read_text()):
        run(work, one)
        print(one["name"], flush=True)
