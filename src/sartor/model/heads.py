"""A scalar head on a language model's body: the reward model.

A Hugging Face sequence classifier with one label, so that what is trained here loads in transformers and TRL. Its one
output, read at a branch's last token, is the reward of that completion (Ouyang et al. 2022, arXiv 2203.02155, §3.5).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from sartor.data.trees import TreeBatch, pack
from sartor.model.forward import packed_hidden, unsuited, use_attention, use_lean_layers
from sartor.model.load import LanguageModel, load

GAP = 0.1  # between packed and plain rewards; smollm2 in bf16, six HH trees: 0.01 to 0.07, with a wrong mask 0.2 to 1.2


def load_reward_model(name: str, dtype: str = "auto", seed: int = 0) -> LanguageModel:
    """A language model's body with a fresh scalar head in place of its vocabulary.

    The head starts at N(0, 1/(H+1)), H its input width, as in Stiennon et al. 2020 (arXiv 2009.01325, appendix B).

    Raises:
        UserError: nothing of that name, or files that do not load.
    """
    source = load(name, dtype)
    config = source.core.config
    config.num_labels = 1
    # The plain road finds each row's last token by its padding.
    config.pad_token_id = next(id for id in (config.pad_token_id, source.tokenizer.eos_token_id) if id is not None)
    body = source.core.base_model
    with torch.device("meta"):
        network = AutoModelForSequenceClassification.from_config(config, dtype=source.core.dtype)
    setattr(network, network.base_model_prefix, body)  # the body as loaded: two would not fit where one only just does
    head = torch.empty_like(network.score.weight, device=source.device)
    head.normal_(std=(head.shape[1] + 1) ** -0.5, generator=torch.Generator(source.device).manual_seed(seed))
    network.score.weight = torch.nn.Parameter(head)
    network.requires_grad_(True).to(source.device).eval()
    return LanguageModel(network, source.tokenizer, source.name, source.path, needs_base=source.needs_base)


def rewards(model: LanguageModel, batch: TreeBatch) -> Float[Tensor, " S"]:
    """Reward of each branch of the batch, fp32, by the packed road where it agrees with the plain one.

    The first use decides, on the batch's longest tree. Rewards of a fresh head scatter by about 1: that is the scale.
    """
    if model.shares_prompts is None:
        first = pack([max(batch.trees, key=lambda tree: tree.size)]).to(model.device)
        with torch.no_grad():
            try:
                agrees = unsuited(model) is None and (_packed(model, first) - _plain(model, first)).abs().max() <= GAP
            except (NotImplementedError, TypeError, AttributeError, RuntimeError):
                agrees = False
        model.shares_prompts = bool(agrees)
    return _packed(model, batch) if model.shares_prompts else _plain(model, batch)


def _packed(model: LanguageModel, batch: TreeBatch) -> Tensor:
    last = torch.tensor([end - 1 for bound in batch.bounds for end in bound[2:]], device=model.device)
    return model.core.score(packed_hidden(model, batch).index_select(0, last))[:, 0].float()


def _plain(model: LanguageModel, batch: TreeBatch) -> Tensor:
    use_attention(model, model.own_attention)
    use_lean_layers(model, False)
    # Row by row: a token that pads may also be a row's own last one.
    rows = [torch.tensor([tree.prompt + branch]) for tree in batch.trees for branch in tree.branches]
    outputs = [model.core.score(model.core.base_model(row.to(model.device)).last_hidden_state[0, -1]) for row in rows]
    return torch.cat(outputs).float()
