"""A found objective as a loss file like any other: ready for ``--loss FILE:NAME``, with where it came from in it."""

import re
import textwrap

from sartor.discover.archive import Candidate
from sartor.discover.language.expression import CONSTANT, INPUTS, Expression
from sartor.discover.language.printing import to_python, to_torch
from sartor.discover.language.program import stabilised
from sartor.discover.rungs.outcome import Setting

STABLE = ("guarded_div", "guarded_log", "guarded_sqrt", "log1mexp", "tangent_exp", "tangent_expm1")
FILE = '''"""{title}: an objective that `sartor discover` found."""

{imports}


def {name}(pair: PairLogps, *, beta: float = {beta}) -> Float[Tensor, " pairs"]:
    """{title}, found by search: {origin}.

    Formula:
{formula}

    Use it:
{advice}

    Args:
        pair: log-probabilities of the four sides, and lengths. Statistics are over all pairs given.
        beta: β; the default is the one that the search chose, with learning rate {rate:g}.

    Returns:
        Loss per pair.
    """
    return {expression}
'''


def loss_name(candidate: Candidate) -> str:
    """A name that Python takes."""
    cleaned = re.sub(r"\W+", "_", candidate.name.lower()).strip("_")
    return cleaned if cleaned and not cleaned[0].isdigit() else f"found_{candidate.number}"


def is_one_number(tree: Expression) -> bool:
    """Whether it is a single number for the whole batch, as statistics, constants and β are, and not one for each pair.

    >>> from sartor.discover.language.parse import parse
    >>> is_one_number(parse("softplus(-mean(beta * margin))")), is_one_number(parse("softplus(-margin) + mean(margin)"))
    (True, False)
    """
    if tree.op in INPUTS:
        return tree.op == "beta"
    return tree.op == CONSTANT or tree.op.startswith("batch_") or all(map(is_one_number, tree.args))


def loss_source(candidate: Candidate, setting: Setting, advice: str) -> str:
    """The file's text.

    Args:
        candidate: with a tree.
        setting: β and learning rate that it was trained at.
        advice: what is known of it, in a sentence or two.
    """
    tree = candidate.tree
    assert tree is not None
    expression = to_torch(stabilised(tree))
    if is_one_number(stabilised(tree)):
        expression = f"{expression} + torch.zeros_like(pair.policy_chosen)"
    needed = [name for name in STABLE if f"{name}(" in expression]
    imports = [
        *(["import torch"] if "torch." in expression else []),
        *(["import torch.nn.functional as F"] if "F." in expression else []),
        "from jaxtyping import Float",
        "from torch import Tensor",
        "",
        *([f"from sartor.losses.stable import {', '.join(needed)}"] if needed else []),
        "from sartor.types import PairLogps",
    ]
    origin = f"candidate {candidate.number}, {candidate.origin}" + (
        f" of {', '.join(map(str, candidate.parents))}" if candidate.parents else ""
    )
    return FILE.format(
        title=loss_name(candidate),
        imports="\n".join(imports),
        name=loss_name(candidate),
        beta=float(setting.beta),
        rate=setting.learning_rate,
        origin=origin,
        formula=textwrap.indent(textwrap.fill(to_python(tree), 104, break_long_words=False), " " * 8),
        advice=textwrap.indent(textwrap.fill(advice, 104), " " * 8),
        expression=expression,
    )
