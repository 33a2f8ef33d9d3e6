"""Everything about speed and exactness that only a GPU can tell, in one run of under nine minutes.

usage: benchmarks/gpu.sh [--out FILE] [--minutes 8.5] [--only TEXT] [--device cpu --tiny]

Models have the shape of Llama 3.2 1B and Llama 3.1 8B with random weights, data the lengths of UltraFeedback and HH:
neither changes what a step costs. Each case is a process of its own with a time limit, and the results are written
after each, so that nothing is lost when the machine goes. First what must be right, then what should be fast:

- ``check``: both roads and their gradients against fp32; flash against dense attention; Triton kernels against fp64.
- ``repeat``: whether two equal runs end with equal bits, with deterministic algorithms off and on.
- ``head``: the passes over a chunk of logits, in torch and in Triton, and the head as it is used.
- ``profile``: where the host waits for the device in a step, and which kernels take the time.
- ``step/MODEL/TRAINED/DATA/WHO``: optimizer steps of 16 pairs by Sartor, by TRL with the best settings known to us
  (``trl-tuned``: reference scored ahead, no checkpointing, micro-batches as large as fit, bf16 where nothing trains
  it), and by TRL as shipped (``trl``). All start from the same weights and take the same pairs in the same order.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

PAIRS = 16  # in an optimizer batch
LEARNING_RATE = 1e-5
LORA_R = 16
LENGTHS = {"uf": (168, 400), "hh": (215, 100)}  # mean prompt and completion of UltraFeedback and HH
SPREAD = 0.5  # lengths are uniform within so much of their mean
DENSE_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s, from the data sheets
# Hidden width, layers, heads, key-value heads, inner width, vocabulary.
SHAPES = {
    "1b": (2048, 16, 32, 8, 8192, 128256),
    "8b": (4096, 32, 32, 8, 14336, 128256),
    "check": (1024, 4, 16, 4, 3072, 32000),
    "tiny": (32, 2, 4, 2, 48, 300),
}
TIED = ("1b",)  # input and output embeddings are one
SCATTER = {"check": 0.05, "tiny": 0.2}  # of the weights, large enough for log-probs that differ from token to token
# Per parameter, by whether only an adapter is trained. TRL's autocast holds a bf16 copy of trained fp32 weights, and as
# shipped a reference beside the policy.
BYTES = {True: {"sartor": 2, "trl-tuned": 2, "trl": 4}, False: {"sartor": 18, "trl-tuned": 18, "trl": 22}}
# In order of what we would miss most, with the seconds each may take.
CASES: list[tuple[str, int]] = [
    ("check", 60),
    ("step/1b/lora/uf/sartor", 60),
    ("step/1b/lora/uf/trl-tuned", 60),
    ("step/1b/full/uf/sartor", 60),
    ("step/1b/full/uf/trl-tuned", 60),
    ("step/8b/lora/uf/sartor", 75),
    ("step/8b/lora/uf/trl-tuned", 90),
    ("profile", 60),
    ("head", 45),
    ("repeat", 45),
    ("step/1b/lora/hh/sartor", 45),
    ("step/1b/lora/hh/trl-tuned", 45),
    ("step/1b/lora/uf/trl", 60),
    ("step/1b/full/uf/trl", 60),
    ("step/8b/lora/hh/sartor", 60),
    ("step/8b/lora/hh/trl-tuned", 60),
    ("step/8b/lora/uf/trl", 90),
    ("step/1b/full/hh/sartor", 45),
    ("step/1b/full/hh/trl-tuned", 45),
    ("step/1b/lora/hh/trl", 45),
    ("step/8b/full/uf/sartor", 90),
    ("step/8b/full/uf/trl-tuned", 90),
]


# --- the parent: one process per case ---------------------------------------------------------------------------------


def run_all(options: argparse.Namespace) -> None:
    begun, results = time.time(), []
    for name, limit in CASES:
        left = options.minutes * 60 - (time.time() - begun)
        if options.only not in name:
            continue
        if left < 15:
            results.append({"case": name, "skipped": "no time left"})
            continue
        # Half the micro-batch where memory runs out, twice.
        for scale in (1.0, 0.5, 0.25):
            result = run_one(name, scale, min(limit, left), options)
            if result.get("error") != "memory":
                break
        results.append(result)
        write(options.out, results)
        print(line(result), flush=True)
    write(options.out, results)


def run_one(name: str, scale: float, limit: float, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", name, "--scale", str(scale), "--device", options.device]
    begun = time.time()
    try:
        found = subprocess.run(
            command + ["--tiny"] * options.tiny, capture_output=True, text=True, timeout=limit, env=environment(name)
        )
    except subprocess.TimeoutExpired as late:
        return {"case": name, "error": f"took more than {limit:.0f} s", "tail": str(late.stderr or "")[-800:]}
    rows = [row for row in found.stdout.splitlines() if row.startswith("RESULT ")]
    result = json.loads(rows[-1].removeprefix("RESULT ")) if rows else {"error": found.stderr[-1500:]}
    return {"case": name, "scale": scale, "process_seconds": round(time.time() - begun, 1), **result}


def environment(name: str) -> dict[str, str]:
    more = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if name == "repeat":
        more["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    else:
        more["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return {**os.environ, **more}


def write(path: str, results: list[dict[str, Any]]) -> None:
    scratch = Path(path).with_suffix(".partial")
    scratch.write_text(json.dumps({"date": date.today().isoformat(), "results": results}, indent=1) + "\n")
    scratch.rename(path)


def line(result: dict[str, Any]) -> str:
    if "ms_per_step" in result:
        share = "" if result["mfu"] is None else f"  MFU {result['mfu']:.1%}"
        return (
            f"{result['case']:28} {result['ms_per_step']:8.1f} ms  {result['pairs_per_second']:7.2f} pairs/s{share}"
            f"  {result['peak_gib']:.1f} GiB  loss {result['loss'][0]:.5f}  norm {result['grad_norm'][0]:.5f}"
        )
    text = {key: value for key, value in result.items() if key not in ("case", "scale", "kernels", "machine")}
    return f"{result['case']:28} {json.dumps(text)[:1500]}"


# --- models and data --------------------------------------------------------------------------------------------------


def build(shape: str, device: Any, lora: bool, dtype: Any = None) -> Any:
    """A random model, the same weights whatever its precision: they are drawn, and rounded, in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    hidden, layers, heads, kv_heads, inner, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=shape in TIED,
        initializer_range=SCATTER.get(shape, 0.02),
        max_position_embeddings=4096,
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
    )
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if dtype is not None:
        network = network.to(dtype)
    if not lora:
        return network
    from peft import get_peft_model

    network = get_peft_model(network, lora_config(), autocast_adapter_dtype=False)
    set_adapter(network)
    return network


def lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=LORA_R, lora_alpha=2 * LORA_R, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def set_adapter(network: Any) -> None:
    """Both halves random, so that policy and reference differ from the first step on; values that bf16 can hold."""
    import torch

    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(zlib.crc32(name[name.index("layers.") :].encode()))
                p.copy_((0.02 * torch.randn(p.shape, generator=generator)).bfloat16())


def draw_trees(data: str, vocabulary: int, count: int, scale: float = 1.0) -> list[Any]:
    from sartor.data.trees import TokenTree

    rng = np.random.default_rng(0)
    tokens = lambda n: tuple(rng.integers(10, vocabulary, n).tolist())  # noqa: E731
    length = lambda mean: max(1, round(scale * mean * rng.uniform(1 - SPREAD, 1 + SPREAD)))  # noqa: E731
    prompt, completion = LENGTHS[data]
    return [
        TokenTree(tokens(length(prompt)), (tokens(length(completion)), tokens(length(completion))), (1.0, 2.0))
        for _ in range(count)
    ]


def useful_flops(config: Any, trees: Sequence[Any], lora: bool) -> float:
    """FLOPs that a step cannot do without: each prompt once, the head on completion tokens, no recomputation.

    A frozen matrix needs two products per token (forward, and the gradient by its input), a trained one three.
    """
    hidden, width = config.hidden_size, config.head_dim
    attention = hidden * width * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    body = config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size)
    tokens = sum(tree.size for tree in trees)
    scored = sum(len(branch) for tree in trees for branch in tree.branches)
    seen = 0  # keys, summed over queries
    for tree in trees:
        p = len(tree.prompt)
        seen += p * (p + 1) // 2 + sum(len(b) * p + len(b) * (len(b) + 1) // 2 for b in tree.branches)
    products = 2 if lora else 3
    matrices = 2 * products * (body * tokens + config.vocab_size * hidden * scored)
    return matrices + 3 * 4 * config.num_hidden_layers * config.num_attention_heads * width * seen


def token_budget(config: Any, static: float, device: Any) -> int:
    """Tokens whose activations fit beside ``static`` bytes, by a rough count per layer."""
    import torch

    if device.type != "cuda":
        return 512
    memory = torch.cuda.get_device_properties(device).total_memory
    per_token = config.num_hidden_layers * (40 * config.hidden_size + 10 * config.intermediate_size)
    return max(512, int((0.85 * memory - 4e9 - static) * 0.8 / per_token))


def bytes_of_weights(shape: str, lora: bool, who: str) -> float:
    """What stays in memory from step to step: weights, and where they are trained gradients, moments and masters."""
    hidden, layers, heads, kv_heads, inner, vocabulary = SHAPES[shape]
    attention = 2 * hidden * hidden * (1 + kv_heads / heads)
    parameters = layers * (attention + 3 * hidden * inner) + vocabulary * hidden * (1 if shape in TIED else 2)
    return parameters * BYTES[lora][who]


def peak_flops() -> float | None:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rate for card, rate in DENSE_BF16.items() if card in name), None)


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib() -> float:
    from sartor.machine import peak_memory_gib

    return peak_memory_gib()


# --- steps ------------------------------------------------------------------------------------------------------------


def step_case(name: str, scale: float, device: Any, tiny: bool) -> dict[str, Any]:
    import torch

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
        "peak_gib": peak_gib(),
        **found,
    }


def sartor_trainer(shape: str, lora: bool, trees: list[Any], scale: float, device: Any) -> Any:
    """A function that takes one step on some items, and what was found on the way there."""
    from sartor.data.trees import split_by_budget
    from sartor.model.forward import check
    from sartor.model.load import LanguageModel
    from sartor.model.reference import score_trees
    from sartor.objectives.specs import parse_objective
    from sartor.train.gradient import batch_gradient
    from sartor.train.loop import MasterWeights
    from sartor.train.preferences import Preferences

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
    import tempfile

    import torch
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


# --- what must be right -----------------------------------------------------------------------------------------------


def check_case(device: Any, tiny: bool) -> dict[str, Any]:
    import torch

    from sartor.machine import machine
    from sartor.model import forward, logprobs

    found: dict[str, Any] = {
        "machine": {**machine(), "triton": find_spec("triton") is not None, "trl": find_spec("trl") is not None},
        "forward_uses_varlen": uses(forward, "varlen"),
        "head_uses_triton": uses(logprobs, "triton_logprobs"),
    }
    for part in (check_roads, check_flash, check_kernels):
        try:
            found[part.__name__] = part(device, tiny)
        except Exception as error:  # the other parts are worth having all the same
            found[part.__name__] = f"{type(error).__name__}: {error}"[:600]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def uses(module: Any, name: str) -> bool:
    """Whether a module has the other one, or anything of it, in its names."""
    return any(name in (key, getattr(value, "__module__", "").split(".")[-1]) for key, value in vars(module).items())


def check_roads(device: Any, tiny: bool) -> dict[str, Any]:
    """Log-probs and gradients by either road against those of the same weights in fp32 by the plain road."""
    import torch

    from sartor.data.trees import TokenTree, pack
    from sartor.model.forward import packed_logps, token_logps
    from sartor.model.load import LanguageModel

    shape = "tiny" if tiny else "check"
    rng = np.random.default_rng(1)
    tokens = lambda n: tuple(rng.integers(10, SHAPES[shape][-1], n).tolist())  # noqa: E731
    sizes = [(60, (40, 90)), (200, (300, 20, 150)), (1, (5, 6)), (0, (30, 40)), (33, (17,))]
    trees = [TokenTree(tokens(p), tuple(tokens(n) for n in branches)) for p, branches in sizes]

    def scored(dtype: Any, packed: bool) -> tuple[Any, Any]:
        network = build(shape, device, lora=False, dtype=dtype)
        model = LanguageModel(network, SimpleNamespace(eos_token_id=1), shape)
        model.shares_prompts = packed
        batch = pack(trees).to(model.device)
        logps = packed_logps(model, batch) if packed else token_logps(model, batch)
        (logps * torch.linspace(-1, 1, len(logps), device=device)).sum().backward()
        gradient = torch.cat([p.grad.flatten().float() for p in network.parameters() if p.grad is not None])
        return logps.detach(), gradient

    low = torch.bfloat16
    truth, true_gradient = scored(torch.float32, False)
    found = {}
    for road, dtype, packed in (("plain bf16", low, False), ("packed bf16", low, True), ("packed fp32", None, True)):
        logps, gradient = scored(dtype or torch.float32, packed)
        gap = (logps - truth).abs()
        found[road] = {
            "max_gap": gap.max().item(),
            "mean_gap": gap.mean().item(),
            "gradient_error": ((gradient - true_gradient).norm() / true_gradient.norm()).item(),
        }
    return found


def check_flash(device: Any, tiny: bool) -> dict[str, Any] | str:
    """Output and gradients of one layer of flash attention against dense attention in fp64: relative errors."""
    import torch

    from sartor.data.trees import TokenTree, pack
    from sartor.model.tree_attention import TreeAttention
    from sartor.model.varlen import VarlenAttention, fits

    if not fits(device):
        return "flash attention does not fit this device"
    sizes = [(70, (130, 40)), (0, (30, 50)), (9, (0, 7, 300)), (129, (128, 1, 64, 65)), (5, (6,))]
    batch = pack([TokenTree((0,) * p, tuple((0,) * n for n in branches)) for p, branches in sizes]).to(device)
    found = {}
    for heads, kv_heads, width in ((32, 8, 64), (32, 8, 128), (8, 8, 256)):
        for window in (None, 100):
            generator = torch.Generator(device=device).manual_seed(0)
            make = lambda n: torch.randn(1, n, len(batch.ids), width, generator=generator, device=device)  # noqa: B023, E731
            qkv = [make(n).bfloat16() for n in (heads, kv_heads, kv_heads)]
            ours, truth = [[x.to(d).requires_grad_() for x in qkv] for d in (torch.bfloat16, torch.float64)]
            options: dict[str, Any] = {"window": window, "scaling": width**-0.5, "softcap": None}
            output = VarlenAttention(batch).attend(0, *ours, **options)
            dense = TreeAttention(batch).attend(0, *truth, **options)
            pull = torch.randn(dense.shape, generator=generator, device=device).bfloat16()
            mine = [output, *torch.autograd.grad(output, ours, pull)]
            theirs = [dense, *torch.autograd.grad(dense, truth, pull.double())]
            errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(mine, theirs, strict=True)]
            found[f"{heads}/{kv_heads}x{width} window {window}"] = dict(
                zip(("out", "dq", "dk", "dv"), errors, strict=True)
            )
    return found


def check_kernels(device: Any, tiny: bool) -> dict[str, Any] | str:
    """The Triton kernels against fp64: largest error of log Z and target logit, relative error of the gradient."""
    import torch

    from sartor.model.triton_logprobs import available, d_logits_, logsumexp_and_target

    if not available(torch.empty(1, device=device)):
        return "Triton cannot run here"
    found = {}
    for rows, columns in ((512, 128256), (300, 50257), (64, 1000)):
        for scale, softcap in ((1.0, None), (0.25, 30.0)):
            torch.manual_seed(0)
            logits = (4 * torch.randn(rows, columns, device=device)).bfloat16()
            target = torch.randint(columns, (rows,), device=device)
            grad = torch.randn(rows, device=device)
            leaf = logits.double().requires_grad_()
            values = leaf * scale if softcap is None else softcap * torch.tanh(leaf * scale / softcap)
            true_z, true_chosen = torch.logsumexp(values, -1), values.gather(1, target[:, None])[:, 0]
            (truth,) = torch.autograd.grad(true_chosen - true_z, leaf, grad.double())
            log_z, chosen = logsumexp_and_target(logits, target, scale, softcap)
            gradient = d_logits_(logits, target, log_z, grad, scale, softcap).double()
            found[f"{rows}x{columns} scale {scale} softcap {softcap}"] = {
                "log_z": (log_z - true_z).abs().max().item(),
                "chosen": (chosen - true_chosen).abs().max().item(),
                "gradient": ((gradient - truth).norm() / truth.norm()).item(),
            }
    return found


def repeat_case(device: Any, tiny: bool) -> dict[str, Any]:
    """Two runs of two steps from the same start: largest difference of any weight, and what a step takes."""
    import torch

    shape = "tiny" if tiny else "check"
    trees = draw_trees("uf", SHAPES[shape][-1], 2 * PAIRS, scale=0.05 if tiny else 1.0)

    def run() -> tuple[Any, float]:
        model, step, _ = sartor_trainer(shape, False, trees, 1.0, device)
        step(range(PAIRS))
        synchronize()
        begun = time.perf_counter()
        step(range(PAIRS, 2 * PAIRS))
        synchronize()
        return torch.cat(
            [p.detach().flatten().float() for p in model.network.parameters()]
        ), time.perf_counter() - begun

    found: dict[str, Any] = {}
    run()  # kernels are compiled and loaded
    for strict in (False, True):
        torch.use_deterministic_algorithms(strict)
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            (first, _), (second, seconds) = run(), run()
            gap = (first - second).abs().max().item()
            found["strict" if strict else "default"] = {"largest_difference": gap, "ms_per_step": 1e3 * seconds}
        except RuntimeError as error:
            found["strict" if strict else "default"] = str(error)[:400]
    return found


# --- where the time goes ----------------------------------------------------------------------------------------------


def milliseconds(work: Callable[[], Any], repeats: int = 10) -> float:
    """Median time of ``work`` once warm."""
    import torch

    times = []
    for i in range(repeats + 3):
        synchronize()
        begun = time.perf_counter()
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            took = start.elapsed_time(end)
        else:
            work()
            took = 1e3 * (time.perf_counter() - begun)
        if i >= 3:
            times.append(took)
    return float(np.median(times))


def head_case(device: Any, tiny: bool) -> dict[str, Any]:
    """One chunk of logits: torch's passes and Triton's, beside the product that made it; then the whole head."""
    import torch

    from sartor.model.logprobs import Head, chunked_logps
    from sartor.model.triton_logprobs import available, d_logits_, logsumexp_and_target

    found: dict[str, Any] = {}
    shapes = [(64, 32, 300)] if tiny else [(8192, 2048, 128256), (8192, 4096, 128256)]
    for tokens, hidden, vocabulary in shapes:
        rows = min(tokens, 2048)
        h = torch.randn(tokens, hidden, device=device).bfloat16()
        w = (hidden**-0.5 * torch.randn(vocabulary, hidden, device=device)).bfloat16()
        target = torch.randint(vocabulary, (tokens,), device=device)
        to, grad = target[:rows], torch.randn(rows, device=device)
        logits = h[:rows] @ w.t()

        def torch_forward(logits: Any = logits, to: Any = to) -> Any:
            wide = logits.float()
            log_z = torch.logsumexp(wide, -1)
            return log_z, wide.gather(1, to[:, None])[:, 0] - log_z

        log_z = torch_forward()[0]

        def torch_backward(logits: Any = logits, to: Any = to, log_z: Any = log_z, grad: Any = grad) -> Any:
            slope = logits.float().sub_(log_z[:, None]).exp_().neg_()
            slope.scatter_add_(1, to[:, None], torch.ones_like(slope[:, :1]))
            return slope.mul_(grad[:, None]).to(logits.dtype)

        times = {
            "product": milliseconds(lambda h=h, w=w, rows=rows: h[:rows] @ w.t()),
            "torch_forward": milliseconds(torch_forward),
            "torch_backward": milliseconds(torch_backward),
        }
        if available(logits):
            times["triton_forward"] = milliseconds(lambda x=logits, to=to: logsumexp_and_target(x, to))
            scratch = logits.clone()  # overwritten again and again, which changes nothing about the time
            times["triton_backward"] = milliseconds(lambda x=scratch, to=to, z=log_z, g=grad: d_logits_(x, to, z, g))
            bytes_ = logits.numel() * logits.element_size()
            times["triton_forward_gb_per_s"] = bytes_ / times["triton_forward"] / 1e6
            times["triton_backward_gb_per_s"] = 2 * bytes_ / times["triton_backward"] / 1e6
        found[f"chunk {rows}x{hidden}x{vocabulary}"] = times
        del logits
        for trained in (False, True):
            leaf, matrix = h.clone().requires_grad_(), w.clone().requires_grad_(trained)

            def whole(leaf: Any = leaf, matrix: Any = matrix, target: Any = target) -> None:
                leaf.grad = matrix.grad = None
                chunked_logps(leaf, target, Head(matrix)).sum().backward()

            took = milliseconds(whole, repeats=5)
            flops = 2 * tokens * hidden * vocabulary * (3 if trained else 2)
            kind = "trained" if trained else "frozen"
            found[f"head {tokens}x{hidden}x{vocabulary} {kind}"] = {"ms": took, "tflops_useful": flops / took / 1e9}
    return found


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Counts where the host waited for the device, by line of Python."""
    import torch

    found: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            found["/".join(Path(warning.filename).parts[-2:]) + f":{warning.lineno}"] += 1


def profile_case(device: Any, tiny: bool) -> dict[str, Any]:
    """One LoRA step of the 1B model: where the host waits, and the kernels with the most time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    shape = "tiny" if tiny else "1b"
    trees = draw_trees("uf", SHAPES[shape][-1], PAIRS, scale=0.05 if tiny else 1.0)
    _, step, facts = sartor_trainer(shape, True, trees, 1.0, device)
    for _ in range(2):
        step(range(PAIRS))
    found: dict[str, Any] = {"token_budget": facts["token_budget"]}
    if device.type == "cuda":
        with waits() as places:
            step(range(PAIRS))
        found |= {"waits": sum(places.values()), "waits_at": dict(places.most_common(20))}
    synchronize()
    begun = time.perf_counter()
    step(range(PAIRS))
    synchronize()
    found["ms_unprofiled"] = 1e3 * (time.perf_counter() - begun)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as trace:
        step(range(PAIRS))
        synchronize()
    on_device = device.type == "cuda"
    time_of = lambda row: row.self_device_time_total if on_device else row.self_cpu_time_total  # noqa: E731
    events = trace.key_averages()
    rows = [row for row in events if not on_device or row.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(map(time_of, rows)) / 1e3
    rows = sorted(rows, key=time_of, reverse=True)[:25]
    found["device_ms"] = total
    found["kernels"] = [{"name": row.key[:90], "ms": time_of(row) / 1e3, "calls": row.count} for row in rows]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=f"gpu-{date.today().isoformat()}.json")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to see that everything runs")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--scale", type=float, default=1.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is None:
        run_all(options)
        return
    import torch

    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    others = {"check": check_case, "repeat": repeat_case, "head": head_case, "profile": profile_case}
    try:
        if options.case in others:
            result = others[options.case](device, options.tiny)
        else:
            result = step_case(options.case, options.scale, device, options.tiny)
    except torch.OutOfMemoryError:
        result = {"error": "memory"}
    print("RESULT " + json.dumps(result, default=float))


if __name__ == "__main__":
    main()
