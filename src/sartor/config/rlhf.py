"""The options of ``sartor rlhf``: what the stages share, and what is passed on to each."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from sartor.config.fields import Checked, Count, OptionalText, Seed, Wanted
from sartor.config.files import coerce
from sartor.config.training import DpoConfig, PpoConfig, RewardConfig, SftConfig
from sartor.errors import UserError, unknown

FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz")  # what feedback by people comes in
OWN = ("model", "data", "output", "resume")  # what the road itself says to its stages
STAGES = {"sft": SftConfig, "reward": RewardConfig, "ppo": PpoConfig}
PASSED_TO = {**STAGES, "dpo": DpoConfig}
PASSED_ON = tyro.conf.arg(metavar="OPTION=VALUE ...")


@dataclass(kw_only=True)
class RlhfConfig(Checked):
    """Demonstrations, reward model, reinforcement, round after round, each stage judged before the next one starts."""

    model: str
    """Where it starts: Hub id, folder, .gguf file, or 'smollm2'."""
    prompts: str
    """Prompts to practise on: text file with one a line, or data with a 'prompt' column."""
    output: Path
    """Folder of all stages: round-1/sft, round-1/reward, round-1/ppo, round-2/reward ..., model/."""
    demonstrations: OptionalText = None
    """Demonstrations to start from; without them there is no first stage."""
    rankings: OptionalText = None
    """Comparisons or rankings for the first reward model; by default it has the first round's feedback."""
    feedback: str = ""
    """Who ranks the answers of a round: a scorer (vader, file.py:function), or a file, with {round} in its name."""
    score: OptionalText = None
    """Scorer that tells the truth where it is known: watched, never trained on."""
    rounds: Count = 1
    """Times to collect feedback on the newest model's answers, train the reward model on all of it, and reinforce."""
    answers: Annotated[int, Wanted("2 to 9", lambda value: 2 <= value <= 9)] = 4
    """Answers to each prompt that feedback ranks."""
    max_new_tokens: Count = 64
    """Length of answers, in tokens."""
    lora_r: Annotated[int, Wanted("0 (full training) or a rank", lambda value: value >= 0)] = 16
    """Rank of all stages' adapters; 0 trains all weights."""
    sft: Annotated[tuple[str, ...], PASSED_ON] = ()
    """Options of `sartor sft`, such as epochs=2."""
    reward: Annotated[tuple[str, ...], PASSED_ON] = ()
    """Options of `sartor reward`."""
    ppo: Annotated[tuple[str, ...], PASSED_ON] = ()
    """Options of `sartor ppo`, such as kl_coef=0.1 max_steps=40."""
    judge_stages: bool = True
    """Stop with the reason where a stage brought nothing: in perplexity, in accuracy of the reward, in reward."""
    seed: Seed = 0
    """Of every stage."""
    resume: bool = False
    """Go on where it stopped: in the middle of a stage, or with feedback that has arrived."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for stage, config in STAGES.items():
            # Made once here with stand-ins for what the road fills in: a slip is told now and not after hours.
            stand_ins = {"model": self.model, "data": "", "output": self.output}
            config(**{**stand_ins, **passed_on(stage, getattr(self, stage))})
        by_file = Path(self.feedback).suffix in FILES
        if by_file and self.rounds > 1 and "{round}" not in self.feedback:
            raise UserError(
                f"--feedback {self.feedback}: each round has a file of its own, wanted {{round}} in its name"
            )
        if not self.feedback and not self.rankings:
            raise UserError("--rankings or --feedback: wanted one of them, or nobody says which answers are better")
        if not self.feedback and self.rounds > 1:
            raise UserError(f"--rounds {self.rounds}: the answers of the second round need --feedback")


def passed_on(stage: str, options: tuple[str, ...]) -> dict[str, Any]:
    """``NAME=VALUE`` (in YAML a mapping) as fields of the stage's own options.

    Raises:
        UserError: a name that the stage does not have, or a value of another type.
    """
    known = {f.name: f for f in fields(PASSED_TO[stage])}
    found = {}
    for option in options:
        mark = min((option.find(sign) for sign in "=:" if sign in option), default=-1)
        if mark < 0:
            raise UserError(f"--{stage} {option}: wanted OPTION=VALUE")
        name, value = option[:mark].strip().replace("-", "_"), option[mark + 1 :].strip()
        if name not in known or name in OWN:
            raise unknown(f"option of {stage}", name, [name for name in known if name not in OWN])
        if value == "None":  # what YAML's null came through as
            continue
        found[name] = coerce(PASSED_TO[stage], name, value, f"--{stage} {name}")
    return found
