"""The log-probs of some trees, and what each kind of objective sees of them: pairs, verdicts or whole rankings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate, chain

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sartor.data.trees import TokenTree
from sartor.losses.weighting import desensitised
from sartor.model.logprobs import sum_by_branch
from sartor.types import JudgedLogps, PairLogps, RankedLogps


@dataclass(frozen=True)
class TreeLogps:
    """Per-token log-probs of the completions of some trees, in the order of ``pack``: N tokens in S branches.

    What no objective depends on was not computed, and is NaN: ``reference``; ``kl``, KL(π_ref ‖ π) between the two
    next-token distributions; ``certainty``, log π(y_t) - log Σ_v π(v)², which carries no gradient.
    """

    trees: Sequence[TokenTree]
    lengths: Int[Tensor, " S"]
    policy: Float[Tensor, " N"]
    reference: Float[Tensor, " N"]
    kl: Float[Tensor, " N"]
    certainty: Float[Tensor, " N"]

    def map(self, change: Callable[[Tensor], Tensor]) -> "TreeLogps":
        """The same trees with every per-token tensor changed."""
        changed = {name: change(getattr(self, name)) for name in PER_TOKEN}
        return TreeLogps(self.trees, self.lengths.to(changed["policy"].device), **changed)

    @classmethod
    def cat(cls, parts: Sequence["TreeLogps"]) -> "TreeLogps":
        """Several groups of trees as one."""
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("lengths", *PER_TOKEN)}
        return cls([tree for part in parts for tree in part.trees], **joined)

    def pairs(self, ties: bool = False, ld_alpha: float | None = None) -> PairLogps:
        """Every pair in the trees, of a ranking all; tied ones on demand.

        ``ld_alpha`` weighs the tokens that one side has beyond the length of the other (LD-DPO).
        """
        better, worse = self.pair_index(ties).unbind(1)
        policy, reference, kl = (self._by_branch(t) for t in (self.policy, self.reference, self.kl))
        sides = {
            "policy_chosen": policy[better],
            "policy_rejected": policy[worse],
            "reference_chosen": reference[better],
            "reference_rejected": reference[worse],
        }
        if ld_alpha is not None:
            shared = torch.minimum(self.lengths[better], self.lengths[worse])
            for model, tokens in (("policy", self.policy), ("reference", self.reference)):
                rows = self._padded(tokens)
                for side, branch in (("chosen", better), ("rejected", worse)):
                    # index_select and not indexing: its backward adds in a fixed order.
                    sides[f"{model}_{side}"] = desensitised(rows.index_select(0, branch), shared, ld_alpha)
        tied = [flag for tree in self.trees for flag in [False] * len(tree.pairs) + [True] * (ties * len(tree.ties))]
        strengths = [
            torch.nan if tree.strength is None else tree.strength
            for tree in self.trees
            for _ in range(len(tree.pairs) + ties * len(tree.ties))
        ]
        return PairLogps(
            **sides,
            chosen_length=self.lengths[better],
            rejected_length=self.lengths[worse],
            tie=self._here(torch.tensor(tied, dtype=torch.bool)),
            strength=self._here(torch.tensor(strengths, dtype=torch.float32)),
            chosen_kl=kl[better],
            rejected_kl=kl[worse],
        )

    def pair_index(self, ties: bool = False) -> Int[Tensor, "pairs 2"]:
        """The two branches of each pair, the better one first."""
        pairs = [
            (first + i, first + j)
            for first, tree in self._first_branches()
            for i, j in chain(tree.pairs, tree.ties if ties else ())
        ]
        return self._here(torch.tensor(pairs, dtype=torch.long).view(-1, 2))

    def pair_certainty(self, ties: bool = False) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Mean certainty over the tokens of the chosen and of the rejected side of each pair (WPO)."""
        means = self._by_branch(self.certainty) / self.lengths.clamp(min=1)
        better, worse = self.pair_index(ties).unbind(1)
        return means[better], means[worse]

    def judged(self) -> JudgedLogps:
        """Every completion with a verdict, and the mismatched ones for a baseline."""
        verdicts = [(first + i, v) for first, tree in self._first_branches() for i, v in enumerate(tree.verdicts)]
        known = [(branch, verdict) for branch, verdict in verdicts if verdict is not None]
        others = [
            first + len(tree.branches) - 1 - i for first, tree in self._first_branches() for i in range(tree.mismatched)
        ]
        at, mismatched = (self._index(numbers) for numbers in ([branch for branch, _ in known], others))
        policy, reference = self._by_branch(self.policy), self._by_branch(self.reference)
        good = self._here(torch.tensor([verdict for _, verdict in known], dtype=torch.bool))
        return JudgedLogps(policy[at], reference[at], good, self.lengths[at], policy[mismatched], reference[mismatched])

    def ranked(self, ties: bool = False) -> RankedLogps:
        """Every ranked tree as one row; those of equals only on demand."""
        policy, reference = self._by_branch(self.policy), self._by_branch(self.reference)
        rows = [
            (self._index(range(first, first + len(tree.ranks))), self._here(torch.tensor(tree.ranks)))
            for first, tree in self._first_branches()
            if tree.pairs or (ties and tree.ranks)
        ]
        if not rows:
            empty = policy.new_empty((0, 0))
            return RankedLogps(empty, empty, empty, empty.long())
        return RankedLogps(
            pad_sequence([policy[at] for at, _ in rows], batch_first=True),
            pad_sequence([reference[at] for at, _ in rows], batch_first=True),
            pad_sequence([ranks.float() for _, ranks in rows], batch_first=True, padding_value=torch.inf),
            pad_sequence([self.lengths[at] for at, _ in rows], batch_first=True, padding_value=1),
        )

    def _first_branches(self) -> Iterator[tuple[int, TokenTree]]:
        starts = accumulate((len(tree.branches) for tree in self.trees), initial=0)
        return zip(starts, self.trees, strict=False)

    def _index(self, numbers: Sequence[int]) -> Int[Tensor, " n"]:
        return self._here(torch.tensor(numbers, dtype=torch.long))

    def _here(self, tensor: Tensor) -> Tensor:
        """The same where the log-probs are. Built from lists on the host: the host need not wait for the copy."""
        return tensor.to(self.policy.device, non_blocking=True)

    @cached_property
    def _counts(self) -> list[int]:
        """``lengths`` as the host knows them, without asking the device."""
        return [count for tree in self.trees for count in tree.counts]

    def _by_branch(self, tokens: Float[Tensor, " N"]) -> Float[Tensor, " S"]:
        numbers = torch.arange(len(self._counts)).repeat_interleave(torch.tensor(self._counts))
        return sum_by_branch(tokens, self._here(numbers), len(self._counts))

    def _padded(self, tokens: Float[Tensor, " N"]) -> Float[Tensor, "S longest"]:
        return pad_sequence(tokens.split(self._counts), batch_first=True)


PER_TOKEN = tuple(f.name for f in fields(TreeLogps) if f.name not in ("trees", "lengths"))
