"""RLHF whole: demonstrations, reward model, reinforcement, and round after round from the newest model.

The loop of Ouyang et al. 2022 (arXiv 2203.02155, figure 2 and section 3): the reward model of a round learns from all
feedback so far, its policy starts from the round before. Each stage is a run of its own verb, with its own page, and is
judged before the next one starts: one that brought nothing stops the whole, with the reason.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sartor import plugins
from sartor.config import PpoConfig, RewardConfig, RlhfConfig, SftConfig, passed_on
from sartor.config.rlhf import FILES
from sartor.console import say
from sartor.data.formats import load_examples
from sartor.errors import UserError
from sartor.evaluate.answers import Answers
from sartor.evaluate.statistics import Estimate
from sartor.machine import set_up_memory
from sartor.model.load import load
from sartor.rewards.scoring import as_rows, from_rows, score_texts
from sartor.rollout.command import read_prompts
from sartor.rollout.local import Sampling
from sartor.train.feedback import collect, split_prompts
from sartor.train.ppo import train_ppo
from sartor.train.reward import train_reward
from sartor.train.run import RunFolder
from sartor.train.sft import train_sft
from sartor.train.summary import percent
from sartor.types import Comparison, Ranking, Text

Verdict = tuple[bool, str]
# Held out once for the whole road: a reward model that has seen answers to a prompt is no judge of new ones to it.
PROMPTS, HELD_OUT = "prompts.jsonl", "prompts_held_out.jsonl"
WITHOUT_HELD_OUT = "rankings.jsonl"  # of the user's own


class Waiting(Exception):
    """Answers lie ready, and people have not ranked them yet. Its text says where, and what to do then."""


def run_rlhf(config: RlhfConfig, command: str = "") -> str:
    """Run ``sartor rlhf``, from wherever it stands; returns what to tell the user at the end.

    Raises:
        UserError: input that the user can mend, or a stage that failed; nothing that was written is lost.
    """
    run = RunFolder(config.output)
    run.check(config, may_change=("judge_stages", "rounds"))
    set_up_memory()
    scorer = _scorer(config)
    share = passed_on("ppo", config.ppo).get("eval_fraction", PpoConfig.eval_fraction)
    parts = split_prompts(read_prompts(config.prompts), share, config.seed)  # what is missing is told now
    run.open(config, {}, command)
    for name, prompts in zip((PROMPTS, HELD_OUT), parts, strict=True):
        if not (run.path / name).is_file():
            run.write_jsonl(name, [{"prompt": as_rows(prompt)} for prompt in prompts])
    feedback = [_rankings(config, run)] if config.rankings else []
    try:
        policy = _demonstrate(config, run)
        for number in range(1, config.rounds + 1):
            say(f"\nround {number} of {config.rounds}, from {policy}")
            if config.feedback and not (number == 1 and config.rankings):
                feedback.append(str(_collect(config, run, policy, number, scorer)))
            reward = _teach(config, run, number, feedback)
            policy = _reinforce(config, run, number, policy, reward)
    except Waiting as waiting:
        return str(waiting)
    finally:
        write_road(run)
    _copy_model(Path(policy), run.path / "model")
    return _told(run, policy)


def _scorer(config: RlhfConfig) -> Callable[..., list[float]] | None:
    """The scorer that gives feedback; None where a file does, or nobody."""
    if not config.feedback or Path(config.feedback).suffix in FILES:
        return None
    scorer = plugins.resolve("rewards", config.feedback)
    score_texts(scorer, ["Is it well?"], ["It is."])
    return scorer


def _demonstrate(config: RlhfConfig, run: RunFolder) -> str:
    if config.demonstrations is None:
        return config.model
    stage = run.path / "round-1" / "sft"
    shared = {
        "max_new_tokens": config.max_new_tokens,
        "score": config.score,
        "lora_r": config.lora_r,
        "seed": config.seed,
    }
    options = {**shared, **passed_on("sft", config.sft)}
    settings = SftConfig(model=config.model, data=config.demonstrations, output=stage, resume=_begun(stage), **options)
    say(f"\nstage   sft -> {stage}")
    train_sft(settings, command=f"sartor rlhf, stage {stage}")
    _judge(config, stage, sft_verdict)
    return str(stage)


def _collect(
    config: RlhfConfig, run: RunFolder, policy: str, number: int, scorer: Callable[..., list[float]] | None
) -> Path:
    """Answers of the newest model to the prompts, ranked by the scorer or by whoever writes the file.

    Raises:
        Waiting: nobody has ranked them yet.
    """
    folder = run.path / f"round-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    ranked, asked = folder / "rankings.jsonl", folder / "answers.jsonl"
    if ranked.is_file():
        return ranked
    theirs = Path(config.feedback.replace("{round}", str(number))) if scorer is None else None
    if theirs is not None and theirs.is_file():
        return theirs
    if not asked.is_file():
        say(f"\nstage   answers to rank -> {asked}")
        model, prompts = load(policy), read_prompts(str(run.path / PROMPTS))
        sampling = Sampling(config.max_new_tokens, seed=config.seed + number)
        found = collect(model, prompts, config.answers, sampling, scorer, "answers to rank")
        RunFolder(folder).write_jsonl(asked.name, found.rows())
    rows = RunFolder(folder).read_jsonl(asked.name)
    if scorer is None:
        raise Waiting(
            f"\n{len(rows)} prompts wait for people, {config.answers} answers each: {asked}\n"
            f"Write {theirs} with the columns prompt, completions, ranks (1 is best), then run the same with --resume."
        )
    kept = Answers.from_rows(rows).rankings()
    if not kept:
        raise UserError(
            f"{asked}: {config.feedback} scores all answers to each prompt alike: there is nothing to prefer"
        )
    RunFolder(folder).write_jsonl(ranked.name, kept)
    say(f"ranked  {len(kept)} of {len(rows)} prompts by {config.feedback} -> {ranked}")
    return ranked


def _teach(config: RlhfConfig, run: RunFolder, number: int, feedback: Sequence[str]) -> str:
    """A reward model from all feedback so far, on the base that the policy of the first round stands on."""
    stage = run.path / f"round-{number}" / "reward"
    base = run.path / "round-1" / "sft"
    model = str(base) if config.demonstrations else config.model
    data = feedback[0]
    if len(feedback) > 1:
        data = str(_joined(stage.with_name("all-rankings.jsonl"), feedback))
    # A model may also say nothing; such answers are left out, and counted.
    shared = {"lora_r": config.lora_r, "seed": config.seed, "on_bad_row": "drop"}
    options = {**shared, **passed_on("reward", config.reward)}
    settings = RewardConfig(model=model, data=data, output=stage, resume=_begun(stage), **options)
    say(f"\nstage   reward -> {stage}")
    train_reward(settings, command=f"sartor rlhf, stage {stage}")
    _judge(config, stage, reward_verdict)
    return str(stage)


def _rankings(config: RlhfConfig, run: RunFolder) -> str:
    """The user's own rankings; those of prompts that are held out are left out, in a file of the run.

    Raises:
        UserError: nothing is left.
    """
    assert config.rankings is not None
    without = run.path / WITHOUT_HELD_OUT
    if without.is_file():
        return str(without)
    # As the reward model will read them.
    given = passed_on("reward", config.reward)
    reading = {"split": given.get("split", RewardConfig.split), "on_bad_row": given.get("on_bad_row", "drop")}
    found = _preferences(config.rankings, **reading)
    held_out = {_turns(from_rows(row["prompt"])) for row in run.read_jsonl(HELD_OUT)}
    kept = [example for example in found if _turns(example.prompt) not in held_out]
    if found and not kept:
        raise UserError(f"--rankings {config.rankings}: all are of prompts held out of --prompts; wanted some others")
    if len(kept) == len(found):
        return config.rankings
    say(f"note    {len(found) - len(kept)} of {len(found)} rankings are of held-out prompts, and are not learned")
    rows = [_as_comparison(one) if isinstance(one, Comparison) else _as_ranking(one) for one in kept]
    run.write_jsonl(WITHOUT_HELD_OUT, rows)
    return str(without)


def _turns(prompt: Text) -> tuple[str, ...]:
    """What tells two prompts apart, whether they came as text or as turns."""
    return (prompt.strip(),) if isinstance(prompt, str) else tuple(turn.content.strip() for turn in prompt)


def _joined(path: Path, files: Sequence[str]) -> Path:
    """Feedback of several rounds in one file, whatever shapes it came in."""
    rows = [_as_ranking(example) for file in files for example in _preferences(file)]
    RunFolder(path.parent).write_jsonl(path.name, rows)
    return path


def _preferences(file: str, split: str = "train", on_bad_row: str = "drop") -> list[Comparison | Ranking]:
    loaded = load_examples(file, wanted=(Comparison, Ranking), split=split, on_bad_row=on_bad_row)
    return [example for example in loaded.examples if isinstance(example, Comparison | Ranking)]


def _as_comparison(example: Comparison) -> dict[str, Any]:
    texts = {name: as_rows(getattr(example, name)) for name in ("prompt", "chosen", "rejected")}
    return {**texts, "tie": example.tie, "strength": example.strength}


def _as_ranking(example: Comparison | Ranking) -> dict[str, Any]:
    if isinstance(example, Ranking):
        answers, ranks = example.completions, example.ranks
    else:
        answers, ranks = (example.chosen, example.rejected), (1.0, 1.0 if example.tie else 2.0)
    return {"prompt": as_rows(example.prompt), "completions": [as_rows(text) for text in answers], "ranks": ranks}


def _reinforce(config: RlhfConfig, run: RunFolder, number: int, policy: str, reward: str) -> str:
    stage = run.path / f"round-{number}" / "ppo"
    shared = {
        "max_new_tokens": config.max_new_tokens,
        "score": config.score,
        "lora_r": config.lora_r,
        "seed": config.seed,
    }
    held_out = {"eval_data": str(run.path / HELD_OUT)}
    options = {"reward": (reward,), **held_out, **shared, **passed_on("ppo", config.ppo)}
    settings = PpoConfig(model=policy, data=str(run.path / PROMPTS), output=stage, resume=_begun(stage), **options)
    say(f"\nstage   ppo -> {stage}")
    train_ppo(settings, command=f"sartor rlhf, stage {stage}")
    _judge(config, stage, ppo_verdict)
    return str(stage)


def _begun(stage: Path) -> bool:
    return (stage / "config.yaml").is_file()


def _judge(
    config: RlhfConfig, stage: Path, verdict: Callable[[Mapping[str, Any], list[dict[str, Any]]], Verdict]
) -> None:
    """Go on only from a stage that brought something.

    Raises:
        UserError: it brought nothing that its interval shows.
    """
    run = RunFolder(stage)
    evaluations = [row for row in run.read_jsonl("metrics.jsonl") if row["split"] == "eval"]
    good, reason = verdict(run.read_json("summary.json"), evaluations)
    run.write_json("verdict.json", {"passed": good, "reason": reason})
    say(f"judged  {reason}")
    if not good and config.judge_stages:
        raise UserError(
            f"stage {stage} failed: {reason}; look at {stage / 'report.html'}, change its options in another --output, "
            "or go on all the same with --no-judge-stages"
        )


def sft_verdict(summary: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> Verdict:
    """Did demonstrations become easier to guess?"""
    ratio = evaluations[-1]["perplexity_ratio"]
    said = f"perplexity is {_share(ratio)} of what it was"
    return ratio["high"] is not None and ratio["high"] < 1, said


def reward_verdict(summary: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> Verdict:
    """Is the reward model right more often than a coin?"""
    accuracy = summary["evaluation"]["accuracy"]
    return accuracy["low"] > 0.5, f"the reward is right about {_share(accuracy)} of held-out pairs"


def ppo_verdict(summary: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> Verdict:
    """Do answers earn more than before, by the truth where it is known?"""
    rate, kl = summary["comparison"]["win_rate"], summary["comparison"]["kl"]
    return rate[
        "low"
    ] > 0.5, f"answers win {_share(rate)} against the start by {summary['scorer']}, KL {kl['value']:.2g} nats"


def _share(estimate: Mapping[str, float]) -> str:
    known = estimate["high"] is not None
    low, high = (estimate["low"], estimate["high"]) if known else (-math.inf, math.inf)
    value = math.nan if estimate["value"] is None else estimate["value"]
    return percent(Estimate(value, low, high, int(estimate.get("n", 0))))


def _copy_model(policy: Path, target: Path) -> None:
    source = policy / "model"
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)


def stages_of(run: RunFolder) -> list[dict[str, Any]]:
    """Every finished stage in order: where, verdict, result, cost."""
    found = []
    for round_folder in sorted(run.path.glob("round-*"), key=lambda path: int(path.name.split("-")[1])):
        for name in ("sft", "reward", "ppo"):
            stage = RunFolder(round_folder / name)
            summary = stage.read_json("summary.json")
            if summary and stage.finished:
                verdict = stage.read_json("verdict.json") or {}
                found.append(
                    {
                        "stage": f"{round_folder.name}/{name}",
                        "headline": summary["headline"],
                        "verdict": verdict.get("reason", ""),
                        "passed": verdict.get("passed"),
                        "seconds": summary["cost"]["seconds"],
                        "peak_memory_gib": summary["cost"]["peak_memory_gib"],
                    }
                )
    return found


def write_road(run: RunFolder) -> None:
    """``road.json``: the stages so far."""
    run.write_json("road.json", stages_of(run))


def _told(run: RunFolder, policy: str) -> str:
    lines = [f"{row['stage']:<16} {'FAILED: ' * (row['passed'] is False)}{row['verdict']}" for row in stages_of(run)]
    return "\n" + "\n".join(lines) + f"\n\nmodel   {run.path / 'model'}\npages   {run.path}/round-*/*/report.html"
