"""Policy, reference, value and reward on as few networks as there can be.

With adapters one frozen base plays all four: the policy's adapter on it, the value's, the reward's, and none for the
reference. A reward model with weights of its own is the base of the value's adapter, so that two networks do. In full
training each is a network.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from sartor.model.forward import use_lean_layers
from sartor.model.heads import load_reward_model
from sartor.model.load import FROZEN, LanguageModel, adapt, convert_gguf, load
from sartor.model.resolve import resolve

VALUE = "sartor_value"  # the critic's adapter; names that no module of a model has


@dataclass(frozen=True)
class Actors:
    """Who takes part in reinforcement learning; ``critic`` only where values are learned, ``rewards`` by name."""

    policy: LanguageModel
    reference: LanguageModel
    critic: LanguageModel | None
    rewards: dict[str, LanguageModel]

    def __str__(self) -> str:
        names = {"policy": self.policy, "reference": self.reference, "value": self.critic, **self.rewards}
        groups: dict[int, list[str]] = {}
        for name, model in names.items():
            if model is not None:
                groups.setdefault(id(model.core), []).append(name)
        return "; ".join(f"{', '.join(group)} on one network" for group in groups.values())

    @property
    def networks(self) -> int:
        """Sets of weights in memory."""
        everyone = [self.policy, self.reference, *([self.critic] if self.critic else []), *self.rewards.values()]
        return len({id(one.core) for one in everyone})


def assemble(
    policy: LanguageModel,
    reward_models: list[str],
    dtype: str,
    with_critic: bool,
    seed: int,
    start: tuple[float, float] = (1.0, 0.0),
) -> Actors:
    """The actors around a policy.

    Args:
        policy: as loaded, with its adapter where it has one.
        reward_models: trained reward models, by name; the first one's weights are the critic's start.
        dtype: of what else is loaded.
        with_critic: PPO learns values, RLOO and GRPO do not.
        seed: of a fresh critic's adapter.
        start: factor and offset from the first reward model's number to what is maximised, where the critic begins.

    Raises:
        UserError: a reward model that does not load.
    """
    rewards = {name: _joined(policy, name, f"sartor_reward{i}") for i, name in enumerate(reward_models)}
    for name, joined in rewards.items():
        rewards[name] = joined or load_reward_model(name, dtype)
    found = {name: model for name, model in rewards.items() if model is not None}
    critic = None
    if with_critic:
        first = next(iter(found), None)
        critic, moved = _critic(policy, found[first] if first else None, seed)
        if first and moved is not None:
            found[first] = moved
            critic.head = _scaled(critic.scalar, *start)
    if policy.is_adapted:
        policy.adapter = policy.adapter or "default"
        reference = policy.beside(adapter=FROZEN)
    else:
        reference = load(str(policy.path), str(policy.core.dtype).removeprefix("torch."))
        reference.network.requires_grad_(False)
    reference.shares_prompts = policy.shares_prompts
    return Actors(policy, reference, critic, found)


def _joined(policy: LanguageModel, name: str, adapter: str) -> LanguageModel | None:
    """A reward model that is an adapter on the policy's own base, put beside the policy's; None for any other."""
    path = resolve(name, convert_gguf)
    if not policy.is_adapted or not (path / "adapter_config.json").is_file():
        return None
    settings = PeftConfig.from_pretrained(str(path))
    base = resolve(str(settings.base_model_name_or_path), convert_gguf)
    if settings.task_type != "SEQ_CLS" or not _is_plain(settings) or not _same(base, policy):
        return None
    tensors = load_file(path / "adapter_model.safetensors")
    weight = next((tensors.pop(key) for key in list(tensors) if key.endswith("score.weight")), None)
    if weight is None:
        return None
    _add_adapter(policy, adapter, settings.r, settings.lora_alpha, trainable=False)
    set_peft_model_state_dict(policy.network, tensors, adapter_name=adapter)
    head = torch.nn.Linear(weight.shape[1], 1, bias=False, device=policy.device)
    head.weight = torch.nn.Parameter(weight.float().to(policy.device), requires_grad=False)
    return policy.beside(name=name, path=path, adapter=adapter, head=head)


def _is_plain(settings: PeftConfig) -> bool:
    """Whether rank and alpha say all of an adapter; one of another kind is loaded by itself."""
    if not isinstance(settings, LoraConfig):
        return False
    unusual = (settings.use_rslora, settings.use_dora, settings.rank_pattern, settings.alpha_pattern)
    return not any(unusual)


def _same(base: Path, policy: LanguageModel) -> bool:
    """Whether a folder holds the weights under the policy's adapter: by name, or tensor by tensor."""
    if base.resolve() == policy.path.resolve():
        return True
    ours = {key.replace(".base_layer", ""): tensor for key, tensor in policy.core.state_dict().items()}
    files = list(base.glob("*.safetensors")) if base.is_dir() else []
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no mapping
                if key not in ours or not torch.equal(tensors.get_tensor(key), ours[key].cpu()):
                    return False
    return bool(files)


def _add_adapter(policy: LanguageModel, name: str, r: int, alpha: int, trainable: bool) -> None:
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    policy.network.add_adapter(name, config, autocast_adapter_dtype=False)
    for key, parameter in policy.network.named_parameters():
        if f".{name}." in key:
            parameter.requires_grad_(trainable)


def _critic(
    policy: LanguageModel, reward: LanguageModel | None, seed: int
) -> tuple[LanguageModel, LanguageModel | None]:
    """The value model, started from the reward model where there is one; and the reward model, where it moved."""
    if not policy.is_adapted:
        source = reward or policy
        use_lean_layers(source, False)  # a copy would go on calling the original's
        network = copy.deepcopy(source.network if reward else policy.core)
        head = copy.deepcopy(source.scalar) if reward else _fresh_head(policy)
        network.requires_grad_(True)
        critic = source.beside(network=network, head=head.float().requires_grad_(True))
        if reward:
            network.score.requires_grad_(False)  # its copy in fp32 is what is trained
        return critic, reward
    settings = policy.network.peft_config["default"]
    if reward is None or reward.network is policy.network:
        like = settings if reward is None else policy.network.peft_config[str(reward.adapter)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _add_adapter(policy, VALUE, like.r, like.lora_alpha, trainable=True)
        if reward:
            theirs = {k: v for k, v in policy.network.named_parameters() if f".{reward.adapter}." in k}
            ours = dict(policy.network.named_parameters())
            with torch.no_grad():
                for key, value in theirs.items():
                    ours[key.replace(f".{reward.adapter}.", f".{VALUE}.")].copy_(value)
        head = copy.deepcopy(reward.scalar) if reward else _fresh_head(policy)
        return policy.beside(adapter=VALUE, head=head.requires_grad_(True)), reward
    network = adapt(reward.network, settings.r, settings.lora_alpha, seed, task=None, name=VALUE, exclude=["score"])
    head = copy.deepcopy(reward.scalar).float().requires_grad_(True)
    return reward.beside(network=network, adapter=VALUE, head=head), reward.beside(network=network, adapter=FROZEN)


def _scaled(head: Any, factor: float, offset: float) -> torch.nn.Linear:
    """A head of its own that says factor·(what this one says) + offset, fp32."""
    weight = factor * head.weight.detach().float()
    found = torch.nn.Linear(weight.shape[1], 1, device=weight.device)
    found.weight, found.bias = torch.nn.Parameter(weight), torch.nn.Parameter(weight.new_tensor([offset]))
    return found


def _fresh_head(policy: LanguageModel) -> torch.nn.Module:
    """A value of 0 everywhere: what is known before the first reward."""
    head = torch.nn.Linear(policy.core.config.get_text_config().hidden_size, 1, bias=False, device=policy.device)
    torch.nn.init.zeros_(head.weight)
    return head


def trained(actors: Actors) -> list[tuple[str, torch.nn.Parameter]]:
    """What is trained, by name: the policy's weights or its adapter's, and the critic's."""
    found = []
    for role, model in (("policy", actors.policy), ("critic", actors.critic)):
        if model is None:
            continue
        own = model.network.named_parameters()
        found += [(f"{role}.{key}", p) for key, p in own if _is_trained(model, key, p)]
        if model.head is not None:
            found += [(f"{role}.head.{key}", p) for key, p in model.head.named_parameters()]
    return found


def _is_trained(model: LanguageModel, key: str, parameter: torch.nn.Parameter) -> bool:
    # PEFT switches gradients off for every adapter but the one that answers, so those of an adapter go by its name.
    return parameter.requires_grad if model.adapter is None else f".{model.adapter}." in key
