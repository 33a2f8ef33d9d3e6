"""What reinforcement learning learns from: prompts, rewards by name, and a rollout of sampled completions."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sartor import plugins
from sartor.config import SamplingConfig
from sartor.console import progress, say
from sartor.data.chat import as_conversation, encode_prompts
from sartor.data.files import Where
from sartor.data.rows import Rows, hold_out, limited, read_rows
from sartor.data.trees import TokenIds, TokenTree
from sartor.errors import UserError
from sartor.model.checkpointing import checkpoint_layers, layers_of
from sartor.model.critic import Actors, assemble
from sartor.model.forward import check, stand_in
from sartor.model.heads import check_rewards
from sartor.model.load import LanguageModel, convert_gguf, fingerprint, load
from sartor.model.resolve import resolve
from sartor.rewards.model import RewardModelScorer, reward_scale
from sartor.rewards.scoring import Scorer, score_texts
from sartor.rollout.command import WITH_PROMPTS, read_lines
from sartor.rollout.local import Sample, Sampling, has_room_to_pack, sample
from sartor.types import Prompt, Text

Scoring = Callable[[Sequence[Text], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Prompts:
    """Prompts as people and as the model read them."""

    texts: list[Text]
    ids: list[TokenIds]

    def take(self, index: Sequence[int]) -> "Prompts":
        """Some of them."""
        return Prompts([self.texts[i] for i in index], [self.ids[i] for i in index])


def read_prompts(config: SamplingConfig) -> tuple[Rows, Rows]:
    """Prompts to train on and to measure on, none in both.

    Raises:
        UserError: no such file, nothing in it, or too few prompts to hold any out.
    """

    def read(source: str, split: str) -> Rows:
        if Path(source).suffix == ".txt":
            lines = read_lines(source, "--data")
            return _unlike(
                Rows([Prompt(line) for line in lines], [Where(source, i + 1) for i in range(len(lines))], "lines")
            )
        return _unlike(read_rows(source, split, WITH_PROMPTS, config))

    return hold_out(config, read)


def _unlike(rows: Rows) -> Rows:
    """Each prompt once."""
    first = {prompt: i for i, prompt in reversed(list(enumerate(rows.prompts)))}
    kept = rows.take(sorted(first.values()))
    return Rows(kept.examples, kept.where, kept.kind, rows.notes)


def encode(model: LanguageModel, rows: Rows, config: SamplingConfig, most: int | None = None) -> Prompts:
    """Prompts in the model's tokens, with room for the answer; at most so many, drawn by the seed.

    Raises:
        UserError: answers of --max-new-tokens leave no room for a prompt.
    """
    room = min(config.max_length, (model.context or 2**31) - config.max_new_tokens)
    if room < 1:
        raise UserError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in {model.context} tokens"
        )
    as_chat = model.reads_as_chat(config.as_chat)
    kept = limited(rows, most, config.seed).prompts
    texts = [as_conversation(text, "user") if as_chat else text for text in kept]
    ids = encode_prompts(model.tokenizer, texts, room)
    cut = sum(len(row) == room for row in ids)
    if cut:
        say(f"note    {cut} of {len(ids)} prompts have {room} tokens or more: of longer ones the start is cut")
    return Prompts(texts, ids)


@dataclass(frozen=True)
class WeightedReward:
    """Several scorers as one: the weighted sum of what each says."""

    scorers: Sequence[tuple[float, Scorer]]

    def __call__(self, prompts: Sequence[Text], texts: Sequence[str]) -> list[float]:
        """A score for each text."""
        parts = [(weight, score_texts(scorer, prompts, texts)) for weight, scorer in self.scorers]
        return [sum(weight * scores[i] for weight, scores in parts) for i in range(len(texts))]


def parse_rewards(specs: Sequence[str]) -> tuple[list[tuple[float, str, Scorer | None]], list[str]]:
    """Weight, name and function of each reward that ``--reward NAME[:WEIGHT]`` names; and the names of reward models.

    A registered name or ``file.py:function`` is a function; anything else is a reward model, and has none yet.

    Raises:
        UserError: no reward, a weight that is no number, or a function that is not there.
    """
    if not specs:
        raise UserError(
            "--reward: wanted what to maximise: a reward model's folder, a registered scorer, file.py:function"
        )
    registered = {point.name for point in entry_points(group="sartor.rewards")}
    found: list[tuple[float, str, Scorer | None]] = []
    for spec in specs:
        name, weight = _weighted(spec)
        function = ".py:" in name or name in registered
        if not function and not Path(name).exists() and "/" not in name:
            plugins.resolve("rewards", name)  # neither scorer nor folder nor Hub id: says which names are known
        found.append((weight, name, plugins.resolve("rewards", name) if function else None))
    return found, [name for _, name, scorer in found if scorer is None]


def _weighted(spec: str) -> tuple[str, float]:
    head, mark, last = spec.rpartition(":")
    if not mark or head.endswith(".py"):
        return spec, 1.0
    try:
        return head, float(last)
    except ValueError:
        if ".py:" in spec:
            return spec, 1.0
        raise UserError(f"--reward {spec!r}: wanted NAME[:WEIGHT], and {last!r} is no number") from None


@dataclass(frozen=True)
class Stage:
    """What a run with rewards is about: who takes part, what scores, which prompts; all loaded and checked."""

    actors: Actors
    reward: WeightedReward
    truth: Scorer | None
    named: str
    training: Prompts
    held_out: Prompts
    notes: list[str]
    identity: dict[str, str]


def set_stage(config: SamplingConfig, rewards: Sequence[str], with_critic: bool) -> Stage:
    """Load policy, rewards and prompts, and say what they are.

    Raises:
        UserError: input that the user can mend.
    """
    wanted, models = parse_rewards(rewards)
    truth = plugins.resolve("rewards", config.score) if config.score else None
    for scorer in [*(scorer for _, _, scorer in wanted), truth]:
        if scorer:
            score_texts(scorer, ["Is it well?"], ["It is."])  # what fails should not wait for the first rollout to end
    rows = read_prompts(config)
    for name in models:
        _refuse_missing(name)
    policy = load(config.model, config.dtype, config.lora_r, config.lora_alpha, config.seed)
    say(f"model   {policy}")
    training, held_out = encode(policy, rows[0], config), encode(policy, rows[1], config, config.eval_prompts)
    longest = max([*training.ids, *held_out.ids], key=len)
    reason = check(policy, stand_in(longest, config.max_new_tokens))
    notes = [*rows[0].notes, *([f"prompts are repeated for each answer: {reason}"] if reason else [])]
    for note in notes:
        say(f"note    {note}")
    identity = {"model": fingerprint(policy), "data": _digest(training, held_out)}
    start = _start_of_critic(wanted, models)
    actors = assemble(policy, models, config.dtype, with_critic, config.seed, start)
    for one in (*actors.rewards.values(), *([actors.critic] if actors.critic else [])):
        if one.shares_prompts is None:
            check_rewards(one, stand_in(longest, config.max_new_tokens))
    if config.checkpointing == "always":
        for network in {id(one.core): one for one in (policy, actors.critic) if one is not None}.values():
            checkpoint_layers(network, len(layers_of(network)))
    identity |= {f"reward model {name}": _weights_of(one) for name, one in actors.rewards.items()}
    say(f"roles   {actors}")
    scorers = [(weight, scorer or _as_scorer(actors.rewards[name], config)) for weight, name, scorer in wanted]
    named = " + ".join(rewards)
    return Stage(actors, WeightedReward(scorers), truth, named, training, held_out, notes, identity)


def _refuse_missing(name: str) -> None:
    """Refuse a reward model that is not there before anything is loaded."""
    try:
        resolve(name, convert_gguf, weights=False)
    except UserError as error:
        raise UserError(f"--reward: {error}") from error


def _start_of_critic(wanted: Sequence[tuple[float, str, Scorer | None]], models: Sequence[str]) -> tuple[float, float]:
    """From the first reward model's number to its share in the score: its weight, and its mean taken off."""
    if not models:
        return 1.0, 0.0
    weight = next(weight for weight, name, _ in wanted if name == models[0])
    return weight, -weight * reward_scale(resolve(models[0], convert_gguf))["mean"]


def _as_scorer(model: LanguageModel, config: SamplingConfig) -> Scorer:
    return RewardModelScorer(model, reward_scale(model.path)["mean"], config.token_budget, config.as_chat)


def _weights_of(reward: LanguageModel) -> str:
    """Hash of a reward model: of its adapter's file, where that is what it is."""
    adapter = reward.path / "adapter_model.safetensors"
    if adapter.is_file():
        return hashlib.blake2b(adapter.read_bytes(), digest_size=16).hexdigest()
    return fingerprint(reward)


def _digest(*parts: Prompts) -> str:
    return hashlib.blake2b(repr([part.ids for part in parts]).encode(), digest_size=16).hexdigest()


def draw(
    policy: LanguageModel, prompts: Prompts, n: int, max_new_tokens: int, seed: Sequence[int]
) -> list[list[Sample]]:
    """``n`` answers to each prompt at temperature 1; ``seed`` says which ones."""
    number = int(np.random.default_rng(seed).integers(2**31))
    sampling = Sampling(max_new_tokens, seed=number, packs=has_room_to_pack(policy))
    with progress("sampling", len(prompts.ids) * n) as advance:
        return sample(policy, prompts.ids, n, sampling, advance)


def score_all(scorer: Scoring, prompts: Prompts, texts: Sequence[Sequence[str]]) -> Float[Tensor, "prompts n"]:
    """The score of every answer to every prompt."""
    asked = [prompt for prompt, row in zip(prompts.texts, texts, strict=True) for _ in row]
    return torch.tensor(scorer(asked, [text for row in texts for text in row])).view(len(texts), -1)


@dataclass
class Rollout:
    """Sampled completions, one tree a prompt, with their scores; and what is fixed of each token while it is learned.

    The latter has one tensor [N] a tree, in the order of ``pack``: log-probs of the policy that drew it and of the
    reference, the critic's value, advantage and return.
    """

    trees: list[TokenTree]
    sizes: list[int]
    scores: Float[Tensor, "prompts n"]
    old: dict[int, Tensor] = field(default_factory=dict)
    reference: dict[int, Tensor] = field(default_factory=dict)
    value: dict[int, Tensor] = field(default_factory=dict)
    advantage: dict[int, Tensor] = field(default_factory=dict)
    returns: dict[int, Tensor] = field(default_factory=dict)

    def flat(self, name: str, trees: Sequence[int] | None = None) -> Float[Tensor, " N"]:
        """One of these for some trees, by default for all."""
        kept = getattr(self, name)
        return torch.cat([kept[i] for i in (range(len(self.trees)) if trees is None else trees)])

    def keep(self, name: str, trees: Sequence[int], flat: Float[Tensor, " N"]) -> None:
        """Take in one of these for some trees."""
        counts = [sum(self.trees[i].counts) for i in trees]
        getattr(self, name).update(zip(trees, flat.cpu().split(counts), strict=True))

    def lengths(self, trees: Sequence[int] | None = None) -> list[int]:
        """Tokens of each completion of some trees, by default of all."""
        return [n for i in (range(len(self.trees)) if trees is None else trees) for n in self.trees[i].counts]
