"""The linear rung: the user's own model, linearised where LoRA starts.

At the start of LoRA (B = 0) a branch's log-ratio to the reference is, to first order, φ·θ, where θ is every B and φ the
gradient of the branch's log-prob by them. One backward pass gives all branches of a batch their φ, once for a model and
a data set. The kernel view of fine-tuning (arXiv 2210.05643) and LESS (arXiv 2402.04333) are its relatives. A is taken
to stay where it is.

Adam moves each coordinate by its own momentum over its own root mean square. The latter hardly depends on the objective
up to a factor: it is taken to be that of φ over the branches to train on, times one running number for each run. Then θ
is always a sum of branches' preconditioned φ, and all that a run needs of φ are three matrices of inner products, exact
in all coordinates. Training any objective takes a step no longer than its formula does, with the real batches, schedule
and clipping, and the log-ratios of held-out branches are one product.

Chances of all answers must sum to one, which φ·θ alone forgets: an objective that lifts every log-prob would never be
done, and one that lowers them all would find resistance where there is none. Where held-out branches are answers that
the reference drew they tell the Fisher matrix F, and the policy is π_ref · e^(φ·θ) / Z with log Z = θᵀFθ / 2, its KL.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from sartor.data.trees import TokenTree, TreeBatch, pack, split_by_budget
from sartor.discover.language.expression import Expression
from sartor.discover.language.program import Program
from sartor.discover.material import Material
from sartor.discover.rungs.many import pulls
from sartor.discover.rungs.outcome import Outcome, Scored, Setting, judged
from sartor.model.forward import check, token_logps
from sartor.model.load import LanguageModel
from sartor.model.logprobs import sum_by_branch

AT_ONCE = 16  # candidates in one product: more gain nothing
ROOM = 2 * 2**30  # bytes for φ while the inner products are made; of more coordinates than fit a part stands for all
COLUMNS = 2**16  # coordinates of a product: bounds what is made fp32 at a time
ADAM = 0.9, 0.999  # as in ``MasterWeights``


@dataclass(frozen=True)
class Kernel:
    """Inner products of φ between all branches, those to train on first.

    Attributes:
        moves: φ·D·φ, with D = 1/rms of each coordinate: how a step on one branch moves the log-ratio of another.
        norms: φ·φ: for the gradient's norm.
        squares: φ·D²·φ, divided by the number of coordinates: the mean square of the preconditioned gradient.
    """

    moves: Float[Tensor, "branches branches"]
    norms: Float[Tensor, "branches branches"]
    squares: Float[Tensor, "branches branches"]


def run_linear(
    material: Material, kernel: Kernel, trees: Sequence[Expression], settings: Sequence[Setting]
) -> list[Outcome]:
    """Train candidates in the linearised model, each at all settings, and judge them on the held-out branches.

    By what they are worth where those branches are the reference's own answers and have true scores, else by bits.

    Args:
        material: what they train on; its adapter is not touched.
        kernel: of its branches, those of the held-out part after those to train on.
        trees: the candidates.
        settings: what each may choose from.
    """
    part = material.held_out
    scored = part.scored if material.truth and material.truth.on_policy else None
    found = []
    for i in range(0, len(trees), AT_ONCE):
        some = trees[i : i + AT_ONCE]
        began = time.perf_counter()
        shares = train(material, kernel, [Program(tree) for tree in some], settings, scored)
        moved = shares @ kernel.moves[material.train.first[-1] :].t()
        rated = judged(moved.transpose(0, 1), part.pairs(), settings, scored)
        seconds = (time.perf_counter() - began) / len(some)
        found += [replace(one, seconds=seconds) for one in rated]
    return found


def train(
    material: Material,
    kernel: Kernel,
    programs: Sequence[Program],
    settings: Sequence[Setting],
    drawn: Scored | None = None,
) -> Float[Tensor, "settings candidates branches"]:
    """How much of each branch's preconditioned φ is in θ after all steps.

    Args:
        material: what they train on.
        kernel: of its branches.
        programs: the candidates.
        settings: what each trains at.
        drawn: the held-out branches, where they are the reference's own answers; no score of theirs is looked at.
    """
    recipe, first = material.recipe, material.train.first[-1]
    betas = torch.tensor([setting.beta for setting in settings])
    rates = torch.tensor([setting.learning_rate for setting in settings])[:, None, None]
    schedule = recipe.rates(1.0)
    shares = torch.zeros(len(settings), len(programs), len(kernel.moves))
    momentum, square = torch.zeros_like(shares), torch.zeros(len(settings), len(programs), 1)
    for step, batch in enumerate(material.train.batches(recipe, seed=0), start=1):
        at = batch.branches
        logratios = shares @ kernel.moves[at].t()
        if drawn is None:
            pulled = pulls(programs, batch, logratios, betas)
        else:
            # F·θ as a sum of the drawn answers' φ; log Z goes off every log-ratio, and its gradient off every gradient.
            fisher, log_z = drawn.fisher(shares @ kernel.moves[first:].t())
            pulled = pulls(programs, batch, logratios - log_z, betas)
            pulled = torch.cat([pulled, -pulled.sum(-1, keepdim=True) * fisher], -1)
            at = torch.cat([at, torch.arange(first, len(kernel.moves))])
        norm = _length(pulled, kernel.norms[at][:, at]).sqrt()
        pulled *= (recipe.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        momentum *= ADAM[0]
        momentum[..., at] += (1 - ADAM[0]) * pulled
        square = ADAM[1] * square + (1 - ADAM[1]) * _length(pulled, kernel.squares[at][:, at])
        scale = (square / (1 - ADAM[1] ** step)).sqrt().clamp(min=1e-12)
        shares -= schedule.at(step - 1) * rates * momentum / (1 - ADAM[0] ** step) / scale
    return shares


def _length(
    vectors: Float[Tensor, "settings candidates branches"], products: Float[Tensor, "branches branches"]
) -> Float[Tensor, "settings candidates 1"]:
    """vᵀ·M·v, which rounding alone could bring below 0."""
    return ((vectors @ products) * vectors).sum(-1, keepdim=True).clamp(min=0)


def kernel_of(
    model: LanguageModel,
    train_on: Sequence[TokenTree],
    held_out: Sequence[TokenTree],
    token_budget: int,
    progress: Callable[[int], None] = lambda branches: None,
    room: int = ROOM,
) -> Kernel:
    """Linearise a model with a fresh adapter (B = 0) on the branches of some trees.

    Args:
        model: with its adapter.
        train_on: trees to train on.
        held_out: trees to judge by.
        token_budget: tokens per pass.
        progress: called with the number of branches that a batch finished.
        room: bytes for φ; of more coordinates than fit every so manieth is kept, and stands for those left out.
    """
    features, step = gradients(model, [*train_on, *held_out], token_budget, progress, room)
    count = sum(len(tree.branches) for tree in train_on)
    everything = torch.zeros(3, len(features), len(features))
    for part in features.split(COLUMNS, dim=1):
        wide = part.float()
        scale = wide[:count].square().mean(0, keepdim=True).sqrt()
        scaled = wide / torch.where(scale > 0, scale, 1.0)
        everything += torch.stack([scaled @ wide.t(), wide @ wide.t(), scaled @ scaled.t()])
    moves, norms, squares = everything
    return Kernel(step * moves, step * norms, squares / features.shape[1])


def gradients(
    model: LanguageModel,
    trees: Sequence[TokenTree],
    token_budget: int,
    progress: Callable[[int], None] = lambda branches: None,
    room: int = ROOM,
) -> tuple[Float[Tensor, "branches coordinates"], int]:
    """φ of every branch, bf16, in the order of ``pack``, and which coordinates: every so manieth, as there is ``room``.

    Each branch goes through the model as a tree of its own, prompt and all: so one backward pass serves a whole batch.
    """
    alone = [TokenTree(tree.prompt, (branch,), unscored=tree.unscored) for tree in trees for branch in tree.branches]
    if model.shares_prompts is None:
        check(model, max(alone, key=lambda tree: tree.size))
    layers = [module for module in model.network.modules() if isinstance(module, LoraLinear)]
    sizes = [_rank(module) * int(module.out_features or 0) for module in layers]
    step = max(1, -(-2 * len(alone) * sum(sizes) // room))  # every so manieth coordinate is kept
    features = torch.empty(len(alone), sum(len(range(0, size, step)) for size in sizes), dtype=torch.bfloat16)
    for group in split_by_budget([tree.size for tree in alone], token_budget):
        batch = pack([alone[i] for i in group]).to(model.device)
        found: list[Tensor] = [torch.empty(0)] * len(layers)
        with _watched(layers, step, found, batch, bool(model.shares_prompts)):
            logps = token_logps(model, batch)
            torch.autograd.backward(sum_by_branch(logps, batch.branch, len(group)).sum())
        for parameter in model.network.parameters():
            parameter.grad = None
        features[group] = torch.cat(found, 1).to("cpu", torch.bfloat16)
        progress(len(group))
    return features, step


def _rank(module: Any) -> int:
    return next(iter(module.r.values()))


@contextmanager
def _watched(layers: Sequence[Any], step: int, found: list[Tensor], batch: TreeBatch, packed: bool) -> Iterator[None]:
    """Have each layer leave ∂log p/∂B of each branch, [branches, coordinates], in ``found`` when it is passed back."""

    def watch(place: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            (name,) = module.active_adapters
            inner = torch.nn.functional.linear(inputs[0].detach(), module.lora_A[name].weight) * module.scaling[name]

            def keep(grad: Tensor) -> None:
                found[place] = _by_branch(inner.float(), grad.float(), batch, packed).flatten(1)[:, ::step]

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
    inner: Float[Tensor, "B T rank"], grad: Float[Tensor, "B T out"], batch: TreeBatch, packed: bool
) -> Float[Tensor, "branches rank out"]:
    """Σ over a branch's tokens of what B multiplies times the gradient by the layer's output."""
    if not packed:  # a padded row for each branch
        return inner.transpose(1, 2) @ grad
    places = [(bound[0], bound[-1]) for bound in batch.bounds]
    return torch.stack([inner[0, start:end].t() @ grad[0, start:end] for start, end in places])
