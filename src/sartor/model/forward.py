"""One forward pass over trees, checked against the plain one on first use.

Two roads give the same per-token log-probs. *Packed*: trees flat, prompt computed once, own head on completion tokens
only. *Plain*: one padded row per branch, the prompt repeated, the model's own logits; slower, and right for every
causal language model. :func:`check` compares them on a real tree and decides; models with recurrent layers, attention
sinks or unknown heads take the plain road.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sartor.data.trees import TokenIds, TokenTree, TreeBatch, pack
from sartor.model.lean import lean_forwards
from sartor.model.load import LanguageModel
from sartor.model.logprobs import CHUNK, Head, Logits, chunked_certainty, chunked_kl, chunked_logps
from sartor.model.tree_attention import NAME, Attends
from sartor.model.varlen import attention_for

# What rounding alone explains (measured: docs/log.md, 2026-11-21): largest and mean difference per token, in nats, and
# the share of the gradient's norm.
TOLERANCE = {torch.float32: (1e-3, 1e-4, 1e-3), torch.bfloat16: (1.0, 0.12, 0.25)}
CHECKED = 64  # tokens of the prompt and of a branch that the self-check goes back through
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Scores:
    """What a forward pass says of each completion token of a batch; fp32, in nats. See ``chunked_certainty`` and
    ``chunked_kl``, which cost another product with the head each and so come on demand only."""

    logps: Float[Tensor, " N"]
    certainty: Float[Tensor, " N"] | None = None
    kl: Float[Tensor, " N"] | None = None


def token_logps(model: LanguageModel, batch: TreeBatch) -> Float[Tensor, " N"]:
    """Log-prob of each completion token of the batch, fp32, with gradient where the caller has gradients on."""
    return token_scores(model, batch).logps


def token_scores(
    model: LanguageModel, batch: TreeBatch, certainty: bool = False, reference: LanguageModel | None = None
) -> Scores:
    """Log-probs of the completion tokens, and what else an objective depends on.

    Args:
        model: the policy.
        batch: trees to score.
        certainty: also compare each token's chance with that of a draw from the policy (WPO).
        reference: also compare next-token distributions with this model's (TDPO); the policy itself stands for its
            frozen weights, without the adapter.
    """
    if model.shares_prompts is None and batch.trees:
        check(model, batch.trees[0])
    rows, head = predictions(model, batch)
    logps = _logps(rows, head, batch)
    kl = None
    if reference is not None:
        with torch.no_grad(), reference.without_adapter():
            other_rows, other_head = predictions(reference, batch)
        kl = chunked_kl(rows, head, other_rows, other_head)
    return Scores(logps, chunked_certainty(rows, head, logps) if certainty else None, kl)


def predictions(model: LanguageModel, batch: TreeBatch) -> tuple[Float[Tensor, "N _"], Head | Logits]:
    """Per completion token the row that predicts it, and what turns rows into logits, by the road that is open."""
    return packed_rows(model, batch) if model.shares_prompts else plain_rows(model, batch)


def _logps(rows: Tensor, head: Head | Logits, batch: TreeBatch) -> Tensor:
    if isinstance(head, Head):
        return chunked_logps(rows, batch.target, head)
    chunks = zip(rows.split(CHUNK), batch.target.split(CHUNK), strict=True)
    return torch.cat([head.logits(row).log_softmax(-1).gather(1, to[:, None])[:, 0] for row, to in chunks])


def packed_logps(model: LanguageModel, batch: TreeBatch, attends: Attends | None = None) -> Float[Tensor, " N"]:
    """Log-probs by the packed road, whatever was decided; by another attention than the device's own on demand."""
    return _logps(*packed_rows(model, batch, attends), batch)


def packed_rows(
    model: LanguageModel, batch: TreeBatch, attends: Attends | None = None
) -> tuple[Float[Tensor, "N H"], Head]:
    """The packed road: every linear layer runs once per token, the head once per completion token."""
    # index_select and not indexing: its backward adds in a fixed order where branches share a prompt's last row.
    return packed_hidden(model, batch, attends).index_select(0, batch.source), head_of(model)


def packed_hidden(model: LanguageModel, batch: TreeBatch, attends: Attends | None = None) -> Float[Tensor, "T H"]:
    """The body's last hidden states of all trees, flat; each branch sees its prompt and itself."""
    use_attention(model, NAME)
    use_lean_layers(model, True)
    return model.core.base_model(
        input_ids=batch.ids[None],
        position_ids=batch.positions[None],
        # Says nothing; without it transformers looks for packed sequences, and waits for the device to see them.
        attention_mask=torch.ones_like(batch.ids)[None],
        use_cache=False,
        attends=attends or attention_for(batch, model.core),
    ).last_hidden_state.squeeze(0)


def plain_rows(model: LanguageModel, batch: TreeBatch) -> tuple[Float[Tensor, "N V"], Logits]:
    """The plain road: one right-padded row per branch, the prompt computed once for each, the model's own logits."""
    use_attention(model, model.own_attention)
    use_lean_layers(model, False)
    ids, mask, scored = _padded(batch)
    logits = model.core(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[scored], Logits()


def hidden_rows(model: LanguageModel, batch: TreeBatch) -> Float[Tensor, "N H"]:
    """The body's last hidden state that predicts each completion token, by the road that is open."""
    if model.shares_prompts:
        return packed_hidden(model, batch).index_select(0, batch.source)
    use_attention(model, model.own_attention)
    use_lean_layers(model, False)
    ids, mask, scored = _padded(batch)
    return model.core.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[scored]


def _padded(batch: TreeBatch) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Ids and mask of one right-padded row per branch, and the (row, place) that predicts each scored token."""
    branches = [(tree, branch) for tree in batch.trees for branch in tree.branches]
    rows = [tree.prompt + branch for tree, branch in branches]
    width, device = max(map(len, rows)), batch.ids.device
    ids = torch.tensor([row + (0,) * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    places = [(i, len(tree.prompt) + k - 1) for i, (tree, branch) in enumerate(branches) for k in tree.scored(branch)]
    index = torch.tensor(places, device=device).view(-1, 2)
    return ids, mask, (index[:, 0], index[:, 1])


def head_of(model: LanguageModel) -> Head:
    """The output layer with what this architecture does to its logits."""
    layer, config = model.core.get_output_embeddings(), model.core.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


def check(model: LanguageModel, tree: TokenTree) -> str | None:
    """Decide ``model.shares_prompts`` by running ``tree`` down both roads, forward and back; returns why not, or None.

    The tree must have a scored token. It goes forward whole, and which tree it is matters for layers with a window:
    callers pass the longest. Back goes a part of it, too short for blocks and for most windows, which tests cover: the
    plain road keeps the prompt and its logits once a branch, more than training itself takes. The gradient that is
    compared is the one by the embedded tokens: it goes back through every layer, and costs no room for gradients by the
    weights.
    """
    reason = unsuited(model)
    if reason is None:
        batch, part = pack([tree]).to(model.device), _part(tree)
        try:
            with torch.no_grad():
                packed = packed_logps(model, batch)
            pulled = _pull(model, part, packed_logps)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            reason = str(error).split("\n")[0]
        else:
            with torch.no_grad():
                plain = _plain_logps(model, batch)
            gap = (packed - plain).abs()
            largest, mean, slope = TOLERANCE[model.core.dtype]
            mean += (largest / 2 - mean) / len(gap)  # that of few tokens is nearly as uncertain as one of them
            if not (gap.max() <= largest and gap.mean() <= mean):  # a NaN is a failure too
                reason = f"packed and plain log-probs differ by up to {gap.max():.2g} nats"
            elif not (pulled - _folded(_pull(model, part, _plain_logps), part)).norm() <= slope * pulled.norm():
                reason = "packed and plain gradients differ"
    model.shares_prompts = reason is None
    return reason


def stand_in(prompt: TokenIds, longest_answer: int) -> TokenTree:
    """A tree to :func:`check` a prompt with before there are any answers to it: parts of it in their place."""
    length = min(longest_answer, 16)
    return TokenTree(prompt, (prompt[-length:], prompt[:length]))


def _part(tree: TokenTree) -> TokenTree:
    """The start of the longest branches and of the prompt: enough of each for a gradient."""
    branches = sorted(tree.branches, key=len)[-2:]
    return TokenTree(tree.prompt[:CHECKED], tuple(branch[:CHECKED] for branch in branches))


def _plain_logps(model: LanguageModel, batch: TreeBatch) -> Float[Tensor, " N"]:
    return _logps(*plain_rows(model, batch), batch)


def _pull(
    model: LanguageModel, tree: TokenTree, road: Callable[[LanguageModel, TreeBatch], Tensor]
) -> Float[Tensor, "rows columns H"]:
    """The gradient of a weighted sum of the log-probs down one road by the embedded tokens, fp32."""
    embedded: list[Tensor] = []

    def leaf(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.core.get_input_embeddings().register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            logps = road(model, pack([tree]).to(model.device))
            weighted = logps @ torch.linspace(-1, 2, len(logps), device=logps.device)
            return torch.autograd.grad(weighted, embedded)[0].float()
    finally:
        handle.remove()


def _folded(rows: Float[Tensor, "S width H"], tree: TokenTree) -> Float[Tensor, "1 T H"]:
    """Gradients of a tree's padded rows in the order of its packed tokens: those of the repeated prompt add up."""
    prompt = len(tree.prompt)
    ends = [prompt + len(branch) for branch in tree.branches]
    parts = [rows[:, :prompt].sum(0), *(row[prompt:end] for row, end in zip(rows, ends, strict=True))]
    return torch.cat(parts)[None]


def unsuited(model: LanguageModel) -> str | None:
    """What the configuration alone rules out, however well a short check goes."""
    config = model.core.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if others:
        return f"layers of type {', '.join(sorted(others))}"
    if not model.core._can_set_attn_implementation():
        return "its attention cannot be replaced from outside"
    head: Any = model.core.get_output_embeddings()
    if head is not None and not isinstance(getattr(head, "weight", None), Tensor):
        return "its output layer is no plain matrix"
    return None


def use_attention(model: LanguageModel, name: str) -> None:
    """Switch every layer's attention function, where this model lets it be switched; and to the model's own adapter."""
    model.activate()
    if model.core.config._attn_implementation != name and model.core._can_set_attn_implementation():
        model.core.set_attn_implementation(name)


def use_lean_layers(model: LanguageModel, lean: bool) -> None:
    """Switch every layer that has a leaner form (``sartor.model.lean``) to it, or back to its own."""
    for module, forward in lean_forwards(model.network).items():
        if lean:
            module.forward = forward  # on the instance, in front of the class's own
        else:
            vars(module).pop("forward", None)
