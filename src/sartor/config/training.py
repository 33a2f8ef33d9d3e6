"""The options of the verbs that train. What several verbs share stands once, in a class that they inherit.

Help shows the fields of the last base first: what a run is about, then what the verb alone has, then what all have.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sartor.config.fields import (
    NOT_BELOW_0,
    AsChat,
    Checked,
    Count,
    Dtype,
    NotNegative,
    OneOf,
    OptionalCount,
    OptionalPositive,
    OptionalText,
    Positive,
    Seed,
    Share,
    Wanted,
)
from sartor.errors import UserError

LOSSES = tyro.conf.arg(metavar="NAME ...")


@dataclass(kw_only=True)
class RunInputs(Checked):
    """What a run is about."""

    model: str
    """Hub id, folder, .gguf file, or 'smollm2' (135M chat model, no Hub account needed)."""
    data: str
    """JSON, JSONL, CSV or Parquet file (.gz too), or Hub id."""
    output: Path
    """Run folder to create: config, metrics, checkpoints, model/, report.html."""


@dataclass(kw_only=True)
class TrainingConfig(RunInputs):
    """What every verb that trains has: which rows, which steps, when to look and to save."""

    eval_data: OptionalText = None
    """Held-out data. By default a share of --data, split by prompt."""
    eval_fraction: Share = 0.1
    """Share of --data to hold out where there is no --eval-data."""
    limit: OptionalCount = None
    """Train on at most so many rows, for a quick try."""
    eval_limit: OptionalCount = None
    """Hold out at most so many rows."""
    split: str = "train"
    """Split to read of a Hub data set."""
    eval_split: OptionalText = None
    """Split to read of --eval-data; as --split by default."""
    on_bad_row: Annotated[str, OneOf("skip", "error", "drop")] = "skip"
    """skip: leave out up to 1 % of rows and say so; drop: any number; error: stop at the first."""
    as_chat: AsChat = "auto"
    """Plain strings as turns of the chat template: always, never (continued as they stand), auto: if it has one."""
    max_length: Count = 1024
    """Tokens of prompt and completion; longer prompts lose their start, longer completions are left out."""

    learning_rate: OptionalPositive = None
    """Peak rate; by default 2e-5 up to 0.5B, 5e-6 up to 3B, else 1e-6; LoRA 10 times, in ppo 25; reward 5 times all."""
    schedule: Annotated[str, OneOf("cosine", "linear", "constant")] = "cosine"
    """How the learning rate falls after warm-up: cosine, linear, or constant."""
    warmup_ratio: Annotated[float, Wanted("at least 0 and below 1", lambda value: 0 <= value < 1)] = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Clip the gradient's norm to this."""
    epochs: Positive = 1.0
    """Passes over the training data."""
    max_steps: OptionalCount = None
    """Stop after so many optimizer steps, whatever --epochs says."""
    batch_size: Count = 8
    """Prompts per optimizer step (a ranking of K answers counts as one)."""
    token_budget: Count = 2048
    """Tokens per forward pass: bounds memory, never changes the result."""
    lora_r: Annotated[int, Wanted("0 (full training) or a rank", lambda value: value >= 0)] = 0
    """Rank of a LoRA adapter on all linear layers; 0 trains all weights."""
    lora_alpha: OptionalCount = None
    """LoRA scale; twice the rank by default."""
    dtype: Dtype = "auto"
    """bfloat16, float32, or auto: bfloat16 where the hardware multiplies in it. Optimizer state is always fp32."""
    checkpointing: Annotated[str, OneOf("auto", "always", "never")] = "auto"
    """Layers to run again in the backward pass, to save memory: always all, never any, auto: as many as must be."""

    eval_every: OptionalCount = None
    """Steps between evaluations; by default four in all."""
    save_every: Count = 100
    """Steps between checkpoints; the last one is kept."""
    seed: Seed = 0
    """Fixes split, order, adapter and samples: same seed, same machine, same result."""
    resume: bool = False
    """Go on with the run in --output, bit for bit where it was interrupted."""


@dataclass(kw_only=True)
class SamplingConfig(TrainingConfig):
    """What verbs share that have the model answer held-out prompts."""

    eval_prompts: Annotated[int, NOT_BELOW_0] = 32
    """Held-out prompts to answer before and after, and to measure KL on. 0: none."""
    eval_samples: Count = 1
    """Answers to each of them."""
    max_new_tokens: Count = 64
    """Length of answers, in tokens."""
    score: OptionalText = None
    """Scorer for the answers: a registered name (vader), or file.py:function with TRL's reward signature."""


@dataclass(kw_only=True)
class AnsweringConfig(SamplingConfig):
    """What verbs share that show a model's answers before and after as it would be used."""

    temperature: NotNegative = 0.7
    """Temperature of the answers to held-out prompts (KL is always measured at 1)."""


@dataclass(kw_only=True)
class ObjectiveOptions(Checked):
    """What a preference objective has."""

    loss: Annotated[tuple[str, ...], LOSSES] = ("dpo",)
    """Objective, NAME[:WEIGHT][,OPTION=VALUE]; several are mixed. `sartor losses` lists them; or file.py:function."""
    beta: OptionalPositive = None
    """KL leash; higher stays closer to the reference. By default each objective's own, 0.1 for DPO."""
    wpo: bool = False
    """Weigh pairs by how likely the policy itself would write them (WPO, arXiv 2406.11827)."""
    ld_alpha: Annotated[
        float | None, tyro.conf.arg(metavar="FLOAT"), Wanted("between 0 and 1", lambda value: 0 <= value <= 1)
    ] = None
    """Weight of the tokens that one answer has beyond the other's length (LD-DPO, arXiv 2409.06411); 1 is none."""


@dataclass(kw_only=True)
class DpoConfig(AnsweringConfig, ObjectiveOptions, RunInputs):
    """Fit a model to comparisons, rankings or judged completions: DPO (arXiv 2305.18290) and its kin."""

    data: str
    """JSON, JSONL, CSV or Parquet file (.gz too), or Hub id: pairs, HH, rankings, judged answers."""
    online: Annotated[tuple[str, ...], LOSSES] = ()
    """Learn from the model's own answers to the prompts of --data, ranked by this reward, NAME[:WEIGHT], as for ppo."""
    samples: Count = 4
    """Answers to each prompt, with --online."""
    reference_cache: bool = True
    """Take log-probs of the reference that earlier runs computed, and keep new ones for later runs."""

    def __post_init__(self) -> None:
        self.loss, self.online = words(self.loss), words(self.online)
        super().__post_init__()


@dataclass(kw_only=True)
class PlanConfig(DpoConfig):
    """What `sartor dpo` with the same options would take: time, memory, FLOPs; without weights, without the device."""

    model: str
    """As for dpo; a folder with nothing but a config.json will do."""
    data: str = ""
    """As for dpo; without it, --rows pairs of --prompt-tokens and twice --answer-tokens are assumed."""
    output: Path = Path()
    """Not written."""
    device: str = "here"
    """here: this machine, timed for a few seconds; or one of the table: h100, a100, l4, rtx4090 ..."""
    rows: Count = 10_000
    """Pairs, where there is no --data."""
    prompt_tokens: Count = 200
    """Tokens of a prompt, where there is no --data."""
    answer_tokens: Count = 200
    """Tokens of an answer, where there is no --data."""


@dataclass(kw_only=True)
class SftOptions(Checked):
    """What supervised fine-tuning alone has."""

    train_on: Annotated[str, OneOf("completion", "assistant", "all")] = "completion"
    """Tokens to learn: completion (the last answer), assistant (every answer of a conversation), or all."""


@dataclass(kw_only=True)
class SftConfig(AnsweringConfig, SftOptions, RunInputs):
    """Fit a model to demonstrations: prompt and completion, conversations, corrections, plain text."""

    data: str
    """JSON, JSONL, CSV or Parquet file (.gz too), or Hub id: demonstrations; of preferences the best answers."""


@dataclass(kw_only=True)
class RewardOptions(Checked):
    """What a reward model alone has."""

    loss: Annotated[tuple[str, ...], LOSSES] = ("bradley_terry",)
    """bradley_terry, plackett_luce, with ties rao_kupper or davidson, with strengths margin; or of `sartor losses`."""
    center: NotNegative = 0.0
    """Weight of a penalty on the square of a pair's summed rewards, which keeps them around 0 (arXiv 2312.09244)."""
    center_data: OptionalText = None
    """Demonstrations that are to have mean reward 0, as in InstructGPT; by default the held-out answers."""
    evaluate: bool = False
    """Train nothing: measure the reward model --model on --data."""
    implicit: bool = False
    """With --evaluate: --model is a policy, and its reward β·log(π/π_ref) (DPO's equation 5)."""
    reference: OptionalText = None
    """With --implicit: the model that the policy started from; an adapter knows its own."""
    beta: Positive = 0.1
    """With --implicit: β of the run that made it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.implicit and not self.evaluate:
            raise UserError("--implicit is for --evaluate: it measures the reward that a policy hides, and trains none")


@dataclass(kw_only=True)
class RewardConfig(TrainingConfig, RewardOptions, RunInputs):
    """Train a reward model on comparisons or rankings (arXiv 2203.02155, section 3.5), or measure one."""

    model: str
    """Hub id, folder or .gguf file of a language model, or 'smollm2'; with --evaluate a reward model."""
    data: str
    """JSON, JSONL, CSV or Parquet file (.gz too), or Hub id: pairs, HH, rankings."""

    def __post_init__(self) -> None:
        self.loss = words(self.loss)
        super().__post_init__()


@dataclass(kw_only=True)
class PpoOptions(Checked):
    """What reinforcement learning alone has."""

    reward: Annotated[tuple[str, ...], LOSSES] = ()
    """What to maximise, NAME[:WEIGHT]: reward models (folder or Hub id), registered scorers, file.py:function."""
    algorithm: Annotated[str, OneOf("ppo", "rloo", "grpo")] = "ppo"
    """ppo (with a value model), rloo or grpo (an answer is compared with the others to its prompt)."""
    samples: Count = 4
    """Answers to each prompt of a rollout."""
    kl_coef: NotNegative = 0.05
    """KL leash: what a nat of log π/π_ref costs, at every token."""
    target_kl: OptionalPositive = None
    """Steer --kl-coef so that KL comes to this many nats per completion (arXiv 1909.08593, section 2.2)."""
    ppo_epochs: Count = 4
    """Passes over each rollout."""
    minibatches: Count = 1
    """Optimizer steps in each pass."""
    clip: Positive = 0.2
    """Range of π/π_old in which a gain is counted."""
    value_clip: Positive = 0.2
    """Range around the old value in which the new one is counted."""
    vf_coef: Positive = 0.1
    """Weight of the value loss."""
    gamma: Annotated[float, Wanted("above 0 and at most 1", lambda value: 0 < value <= 1)] = 1.0
    """Discount per token."""
    lam: Annotated[float, Wanted("from 0 to 1", lambda value: 0 <= value <= 1)] = 0.95
    """λ of generalised advantage estimation."""
    whiten_rewards: bool = False
    """Scale rewards to unit variance over each rollout."""
    reward_clip: OptionalPositive = None
    """Clip each score to ± this before KL is taken off."""
    missing_end_penalty: NotNegative = 1.0
    """Taken off the score of an answer that did not end by itself."""
    stop_kl: OptionalPositive = None
    """Take no more steps on a rollout once the policy is so many nats per token from the one that wrote it."""


@dataclass(kw_only=True)
class PpoConfig(SamplingConfig, PpoOptions, RunInputs):
    """Maximise a reward under a KL leash: PPO as in InstructGPT (arXiv 2203.02155), RLOO, GRPO."""

    model: str
    """Where the policy starts: Hub id, folder, .gguf file, or 'smollm2'; best a model that `sartor sft` made."""
    data: str
    """Prompts: text file with one a line, or data with a 'prompt' column; what else is in it is not read."""
    max_length: Count = 1024
    """Tokens of a prompt; longer ones lose their start. --max-new-tokens are beside it."""
    batch_size: Count = 16
    """Prompts per rollout."""
    eval_prompts: Count = 32
    """Held-out prompts to measure reward and KL on."""
    eval_samples: Count = 4
    """Answers to each of them."""
    save_every: Count = 5
    """Rollouts between checkpoints; the last one is kept."""
    max_steps: OptionalCount = None
    """Stop after so many rollouts, whatever --epochs says."""
    lora_r: Annotated[int, Wanted("0 (full training) or a rank", lambda value: value >= 0)] = 16
    """Rank of the LoRA adapters, with which policy, reference and value share one network; 0 trains all weights."""

    def __post_init__(self) -> None:
        self.reward = words(self.reward)
        super().__post_init__()


def words(loss: str | tuple[str, ...]) -> tuple[str, ...]:
    """Terms of a loss: "dpo sft:0.1" in quotes means the same as without; a path may have spaces in it."""
    specs = (loss,) if isinstance(loss, str) else loss
    return tuple(part for spec in specs for part in ([spec] if _is_path(spec) else spec.split()))


def _is_path(spec: str) -> bool:
    return ".py" in spec or Path(spec).exists() or Path(spec.rpartition(":")[0] or spec).exists()
