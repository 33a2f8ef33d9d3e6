"""What every objective has to hold to, tried out on arrival, and what it depends on, found the same way.

Nothing is declared: an objective is a function, its first argument's type says whether it sees pairs, verdicts or
rankings, and the rest is measured. A field whose ruin changes neither a loss nor a gradient is not needed, and so need
not be computed: that is how an objective runs without a reference model.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import product

import torch
from torch import Tensor

from sartor.errors import UserError
from sartor.types import JudgedLogps, PairLogps, RankedLogps

Loss = Callable[..., Tensor]
Inputs = PairLogps | JudgedLogps | RankedLogps
KINDS: dict[str, type[Inputs]] = {"pairs": PairLogps, "completions": JudgedLogps, "rankings": RankedLogps}
STRESS = (0.0, -1.0, -50.0, -1000.0, -10_000.0)  # nats: from certain to a long text that the model finds absurd
SIZES = (1, 2, 64)
SCALES = (1.0, 0.1, 0.001)  # of the log-ratios: in the middle of training, early, and at its start


@dataclass(frozen=True)
class Traits:
    """What was found out about an objective: its kind of input, the fields it depends on, whether one entry's loss
    depends on the others, and whether a tie has something to say to it."""

    kind: str
    depends_on: frozenset[str]
    whole_batch: bool
    reads_ties: bool

    @property
    def needs_reference(self) -> bool:
        """Whether it has to know what the reference model says."""
        return any("reference" in name for name in self.depends_on)


def examine(name: str, loss: Loss) -> Traits:
    """Put an objective through its contract and find out what it depends on.

    Args:
        name: what to call it in errors.
        loss: from ``PairLogps``, ``JudgedLogps`` or ``RankedLogps`` to one loss per pair, completion or ranking.

    Raises:
        UserError: which property failed, and at which input.
    """
    kind = kind_of(loss)
    for size in SIZES:
        for batch in stress(kind, size):
            _require_finite(name, loss, batch)
    batch = moderate(kind, 12)
    losses, gradients = evaluate(name, loss, batch)
    if not any(bool(gradient.any()) for gradient in gradients.values()):
        raise UserError(f"loss {name}: its gradient is zero everywhere, so nothing would be learnt")
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(1))
    permuted, others = evaluate(name, loss, take(batch, order))
    moved = {"loss": (losses, permuted), **{f"gradient by {k}": (g, others[k]) for k, g in gradients.items()}}
    for what, (ours, theirs) in moved.items():
        if not torch.allclose(ours[order], theirs, rtol=1e-4, atol=1e-6):
            raise UserError(f"loss {name}: the order of the batch changes its {what}; it must not matter")
    if kind == "rankings":
        _require_padding_ignored(name, loss, batch)
    # At the start of training all log-ratios are 0, and what tells there may be saturated later: look at both.
    scaled = [moderate(kind, 12, scale) for scale in SCALES]
    depends_on = frozenset(field for batch in scaled for field in _dependencies(name, loss, batch))
    # A baseline from mismatched completions is one number for the whole batch.
    mixes = "mismatched_policy" in depends_on or any(_mixes(name, loss, batch) for batch in scaled)
    return Traits(kind, depends_on, mixes, "tie" in depends_on or _moved_by_a_tie(name, loss, kind))


def kind_of(loss: Loss) -> str:
    """What an objective sees, by the annotation of its first argument; pairs where there is none."""
    try:
        # torch hides the signature of a module's forward behind its own __call__.
        written = loss.forward if isinstance(loss, torch.nn.Module) else loss
        parameters = list(inspect.signature(written).parameters.values())
    except (TypeError, ValueError) as error:
        raise UserError(f"loss {loss!r}: wanted a function of PairLogps, JudgedLogps or RankedLogps") from error
    annotation = parameters[0].annotation if parameters else None
    written_name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    found = [kind for kind, noun in KINDS.items() if written_name.split(".")[-1] == noun.__name__]
    return found[0] if found else "pairs"


def evaluate(name: str, loss: Loss, batch: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses, and the gradient of their sum by each log-prob of the policy: the weights that training multiplies with.

    Raises:
        UserError: the objective fails, or does not return one number per entry.
    """
    leaves = {
        f.name: getattr(batch, f.name).detach().clone().requires_grad_()
        for f in fields(batch)
        if f.name.startswith("policy") or f.name.endswith("_kl")
    }
    losses = call(name, loss, _with(batch, leaves))
    if losses.requires_grad:
        losses.sum().backward()
    return losses.detach(), {
        field: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for field, leaf in leaves.items()
    }


def call(name: str, loss: Loss, batch: Inputs) -> Tensor:
    """The objective's losses, one per entry of the batch.

    Raises:
        UserError: the objective fails, or returns something else.
    """
    wanted = len(rows_of(batch))
    try:
        with warnings.catch_warnings():  # of a spread over one pair, say: what comes of it is checked, and told once
            warnings.simplefilter("ignore", UserWarning)
            losses = loss(batch)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"loss {name} failed on a batch of {wanted}: {text}{_hint(error, batch)}") from error
    if not isinstance(losses, Tensor) or losses.shape != (wanted,):
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        what = kind_of(loss).removesuffix("s")
        way_out = ""
        if isinstance(losses, Tensor):
            way_out = "; leave the mean out, it is taken over the whole batch" * (losses.ndim == 0)
        raise UserError(f"loss {name}: wanted a tensor of shape ({wanted},), one number per {what}, got {got}{way_out}")
    return losses


def _hint(error: Exception, batch: Inputs) -> str:
    """The way out of the usual slips."""
    if isinstance(error, AttributeError) and type(batch).__name__ in str(error):
        known = [f.name for f in fields(batch)] + [n for n, v in vars(type(batch)).items() if isinstance(v, property)]
        return f"; it has {', '.join(known)}"
    if "numpy()" in str(error):
        return "; a loss must stay in torch, for its gradient"
    return ""


def _with(batch: Inputs, values: dict[str, Tensor]) -> Inputs:
    return type(batch)(**{**{f.name: getattr(batch, f.name) for f in fields(batch)}, **values})


def rows_of(batch: Inputs) -> Tensor:
    """A tensor with one row per entry of the batch."""
    return batch.policy_chosen if isinstance(batch, PairLogps) else batch.policy


def take(batch: Inputs, index: Tensor) -> Inputs:
    """Some entries of a batch; mismatched completions belong to all of them."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return type(batch)(**{k: v if k.startswith("mismatched") else v[index] for k, v in values.items()})


def moderate(kind: str, n: int, scale: float = 1.0) -> Inputs:
    """A batch as training sees it: log-ratios of ``scale`` times a few nats, unlike lengths, some ties."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    length = lambda *shape: torch.randint(5, 60, shape, generator=generator)  # noqa: E731
    if kind == "rankings":
        rank = torch.arange(1.0, 5.0).repeat(n, 1)
        rank[::3, 2] = rank[::3, 1]
        reference = -40 + 5 * normal(n, 4)
        return RankedLogps(reference + scale * 2 * normal(n, 4), reference, rank, length(n, 4))
    reference = -40 + 5 * normal(2, n)
    policy = reference + scale * 2 * normal(2, n)
    if kind == "completions":
        other = -60 + 5 * normal(n)
        good = torch.arange(n) % 2 == 0
        return JudgedLogps(policy[0], reference[0], good, length(n), other + scale * (0.5 + normal(n).abs()), other)
    lengths = length(2, n)
    return PairLogps(
        policy[0],
        policy[1],
        reference[0],
        reference[1],
        lengths[0],
        lengths[1],
        tie=torch.arange(n) % 3 == 2,
        strength=0.5 + normal(n).abs(),
        chosen_kl=normal(n).abs(),
        rejected_kl=normal(n).abs(),
    )


def stress(kind: str, n: int) -> Iterator[Inputs]:
    """Batches of ``n`` entries that together hold every combination of the extremes, in an order fixed by a seed."""
    sides = 4 if kind == "pairs" else 2
    grid = torch.tensor(list(product(STRESS, repeat=sides)))
    order = torch.randperm(len(grid), generator=torch.Generator().manual_seed(n))
    lengths = torch.tensor([1, 2, 60, 5000])
    # One entry a time costs a call each: a sample of the grid stands for all of it there.
    for start in range(0, len(grid) if n > 2 else 64, n):
        at = order[torch.arange(start, start + n) % len(grid)]
        logps, number = grid[at].T, torch.arange(start, start + n)
        length = lengths[number % 4]
        if kind == "rankings":
            lists = torch.stack([logps.roll(shift, 1) for shift in range(3)], -1)
            rank = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 2.0], [1.0, 2.0, torch.inf]])[number % 3]
            there = torch.isfinite(rank)
            yield RankedLogps(lists[0] * there, lists[1] * there, rank, torch.where(there, length[:, None], 1))
        elif kind == "completions":
            yield JudgedLogps(logps[0], logps[1], number % 3 != 0, length, logps[1], logps[0])
        else:
            strength = torch.tensor([torch.nan, 0.0, 1.0, 100.0])[number % 4]
            kl = -logps / 10
            yield PairLogps(
                logps[0],
                logps[1],
                logps[2],
                logps[3],
                length,
                lengths[number % 3],
                number % 5 == 4,
                strength,
                kl[0],
                kl[1],
            )


def _require_finite(name: str, loss: Loss, batch: Inputs) -> None:
    losses, gradients = evaluate(name, loss, batch)
    for what, values in {"its value": losses, **{f"its gradient by {k}": v for k, v in gradients.items()}}.items():
        odd = ~torch.isfinite(values.view(len(losses), -1)).all(1)
        if odd.any():
            at = int(odd.nonzero()[0])
            logps = [f.name for f in fields(batch) if f.name.startswith(("policy", "reference"))]
            entry = ", ".join(f"{field} {getattr(batch, field)[at].tolist()}" for field in logps)
            raise UserError(
                f"loss {name}: {what} is {values[at].tolist()} in a batch of {len(losses)} where {entry}; wanted "
                "finite values and gradients for log-probs from 0 to -10,000, in batches from 1 on (logsigmoid, "
                "softplus or a clamp may help)"
            )


def _dependencies(name: str, loss: Loss, batch: Inputs) -> Iterator[str]:
    for f in fields(batch):
        if f.name.startswith("policy") or f.name in ("good", "rank"):
            continue
        value = getattr(batch, f.name)
        if value.is_floating_point():
            ruined = torch.full_like(value, torch.nan)
        else:
            ruined = ~value if value.dtype == torch.bool else 2 * value + 1
        if not _same(name, loss, batch, _with(batch, {f.name: ruined})):
            yield f.name


def _same(name: str, loss: Loss, one: Inputs, two: Inputs) -> bool:
    (losses, gradients), (others, other_gradients) = evaluate(name, loss, one), evaluate(name, loss, two)
    return torch.equal(losses, others) and all(torch.equal(gradients[k], other_gradients[k]) for k in gradients)


def _mixes(name: str, loss: Loss, batch: Inputs) -> bool:
    """Whether a part of the batch fares otherwise alone than in company: in fp64, where rounding is no excuse."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    wide = _with(batch, {k: v.double() for k, v in values.items() if v.is_floating_point()})
    rtol, atol = 1e-6, 1e-9
    try:
        losses, gradients = evaluate(name, loss, wide)
    except UserError:  # weights of its own in fp32, say: it has met its contract there
        wide, rtol, atol = batch, 1e-4, 1e-6
        losses, gradients = evaluate(name, loss, wide)
    for part in (torch.arange(6), torch.arange(6, 12), torch.tensor([0, 3])):
        alone, alone_gradients = evaluate(name, loss, take(wide, part))
        both = [(losses[part], alone), *((gradients[field][part], alone_gradients[field]) for field in gradients)]
        if not all(torch.allclose(whole, one, rtol=rtol, atol=atol) for whole, one in both):
            return True
    return False


def _moved_by_a_tie(name: str, loss: Loss, kind: str) -> bool:
    """Whether a list of equals has a gradient."""
    if kind != "rankings":
        return False
    batch = moderate(kind, 4)
    _, gradients = evaluate(name, loss, _with(batch, {"rank": torch.ones_like(rows_of(batch))}))
    return bool(gradients["policy"].any())


def _require_padding_ignored(name: str, loss: Loss, batch: Inputs) -> None:
    """Lists are padded to the longest of their batch, which is another in every batch."""
    width = {"policy": 0.0, "reference": 0.0, "rank": torch.inf, "length": 1}
    padded = _with(batch, {k: torch.nn.functional.pad(getattr(batch, k), (0, 1), value=v) for k, v in width.items()})
    (losses, gradients), (wider, others) = evaluate(name, loss, batch), evaluate(name, loss, padded)
    same = torch.allclose(losses, wider, rtol=1e-4, atol=1e-6)
    if not same or not torch.allclose(gradients["policy"], others["policy"][:, :-1], rtol=1e-4, atol=1e-6):
        raise UserError(f"loss {name}: padding changes it; leave out what ranked.present says is not there")
