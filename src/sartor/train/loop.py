"""The loop under every algorithm: accumulate, clip, step, log, evaluate, save, resume.

An algorithm brings one function that leaves the gradient of a whole optimizer batch behind. Nothing here is random:
the order of the data follows from the seed and the step alone, and so a resumed run has nothing to restore but weights
and moments.
"""

import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sartor.machine import release_freed_memory
from sartor.model.load import LanguageModel
from sartor.train.run import RunFolder

# Batches of unlike shape leave holes in the memory that the process keeps; closing them costs a tenth of one step.
RELEASE_EVERY = 4
SPENT = (
    "elapsed.json"  # of a checkpoint: seconds and FLOPs up to it, so that a resumed run has each step in its bill once
)


@dataclass(frozen=True)
class Schedule:
    """Learning rate per step: linear warm-up, then cosine, linear or constant."""

    peak: float
    steps: int
    warmup: int
    shape: str

    def at(self, step: int) -> float:
        """Rate of optimizer step ``step``, counted from 0.

        >>> [round(Schedule(1.0, 6, 2, "linear").at(step), 2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
        return self.peak * factor[self.shape]


class MasterWeights:
    """Trainable weights in fp32 with AdamW, whatever precision the network computes in.

    A bf16 weight keeps 8 bits of its mantissa: an update below 1/256 of it would be lost. So each has an fp32 master,
    gradients of all micro-batches add up there in fp32, and the network gets the rounded copy after each step. fp32
    weights are their own masters.
    """

    def __init__(
        self, trained: torch.nn.Module | Sequence[tuple[str, torch.nn.Parameter]], weight_decay: float
    ) -> None:
        if isinstance(trained, torch.nn.Module):
            trained = [(name, p) for name, p in trained.named_parameters() if p.requires_grad]
        named = [(name, p.requires_grad_(True)) for name, p in trained]
        self.names = [name for name, _ in named]
        self.working = [p for _, p in named]
        self.master = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.working]
        self._hooks = [
            working.register_post_accumulate_grad_hook(_move_gradient(master))
            for working, master in zip(self.working, self.master, strict=True)
            if working is not master
        ]
        self.optimizer = torch.optim.AdamW(self.master, lr=0.0, weight_decay=weight_decay, fused=True)

    def step(self, learning_rate: float, max_norm: float) -> float:
        """Clip, step and refresh the network; returns the gradient's norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.master, max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.forget()
        self._refresh()
        return float(norm)

    def forget(self) -> None:
        """Drop the gradient instead of taking a step."""
        self.optimizer.zero_grad(set_to_none=True)

    def release(self) -> None:
        """Let go of the network, so that others may train it."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _refresh(self) -> None:
        rounded = [(w, m) for w, m in zip(self.working, self.master, strict=True) if w is not m]
        if rounded:
            torch._foreach_copy_([w for w, _ in rounded], [m for _, m in rounded])

    def save(self, path: Path) -> None:
        """Masters and moments, by name."""
        master = dict(zip(self.names, (m.detach() for m in self.master), strict=True))
        torch.save({"master": master, "optimizer": self.optimizer.state_dict()}, path)

    def load(self, path: Path) -> None:
        """Restore what :meth:`save` wrote."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, master in zip(self.names, self.master, strict=True):
                master.copy_(state["master"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self._refresh()


def _move_gradient(master: Tensor) -> Callable[[Tensor], None]:
    def move(working: Tensor) -> None:
        assert working.grad is not None
        gradient = working.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        working.grad = None

    return move


@dataclass(frozen=True)
class Plan:
    """How many steps, of what. Items of each of the ``labels`` are spread evenly over an epoch, where there are any."""

    items: int
    batch_size: int
    steps: int
    seed: int
    labels: Sequence[Hashable] = ()
    _orders: dict[int, list[int]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data; the last one may be smaller."""
        return math.ceil(self.items / self.batch_size)

    def batch(self, step: int) -> list[int]:
        """Items of optimizer step ``step``: each epoch has an order of its own, fixed by the seed.

        >>> plan = Plan(items=5, batch_size=2, steps=6, seed=0)
        >>> sorted(plan.batch(0) + plan.batch(1) + plan.batch(2)), len(plan.batch(2))
        ([0, 1, 2, 3, 4], 1)
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.items).tolist()
            self._orders.clear()
            self._orders[epoch] = _spread(order, self.labels) if self.labels else order
        return self._orders[epoch][place * self.batch_size : (place + 1) * self.batch_size]


def _spread(order: Sequence[int], labels: Sequence[Hashable]) -> list[int]:
    """``order`` with the items of each label at even distances: no stretch has only one of them if it need not.

    >>> _spread([0, 1, 2, 3, 4, 5], labels=["good"] * 4 + ["bad"] * 2)
    [0, 4, 1, 2, 5, 3]
    """
    groups: dict[Hashable, list[int]] = {}
    for item in order:
        groups.setdefault(labels[item], []).append(item)
    place = {
        item: ((i + 0.5) / len(group), number)
        for number, group in enumerate(groups.values())
        for i, item in enumerate(group)
    }
    return sorted(order, key=place.__getitem__)


@dataclass
class Sums:
    """Running sums of metrics over the micro-batches of a step, each with its own count."""

    totals: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the values of each metric, one per pair or completion."""
        for name, values in metrics.items():
            self.totals[name] = self.totals.get(name, 0.0) + float(values.detach().sum())
            self.counts[name] = self.counts.get(name, 0) + values.numel()

    def means(self) -> dict[str, float]:
        """Mean of each metric that has any value."""
        return {name: self.totals[name] / count for name, count in self.counts.items() if count}


def steps_of(epochs: float, max_steps: int | None, items: int, batch_size: int) -> int:
    """Optimizer steps that ``epochs`` and ``max_steps`` ask for, at least one."""
    return max_steps or max(1, round(epochs * math.ceil(items / batch_size)))


def train_steps(
    weights: MasterWeights,
    plan: Plan,
    schedule: Schedule,
    gradient: Callable[[Sequence[int]], dict[str, float]],
    *,
    max_grad_norm: float,
    first_step: int = 0,
) -> Iterator[dict[str, float]]:
    """Run the optimizer steps from ``first_step`` on and yield the metrics of each.

    Args:
        weights: what is trained.
        plan: which items make up each step.
        schedule: learning rate per step.
        gradient: adds the gradient of a batch of items to the weights, and returns its metrics.
        max_grad_norm: gradient clipping.
        first_step: steps already taken.
    """
    for step in range(first_step, plan.steps):
        metrics = gradient(plan.batch(step))
        rate = schedule.at(step)
        norm = weights.step(rate, max_grad_norm)
        if step % RELEASE_EVERY == 0:
            release_freed_memory()
        yield {
            "step": step + 1,
            "epoch": round((step + 1) / plan.steps_per_epoch, 4),
            **metrics,
            "grad_norm": norm,
            "learning_rate": rate,
        }


def save_checkpoint(
    run: RunFolder, step: int, model: LanguageModel, weights: MasterWeights, spent: Mapping[str, Any]
) -> None:
    """Write ``checkpoint-N``: the model as anyone can load it, what exact resuming needs, and what was spent so far."""
    with run.new_checkpoint(step) as folder:
        model.save(folder)
        weights.save(folder / "optimizer.pt")
        (folder / SPENT).write_text(json.dumps(spent), encoding="utf-8")


def load_checkpoint(run: RunFolder, weights: MasterWeights) -> int:
    """Restore the newest checkpoint and return its step; 0 where there is none."""
    for step, folder in run.checkpoints():
        weights.load(folder / "optimizer.pt")
        return step
    return 0


def default_learning_rate(parameters: int, lora: bool) -> float:
    """Peak rate by model size: small models need larger steps (`docs/log.md`); adapters ten times the rate.

    >>> default_learning_rate(135_000_000, lora=False), default_learning_rate(2_000_000_000, lora=True)
    (2e-05, 5e-05)
    """
    full = 2e-5 if parameters <= 500e6 else 5e-6 if parameters <= 3e9 else 1e-6
    return 10 * full if lora else full
