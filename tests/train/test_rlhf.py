"""``sartor rlhf``: three stages and two rounds, judged, stopped, waited for, resumed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SCORER
from transformers import AutoTokenizer

from sartor.config import RlhfConfig, from_yaml
from sartor.errors import UserError
from sartor.train import rlhf
from sartor.train.rlhf import ppo_verdict, reward_verdict, run_rlhf, sft_verdict
from sartor.train.run import RunFolder

QUICK = ("dtype=float32", "eval_fraction=0.25")


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> RlhfConfig:
    (tmp_path / "scorer.py").write_text(SCORER)
    (tmp_path / "prompts.txt").write_text("".join(f"prompt number {i}\n" for i in range(24)))
    rows = [{"prompt": f"prompt number {i}", "completion": "aeio bcd"} for i in range(24)]
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RlhfConfig(
        model=str(tiny_folder),
        prompts=str(tmp_path / "prompts.txt"),
        output=tmp_path / "road",
        demonstrations=str(tmp_path / "demos.jsonl"),
        feedback=f"{tmp_path / 'scorer.py'}:even",
        rounds=2,
        max_new_tokens=6,
        lora_r=4,
        sft=(*QUICK, "learning_rate=0.03", "epochs=2", "eval_prompts=2"),
        reward=(*QUICK, "learning_rate=0.02"),
        ppo=(*QUICK, "learning_rate=0.03", "max_steps=2", "batch_size=6"),
        judge_stages=False,
    )


def lines(config: RlhfConfig, name: str) -> list[str]:
    return (config.output / name).read_text().splitlines()


def test_two_rounds_leave_every_stage_behind(config: RlhfConfig) -> None:
    told = run_rlhf(config)
    road = json.loads((config.output / "road.json").read_text())
    stages = ["round-1/sft", "round-1/reward", "round-1/ppo", "round-2/reward", "round-2/ppo"]
    assert [row["stage"] for row in road] == stages
    assert all(stage in told for stage in stages)
    assert all((config.output / stage / "report.html").is_file() for stage in stages)
    counts = [
        len((config.output / name).read_text().splitlines())
        for name in ("round-1/rankings.jsonl", "round-2/rankings.jsonl", "round-2/all-rankings.jsonl")
    ]
    asked = [json.loads(row)["prompt"][-1]["content"] for row in lines(config, "round-2/all-rankings.jsonl")]
    held_out = [json.loads(row)["prompt"] for row in lines(config, "prompts_held_out.jsonl")]
    assert len(held_out) == 6
    assert not set(asked) & set(held_out)  # what the reward model learned from measures nothing
    assert counts[2] <= counts[0] + counts[1]  # the second reward model learns from all feedback so far
    assert counts[2] > counts[0]
    second = json.loads((config.output / "round-2" / "ppo" / "identity.json").read_text())
    assert (
        "round-1/ppo" in (config.output / "round-2" / "ppo" / "config.yaml").read_text()
    )  # it starts where round 1 ended
    assert second["model"] != json.loads((config.output / "round-1" / "ppo" / "identity.json").read_text())["model"]
    assert AutoTokenizer.from_pretrained(config.output / "model") is not None


def test_a_stage_that_brought_nothing_stops_the_road(config: RlhfConfig) -> None:
    lazy = replace(config, sft=(*QUICK, "learning_rate=1e-9", "max_steps=1", "eval_prompts=0"), judge_stages=True)
    with pytest.raises(UserError, match=r"stage .*round-1/sft failed: perplexity is .* of what it was; look at"):
        run_rlhf(lazy)
    assert not (config.output / "round-1" / "reward").exists()
    with pytest.raises(UserError, match="failed: perplexity"):
        run_rlhf(replace(lazy, resume=True))
    assert json.loads((config.output / "road.json").read_text())[0]["passed"] is False
    told = run_rlhf(replace(lazy, resume=True, judge_stages=False, rounds=1))  # the way out that the error names
    assert "round-1/ppo" in told
    assert "FAILED: perplexity" in told


def test_it_resumes_at_the_stage_that_broke(config: RlhfConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, rounds=1)
    train, calls = rlhf.train_reward, []

    def breaks(*arguments, **options):
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(rlhf, "train_reward", breaks)
    with pytest.raises(KeyboardInterrupt):
        run_rlhf(config)
    before = (config.output / "round-1" / "sft" / "report.html").stat().st_mtime_ns
    monkeypatch.setattr(rlhf, "train_reward", train)
    run_rlhf(replace(config, resume=True))
    assert (config.output / "round-1" / "sft" / "report.html").stat().st_mtime_ns == before
    assert (config.output / "model").is_dir()


def test_feedback_of_several_shapes_is_joined(tmp_path: Path) -> None:
    pairs, ranked = tmp_path / "pairs.csv", tmp_path / "ranked.jsonl"
    pairs.write_text("prompt,chosen,rejected\nSay it,yes,no\n")
    ranked.write_text(json.dumps({"prompt": "Say it", "completions": ["a", "b", "c"], "ranks": [1, 2, 2]}) + "\n")
    joined = rlhf._joined(tmp_path / "all.jsonl", [str(pairs), str(ranked)])
    rows = [json.loads(line) for line in joined.read_text().splitlines()]
    assert rows[0] == {"prompt": "Say it", "completions": ["yes", "no"], "ranks": [1.0, 2.0]}
    assert rows[1]["ranks"] == [1.0, 2.0, 2.0]


def test_rankings_of_held_out_prompts_are_not_learned(
    config: RlhfConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without demonstrations, where the reward model is the first stage; killed after it, and resumed."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"prompt number {i}", "chosen": "aeae", "rejected": "bdbd", "strength": 2} for i in range(24)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, demonstrations=None, rankings=str(pairs), feedback="", rounds=1)
    run_rlhf(config)
    assert "6 of 24 rankings are of held-out prompts" in capsys.readouterr().err
    learned = [json.loads(line) for line in lines(config, "rankings.jsonl")]
    held_out = {json.loads(row)["prompt"] for row in lines(config, "prompts_held_out.jsonl")}
    assert len(learned) == 18
    assert not {row["prompt"] for row in learned} & held_out
    assert {row["strength"] for row in learned} == {2}
    assert "rankings.jsonl" in (config.output / "round-1" / "reward" / "config.yaml").read_text()
    assert "round-1/ppo" in run_rlhf(replace(config, resume=True))


def test_rankings_of_other_prompts_are_read_where_they_are(config: RlhfConfig, tmp_path: Path) -> None:
    pairs, run = tmp_path / "pairs.csv", RunFolder(tmp_path)
    pairs.write_text("prompt,chosen,rejected\nSay it,yes,no\nSay more,and,or\n")
    config = replace(config, rankings=str(pairs))
    run.write_jsonl("prompts_held_out.jsonl", [{"prompt": "Say nothing"}])
    assert rlhf._rankings(config, run) == str(pairs)
    turns = [[{"role": "user", "content": f"{text} "}] for text in ("Say it", "Say more")]
    run.write_jsonl("prompts_held_out.jsonl", [{"prompt": prompt} for prompt in turns])
    with pytest.raises(UserError, match="all are of prompts held out"):
        rlhf._rankings(config, run)
    assert not (tmp_path / "rankings.jsonl").exists()


def test_people_are_waited_for(config: RlhfConfig, tmp_path: Path) -> None:
    config = replace(config, feedback=str(tmp_path / "ranked-{round}.jsonl"), rounds=1, demonstrations=None)
    told = run_rlhf(config)
    assert "18 prompts wait for people" in told
    rows = [json.loads(line) for line in (config.output / "round-1" / "answers.jsonl").read_text().splitlines()]
    ranked = [
        {"prompt": r["prompt"], "completions": r["completions"], "ranks": [1, 2, 3, 4]}
        for r in rows
        if len(set(r["completions"])) > 1
    ]
    (tmp_path / "ranked-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    told = run_rlhf(replace(config, resume=True))
    assert "round-1/ppo" in told


def test_verdicts_go_by_the_interval() -> None:
    estimate = lambda value, low, high: {"value": value, "low": low, "high": high}  # noqa: E731
    assert sft_verdict({}, [{"perplexity_ratio": estimate(0.9, 0.8, 0.99)}])[0]
    assert not sft_verdict({}, [{"perplexity_ratio": estimate(0.9, 0.8, 1.01)}])[0]
    assert reward_verdict({"evaluation": {"accuracy": estimate(0.6, 0.51, 0.7)}}, [])[0]
    assert not reward_verdict({"evaluation": {"accuracy": estimate(0.6, 0.49, 0.7)}}, [])[0]
    won = {"win_rate": estimate(0.6, 0.52, 0.7), "kl": estimate(3.0, 2.0, 4.0)}
    assert ppo_verdict({"comparison": won, "scorer": "vader"}, [])[0]


def test_options_are_passed_on_and_checked(tmp_path: Path) -> None:
    known = {"model": "m", "prompts": "p.txt", "output": tmp_path, "feedback": "vader"}
    with pytest.raises(UserError, match="unknown option of ppo 'kl_coeff': did you mean 'kl_coef'"):
        RlhfConfig(**known, ppo=("kl_coeff=0.1",))
    with pytest.raises(UserError, match="each round has a file of its own"):
        RlhfConfig(**{**known, "feedback": "ranked.jsonl"}, rounds=2)
    with pytest.raises(UserError, match=r"--kl-coef -3\.0: wanted 0 or more"):
        RlhfConfig(**known, ppo=("kl_coef=-3",))
    with pytest.raises(UserError, match="unknown option of reward 'model'"):
        RlhfConfig(**known, reward=("model=other",))
    with pytest.raises(UserError, match="--sft epochs: wanted float, got 'many'"):
        RlhfConfig(**known, sft=("epochs=many",))
    with pytest.raises(UserError, match="wanted OPTION=VALUE"):
        RlhfConfig(**known, sft=("epochs",))
    with pytest.raises(UserError, match="wanted one of them"):
        RlhfConfig(**{**known, "feedback": ""})
    file = tmp_path / "rlhf.yaml"
    file.write_text("model: m\nprompts: p.txt\nfeedback: vader\nppo:\n  kl_coef: 0.1\n  max_steps: 40\n")
    assert from_yaml(file, RlhfConfig)["ppo"] == ("kl_coef:0.1", "max_steps:40")
