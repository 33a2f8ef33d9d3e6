"""Forecasts: what they are made of, what they advise, and that a run's own words agree with its folder."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import SCORER

from sartor.cli import main
from sartor.config import DpoConfig, PlanConfig, PpoConfig
from sartor.data.trees import TokenTree
from sartor.errors import UserError
from sartor.objectives.specs import parse_objective
from sartor.plan import forecast as module
from sartor.plan.devices import DEVICES, Device
from sartor.plan.forecast import Load
from sartor.plan.shape import GIB, Shape
from sartor.plan.words import one_line, table, warning
from sartor.train.forecast import _neediest, made_up, plan_dpo, rollouts, smaller, workload
from sartor.train.ppo import train_ppo
from sartor.train.rollout import set_stage

SHAPE = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
}


@pytest.fixture
def shape(tmp_path: Path) -> str:
    """A folder with a config.json and nothing else."""
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps(SHAPE))
    return str(tmp_path / "shape")


@pytest.fixture
def small_card(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device on which the shape does not fit without more."""
    monkeypatch.setitem(DEVICES, "small", Device("small", 1e12, 1e11, 0.6 * GIB))
    return "small"


def test_a_config_alone_is_enough(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "dpo", "--model", shape, "--device", "h100"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "assumed, not measured: 40 % of the h100's matrix peak" in shown
    assert re.search(r"training .* PFLOP|training .* TFLOP", shown)
    assert re.search(r"memory +\d+\.\d of 79\.6 GiB", shown)


def test_work_is_counted_from_the_run_itself() -> None:
    config = PlanConfig(model="m", rows=100, prompt_tokens=20, answer_tokens=10, epochs=2, eval_prompts=4)
    training, held_out = made_up(config)
    found = workload(config, parse_objective(["dpo"]), training, held_out, [*training.trees, *held_out.trees])
    assert (len(training.trees), len(held_out.trees)) == (90, 10)
    assert found.steps == 24  # two epochs of 90 pairs by eights
    assert found.training == Load(2 * 90 * 40, 2 * 90 * 20, 2 * 90 * 40**2, 24)
    assert found.reference.tokens == 100 * 40
    # Before, after, and what is measured at the start and at four evaluations; at temperature 1 these are the same.
    assert found.sampled is not None
    assert found.sampled.answers == (2 + 5) * 4
    alike = workload(
        PlanConfig(**{**vars(config), "temperature": 1.0}), parse_objective(["dpo"]), training, held_out, []
    )
    assert alike.sampled is not None
    assert alike.sampled.answers == 5 * 4
    twice = workload(
        PlanConfig(**{**vars(config), "loss": ("aot",), "token_budget": 80}),
        parse_objective(["aot"]),
        training,
        held_out,
        [],
    )
    assert twice.evaluation.tokens - found.evaluation.tokens == twice.training.tokens  # cut batches: two passes


def test_memory_is_the_sum_of_what_training_holds() -> None:
    from transformers import LlamaConfig

    model = Shape(LlamaConfig(**SHAPE), torch.bfloat16, 0, on_gpu=False)
    tree = TokenTree((1,) * 20, ((2,) * 10, (3,) * 10))
    parts = model.training([[tree]])
    assert parts["weights"] == 2 * model.trained
    assert parts["fp32 masters, moments"] == 12 * model.trained
    assert parts["gradients"] == 4 * model.trained
    assert model.training([[tree], [tree] * 9])["activations"] == model.training([[tree] * 9])["activations"]
    adapter = Shape(LlamaConfig(**SHAPE), torch.bfloat16, 4, on_gpu=False)
    assert adapter.trained < 0.1 * model.trained
    assert adapter.training([[tree]])["weights"] > parts["weights"]
    sampling = model.sampling(rows=10, length=30, packed=True)
    assert sampling["weights"] == 2 * parts["weights"]  # a second copy, laid out for the processor
    assert sampling["keys and values"] == 10 * 30 * (2 * 8 * 2 * 64 * 2)  # keys and values, layers, heads, width, bf16


def test_checkpointing_is_as_much_as_is_needed(shape: str, small_card: str) -> None:
    options = {"model": shape, "token_budget": 8192, "lora_r": 4, "prompt_tokens": 100, "answer_tokens": 50}
    never = plan_dpo(PlanConfig(**options, device=small_card, checkpointing="never"))
    assert not never.memory.fits
    auto = plan_dpo(PlanConfig(**options, device=small_card))
    assert 0 < auto.checkpointed < 8
    assert auto.memory.fits
    assert auto.flops > never.flops
    assert f"{auto.checkpointed} of 8 layers checkpointed" in one_line(auto)
    roomy = plan_dpo(PlanConfig(**options, device="h100"))
    assert roomy.checkpointed == 0


def test_what_does_not_fit_names_the_nearest_that_does(shape: str, small_card: str) -> None:
    found = plan_dpo(PlanConfig(model=shape, device=small_card, token_budget=16384, rows=200, batch_size=64))
    assert not found.memory.fits
    told = warning(found) or ""
    assert told.startswith("does not fit: wants ")
    option = re.search(r"; (--.*) fits: ([\d.]+) GiB", told)
    assert option, told
    budget = re.search(r"--token-budget (\d+)", option[1])
    assert budget
    again = plan_dpo(
        PlanConfig(
            model=shape,
            device=small_card,
            token_budget=int(budget[1]),
            lora_r=16 if "--lora-r 16" in option[1] else 0,
            rows=200,
            batch_size=64,
        )
    )
    assert again.memory.fits
    assert again.memory.total / GIB == pytest.approx(float(option[2]), abs=0.06)


def test_advice_never_cuts_below_the_longest_row() -> None:
    trees = [TokenTree((1,) * 700, ((2,) * 100, (3,) * 100))] * 4
    options = [option for option, _, _ in smaller(DpoConfig(model="m", data="d", output=Path("o")), trees)()]
    assert options == ["--token-budget 1024", "--lora-r 16", "--lora-r 16 --token-budget 1024"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["dpo", "--device", "h1000"], "--device 'h1000'"),
        (["sft"], "verb to plan 'sft'"),
        (["dpo", "--data", "prefs.jsonl"], "has no tokenizer to measure --data with"),
        (["dpo", "--rows", "0"], "--rows 0: wanted above 0"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    shape: str, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments, "--model", shape])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert shown.count("\n") == 1


def test_answers_that_do_not_fit_are_one_line(shape: str) -> None:
    with pytest.raises(UserError, match="--answer-tokens 2000: wanted fewer than the 1024 of --max-length"):
        plan_dpo(PlanConfig(model=shape, device="h100", answer_tokens=2000))


def test_never_checkpointing_is_advised_against_first(shape: str, small_card: str) -> None:
    options = {"token_budget": 8192, "lora_r": 4, "prompt_tokens": 100, "answer_tokens": 50}
    found = plan_dpo(PlanConfig(model=shape, device=small_card, checkpointing="never", **options))
    assert (found.advice or "").startswith("--checkpointing auto fits: ")


def test_memory_is_known_where_time_is_not(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(module, "TOO_SMALL", 0)
    monkeypatch.setattr(module, "time_passes", fails)
    found = plan_dpo(PlanConfig(model=shape, dtype="float32"))
    assert not found.stages
    assert "time unknown, RuntimeError: no such kernel" in table(found)
    assert one_line(found).startswith(f"{found.memory.total / GIB:.1f} of ")
    assert found.record()["seconds"] is None


def test_what_is_left_is_less(shape: str) -> None:
    config = PlanConfig(model="m", rows=100, epochs=2, eval_prompts=4)
    training, held_out = made_up(config)
    whole, rest = (workload(config, parse_objective(["dpo"]), training, held_out, [], done=n) for n in (0, 20))
    assert rest.steps == whole.steps - 20 == 4
    assert rest.training.tokens < whole.training.tokens / 5
    assert rest.evaluation.tokens < whole.evaluation.tokens / 3
    workload(config, parse_objective(["dpo"]), training, held_out, [], done=whole.steps)  # nothing is left to train


def test_no_config_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no configuration of a causal language model"):
        plan_dpo(PlanConfig(model=str(tmp_path), device="h100"))


def test_this_machine_is_timed(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOO_SMALL", 0)
    found = plan_dpo(PlanConfig(model=shape, rows=200, dtype="float32", eval_prompts=0))
    assert found.basis == "timed on this machine"
    assert {stage.name for stage in found.stages} == {"reference", "training", "optimizer", "evaluation", "save"}
    assert "timed on this machine" in table(found)


def test_seconds_follow_the_work(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pass that takes as long as its FLOPs, ten times the rows take ten times as long, but for the rest."""
    monkeypatch.setattr(module, "TOO_SMALL", 0)
    monkeypatch.setattr(module, "seconds_per_update", lambda dtype: 0.0)
    monkeypatch.setattr(module, "time_passes", lambda *given: [3.0 if one.backward else 1.0 for one in given[-1]])
    options = {"model": shape, "dtype": "float32", "eval_prompts": 0, "token_budget": 600, "batch_size": 1}
    short, long = (plan_dpo(PlanConfig(**options, rows=rows)) for rows in (100, 1000))
    seconds = [{stage.name: stage.seconds for stage in found.stages} for found in (short, long)]
    assert seconds[0]["training"] == pytest.approx(module.SLOWER * 90 * 3.0)  # 90 passes of one row each
    assert seconds[0]["reference"] == pytest.approx(module.SLOWER * 100 * 1.0)
    assert seconds[1]["training"] == pytest.approx(module.SLOWER * 900 * 3.0)


def test_the_neediest_are_those_that_keep_scores_too() -> None:
    """A tree of 1,900 tokens keeps no scores, and three of 512 keep most: neither has the most tokens here."""
    long, middle, small = (TokenTree((1,) * n, ((2,) * 10,)) for n in (1890, 502, 90))
    groups = [[long], [middle] * 3, [small] * 20]
    assert _neediest(groups) == [groups[2], groups[1], groups[0]]


def test_rollouts_are_foreseen_as_they_are_counted(sharp_folder: Path, tmp_path: Path) -> None:
    """Where no answer ends early, the FLOPs of a PPO run are those foreseen, but for the head and attention."""
    (tmp_path / "scorer.py").write_text(SCORER)
    (tmp_path / "prompts.txt").write_text("".join(f"prompt number {i}\n" for i in range(10)))
    config = PpoConfig(
        model=str(sharp_folder),
        data=str(tmp_path / "prompts.txt"),
        output=tmp_path / "run",
        reward=(f"{tmp_path / 'scorer.py'}:length",),
        eval_fraction=0.2,
        batch_size=4,
        max_steps=2,
        max_new_tokens=5,
        dtype="float32",
        lora_r=4,
    )
    run = train_ppo(config)
    stage = set_stage(config, config.reward, with_critic=True)
    work = rollouts(config, stage.training.ids, stage.held_out.ids, looks=3, passes=2 * 4, updates=4)
    rows = [row for row in run.read_jsonl("metrics.jsonl") if row["split"] == "train"]
    answers = sum(row["examples"] for row in rows)
    assert work.steps == sum(row["policy/updates"] for row in rows)
    assert work.sampled.answers == answers + 3 * len(stage.held_out.ids) * config.eval_samples
    # All trees with full answers: at least what was computed, and hardly more, for few answers of it end early.
    tokens = sum(row["tokens"] for row in rows)
    assert tokens <= work.training.tokens / 8 <= 1.1 * tokens
    assert run.read_json("forecast.json")["seconds"] > 0
