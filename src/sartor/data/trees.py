"""Token trees, packed flat: the one batch that every algorithm trains on.

A tree is a prompt with K branches (completions). A batch holds whole trees one after the other with no padding::

    ids        p p p p c c c r r | p p p c c r r r r      [T]
    positions  0 1 2 3 4 5 6 4 5 | 0 1 2 3 4 3 4 5 6      [T]   every branch goes on where its prompt ends

so that each linear layer sees a prompt once for all its branches. Only attention has to know the tree
(``sartor.model.tree_attention``). The prompt's last token predicts the first token of *every* branch: ``source`` names,
for each completion token, the row that predicts it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenTree:
    """One prompt's token ids with those of its branches, and what people said of them.

    ``ranks`` are the branches' places, 1 the best, equal for ties, for comparisons and rankings; ``good`` is a verdict
    on each for judged completions; ``strength`` is by how much the first was preferred to the second. The last
    ``mismatched`` branches answer some other prompt: KTO measures its baseline on them, and nobody judged them.
    ``unscored`` are places in the branches that are context and not learned: the user's turns of a conversation.
    """

    prompt: TokenIds
    branches: tuple[TokenIds, ...]
    ranks: tuple[float, ...] = ()
    good: tuple[bool, ...] = ()
    strength: float | None = None
    mismatched: int = 0
    unscored: frozenset[int] = frozenset()

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Every (better, worse) pair of branches."""
        places = range(len(self.ranks))
        return tuple((i, j) for i in places for j in places if self.ranks[i] < self.ranks[j])

    @property
    def ties(self) -> tuple[tuple[int, int], ...]:
        """Every pair of branches that share a place."""
        places = range(len(self.ranks))
        return tuple((i, j) for i in places for j in places if i < j and self.ranks[i] == self.ranks[j])

    @property
    def verdicts(self) -> tuple[bool | None, ...]:
        """Good, bad or neither, for each branch that was judged or ranked: of a ranking the best are good, the worst
        bad, and nothing follows for those between them."""
        if self.good or len(set(self.ranks)) < 2:
            return self.good
        best, worst = min(self.ranks), max(self.ranks)
        return tuple({best: True, worst: False}.get(rank) for rank in self.ranks)

    def scored(self, branch: TokenIds) -> Sequence[int]:
        """Places in a branch whose tokens are predicted; without a prompt nothing predicts the first one."""
        places = range(int(not self.prompt), len(branch))
        return [place for place in places if place not in self.unscored] if self.unscored else places

    @property
    def counts(self) -> list[int]:
        """Scored tokens of each branch."""
        return [len(self.scored(branch)) for branch in self.branches]

    @property
    def size(self) -> int:
        """Tokens that a forward pass computes: the prompt once."""
        return len(self.prompt) + sum(map(len, self.branches))

    @property
    def repeated_size(self) -> int:
        """Tokens where the prompt has to be repeated for each branch, as padded rows."""
        return len(self.branches) * (len(self.prompt) + max(map(len, self.branches), default=0))


@dataclass(frozen=True)
class TreeBatch:
    """Trees packed flat. T tokens, N scored completion tokens, S branches.

    ``bounds`` holds one tuple per tree of offsets into the flat sequence: start, end of the prompt, end of each branch.
    A branch without a prompt has nothing that predicts its first token, so that token is context and is not scored.
    """

    ids: Int[Tensor, " T"]
    positions: Int[Tensor, " T"]
    bounds: tuple[tuple[int, ...], ...]
    source: Int[Tensor, " N"]
    target: Int[Tensor, " N"]
    branch: Int[Tensor, " N"]
    lengths: Int[Tensor, " S"]
    trees: tuple[TokenTree, ...] = field(repr=False)

    def to(self, device: torch.device | str) -> "TreeBatch":
        """The same batch with its tensors on ``device``."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        values |= {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return TreeBatch(**values)

    @cached_property
    def branch_of_token(self) -> Int[Tensor, " T"]:
        """Which branch of its tree each flat token belongs to: 0 is the prompt, k the k-th branch."""
        runs = [np.diff(b) for b in self.bounds]
        numbers = [np.repeat(np.arange(len(run)), run) for run in runs]
        return torch.from_numpy(np.concatenate(numbers)).to(self.ids.device, non_blocking=True)


def pack(trees: Sequence[TokenTree]) -> TreeBatch:
    """Pack whole trees into one flat batch.

    >>> batch = pack([TokenTree((5, 6), ((7, 8), (9,)))])
    >>> batch.positions.tolist(), batch.source.tolist(), batch.target.tolist(), batch.branch.tolist()
    ([0, 1, 2, 3, 2], [1, 2, 1], [7, 8, 9], [0, 0, 1])
    """
    ids: list[int] = []
    positions: list[int] = []
    source: list[int] = []
    target: list[int] = []
    branch: list[int] = []
    bounds: list[tuple[int, ...]] = []
    lengths: list[int] = []
    for tree in trees:
        start, prompt = len(ids), len(tree.prompt)
        ids += tree.prompt
        positions += range(prompt)
        bound = [start, len(ids)]
        for tokens in tree.branches:
            offset = len(ids)
            ids += tokens
            positions += range(prompt, prompt + len(tokens))
            places = tree.scored(tokens)
            source += [offset + i - 1 if i else bound[1] - 1 for i in places]
            target += [tokens[i] for i in places]
            branch += [len(lengths)] * len(places)
            lengths.append(len(places))
            bound.append(len(ids))
        bounds.append(tuple(bound))
    as_tensor = lambda values: torch.tensor(values, dtype=torch.long)  # noqa: E731
    return TreeBatch(
        ids=as_tensor(ids),
        positions=as_tensor(positions),
        bounds=tuple(bounds),
        source=as_tensor(source),
        target=as_tensor(target),
        branch=as_tensor(branch),
        lengths=as_tensor(lengths),
        trees=tuple(trees),
    )


def split_by_budget(sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Cut indices 0..n-1 into micro-batches of at most ``budget`` tokens, longest first.

    Trees of like length share a micro-batch, and the order depends on the sizes alone. One tree larger than the budget
    gets a micro-batch of its own: it is never cut.

    >>> list(split_by_budget([30, 80, 20, 50], budget=100))
    [[1], [3, 0, 2]]
    """
    group: list[int] = []
    total = 0
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if group and total + sizes[index] > budget:
            yield group
            group, total = [], 0
        group.append(index)
        total += sizes[index]
    if group:
        yield group
