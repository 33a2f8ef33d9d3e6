"""The linear rung: the user's own model, linearised where LoRA starts.

At the start of LoRA (B = 0) a branch's log-ratio to the reference is, to first order, φ·θ, where θ is every B and φ the
gradient of the branch's log-prob by them. One backward pass gives all branches of a batch their φ, once for a model and
a data set; after that any objective trains in about the time that its formula takes, with the real optimizer, batch
order and schedule, and held-out log-ratios are linear in θ too. The kernel view of fine-tuning (arXiv 2210.05643) and
LESS (arXiv 2402.04333) are its relatives. A is taken to stay where it is.

Only a part of the coordinates is kept: AdamW moves each by its own gradient alone, so a random part of them, made up
for by a factor, follows the whole in expectation, which a random projection would not.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from sartor.data.trees import TokenTree, TreeBatch, pack, split_by_budget
from sartor.discover.language.expression import Expression
from sartor.discover.material import Material
from sartor.discover.rungs.many import train_many
from sartor.discover.rungs.outcome import Outcome, Setting, judged
from sartor.model.forward import check, token_logps
from sartor.model.load import LanguageModel
from sartor.model.logprobs import sum_by_branch

AT_ONCE = 16  # candidates in one product: more gain nothing and cost memory
KEPT = 2**15  # coordinates kept by default: how many are enough is measured in docs/log.md


@dataclass(frozen=True)
class Linearised:
    """A ``World`` (see ``many``) whose log-ratios are φ·θ. ``share`` of all coordinates is kept."""

    features: Float[Tensor, "branches P"]
    share: float

    def parameters(self, runs: int) -> Float[Tensor, "runs P"]:
        """Every B at 0."""
        return self.features.new_zeros(runs, self.features.shape[1])

    def logratios(
        self, parameters: Float[Tensor, "runs P"], branches: Int[Tensor, " branches"]
    ) -> Float[Tensor, "runs branches"]:
        """θ·φᵀ, made up for the coordinates that are not kept."""
        return (parameters @ self.features[branches].t()) / self.share

    def gradient(
        self,
        parameters: Float[Tensor, "runs P"],
        branches: Int[Tensor, " branches"],
        weights: Float[Tensor, "runs branches"],
    ) -> Float[Tensor, "runs P"]:
        """weights·φ: that of the coordinates that are kept, as they are in the real model."""
        return weights @ self.features[branches]


def linearise(
    model: LanguageModel,
    trees: Sequence[TokenTree],
    token_budget: int,
    kept: int = KEPT,
    seed: int = 0,
    progress: Callable[[int], None] = lambda trees: None,
) -> Linearised:
    """Features of every branch, in the order of ``pack``.

    Args:
        model: with a fresh adapter, B = 0.
        trees: whose branches to linearise. Each goes through the model as a tree of its own, prompt and all: so one
            backward pass serves a whole batch, and no branch waits for those it shares a prompt with.
        token_budget: tokens per pass.
        kept: about how many coordinates to keep.
        seed: which.
        progress: called with the number of branches that a batch finished.
    """
    alone = [TokenTree(tree.prompt, (branch,), unscored=tree.unscored) for tree in trees for branch in tree.branches]
    if model.shares_prompts is None:
        check(model, max(alone, key=lambda tree: tree.size))
    layers = [module for module in model.network.modules() if isinstance(module, LoraLinear)]
    rows, share = _choose(layers, kept, seed)
    features = torch.empty(len(alone), sum(len(at) * _rank(m) for m, at in zip(layers, rows, strict=True)))
    for group in split_by_budget([tree.size for tree in alone], token_budget):
        batch = pack([alone[i] for i in group]).to(model.device)
        found: list[Tensor] = [torch.empty(0)] * len(layers)
        with _watched(layers, rows, found, batch, model):
            logps = token_logps(model, batch)
            torch.autograd.backward(sum_by_branch(logps, batch.branch, len(group)).sum())
        for parameter in model.network.parameters():
            parameter.grad = None
        features[group] = torch.cat([part.flatten(1) for part in found], 1).cpu()
        progress(len(group))
    return Linearised(features, share)


def run_linear(
    material: Material,
    world: Linearised,
    held_out: Linearised,
    trees: Sequence[Expression],
    settings: Sequence[Setting],
) -> list[Outcome]:
    """Train candidates in the linearised model, each at all settings, and judge them on the held-out branches.

    Args:
        material: what they train on; its adapter is not touched.
        world: the branches to train on, linearised.
        held_out: the branches to judge by, with the same coordinates.
        trees: the candidates.
        settings: what each may choose from.
    """
    recipe, part = material.recipe, material.held_out
    batches = material.train.batches(recipe, seed=0)
    found = []
    for i in range(0, len(trees), AT_ONCE):
        some = trees[i : i + AT_ONCE]
        began = time.perf_counter()
        theta = train_many(world, some, settings, batches, recipe.rates(1.0), recipe.max_grad_norm)
        moved = held_out.logratios(theta.flatten(0, 1), torch.arange(part.first[-1])).view(*theta.shape[:2], -1)
        rated = judged(moved, part.pairs(), settings, part.scored)
        seconds = (time.perf_counter() - began) / len(some)
        found += [replace(one, seconds=seconds) for one in rated]
    return found


def _rank(module: Any) -> int:
    return next(iter(module.r.values()))


def _choose(layers: Sequence[Any], kept: int, seed: int) -> tuple[list[Tensor], float]:
    """Rows of each layer's B to keep, in proportion to how many it has, and what share of all that is."""
    draw = torch.Generator().manual_seed(seed)
    total = sum(module.out_features * _rank(module) for module in layers)
    wanted = min(1.0, kept / total)
    rows = []
    for module in layers:
        count = max(1, round(wanted * module.out_features))
        rows.append(torch.randperm(module.out_features, generator=draw)[:count].sort().values)
    return rows, sum(len(at) * _rank(module) for module, at in zip(layers, rows, strict=True)) / total


@contextmanager
def _watched(
    layers: Sequence[Any], rows: Sequence[Tensor], found: list[Tensor], batch: TreeBatch, model: LanguageModel
) -> Iterator[None]:
    """Have each layer leave ∂log p/∂B of each branch, [branches, rows, rank], in ``found`` when it is passed back."""

    def watch(place: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            (name,) = module.active_adapters
            inner = torch.nn.functional.linear(inputs[0].detach(), module.lora_A[name].weight).float()

            def keep(grad: Tensor) -> None:
                pulled = grad[..., rows[place].to(grad.device)].float() * module.scaling[name]
                found[place] = _by_branch(pulled, inner, batch, bool(model.shares_prompts))

            output.register_hook(keep)

        return hook

    handles = [module.register_forward_hook(watch(place)) for place, module in enumerate(layers)]
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _by_branch(
    pulled: Float[Tensor, "B T rows"], inner: Float[Tensor, "B T rank"], batch: TreeBatch, packed: bool
) -> Float[Tensor, "branches rows rank"]:
    """Σ over a branch's tokens of the gradient by the layer's output times what B multiplies."""
    if not packed:  # a padded row for each branch
        return pulled.transpose(1, 2) @ inner
    places = [(bound[0], bound[-1]) for bound in batch.bounds]
    return torch.stack([pulled[0, start:end].t() @ inner[0, start:end] for start, end in places])
