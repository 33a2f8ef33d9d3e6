"""The step never waits for its device."""

from importlib.metadata import entry_points

import pytest
import torch
from conftest import CONFIGS

from sartor.data.trees import TokenTree
from sartor.model.load import LanguageModel
from sartor.objectives.specs import parse_objective
from sartor.plan.trace import weightless
from sartor.train.gradient import accumulate
from sartor.train.preferences import Preferences

PAIRS = [
    TokenTree((1,) * 5, ((2,) * 4, (3,) * 6), (1.0, 2.0)),
    TokenTree((1,) * 7, ((2,) * 4, (3,) * 6, (4,) * 3), (1.0, 2.0, 2.0)),
    TokenTree((1,) * 7, ((2,) * 4, (3,) * 6), (1.0, 1.0)),
]
JUDGED = [TokenTree((1,) * 5, ((2,) * 4, (3,) * 3), good=(good,), mismatched=1) for good in (True, False)]


@pytest.mark.parametrize("name", sorted(entry.name for entry in entry_points(group="sartor.losses")))
def test_forward_loss_and_backward_read_nothing_back(name: str) -> None:
    """A tensor on the meta device has no numbers: whoever asks for one, as ``.item()`` or a mask does, fails here.

    On a GPU the same question would make the host wait until all queued work is done.
    """
    model = LanguageModel(weightless(CONFIGS["llama"](), torch.bfloat16), None, "", shares_prompts=True)
    objective = parse_objective([name])
    trees = JUDGED if objective.terms[0].traits.kind == "completions" else PAIRS
    reference = [torch.empty(sum(map(len, tree.branches)), device="meta") for tree in trees]
    data = Preferences(trees, [""] * len(trees), [], reference)
    rival = model if objective.needs_kl else None
    loss, _ = accumulate(
        objective, lambda group: data.logps(model, group, objective, rival), [[0], [1]], objective.units(trees)
    )
    assert loss.device.type == "meta"
