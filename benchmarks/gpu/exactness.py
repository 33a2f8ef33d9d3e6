"""What must be right before anything may be fast: log-probs and gradients, kernels, and whether runs repeat."""

import gc
import time
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from shapes import PAIRS, SHAPES, build, draw_trees, synchronize
from training import sartor_trainer

from sartor.data.trees import TokenTree, pack
from sartor.machine import machine
from sartor.model import forward, logprobs
from sartor.model.forward import packed_logps, token_logps
from sartor.model.load import LanguageModel
from sartor.model.tree_attention import TreeAttention
from sartor.model.triton_logprobs import available, d_logits_, logsumexp_and_target
from sartor.model.varlen import VarlenAttention, fits


def check_case(device: Any, tiny: bool) -> dict[str, Any]:
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
