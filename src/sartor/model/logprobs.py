"""Log-probabilities of completion tokens, straight from hidden states, never a [tokens, vocabulary] tensor at once."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sartor.model.triton_logprobs import available, d_logits_, logsumexp_and_target

KEPT = 2**28  # bytes of logits kept for the backward pass, where so few are enough; more are computed again
CHUNK = 512  # rows projected to the vocabulary at a time: 100 MB of fp32 logits at 49k words


@dataclass(frozen=True)
class Head:
    """A language model's output layer: logits = cap·tanh(scale·(h·Wᵀ + b)/cap), cap and scale where the model has them.

    ``scale`` is Granite's 1/logits_scaling or Cohere's logit_scale, ``softcap`` Gemma's final_logit_softcapping.
    """

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        """fp32 logits of a chunk of rows; the product itself runs in the weights' precision."""
        return self.shaped(self.product(hidden))

    def product(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        """h·Wᵀ + b in the weights' precision, before scale and cap."""
        return torch.nn.functional.linear(hidden, self.weight, self.bias)

    def shaped(self, product: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """fp32 logits of the product."""
        logits = product.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class Logits:
    """In place of a head where the rows are logits already."""

    def logits(self, rows: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """The rows in fp32."""
        return rows.float()


class _ChunkedLogProb(torch.autograd.Function):
    """log softmax(logits)[target], ``CHUNK`` rows of logits at a time.

    A trained head needs the logits again in the backward pass, where the gradient by each log-prob is known: few are
    kept, many computed again. A frozen one (LoRA) does not: ∂ log p / ∂ hidden = (onehot(target) - softmax)·W is the
    same whatever the loss, so the forward pass leaves it, [N, H], and the backward pass only scales it. That saves one
    of three products with the head.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, head: Head) -> Tensor:
        logp = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        log_z = torch.empty_like(logp)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        slope = torch.empty_like(hidden) if needs_hidden and not (needs_weight or needs_bias) else None
        keeps = slope is None and needs_hidden and len(hidden) * weight[:, 0].nbytes <= KEPT
        products: list[Tensor] = []
        for i in range(0, len(hidden), CHUNK):
            rows = slice(i, i + CHUNK)
            product = head.product(hidden[rows])
            products += [product] * keeps
            logits = _readable(product, head)
            log_z[rows], chosen = _log_z_and_chosen(logits, target[rows], head)
            logp[rows] = chosen - log_z[rows]
            if slope is not None:
                d_logits = _d_logits(logits, log_z[rows], target[rows], None, head)
                torch.mm(d_logits.to(hidden.dtype), weight, out=slope[rows])
        ctx.products = products
        ctx.head = Head(weight.detach(), None if bias is None else bias.detach(), head.scale, head.softcap)
        ctx.save_for_backward(*((slope,) if slope is not None else (hidden, weight, bias, target, log_z)))
        return logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 1:
            (slope,) = ctx.saved_tensors
            return (slope * grad[:, None]).to(slope.dtype), None, None, None, None
        hidden, weight, bias, target, log_z = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Summing chunks in bf16 would lose the small ones: the sum over chunks is kept in fp32.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for i in range(0, len(hidden), CHUNK):
            rows = slice(i, i + CHUNK)
            product = ctx.products.pop(0) if ctx.products else ctx.head.product(hidden[rows])
            logits = _readable(product, ctx.head)
            d_logits = _d_logits(logits, log_z[rows], target[rows], grad[rows], ctx.head)
            narrow = d_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(narrow, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += narrow.t() @ hidden[rows]
            if grad_bias is not None:
                grad_bias += d_logits.sum(0, dtype=torch.float32)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _readable(product: Tensor, head: Head) -> Tensor:
    """What the two functions below read: the bare product where Triton's kernels take it, else fp32 logits."""
    return product if available(product) else head.shaped(product)


def _log_z_and_chosen(logits: Tensor, target: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Per row log Σ exp of the logits and the target's own, fp32."""
    if available(logits):
        return logsumexp_and_target(logits, target, head.scale, head.softcap)
    return torch.logsumexp(logits, -1), logits.gather(1, target[:, None])[:, 0]


def _d_logits(logits: Tensor, log_z: Tensor, target: Tensor, grad: Tensor | None, head: Head) -> Tensor:
    """∂ log p(target) / ∂ (h·Wᵀ + b) = onehot(target) - softmax, through cap and scale, times ``grad`` if given.

    Fp32, or in the product's precision and in its place.
    """
    if available(logits):
        pull = torch.ones_like(log_z) if grad is None else grad
        return d_logits_(logits, target, log_z, pull, head.scale, head.softcap)
    slope = logits.sub(log_z[:, None]).exp_().neg_()
    slope.scatter_add_(1, target[:, None], torch.ones_like(slope[:, :1]))
    if head.softcap is not None:
        slope *= 1 - (logits / head.softcap) ** 2
    if head.scale != 1.0:
        slope *= head.scale
    return slope if grad is None else slope.mul_(grad[:, None])


def chunked_logps(hidden: Float[Tensor, "N H"], target: Int[Tensor, " N"], head: Head) -> Float[Tensor, " N"]:
    """log p(target) per row, fp32, in nats. Memory: ``CHUNK`` rows of the vocabulary, whatever N is."""
    return _ChunkedLogProb.apply(hidden, head.weight, head.bias, target, head)


@torch.no_grad()
def chunked_certainty(
    rows: Float[Tensor, "N _"], head: Head | Logits, logps: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """log π(y_t) - log Σ_v π(v)² per row: how the token's chance compares with that of a draw from π itself."""
    collisions = []
    for chunk in rows.split(CHUNK):
        logits = head.logits(chunk)
        collisions.append(torch.logsumexp(2 * logits, -1) - 2 * torch.logsumexp(logits, -1))
    return logps.detach() - torch.cat(collisions)


def chunked_kl(
    rows: Float[Tensor, "N _"], head: Head | Logits, other_rows: Float[Tensor, "N _"], other_head: Head | Logits
) -> Float[Tensor, " N"]:
    """KL(other ‖ ours) between next-token distributions per row, fp32, with gradient by ours only.

    Logits are computed again in the backward pass, a chunk at a time.
    """

    def of_chunk(ours: Tensor, theirs: Tensor) -> Tensor:
        log_p = head.logits(ours).log_softmax(-1)
        log_q = other_head.logits(theirs).detach().log_softmax(-1)
        return torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)

    pairs = zip(rows.split(CHUNK), other_rows.split(CHUNK), strict=True)
    return torch.cat([checkpoint(of_chunk, ours, theirs, use_reentrant=False) for ours, theirs in pairs])


def sum_by_branch(token_logps: Float[Tensor, " N"], branch: Int[Tensor, " N"], branches: int) -> Float[Tensor, " S"]:
    """Per-token log-probs summed into per-branch log-probs; an empty branch sums to 0."""
    return torch.zeros(branches, dtype=torch.float32, device=token_logps.device).index_add(0, branch, token_logps)
