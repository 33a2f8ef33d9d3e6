"""The options of ``sartor compare``, and what its sizes mean."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sartor.config.fields import Checked, Count, OneOf, OptionalCount, OptionalText, Wanted
from sartor.config.rlhf import PASSED_ON, PASSED_TO, passed_on
from sartor.errors import UserError


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    prompts: int  # to train on, at most
    held_out: int  # prompts to measure on, at most
    betas: tuple[float, ...]  # of DPO
    epochs: float  # of DPO and of the reward model, over the feedback
    rollouts: int  # of PPO
    evaluations: int  # of each run, after the start
    samples: int  # answers to each held-out prompt at an evaluation
    best_of: int  # the most answers to choose the best from


MATCHED = 0.05  # the β of DPO that the headline tells of, and PPO's price of a nat
# The same for every arm, or else there would be nothing to compare.
SAME = {
    *("score", "seed", "lora_r", "eval_data", "eval_samples", "eval_prompts", "max_new_tokens", "temperature"),
    *("beta", "reward", "reference_cache", "evaluate", "implicit", "online"),
}
SIZES = {
    "quick": Size(prompts=6, held_out=6, betas=(MATCHED,), epochs=1, rollouts=1, evaluations=1, samples=2, best_of=2),
    "small": Size(
        prompts=100, held_out=40, betas=(0.02, MATCHED), epochs=2, rollouts=8, evaluations=2, samples=2, best_of=16
    ),
    "full": Size(
        prompts=10_000,
        held_out=200,
        betas=(0.02, MATCHED, 0.2, 1.0),
        epochs=4,
        rollouts=40,
        evaluations=8,
        samples=4,
        best_of=64,
    ),
}


@dataclass(kw_only=True)
class CompareConfig(Checked):
    """DPO against a reward model with PPO on the same feedback: reward, distance, variety and cost, over seeds."""

    output: Path
    """Folder of the experiment: a run folder for each arm and seed, compare.json, report.html."""
    model: str = "smollm2"
    """Where every arm starts: Hub id, folder, .gguf file, or 'smollm2'; best a model that `sartor sft` made."""
    task: str = "sentiment"
    """sentiment (praise, by the lexicon VADER), or summary (one sentence, by a count); or --prompts and --score."""
    prompts: OptionalText = None
    """Prompts of a task of your own: text file with one a line, or data with a 'prompt' column; a third is held out."""
    score: OptionalText = None
    """With --prompts: its truth, a registered scorer or file.py:function. It labels the feedback and measures all."""
    max_new_tokens: OptionalCount = None
    """Length of answers, in tokens; by default the task's own, 48."""
    size: Annotated[str, OneOf("quick", "small", "full")] = "small"
    """quick: minutes, to see that all of it runs; small: half an hour a seed on two cores; full: hours a seed."""
    seeds: Count = 3
    """Repetitions: each has feedback, adapters and samples of its own. A later --resume may ask for more."""
    answers: Annotated[int, Wanted("2 to 9", lambda value: 2 <= value <= 9)] = 4
    """Answers to each prompt that are ranked."""
    lora_r: Annotated[int, Wanted("0 (full training) or a rank", lambda value: value >= 0)] = 16
    """Rank of all arms' adapters; 0 trains all weights."""
    dpo: Annotated[tuple[str, ...], PASSED_ON] = ()
    """Options of `sartor dpo`, such as learning_rate=1e-4."""
    reward: Annotated[tuple[str, ...], PASSED_ON] = ()
    """Options of `sartor reward`."""
    ppo: Annotated[tuple[str, ...], PASSED_ON] = ()
    """Options of `sartor ppo`, such as kl_coef=0.1."""
    resume: bool = False
    """Go on where it stopped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for verb, config in PASSED_TO.items():
            passed = passed_on(verb, getattr(self, verb)) if hasattr(self, verb) else {}
            for name in passed:
                if name in SAME:
                    raise UserError(f"--{verb} {name}: this is the same for all arms; wanted an option of {verb} alone")
            # Made once here with stand-ins for what the experiment fills in: a slip is told now and not after an hour.
            config(**{"model": self.model, "data": "", "output": self.output, **passed})
        if bool(self.prompts) != bool(self.score):
            raise UserError("--prompts and --score: a task of your own needs both, one of Sartor's neither")
