"""Reference log-probs: per token, computed once per content, kept on disk.

A value is keyed by everything it depends on and nothing else: the fingerprint of the weights and the token ids of the
tree. Changing β, the loss or the learning rate finds it again; changing the model, the template or the truncation does
not. Shards are written whole under names of their own, so a killed run keeps what it had and two may write at once.
"""

import hashlib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from sartor.data.trees import TokenTree, pack, split_by_budget
from sartor.model.forward import token_logps
from sartor.model.load import LanguageModel, fingerprint
from sartor.model.resolve import cache_folder

Key = bytes
Values = NDArray[np.float32]
SHARD_TOKENS = 100_000  # written every so many tokens: what a kill may cost


def key_of(tree: TokenTree) -> Key:
    """Content hash of a tree's token ids."""
    digest = hashlib.blake2b(digest_size=16)
    for tokens in (tree.prompt, *tree.branches):
        digest.update(np.asarray((len(tokens), *tokens), dtype=np.int64).tobytes())
    return digest.digest()


def read_shard(path: Path) -> dict[Key, Values]:
    """The per-token values in one shard, by key."""
    shard = load_file(path)
    ends = shard["ends"]
    parts = np.split(shard["values"], ends[:-1])
    return {row.tobytes(): part for row, part in zip(shard["keys"], parts, strict=True)}


def write_shard(path: Path, entries: Mapping[Key, Values]) -> None:
    """Write one shard whole or not at all."""
    keys = np.stack([np.frombuffer(key, dtype=np.uint8) for key in entries])
    ends = np.cumsum([len(values) for values in entries.values()])
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    save_file({"keys": keys, "ends": ends, "values": np.concatenate([*entries.values()])}, scratch)
    scratch.rename(path)


def folder_of(weights: str) -> Path:
    """Where the reference log-probs of a model are kept, by the fingerprint of its weights."""
    return cache_folder() / "reference" / weights


def not_cached(folder: Path, trees: Sequence[TokenTree]) -> list[TokenTree]:
    """The trees whose reference log-probs would have to be computed."""
    known = {key for key, _ in _read(folder)}
    return [tree for tree in trees if key_of(tree) not in known]


@torch.no_grad()
def reference_logps(
    model: LanguageModel,
    trees: Sequence[TokenTree],
    *,
    token_budget: int,
    folder: Path | None = None,
    progress: Callable[[int], None] = lambda trees: None,
) -> list[Tensor]:
    """Per-token log-probs of every tree's completions under ``model``, from the cache or computed now.

    Args:
        model: the reference; an adapter on it is switched off.
        trees: whose completions to score; values come in the order of ``pack``: branch after branch.
        token_budget: tokens per forward pass.
        folder: where the shards are; by default the user's cache, under the fingerprint of the weights.
        progress: called with the number of trees that a batch finished.
    """
    folder = folder or folder_of(fingerprint(model))
    keys = [key_of(tree) for tree in trees]
    wanted = set(keys)
    known = {key: values for key, values in _read(folder) if key in wanted}
    fresh: dict[Key, Values] = {}
    # Batches are planned over all trees, known ones too: a run killed here finds the same batches again, and so the
    # same bits, however far it had come.
    for group in split_by_budget([tree.size for tree in trees], token_budget):
        missing = [i for i in group if keys[i] not in known]
        if missing:
            scored = score_trees(model, [trees[i] for i in missing], adapter=False)
            for i, values in zip(missing, scored, strict=True):
                known[keys[i]] = fresh[keys[i]] = values.cpu().numpy()
            if sum(map(len, fresh.values())) >= SHARD_TOKENS:
                write_shard(folder / f"{uuid.uuid4().hex}.safetensors", fresh)
                fresh = {}
        progress(len(group))
    if fresh:
        write_shard(folder / f"{uuid.uuid4().hex}.safetensors", fresh)
    return [torch.from_numpy(known[key]) for key in keys]


@torch.no_grad()
def score_trees(model: LanguageModel, trees: Sequence[TokenTree], adapter: bool = True) -> list[Tensor]:
    """Per-token log-probs of each tree in one forward pass, with the adapter or without."""
    batch = pack(trees).to(model.device)
    with nullcontext() if adapter else model.without_adapter():
        values = token_logps(model, batch)
    return list(values.split([sum(tree.counts) for tree in trees]))


def _read(folder: Path) -> Iterable[tuple[Key, Values]]:
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(SafetensorError, OSError, KeyError, ValueError):  # a damaged shard is computed again
            yield from read_shard(path).items()
