"""The reward model: packed rewards are those of each completion alone, and of transformers' own classifier."""

import random
from pathlib import Path

import pytest
import torch
from conftest import random_tree, tiny_model
from transformers import AutoModelForSequenceClassification

from sartor.data.trees import TokenTree, pack
from sartor.model.heads import new_reward_model, rewards
from sartor.train.reward import reward_gradient, reward_objective
from sartor.train.sft import sft_gradient


def test_rewards_are_those_of_a_hugging_face_classifier(tiny_folder: Path, tmp_path: Path, rng: random.Random) -> None:
    model = new_reward_model(str(tiny_folder), "float32")
    trees = [random_tree(rng, 5, 3), random_tree(rng, 9, 2)]
    with torch.no_grad():
        ours = rewards(model, pack(trees))
        assert model.shares_prompts
        model.save(tmp_path / "reward")
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
        theirs = [
            classifier(torch.tensor([tree.prompt + branch])).logits[0, 0] for tree in trees for branch in tree.branches
        ]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-4, atol=1e-4)


def test_each_prompt_counts_once_however_many_pairs_it_has(tiny_folder: Path, rng: random.Random) -> None:
    model = new_reward_model(str(tiny_folder), "float32")
    trees = [random_tree(rng, 5, 4), random_tree(rng, 9, 2)]
    assert [len(tree.pairs) for tree in trees] == [6, 1]

    def by_hand() -> torch.Tensor:
        means = []
        for tree in trees:
            reward = rewards(model, pack([tree]))
            losses = [-torch.log(torch.sigmoid(reward[i] - reward[j])) for i, j in tree.pairs]
            means.append(torch.stack(losses).mean())
        return torch.stack(means).mean()

    expected = by_hand()
    expected.backward()
    want = {name: p.grad.clone() for name, p in model.network.named_parameters() if p.grad is not None}
    for budget in (1000, 10):  # the micro-batches change nothing
        model.network.zero_grad()
        found = reward_gradient(model, reward_objective(("bradley_terry",)), trees, [0, 1], budget)
        assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
        assert found["examples"] == 7
        for name, parameter in model.network.named_parameters():
            if name in want:
                torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-6)


def test_sft_is_the_mean_over_completion_tokens(rng: random.Random) -> None:
    model = tiny_model()
    trees = [TokenTree(random_tree(rng, n, 1).prompt, random_tree(rng, 1, 1, 20).branches) for n in (4, 11, 0)]
    total, count = torch.zeros(()), 0
    for tree in trees:
        row = tree.prompt + tree.branches[0]
        labels = torch.tensor([row])
        labels[0, : max(1, len(tree.prompt))] = -100
        scored = len(row) - max(1, len(tree.prompt))
        total = total + scored * model.network(torch.tensor([row]), labels=labels).loss
        count += scored
    (total / count).backward()
    want = {name: p.grad.clone() for name, p in model.network.named_parameters()}
    for budget in (1000, 8):
        model.network.zero_grad()
        found = sft_gradient(model, trees, range(3), budget)
        assert found["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-5)
        for name, parameter in model.network.named_parameters():
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-3, atol=1e-5)
