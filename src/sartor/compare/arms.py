"""The arms of the experiment: each is a command that could be typed, and leaves a run folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.config import CompareConfig, DpoConfig
from sartor.config.compare import MATCHED, SIZES
from sartor.config.rlhf import passed_on
from sartor.tasks.task import Task
from sartor.train.loop import default_learning_rate, steps_of
from sartor.train.ppo import FASTER_ADAPTERS

# With MATCHED as β and as the price of a nat, DPO and PPO on a Bradley-Terry reward have the same optimum (arXiv
# 2305.18290, equation 4), so this pair is the one to compare; DPO's other β show the frontier. No penalty on answers
# that do not end: the score that all arms are measured by knows of none. Every policy learns at PPO's default rate: at
# its own DPO's took half the way. A reward model takes twice the steps over the same rankings, with which one was right
# about 63 % of held-out pairs and not 58 % (both: docs/log.md, 2026-11-22, on the sentiment task's held-out prompts).
DPO = {"temperature": 1, "reference-cache": False}  # each arm pays for all that it needs
REWARD = {"batch-size": DpoConfig.batch_size // 2}
PPO = {"schedule": "linear", "ppo-epochs": 2, "kl-coef": MATCHED, "missing-end-penalty": 0}


@dataclass(frozen=True)
class Arm:
    """One method on one seed.

    Attributes:
        name: the method for people, the same over seeds.
        kind: dpo, dpo-other (at another β), reward, ppo (on the reward model) or ppo-true (on the truth).
        folder: its run folder.
        options: what the verb is called with.
        after: arms whose result it needs, and whose cost is its own too.
        truth: the column of its answers that holds the true score.
    """

    name: str
    kind: str
    folder: Path
    options: Mapping[str, Any]
    passed: Sequence[str]
    after: tuple["Arm", ...] = ()
    truth: str = "scores"

    @property
    def command(self) -> list[str]:
        """Verb and options; options that the user passes on win."""
        verb = self.kind.split("-")[0]
        passed = {name.replace("_", "-"): value for name, value in passed_on(verb, tuple(self.passed)).items()}
        options = [word for name, value in {**self.options, **passed}.items() for word in _typed(name, value)]
        return [verb, *options, "--output", str(self.folder)]


def _typed(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]


def arms_of(config: CompareConfig, task: Task, folder: Path, seed: int, rankings: int, parameters: int) -> list[Arm]:
    """All arms of one seed, in the order in which they have to run.

    Args:
        config: the options.
        task: what the arms learn.
        folder: of this seed, with its feedback in it.
        seed: of training and sampling.
        rankings: how many the feedback has.
        parameters: of the model.
    """
    size = SIZES[config.size]
    shared = {"model": config.model, "lora-r": str(config.lora_r), "seed": str(seed)}
    rate = (FASTER_ADAPTERS if config.lora_r else 1.0) * default_learning_rate(parameters, lora=config.lora_r > 0)
    feedback = {
        "data": str(folder / "rankings.jsonl"),
        "eval-data": str(folder / "rankings_held_out.jsonl"),
        "epochs": f"{size.epochs:g}",
    }
    answers = {
        "score": task.score,
        "max-new-tokens": str(config.max_new_tokens or task.max_new_tokens),
        "eval-prompts": str(len(task.held_out)),
        "eval-samples": str(size.samples),
    }
    prompts = {"data": str(folder / "prompts.jsonl"), "eval-data": str(folder / "prompts_held_out.jsonl")}
    policy = {**shared, **answers, "learning-rate": f"{rate:g}"}

    def every(steps: int) -> dict[str, str]:
        return {"eval-every": str(max(1, -(-steps // size.evaluations)))}

    dpo = {**policy, **feedback, **DPO, **every(steps_of(size.epochs, None, rankings, DpoConfig.batch_size))}
    judge = {**shared, **feedback, **REWARD, **every(steps_of(size.epochs, None, rankings, REWARD["batch-size"]))}
    ppo = {**policy, **prompts, **PPO, "max-steps": str(size.rollouts), **every(size.rollouts)}
    reward = Arm("reward model", "reward", folder / "reward", judge, config.reward)
    return [
        *(
            Arm(
                f"DPO, β = {beta:g}",
                "dpo" if beta == MATCHED else "dpo-other",
                folder / f"dpo-{beta:g}",
                {**dpo, "beta": f"{beta:g}"},
                config.dpo,
            )
            for beta in size.betas
        ),
        reward,
        Arm(
            "PPO on a reward model",
            "ppo",
            folder / "ppo",
            {**ppo, "reward": str(reward.folder)},
            config.ppo,
            (reward,),
            truth="true_scores",
        ),
        Arm("PPO on the truth", "ppo-true", folder / "ppo-true", {**ppo, "reward": task.score}, config.ppo),
    ]
