"""Training on tiny models: what a step depends on, what a kill costs, and what is left behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import metrics
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sartor.config import DpoConfig
from sartor.errors import UserError
from sartor.train.dpo import train_dpo

RUN = "from sartor.cli import main; main()"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Comparisons whose chosen answers are upper case: easy to learn, of unlike lengths."""
    rng = random.Random(0)
    word = lambda: "".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 8)))  # noqa: E731
    rows = [{"prompt": f"Say {word()}: ", "chosen": word().upper(), "rejected": word()} for _ in range(48)]
    path = tmp_path / "prefs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(data: Path, tiny_folder: Path, tmp_path: Path) -> DpoConfig:
    return DpoConfig(
        model=str(tiny_folder),
        data=str(data),
        output=tmp_path / "run",
        eval_fraction=0.25,
        learning_rate=3e-3,
        dtype="float32",
        epochs=2,
        eval_prompts=3,
        max_new_tokens=5,
        save_every=3,
    )


def test_at_temperature_1_the_answers_shown_are_those_measured(config: DpoConfig) -> None:
    run = train_dpo(replace(config, temperature=1.0, max_steps=2)).path
    shown = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for name, step in (("before", 0), ("after", 2)):
        measured = [json.loads(line) for line in (run / f"answers-{step}.jsonl").read_text().splitlines()]
        assert [row[name] for row in shown] == [row["completions"] for row in measured]
    assert not (run / "answers-3.jsonl").exists()


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "model").glob("*.safetensors")
    return load_file(file)


def test_it_learns_and_leaves_a_run_behind(config: DpoConfig) -> None:
    run = train_dpo(config, command="sartor dpo").path
    first, last = metrics(run, "eval")[0], metrics(run, "eval")[-1]
    assert first["rewards/accuracies"]["value"] == 0.5
    assert first["objective/kl"]["value"] == first["rewards/margins"]["value"] == 0.0
    assert last["rewards/accuracies"]["low"] > 0.5
    assert last["rewards/margins"]["low"] > 0.0
    assert [row["step"] for row in metrics(run, "train")] == list(range(1, 11))
    assert {row["step"] for row in metrics(run, "eval")} == {0, 3, 6, 9, 10}
    assert metrics(run, "train")[0]["loss"] == pytest.approx(0.6931472)

    network = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    answer = network.generate(**tokenizer("Say x: ", return_tensors="pt"), max_new_tokens=3)
    assert tokenizer.decode(answer[0]).startswith("Say x: ")
    for name in ("report.html", "README.md", "summary.json", "config.yaml", "samples.jsonl", "margins.json"):
        assert (run / name).stat().st_size > 0, name
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-10"]
    assert sum(1 for _ in (run / "samples.jsonl").open()) == 3


@pytest.mark.parametrize("model", ["llama", "mamba"])
def test_micro_batches_do_not_change_the_step(config: DpoConfig, model: str, tmp_path: Path) -> None:
    from conftest import tiny_model

    tiny_model(model).save(tmp_path / model)
    config = replace(config, model=str(tmp_path / model), max_steps=2, eval_prompts=0)
    norms = []
    for budget in (40, 150, 100_000):
        run = train_dpo(replace(config, token_budget=budget, output=tmp_path / f"{model}-{budget}")).path
        norms.append([row["grad_norm"] for row in metrics(run, "train")])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert norms[2] == pytest.approx(norms[0], rel=1e-4)


def test_checkpointing_changes_memory_and_nothing_else(config: DpoConfig, tmp_path: Path) -> None:
    config = replace(config, max_steps=3, eval_prompts=0)
    kept, again = (
        train_dpo(replace(config, checkpointing=choice, output=tmp_path / choice)).path
        for choice in ("never", "always")
    )
    assert json.loads((again / "forecast.json").read_text())["checkpointed_layers"] == 2
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(kept).items())


def test_a_run_says_what_it_will_take_and_at_last_what_it_took(
    config: DpoConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_dpo(replace(config, max_steps=3))
    said = [line.split()[0] for line in capsys.readouterr().err.splitlines() if line and not line.startswith(" ")]
    assert said.index("plan") < said.index("train")
    told = json.loads((run.path / "forecast.json").read_text())
    assert told == json.loads((run.path / "summary.json").read_text())["forecast"]
    assert sum(told["stages"].values()) == pytest.approx(told["seconds"], abs=1)
    assert f"(forecast {told['peak_memory_gib']:.1f})" in run.closing_lines()
    assert "Said before the run" in (run.path / "report.html").read_text()


def test_a_shape_that_cannot_be_forecast_trains_all_the_same(
    config: DpoConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no meta kernel")

    monkeypatch.setattr("sartor.plan.shape.trace", fails)
    monkeypatch.setattr("sartor.train.forecast.checkpoint_layers", lambda model, count: asked.append(count))
    asked: list[int] = []
    run = train_dpo(replace(config, max_steps=1, eval_prompts=0, checkpointing="always"))
    assert asked == [2]  # what was asked for needs no forecast
    assert "no forecast: " in capsys.readouterr().err
    assert run.finished
    assert "(forecast" not in run.closing_lines()


def test_rankings_train_as_one_tree(config: DpoConfig, tmp_path: Path) -> None:
    """A ranking of three weighs as its three pairs: the first step's loss and gradient are those of the pairs."""
    ranked = {"prompt": "Say hi: ", "completions": ["HELLO", "Hello", "no"], "ranks": [1, 2, 3]}
    pairs = [("HELLO", "Hello"), ("HELLO", "no"), ("Hello", "no")]
    rows = [{"prompt": "Say hi: ", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    files = {"ranked": [ranked], "pairs": rows}
    norms = {}
    for name, lines in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        mine = replace(
            config,
            data=str(tmp_path / f"{name}.jsonl"),
            eval_data=config.data,
            output=tmp_path / name,
            max_steps=1,
            eval_prompts=0,
        )
        norms[name] = metrics(train_dpo(mine).path, "train")[0]["grad_norm"]
    assert norms["ranked"] == pytest.approx(norms["pairs"], rel=1e-4)


def test_lora_saves_an_adapter_that_peft_loads(config: DpoConfig) -> None:
    run = train_dpo(replace(config, lora_r=4, learning_rate=2e-2)).path
    assert (run / "model" / "adapter_model.safetensors").is_file()
    assert metrics(run, "eval")[-1]["rewards/margins"]["low"] > 0.0
    adapted = AutoPeftModelForCausalLM.from_pretrained(run / "model")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), adapted.disable_adapter():
        base = adapted(ids).logits
    with torch.no_grad():
        assert not torch.allclose(adapted(ids).logits, base, atol=1e-3)


def test_an_adapter_is_a_model_to_start_from(config: DpoConfig, tmp_path: Path) -> None:
    first = train_dpo(replace(config, lora_r=4, learning_rate=2e-2, eval_prompts=0)).path
    again = replace(config, model=str(first / "model"), output=tmp_path / "second", max_steps=1, eval_prompts=0)
    second = train_dpo(again).path
    assert metrics(second, "train")[0]["loss"] == pytest.approx(0.6931472)  # its own start is its reference
    assert AutoModelForCausalLM.from_pretrained(second / "model") is not None


def test_lora_on_an_adapter_keeps_what_the_first_one_learned(config: DpoConfig, tmp_path: Path) -> None:
    first = train_dpo(replace(config, lora_r=4, learning_rate=2e-2, eval_prompts=0)).path
    second = replace(config, model=str(first / "model"), output=tmp_path / "second", lora_r=2, learning_rate=1e-7)
    path = train_dpo(replace(second, max_steps=1, eval_prompts=0)).path
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        logits = [AutoPeftModelForCausalLM.from_pretrained(run / "model")(ids).logits for run in (first, path)]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("change", ["data", "model"])
def test_resume_notices_other_data_and_another_model(config: DpoConfig, change: str, tmp_path: Path) -> None:
    from conftest import tiny_model

    tiny_model().save(tmp_path / "own")
    config = replace(config, model=str(tmp_path / "own"), max_steps=1, eval_prompts=0)
    run = train_dpo(config).path
    (run / "report.html").unlink()
    if change == "data":
        with Path(config.data).open("a") as file:
            file.write(json.dumps({"prompt": "new", "chosen": "A", "rejected": "b"}) + "\n")
    else:
        tiny_model(seed=1).save(tmp_path / "own")
    with pytest.raises(UserError, match=f"the {change} changed since"):
        train_dpo(replace(config, resume=True))


def test_a_run_killed_before_its_report_gets_one(config: DpoConfig) -> None:
    config = replace(config, max_steps=2)
    run = train_dpo(config).path
    (run / "report.html").unlink()
    train_dpo(replace(config, resume=True))
    assert (run / "report.html").is_file()
    assert [row["step"] for row in metrics(run, "eval")] == [0, 1, 2]


def test_line_separators_in_texts_survive(config: DpoConfig, tmp_path: Path) -> None:
    rows = [{"prompt": f"a\u2028b\u0085{i}", "chosen": "YES", "rejected": "no"} for i in range(12)]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_dpo(replace(config, data=str(tmp_path / "odd.jsonl"), max_steps=1))


def test_held_out_prompts_are_never_trained_on(config: DpoConfig, tmp_path: Path) -> None:
    lines = Path(config.data).read_text().splitlines(keepends=True)
    (tmp_path / "held.jsonl").write_text("".join(lines[:10]))
    run = train_dpo(replace(config, eval_data=str(tmp_path / "held.jsonl"), max_steps=1, eval_prompts=0)).path
    summary = json.loads((run / "summary.json").read_text())
    assert summary["data"]["train"].startswith("38 pairs")
    assert any("10 rows left out of training" in note for note in summary["data"]["notes"])
    with pytest.raises(UserError, match="none is left to train on"):
        train_dpo(replace(config, eval_data=config.data, output=tmp_path / "same"))


def test_pairs_of_one_prompt_are_one_unit(config: DpoConfig, tmp_path: Path) -> None:
    rows = [{"prompt": "one", "chosen": "A" * (i + 1), "rejected": "b" * (i + 1)} for i in range(8)]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train_dpo(replace(config, eval_data=str(tmp_path / "one.jsonl"), max_steps=1, eval_prompts=0)).path
    accuracy = metrics(run, "eval")[-1]["rewards/accuracies"]
    assert accuracy["n"] == 1
    assert accuracy["high"] - accuracy["low"] > 0.7


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda pair, *, beta: pair.policy_chosen.sum(), r"wanted a tensor of shape \(1,\), one number per pair, got"),
        (lambda pair: pair.nothing, "failed on a batch of 1: AttributeError"),
    ],
)
def test_a_loss_that_breaks_its_contract_is_told_so(config: DpoConfig, loss, said: str) -> None:
    with pytest.raises(UserError, match=said):
        train_dpo(replace(config, eval_prompts=0), loss=loss)


def test_k_branches_sum_their_gradients_in_a_fixed_order() -> None:
    """fp32, nine branches on one prompt row, large enough for torch to use both cores."""
    from conftest import CONFIGS, byte_tokenizer

    from sartor.data.trees import TokenTree, pack
    from sartor.model.forward import packed_logps
    from sartor.model.load import LanguageModel

    settings = CONFIGS["llama"]()
    settings.hidden_size, settings.head_dim = 512, 16
    torch.manual_seed(0)
    model = LanguageModel(AutoModelForCausalLM.from_config(settings, dtype=torch.float32), byte_tokenizer(), "wide")
    batch = pack([TokenTree((i,) * 3, tuple((i, k) for k in range(9))) for i in range(40)])
    gradients = []
    for _ in range(6):
        model.network.zero_grad()
        packed_logps(model, batch).sum().backward()
        gradients.append([p.grad.clone() for p in model.network.parameters()])
    assert all(torch.equal(a, b) for again in gradients[1:] for a, b in zip(gradients[0], again, strict=True))


def test_reference_cache_is_found_again_whatever_the_loss_does(config: DpoConfig, monkeypatch, tmp_path) -> None:
    from sartor.model import reference

    train_dpo(replace(config, max_steps=1, eval_prompts=0))
    calls: list[int] = []
    score = reference.score_trees
    monkeypatch.setattr(reference, "score_trees", lambda *a, **k: calls.append(1) or score(*a, **k))
    other = {"beta": 0.5, "learning_rate": 1e-5, "seed": 3}
    for name, value in other.items():
        train_dpo(replace(config, max_steps=1, eval_prompts=0, output=tmp_path / name, **{name: value}))
    assert not calls
    train_dpo(replace(config, max_steps=1, eval_prompts=0, output=tmp_path / "shorter", max_length=14))
    assert calls


def command(config: DpoConfig, *extra: str) -> list[str]:
    options = {
        "model": config.model,
        "data": config.data,
        "output": config.output,
        "eval-fraction": config.eval_fraction,
        "learning-rate": config.learning_rate,
        "epochs": config.epochs,
        "eval-prompts": config.eval_prompts,
        "max-new-tokens": config.max_new_tokens,
        "save-every": config.save_every,
        "dtype": "auto",
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-c", RUN, "dpo", *flags, *extra]


@pytest.mark.parametrize("lora", [(), ("--lora-r", "4")], ids=["full", "lora"])
def test_killed_and_resumed_equals_uninterrupted(config: DpoConfig, tmp_path: Path, lora: tuple[str, ...]) -> None:
    """Really kills the process, with SIGKILL, three times: before a checkpoint, after one, and near the end."""
    smooth = replace(config, output=tmp_path / "smooth")
    subprocess.run(command(smooth, *lora), check=True, capture_output=True, env=_env(tmp_path, "a"))
    for after in (1, 5, 9):
        resume = ("--resume",) if config.output.exists() else ()
        process = subprocess.Popen(
            command(config, *lora, *resume),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=_env(tmp_path, "b"),
        )
        _wait_for_step(config.output, after, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    # The last resume needs no other option than where.
    last = [sys.executable, "-c", RUN, "dpo", "--output", str(config.output), "--resume"]
    subprocess.run(last, check=True, capture_output=True, env=_env(tmp_path, "b"))
    ours, theirs = weights(config.output), weights(smooth.output)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    dull = lambda row: {k: v for k, v in row.items() if k != "seconds"}  # noqa: E731
    for split in ("train", "eval"):
        assert [dull(r) for r in metrics(config.output, split)] == [dull(r) for r in metrics(smooth.output, split)]
    assert (config.output / "samples.jsonl").read_text() == (smooth.output / "samples.jsonl").read_text()


def _env(tmp_path: Path, cache: str) -> dict[str, str]:
    """A cache of its own for each side, or the second would not compute its reference."""
    return {**os.environ, "SARTOR_CACHE": str(tmp_path / f"cache-{cache}")}


def _wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").is_file() else ""
        if f'"split": "train", "step": {step},' in text:
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was never seen; the process ended with {process.poll()}")


def test_a_run_is_never_overwritten_and_resumes_with_its_own_options_only(config: DpoConfig) -> None:
    train_dpo(replace(config, max_steps=1, eval_prompts=0))
    with pytest.raises(UserError, match="exists already: --resume goes on with it"):
        train_dpo(config)
    with pytest.raises(UserError, match=r"started with other options: beta 0.3 \(was not set\)"):
        train_dpo(replace(config, max_steps=1, eval_prompts=0, beta=0.3, resume=True))
    with pytest.raises(UserError, match="holds no run"):
        train_dpo(replace(config, output=config.output / "nothing", resume=True))


def test_divergence_stops_with_advice(config: DpoConfig) -> None:
    def broken(pair):
        in_training = len(pair.policy_chosen) == config.batch_size  # no batch of the contract is of this size
        return pair.policy_chosen * (float("nan") if in_training else 1.0)

    with pytest.raises(UserError, match=r"training diverged at step 1: loss nan.*lower --learning-rate"):
        train_dpo(replace(config, eval_prompts=0), loss=broken)


def test_no_prompt_is_in_both_parts(config: DpoConfig, tmp_path: Path) -> None:
    from sartor.objectives.specs import parse_objective
    from sartor.train.preferences import read_preferences

    rows = [{"prompt": f"p{i % 7}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(70)]
    (tmp_path / "shared.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training, held_out = read_preferences(
        replace(config, data=str(tmp_path / "shared.jsonl"), eval_fraction=0.2), parse_objective(["dpo"])
    )
    ours, theirs = ({row.prompt for row in part.examples} for part in (training, held_out))
    assert not ours & theirs
    assert len(training.examples) + len(held_out.examples) == 70


def test_ties_are_left_out_and_said(config: DpoConfig, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "tie": i % 4 == 0} for i in range(40)]
    (tmp_path / "ties.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train_dpo(replace(config, data=str(tmp_path / "ties.jsonl"), max_steps=1, eval_prompts=0)).path
    notes = json.loads((run / "summary.json").read_text())["data"]["notes"]
    assert any("10 tied rows left out" in note for note in notes)


def test_same_seed_same_result_other_seed_other_result(config: DpoConfig, tmp_path: Path) -> None:
    runs = [
        weights(train_dpo(replace(config, max_steps=3, output=tmp_path / str(i), seed=seed, eval_prompts=0)).path)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])
