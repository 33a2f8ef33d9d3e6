"""A scalar head on a language model's body: the reward model.

A Hugging Face sequence classifier with one label, so that what is trained here loads in transformers and TRL. Its one
output, read at a branch's last token, is the reward of that completion (Ouyang et al. 2022, arXiv 2203.02155, §3.5).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from sartor.data.chat import plain_template
from sartor.data.trees import TokenTree, TreeBatch, pack, split_by_budget
from sartor.errors import UserError
from sartor.model.forward import hidden_rows, packed_hidden, unsuited, use_attention, use_lean_layers
from sartor.model.load import (
    UNLOADABLE,
    LanguageModel,
    adapt,
    convert_gguf,
    load,
    name_base,
    pick_device,
    pick_dtype,
    quiet,
)
from sartor.model.resolve import resolve

# Between the last hidden states down both roads, as a share of their norm; smollm2 in bf16, twelve Open-Assistant
# rankings: 0.015 to 0.036 by rounding, 0.17 to 1.1 where a branch sees another (docs/log.md, 2026-11-21).
APART = {torch.float32: 1e-3, torch.bfloat16: 0.08}


def new_reward_model(
    name: str, dtype: str = "auto", lora_r: int = 0, lora_alpha: int | None = None, seed: int = 0
) -> LanguageModel:
    """A language model's body with a fresh scalar head in place of its vocabulary; with ``lora_r`` also an adapter.

    The head starts at N(0, 1/(H+1)), H its input width, as in Stiennon et al. 2020 (arXiv 2009.01325, appendix B).

    Raises:
        UserError: nothing of that name, or files that do not load.
    """
    source = load(name, dtype)
    config = source.core.config
    config.num_labels = 1
    config.pad_token_id = source.tokenizer.pad_token_id = _pad_token(source)
    body = source.core.base_model
    with torch.device("meta"):
        network = AutoModelForSequenceClassification.from_config(config, dtype=source.core.dtype)
    setattr(network, network.base_model_prefix, body)  # the body as loaded: two would not fit where one only just does
    head = torch.empty_like(network.score.weight, device=source.device)
    head.normal_(std=(head.shape[1] + 1) ** -0.5, generator=torch.Generator(source.device).manual_seed(seed))
    network.score.weight = torch.nn.Parameter(head)
    network.requires_grad_(True)
    if lora_r:
        network = adapt(network, lora_r, lora_alpha or 2 * lora_r, seed, task="SEQ_CLS")
        name_base(network, name)
    network = network.to(source.device).eval()
    return LanguageModel(
        network, source.tokenizer, name, source.path, needs_base=source.needs_base, has_template=source.has_template
    )


def _pad_token(model: LanguageModel) -> int:
    """A token that ends no completion: transformers reads a row's reward at its last token that is no padding."""
    tokenizer = model.tokenizer
    special = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    candidates = [model.core.config.pad_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, *reversed(special)]
    unfit = {None, tokenizer.bos_token_id, *model.end_tokens}
    return next((id for id in candidates if id not in unfit), tokenizer.eos_token_id)


def load_reward_model(name: str, dtype: str = "auto") -> LanguageModel:
    """A trained reward model: a sequence classifier with one label, or an adapter that makes one of a language model.

    Raises:
        UserError: nothing of that name, or something else than a reward model.
    """
    path = resolve(name, convert_gguf)
    try:
        if (path / "adapter_config.json").is_file():
            settings = PeftConfig.from_pretrained(str(path))
            if settings.task_type != "SEQ_CLS":
                raise UserError(f"reward model {name!r}: an adapter of a language model, and no reward model")
            base = new_reward_model(str(settings.base_model_name_or_path), dtype)
            network: Any = PeftModel.from_pretrained(base.network, str(path)).merge_and_unload()
        else:
            network = _classifier(name, path, dtype)
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except UNLOADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"reward model {name!r}: {path} does not load: {reason}") from error
    network = network.to(pick_device()).eval().requires_grad_(False)
    has_template = bool(tokenizer.chat_template)
    tokenizer.chat_template = tokenizer.chat_template or plain_template(tokenizer)
    return LanguageModel(network, tokenizer, name, path, has_template=has_template)


def _classifier(name: str, path: Path, dtype: str) -> Any:
    with quiet():
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    kinds = getattr(config, "architectures", None) or []
    if not any("SequenceClassification" in kind for kind in kinds):
        what = f"a {kinds[0]}" if kinds else "of no known kind"
        raise UserError(
            f"reward model {name!r} is {what}: wanted a sequence classifier, which `sartor reward` makes of it; "
            "a model trained by `sartor dpo` is measured with --implicit"
        )
    if config.num_labels != 1:
        raise UserError(f"reward model {name!r} has {config.num_labels} labels: wanted 1, a reward")
    options: dict[str, Any] = {"dtype": pick_dtype(dtype, pick_device()), "local_files_only": True}
    with quiet():
        network = AutoModelForSequenceClassification.from_pretrained(path, **options)
    if not hasattr(network, "score"):
        raise UserError(
            f"reward model {name!r} is a {kinds[0]}: wanted one on a causal language model, with a head 'score'"
        )
    return network


def rewards(model: LanguageModel, batch: TreeBatch) -> Float[Tensor, " S"]:
    """Reward of each branch of the batch, fp32, by the packed road where it agrees with the plain one.

    The first use decides, on the batch's longest tree.
    """
    if model.shares_prompts is None:
        check_rewards(model, max(batch.trees, key=lambda tree: tree.size))
    return _scalar(model, _packed(model, batch) if model.shares_prompts else _plain(model, batch))


@torch.no_grad()
def score_rewards(
    model: LanguageModel,
    trees: Sequence[TokenTree],
    token_budget: int,
    progress: Callable[[int], None] = lambda trees: None,
) -> list[list[float]]:
    """The rewards of each tree's branches, in the order of the trees."""
    found: list[list[float]] = [[] for _ in trees]
    for group in split_by_budget([tree.size for tree in trees], token_budget):
        batch = pack([trees[i] for i in group]).to(model.device)
        rows = rewards(model, batch).split([len(tree.branches) for tree in batch.trees])
        for i, row in zip(group, rows, strict=True):
            found[i] = row.tolist()
        progress(len(group))
    return found


@torch.no_grad()
def check_rewards(model: LanguageModel, tree: TokenTree) -> str | None:
    """Decide ``model.shares_prompts`` by running ``tree`` down both roads; returns why not, or None.

    What is compared is what the head reads: by one number of it, rounding and a wrong mask are hard to tell apart.
    """
    reason = unsuited(model)
    if reason is None:
        batch = pack([tree]).to(model.device)
        try:
            packed = _packed(model, batch).float()
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            reason = str(error).split("\n")[0]
        else:
            plain = _plain(model, batch).float()
            apart = ((packed - plain).norm(dim=1) / plain.norm(dim=1)).max()
            if not apart <= APART[model.core.dtype]:  # a NaN is a failure too
                reason = f"packed and plain hidden states differ by {apart:.2g} of their norm"
    model.shares_prompts = reason is None
    return reason


def _packed(model: LanguageModel, batch: TreeBatch) -> Float[Tensor, "S H"]:
    """The hidden state at the end of each branch."""
    last = torch.tensor([end - 1 for bound in batch.bounds for end in bound[2:]], device=model.device)
    return packed_hidden(model, batch).index_select(0, last)


def _plain(model: LanguageModel, batch: TreeBatch) -> Float[Tensor, "S H"]:
    use_attention(model, model.own_attention)
    use_lean_layers(model, False)
    # Row by row: a token that pads may also be a row's own last one.
    rows = [torch.tensor([tree.prompt + branch]) for tree in batch.trees for branch in tree.branches]
    return torch.cat([model.core.base_model(row.to(model.device)).last_hidden_state[:, -1] for row in rows])


def values(model: LanguageModel, batch: TreeBatch) -> Float[Tensor, " N"]:
    """The value of the state before each completion token, fp32: what the head says where that token is predicted."""
    return _scalar(model, hidden_rows(model, batch))


def _scalar(model: LanguageModel, hidden: Float[Tensor, "rows H"]) -> Float[Tensor, " rows"]:
    head: Any = model.scalar
    weight = head.weight if isinstance(head, torch.nn.Linear) else head.modules_to_save[head.active_adapters[0]].weight
    # fp32 whatever the network computes in: bf16 knows a reward of 4 to 0.03, which makes ties of what are none.
    reward = hidden.float() @ weight.float()[0]
    return reward if getattr(head, "bias", None) is None else reward + head.bias.float()[0]
