"""``sartor reward``: what the loss is, that it learns, what it leaves behind, and how it is measured."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import metrics, random_tree
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sartor.config import DpoConfig, RewardConfig
from sartor.data.chat import encode_demonstrations
from sartor.data.trees import TokenTree
from sartor.errors import UserError
from sartor.model.heads import load_reward_model, new_reward_model, score_rewards
from sartor.train.dpo import train_dpo
from sartor.train.reward import as_logratios, losses_by_tree, reward_gradient, reward_objective, train_reward
from sartor.types import Demonstration


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rankings(count: int, seed: int = 0) -> list[dict]:
    """Answers of one to four letters: the more capitals, the better."""
    rng = random.Random(seed)
    word = lambda: "".join(rng.choice("abcdefgh") for _ in range(4))  # noqa: E731
    rows = []
    for i in range(count):
        answers = [word().upper(), word().capitalize(), word()]
        order = rng.sample(range(3), 3)
        rows.append(
            {"prompt": f"Say {i}: ", "completions": [answers[j] for j in order], "ranks": [j + 1 for j in order]}
        )
    return rows


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> RewardConfig:
    return RewardConfig(
        model=str(tiny_folder),
        data=write(tmp_path / "rankings.jsonl", rankings(60)),
        output=tmp_path / "run",
        eval_fraction=0.25,
        learning_rate=3e-3,
        dtype="float32",
        epochs=3,
    )


def test_it_learns_and_leaves_a_classifier_behind(config: RewardConfig) -> None:
    run = train_reward(config, command="sartor reward").path
    last = metrics(run, "eval")[-1]
    assert last["rewards/accuracies"]["low"] > 0.6
    assert last["rewards/margins"]["low"] > 0
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["accuracy"] == last["rewards/accuracies"]
    assert evaluation["pick_rate"]["value"] > evaluation["pick_rate_chance"]
    assert "Calibration" in (run / "report.html").read_text()

    ours = load_reward_model(str(run / "model"), "float32")
    network = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    assert network.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    answered = [Demonstration("Say 1: ", "ABC"), Demonstration("Say 2: ", "abcdefgh")]
    trees = encode_demonstrations(tokenizer, answered, 100, as_chat=True).trees
    rows = [{"input_ids": [*tree.prompt, *tree.branches[0]]} for tree in trees]
    padded = tokenizer.pad(rows, padding_side="right", return_tensors="pt")  # as TRL does; its own end is no padding
    with torch.no_grad():
        theirs = network(**padded).logits[:, 0].tolist()
    assert [row[0] for row in score_rewards(ours, trees, 100)] == pytest.approx(theirs, abs=1e-4)


def test_lora_leaves_an_adapter_with_its_head(config: RewardConfig) -> None:
    run = train_reward(replace(config, lora_r=4, learning_rate=2e-2)).path
    assert (run / "model" / "adapter_model.safetensors").is_file()
    assert metrics(run, "eval")[-1]["rewards/accuracies"]["low"] > 0.55
    # What is loaded from disk is what was trained: its rewards have the recorded mean.
    scale = json.loads((run / "model" / "reward.json").read_text())
    again = train_reward(
        replace(config, model=str(run / "model"), evaluate=True, output=run.with_name("again"), resume=False)
    ).path
    accuracy = json.loads((again / "evaluation.json").read_text())["accuracy"]
    assert accuracy["low"] > 0.55
    assert scale["std"] > 0


def test_rewards_are_centred_on_demonstrations(config: RewardConfig, tmp_path: Path) -> None:
    shown = write(tmp_path / "demos.jsonl", [{"prompt": f"Say {i}: ", "completion": "ABCD"} for i in range(8)])
    run = train_reward(replace(config, max_steps=2, center_data=shown)).path
    scale = json.loads((run / "model" / "reward.json").read_text())
    model = load_reward_model(str(run / "model"), "float32")
    trees = encode_demonstrations(
        model.tokenizer, [Demonstration(f"Say {i}: ", "ABCD") for i in range(8)], 100, as_chat=True
    ).trees
    values = [row[0] for row in score_rewards(model, trees, 1000)]
    assert scale["mean"] == pytest.approx(sum(values) / 8, abs=1e-5)
    assert scale["measured_on"] == shown


def test_centring_pulls_the_sum_of_a_pair_to_zero(tiny_folder: Path, rng: random.Random) -> None:
    model = new_reward_model(str(tiny_folder), "float32")
    trees, objective = [random_tree(rng, 5, 3), random_tree(rng, 9, 2)], reward_objective(("bradley_terry",))
    plain = reward_gradient(model, objective, trees, [0, 1], 1000)["loss"]
    rewards = score_rewards(model, trees, 1000)
    squares = [
        sum((row[i] + row[j]) ** 2 for i, j in tree.pairs) / len(tree.pairs)
        for tree, row in zip(trees, rewards, strict=True)
    ]
    for budget in (1000, 10):
        model.network.zero_grad()
        found = reward_gradient(model, objective, trees, [0, 1], budget, center=0.5)["loss"]
        assert found - plain == pytest.approx(0.5 * sum(squares) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        ("bradley_terry", lambda r: sum(_softplus(r[j] - r[i]) for i, j in ((0, 1), (0, 2), (1, 2))) / 3),
        ("plackett_luce", lambda r: _log_sum(r) - r[0] + _log_sum(r[1:]) - r[1]),
        ("hinge", lambda r: sum(max(0.0, 1 - (r[i] - r[j])) for i, j in ((0, 1), (0, 2), (1, 2))) / 3),
    ],
)
def test_losses_of_the_catalogue_take_rewards(loss: str, by_hand) -> None:
    reward = [0.7, -0.4, 1.9]
    tree = TokenTree((1,), ((1,),) * 3, (1.0, 2.0, 3.0))
    ((weight, losses, places),) = losses_by_tree(reward_objective((loss,)), as_logratios([tree], torch.tensor(reward)))
    assert (weight, places) == (1.0, [0])
    assert float(losses[0]) == pytest.approx(by_hand(reward), rel=1e-5)


def _softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def _log_sum(values: list[float]) -> float:
    return math.log(sum(math.exp(value) for value in values))


def test_ties_are_learned_by_those_who_read_them() -> None:
    """Rao and Kupper 1967: a tie is likeliest where rewards are equal."""
    trees = [TokenTree((1,), ((1,),) * 2, (1.0, 1.0))]
    objective = reward_objective(("rao_kupper",))
    values = [
        float(losses_by_tree(objective, as_logratios(trees, torch.tensor([gap, 0.0])))[0][1]) for gap in (0.0, 1.0, 3.0)
    ]
    assert values == sorted(values)
    assert not losses_by_tree(reward_objective(("bradley_terry",)), as_logratios(trees, torch.zeros(2)))[0][2]


@pytest.mark.parametrize("loss", ["simpo", "kto", "aot", "tdpo1", "sft"])
def test_losses_that_see_more_than_rewards_are_refused(loss: str) -> None:
    with pytest.raises(UserError, match=f"--loss {loss} is no loss for a reward model"):
        reward_objective((loss,))


def test_a_policy_hides_a_reward_model(config: RewardConfig, tmp_path: Path) -> None:
    """DPO on the same rankings: its implicit reward orders held-out answers as people did."""
    held = write(tmp_path / "held.jsonl", rankings(40, seed=1))
    dpo = DpoConfig(
        model=config.model,
        data=config.data,
        output=tmp_path / "dpo",
        learning_rate=2e-2,
        epochs=2,
        lora_r=4,
        eval_prompts=0,
        dtype="float32",
    )
    policy = train_dpo(dpo).path
    judge = RewardConfig(
        model=str(policy), data=held, output=tmp_path / "judged", evaluate=True, implicit=True, dtype="float32"
    )
    judged = train_reward(judge).path  # the adapter knows its base
    assert json.loads((judged / "evaluation.json").read_text())["accuracy"]["low"] > 0.5
    same = replace(judge, model=config.model, reference=config.model, output=tmp_path / "same")
    untrained = json.loads((train_reward(same).path / "evaluation.json").read_text())
    assert untrained["accuracy"]["value"] == 0.5  # policy and reference are one: every reward is 0
    with pytest.raises(UserError, match="name it with --reference"):
        train_reward(replace(same, reference=None, output=tmp_path / "unknown"))


def test_a_language_model_is_no_reward_model(config: RewardConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a LlamaForCausalLM: wanted a sequence classifier"):
        train_reward(replace(config, evaluate=True, output=tmp_path / "x"))


def test_killed_and_resumed_equals_uninterrupted(config: RewardConfig, tmp_path: Path, monkeypatch) -> None:
    from safetensors.torch import load_file

    from sartor.train import trainer

    config = replace(config, epochs=1, save_every=2)
    smooth = train_reward(replace(config, output=tmp_path / "smooth")).path
    save, saved = trainer.save_checkpoint, []

    def dies(run, step, *rest) -> None:
        save(run, step, *rest)
        saved.append(step)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        train_reward(config)
    monkeypatch.setattr(trainer, "save_checkpoint", save)
    resumed = train_reward(replace(config, resume=True)).path
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (resumed, smooth))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (resumed / "evaluation.json").read_text() == (smooth / "evaluation.json").read_text()
