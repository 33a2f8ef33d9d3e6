"""Log-probabilities of completion tokens, straight from hidden states, never a [tokens, vocabulary] tensor at once."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias).float()
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
    """log softmax(logits)[target] with the logits recomputed in the backward pass, ``CHUNK`` rows at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, head: Head) -> Tensor:
        logp = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        log_z = torch.empty_like(logp)
        for i in range(0, len(hidden), CHUNK):
            rows = slice(i, i + CHUNK)
            logits = head.logits(hidden[rows])
            log_z[rows] = torch.logsumexp(logits, -1)
            logp[rows] = logits.gather(1, target[rows, None])[:, 0] - log_z[rows]
        ctx.save_for_backward(hidden, weight, bias, target, log_z)
        ctx.scale, ctx.softcap = head.scale, head.softcap
        return logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, log_z = ctx.saved_tensors
        head = Head(weight, bias, ctx.scale, ctx.softcap)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden)
        # Summing chunks in bf16 would lose the small ones: the sum over chunks is kept in fp32.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for i in range(0, len(hidden), CHUNK):
            rows = slice(i, i + CHUNK)
            logits = head.logits(hidden[rows])
            # ∂ log p(target) / ∂ logits = onehot(target) - softmax, then through cap and scale.
            d_logits = logits.sub(log_z[rows, None]).exp_().mul_(-grad[rows, None])
            d_logits.scatter_add_(1, target[rows, None], grad[rows, None])
            if ctx.softcap is not None:
                d_logits *= 1 - (logits / ctx.softcap) ** 2
            if ctx.scale != 1.0:
                d_logits *= ctx.scale
            narrow = d_logits.to(hidden.dtype)
            if needs_hidden:
                grad_hidden[rows] = narrow @ weight
            if grad_weight is not None:
                grad_weight += narrow.t() @ hidden[rows]
            if grad_bias is not None:
                grad_bias += d_logits.sum(0)
        return (
            grad_hidden if needs_hidden else None,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


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
