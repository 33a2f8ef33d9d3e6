"""One forward pass over trees, checked against the plain one on first use.

Two roads give the same per-token log-probs. *Packed*: trees flat, prompt computed once, own head on completion tokens
only. *Plain*: one padded row per branch, the prompt repeated, the model's own logits; slower, and right for every
causal language model. :func:`check` compares them on a real tree and decides; models with recurrent layers, attention
sinks or unknown heads take the plain road.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sartor.data.trees import TokenTree, TreeBatch, pack
from sartor.model.load import LanguageModel
from sartor.model.logprobs import Head, chunked_logps
from sartor.model.tree_attention import NAME, TreeAttention

# Largest and mean difference per token, in nats, that rounding alone explains (measured: docs/log.md, 2026-11-21).
TOLERANCE = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (1.0, 0.12)}
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def token_logps(model: LanguageModel, batch: TreeBatch) -> Float[Tensor, " N"]:
    """Log-prob of each completion token of the batch, fp32, with gradient where the caller has gradients on."""
    if model.shares_prompts is None and batch.trees:
        check(model, batch.trees[0])
    return packed_logps(model, batch) if model.shares_prompts else plain_logps(model, batch)


def packed_logps(model: LanguageModel, batch: TreeBatch) -> Float[Tensor, " N"]:
    """The packed road: every linear layer runs once per token, the head once per completion token."""
    use_attention(model, NAME)
    hidden = model.core.base_model(
        input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False, attends=TreeAttention(batch)
    ).last_hidden_state[0]
    # index_select and not indexing: its backward adds in a fixed order where branches share a prompt's last row.
    return chunked_logps(hidden.index_select(0, batch.source), batch.target, head_of(model))


def plain_logps(model: LanguageModel, batch: TreeBatch) -> Float[Tensor, " N"]:
    """The plain road: one right-padded row per branch, the prompt computed once for each."""
    use_attention(model, model.own_attention)
    rows = [tree.prompt + branch for tree in batch.trees for branch in tree.branches]
    starts = [max(1, len(tree.prompt)) for tree in batch.trees for _ in tree.branches]
    width = max(map(len, rows))
    ids = torch.tensor([row + (0,) * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    logits = model.core(input_ids=ids, attention_mask=mask, use_cache=False).logits
    scored = [
        logits[i, start - 1 : len(row) - 1].float().log_softmax(-1).gather(1, ids[i, start : len(row), None])[:, 0]
        for i, (row, start) in enumerate(zip(rows, starts, strict=True))
    ]
    return torch.cat(scored)


def head_of(model: LanguageModel) -> Head:
    """The output layer with what this architecture does to its logits."""
    layer, config = model.core.get_output_embeddings(), model.core.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


@torch.no_grad()
def check(model: LanguageModel, tree: TokenTree) -> str | None:
    """Decide ``model.shares_prompts`` by running ``tree`` down both roads; returns why not, or None.

    The tree must have a scored token. Which tree is used matters for layers with a window: callers pass the longest.
    """
    reason = _unsuited(model)
    if reason is None:
        batch = pack([tree]).to(model.device)
        try:
            packed = packed_logps(model, batch)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, TypeError, AttributeError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
        else:
            gap = (packed - plain_logps(model, batch)).abs()
            largest, mean = TOLERANCE[model.core.dtype]
            if not (gap.max() <= largest and gap.mean() <= mean):  # a NaN is a failure too
                reason = f"packed and plain log-probs differ by up to {gap.max():.2g} nats"
    model.shares_prompts = reason is None
    return reason


def _unsuited(model: LanguageModel) -> str | None:
    """What the configuration alone rules out, however well a short check goes."""
    config = model.core.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if others:
        return f"layers of type {', '.join(sorted(others))}"
    if not model.core._can_set_attn_implementation():
        return "its attention cannot be replaced from outside"
    head: Any = model.core.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor):
        return "its output layer is no plain matrix"
    return None


def use_attention(model: LanguageModel, name: str) -> None:
    """Switch every layer's attention function, where this model lets it be switched."""
    if model.core.config._attn_implementation != name and model.core._can_set_attn_implementation():
        model.core.set_attn_implementation(name)
