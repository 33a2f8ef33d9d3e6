"""Reinforcement learning from a reward, under a KL leash: PPO, and RLOO and GRPO with the same rollouts.

The third step of RLHF (Ouyang et al. 2022, arXiv 2203.02155, section 3.5, equation 2). What is done, after the list of
Huang et al. 2024 (arXiv 2403.17031, section 7):

1. The score stands at a completion's last token; a penalty is taken off where the completion did not end by itself.
2. KL to where the policy started is taken off at every token, with a coefficient that is fixed or steered to a target.
3. Scores of a reward model are centred on demonstrations, clipped on demand, rewards whitened on demand.
4. Generalised advantage estimation over tokens, γ = 1, λ = 0.95; advantages whitened over the rollout.
5. Ratio and value are clipped; several passes over a rollout in shuffled mini-batches, ended early on KL on demand.
6. The value model starts as the reward model, or with a head of 0 where there is none.
7. Dropout is off, and the optimizer's state runs through the whole run.

Different, and why:

8. Log-probs of a rollout come from the trainer's own forward pass, in the micro-batches of the first update, and not
   from the sampler: the ratio starts at exactly 1.
9. Completions are drawn at temperature 1: what is drawn is then what is scored.
10. The answers to one prompt stand in one tree, so that prompts are computed once.
11. Policy and value have parameters of their own; only the clipping of the gradient's norm sees both.
12. GRPO has KL in the reward, like the others. As published (arXiv 2402.03300, equation 4) it stands in the loss as k3,
   whose gradient is that of KL(π_ref ‖ π): that does not end at the optimum (tests/train/test_policy_gradient.py).
13. Left out: the pretraining gradients of PPO-ptx; an entropy bonus.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sartor.config import PpoConfig
from sartor.data.trees import TokenTree, pack, split_by_budget
from sartor.errors import UserError
from sartor.evaluate.diversity import distinct_n
from sartor.evaluate.statistics import Estimate
from sartor.machine import release_freed_memory
from sartor.model.critic import Actors, trained
from sartor.model.forward import token_logps
from sartor.model.heads import values
from sartor.rewards.scoring import as_rows
from sartor.train.forecast import announce, rollouts
from sartor.train.held_out import HeldOutAnswers
from sartor.train.loop import Sums
from sartor.train.policy_gradient import (
    KlController,
    clipped_policy_loss,
    clipped_share,
    clipped_value_loss,
    gae,
    group_normalised,
    k1,
    k3,
    leave_one_out,
    per_token,
    token_rewards,
    whiten,
)
from sartor.train.rollout import Prompts, Rollout, Scoring, draw, score_all, set_stage
from sartor.train.run import RunFolder
from sartor.train.stopwatch import Stopwatch
from sartor.train.trainer import Trainer, begin, resolved

# Each of a few dozen rollouts has to count: with adapters on 135M, 3e-4 won 42 % of what the best of 16 gains, 5e-4
# 103 % (docs/log.md, 2026-11-22). All weights at once were not tried.
FASTER_ADAPTERS = 2.5
WEIGHTED_BY = {"ppo": "tokens", "rloo": "completions", "grpo": "means"}


def train_ppo(config: PpoConfig, command: str = "") -> RunFolder:
    """Run ``sartor ppo`` from prompts to report.

    Raises:
        UserError: input that the user can mend; nothing that was written is lost.
    """
    if config.algorithm != "ppo" and config.samples < 2:
        raise UserError(
            f"--samples {config.samples}: {config.algorithm} compares the answers to a prompt, wanted 2 or more"
        )
    run, finished = begin(config)
    if finished:
        return run
    watch = Stopwatch()
    with watch.stage("load"):
        stage = set_stage(config, config.reward, with_critic=config.algorithm == "ppo")
        faster = FASTER_ADAPTERS if config.lora_r else 1.0
        config = resolved(config, stage.actors.policy, len(stage.training.texts), faster)
        run.open(config, stage.identity, command)
        stage.actors.policy.keep_base_if_needed(run.path / "base")
    model, actors = stage.actors.policy, stage.actors
    with watch.stage("forecast"):
        networks = 1 + (actors.critic is not None)  # that learn
        work = partial(
            rollouts,
            config,
            stage.training.ids,
            stage.held_out.ids,
            networks + 1 + len(actors.rewards),
            networks * config.ppo_epochs,
            config.ppo_epochs * config.minibatches,
        )
        announce(run, watch, config, model, work)
    held_out = HeldOutAnswers(config, run, stage)
    trainer = Trainer(config, run, watch, model, len(stage.training.texts), trained=trained(stage.actors))
    ppo = Ppo(config, run, trainer, stage.actors, stage.reward, stage.training, held_out)
    estimates = trainer.train(ppo)
    summary = held_out.summary(estimates, f"{config.model} reinforced by {' + '.join(config.reward)}")
    trainer.finish({"verb": "ppo", "networks": stage.actors.networks, **summary}, ppo.unit)
    return run


class Ppo:
    """One run: what answers, what scores, and what is measured before, during and after."""

    unit = "completions"

    def __init__(
        self,
        config: PpoConfig,
        run: RunFolder,
        trainer: Trainer,
        actors: Actors,
        reward: Scoring,
        training: Prompts,
        held_out: HeldOutAnswers,
    ) -> None:
        self.config, self.run, self.trainer, self.actors = config, run, trainer, actors
        self.reward, self.training, self.held_out = reward, training, held_out
        self.controller = KlController(config.kl_coef, config.target_kl)

    def __str__(self) -> str:
        what = " + ".join(self.config.reward)
        return (
            f"{len(self.training.texts)} prompts, {self.config.samples} answers each, {self.config.algorithm} on {what}"
        )

    def steps(self, trainer: Trainer, first: int) -> Iterator[dict[str, Any]]:
        """Rollout and updates, one after the other, from iteration ``first`` on; yields the metrics of each."""
        plan = trainer.plan
        if first:
            rows = [row for row in self.run.read_jsonl("metrics.jsonl") if row["split"] == "train"]
            self.controller.value = next(row["objective/next_kl_coef"] for row in rows if row["step"] == first)
        for step in range(first, plan.steps):
            rollout, metrics = self.roll_out(self.training.take(plan.batch(step)), step)
            metrics |= self.update(rollout, step)
            metrics["objective/kl_coef"] = self.controller.value
            self.controller.update(metrics["objective/kl"])
            release_freed_memory()
            yield {
                "step": step + 1,
                "epoch": round((step + 1) / plan.steps_per_epoch, 4),
                **metrics,
                "objective/next_kl_coef": self.controller.value,
                "learning_rate": trainer.schedule.at(step),
                "examples": rollout.scores.numel(),
            }

    # Rollout: sample, score, and everything about the samples that the updates will not change.

    def roll_out(self, prompts: Prompts, step: int) -> tuple[Rollout, dict[str, Any]]:
        """Answer prompts, score the answers, and work out advantages; with metrics under the names of TRL's PPO."""
        config, policy = self.config, self.actors.policy
        with self.trainer.watch.stage("sample"):
            drawn = draw(policy, prompts, config.samples, config.max_new_tokens, [config.seed, 5, step])
        trees = [TokenTree(ids, tuple(one.tokens for one in row)) for ids, row in zip(prompts.ids, drawn, strict=True)]
        texts = [[one.text.strip() for one in row] for row in drawn]
        with self.trainer.watch.stage("score"):
            raw = score_all(self.reward, prompts, texts)
        ended = torch.tensor([[one.finished for one in row] for row in drawn])
        scores = raw - config.missing_end_penalty * (~ended)
        if config.reward_clip:
            scores = scores.clamp(-config.reward_clip, config.reward_clip)
        sizes = [tree.size if policy.shares_prompts else tree.repeated_size for tree in trees]
        rollout = Rollout(trees, sizes, scores)
        with self.trainer.watch.stage("look at rollouts"):
            for group in (group for minibatch in self._minibatches(rollout, step, 0) for group in minibatch):
                self._look_at(rollout, group)
        kl = float(k1(rollout.flat("old"), rollout.flat("reference")).sum()) / scores.numel()
        self._work_out_advantages(rollout)
        rows = zip(prompts.texts, texts, raw.tolist(), strict=True)
        self.run.write_jsonl(
            "rollout.jsonl",
            [
                {"step": step + 1, "prompt": as_rows(prompt), "completions": row, "scores": score}
                for prompt, row, score in rows
            ],
        )
        return rollout, {
            "objective/kl": kl,
            "objective/scores": float(raw.mean()),
            "objective/rlhf_reward": float(scores.mean()) - self.controller.value * kl,
            "objective/entropy": -float(rollout.flat("old").sum()) / scores.numel(),
            "completions/length": sum(rollout.lengths()) / scores.numel(),
            "completions/ended": float(ended.float().mean()),
            "completions/distinct_2": float(np.mean([distinct_n(row) for row in texts])),
            "tokens": sum(sizes),
        }

    def _minibatches(self, rollout: Rollout, step: int, epoch: int) -> Iterator[list[list[int]]]:
        """The mini-batches of one pass over a rollout, each cut into micro-batches of trees."""
        config, trees = self.config, len(rollout.trees)
        order = np.random.default_rng([config.seed, 6, step, epoch]).permutation(trees)
        for part in np.array_split(order, min(config.minibatches, trees)):
            groups = split_by_budget([rollout.sizes[i] for i in part], config.token_budget)
            yield [[int(part[i]) for i in group] for group in groups]

    @torch.no_grad()
    def _look_at(self, rollout: Rollout, group: Sequence[int]) -> None:
        """Log-probs and values of a micro-batch, as the first update will compute them."""
        actors = self.actors
        batch = pack([rollout.trees[i] for i in group]).to(actors.policy.device)
        rollout.keep("old", group, token_logps(actors.policy, batch))
        rollout.keep("reference", group, token_logps(actors.reference, batch))
        if actors.critic:
            rollout.keep("value", group, values(actors.critic, batch))

    def _work_out_advantages(self, rollout: Rollout) -> None:
        config, coefficient, everything = self.config, self.controller.value, range(len(rollout.trees))
        lengths, kl = rollout.lengths(), k1(rollout.flat("old"), rollout.flat("reference"))
        if config.algorithm == "ppo":
            reward = token_rewards(rollout.scores.flatten(), kl, lengths, coefficient)
            reward = whiten(reward, shift_mean=False) if config.whiten_rewards else reward
            value = rollout.flat("value")
            advantage = gae(reward, value, lengths, config.gamma, config.lam)
            rollout.keep("returns", everything, advantage + value)
            advantage = whiten(advantage)
        else:
            by_completion = torch.stack([part.sum() for part in kl.split(lengths)]).view_as(rollout.scores)
            score = rollout.scores - coefficient * by_completion
            compared = leave_one_out(score) if config.algorithm == "rloo" else group_normalised(score)
            advantage = compared.flatten().repeat_interleave(torch.tensor(lengths))
        rollout.keep("advantage", everything, advantage)

    # Update: several clipped passes over the rollout.

    def update(self, rollout: Rollout, step: int) -> dict[str, float]:
        """Learn from a rollout; returns metrics averaged over its mini-batches."""
        config, weights, rate = self.config, self.trainer.weights, self.trainer.schedule.at(step)
        sums = Sums()
        losses: list[float] = []
        norms: list[float] = []
        passes = (self._minibatches(rollout, step, epoch) for epoch in range(config.ppo_epochs))
        for minibatch in chain.from_iterable(passes):
            losses.append(0.0)
            moved = Sums()
            for group, weight in zip(minibatch, self._weights(rollout, minibatch), strict=True):
                loss, found = self._gradient(rollout, group, weight)
                losses[-1] += loss
                sums.add(found)
                moved.add({"kl": found["policy/approxkl"]})
            if norms and config.stop_kl and moved.means()["kl"] > config.stop_kl:
                weights.forget()
                break
            norms.append(weights.step(rate, config.max_grad_norm))
        return {
            "loss": float(np.mean(losses)),
            **sums.means(),
            "policy/updates": len(norms),
            "grad_norm": float(np.mean(norms)),
        }

    def _weights(self, rollout: Rollout, minibatch: Sequence[Sequence[int]]) -> Sequence[Tensor]:
        """The share of each token in a mini-batch's loss, for each of its micro-batches."""
        counts = [rollout.lengths(group) for group in minibatch]
        flat = [length for part in counts for length in part]
        return per_token(flat, WEIGHTED_BY[self.config.algorithm]).split([sum(part) for part in counts])

    def _gradient(
        self, rollout: Rollout, group: Sequence[int], weight: Float[Tensor, " N"]
    ) -> tuple[float, dict[str, Tensor]]:
        """Add the gradient of one micro-batch to the weights; returns its share in the loss, and metrics per token."""
        config, policy, critic = self.config, self.actors.policy, self.actors.critic
        batch = pack([rollout.trees[i] for i in group]).to(policy.device)
        here = lambda name: rollout.flat(name, group).to(policy.device)  # noqa: E731
        weight, old, advantage = weight.to(policy.device), here("old"), here("advantage")
        logps = token_logps(policy, batch)
        losses = clipped_policy_loss(logps, old, advantage, config.clip)
        loss = losses @ weight
        loss.backward()
        logps, total = logps.detach(), float(loss.detach())
        found = {
            "loss/policy": losses.detach(),
            "policy/approxkl": k3(old, logps),
            "policy/clipfrac": clipped_share(logps, old, advantage, config.clip).float(),
            "policy/ratio": torch.exp(logps - old),
        }
        if critic:
            value, before, returns = values(critic, batch), here("value"), here("returns")
            losses = clipped_value_loss(value, before, returns, config.value_clip)
            loss = config.vf_coef * (losses @ weight)
            loss.backward()
            total += float(loss.detach())
            found |= {
                "loss/value": losses.detach(),
                "value/mean": value.detach(),
                "value/error": (value.detach() - returns).abs(),
                "value/clipfrac": ((value.detach() - before).abs() > config.value_clip).float(),
            }
        return total, found

    def note(self, metrics: Mapping[str, float]) -> str:
        """What the progress bar shows of a rollout."""
        return f"reward {metrics['objective/scores']:.3f}  KL {metrics['objective/kl']:.2f}"

    def measure(self, step: int) -> dict[str, Estimate]:
        """Rewards, KL and variety of answers to held-out prompts."""
        return self.held_out.measure(step)

    def in_words(self, measured: Mapping[str, Estimate]) -> str:
        """Reward, truth where it is known, and KL."""
        return self.held_out.in_words(measured)
