"""The words for a language model: the language of objectives, some that were trained, what failed, and the question."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from sartor.discover.language.expression import INPUTS, LARGEST_CONSTANT, MOST_NODES, Expression
from sartor.discover.language.known import KNOWN
from sartor.discover.language.operators import NUMBER, OPERATORS, TRUTH, Operator
from sartor.discover.language.parse import LONGEST
from sartor.discover.language.printing import to_python
from sartor.discover.language.program import DIFFERENCES
from sartor.discover.propose.parents import pick
from sartor.discover.propose.proposal import Failure, Member, Population
from sartor.discover.screens import in_words
from sartor.types import Message

PARENTS, FAILURES = 4, 6  # that are shown
PICKS = 3 * PARENTS  # the same one is often picked again
LONGEST_FAILURE, LONGEST_WHY = 200, 300  # characters

FRAME = """\
You invent objectives for training language models on preferences. Each pair is a prompt with a chosen and a rejected \
answer. Training lowers the mean of your objective over the pairs, by the gradient through the policy's log-probs alone.

An objective is one expression, or lines of `name = expression` and a last line `return expression`. It is parsed and \
never executed, and nothing exists but what is listed here: no imports, loops, conditions with `if:`, keywords, indices.

Inputs, one number for each pair. Log-probs are sums over an answer's tokens in nats: often -20 to -1000.
{inputs}

Operators, each on one pair at a time unless it says batch. All are finite, with finite gradients, wherever their \
arguments are: divisions, logarithms and roots are guarded.
{operators}

Limits: {nodes} nodes, {characters:,} characters, constants from -{constant:,.0f} to {constant:,.0f}.
Give one value for each pair: the mean over the batch is taken afterwards. Not every input has to be used. A factor \
before the whole, or another beta, is no new objective."""

ANSWER = """\
Propose {count} new objectives, each from an idea of its own, unlike those above and unlike each other. Say in the \
thought what it does to the gradient and why that should help.
Answer with a JSON list and nothing else, in this form:
[{{"name": "short_name", "thought": "one or two sentences", "code": "{example}"}}]"""


def question(population: Population, parents: Sequence[Member], count: int) -> tuple[Message, ...]:
    """What the model is asked: the language, the parents with their scores and shapes, what failed, ``count`` new."""
    parts = [_parents(population, parents) if parents else "", _failures(population.failures)]
    parts.append(ANSWER.format(count=count, example=KNOWN["dpo"]))
    return Message("system", language()), Message("user", "\n\n".join(filter(None, parts)))


def language() -> str:
    """The language of objectives, said for somebody who is to write in it."""
    return FRAME.format(
        inputs="\n".join(f"- {name}: {_meaning(name)}" for name in INPUTS),
        operators="\n".join(f"- {_written(operator)}" for operator in OPERATORS.values()),
        nodes=MOST_NODES,
        characters=LONGEST,
        constant=LARGEST_CONSTANT,
    )


def drawn_parents(population: Population, draw: np.random.Generator) -> list[Member]:
    """Some members to build on, best first; of as many islands as were met, since unlike parents say more together."""
    picked = dict.fromkeys(filter(None, (pick(population, draw) for _ in range(PICKS))))
    firsts = {member.island: member for member in reversed(picked)}
    chosen = list(dict.fromkeys([*reversed(firsts.values()), *picked]))[:PARENTS]
    return sorted(chosen, key=population.members.index)


def _meaning(name: str) -> str:
    if name not in DIFFERENCES:
        return INPUTS[name]
    return f"{INPUTS[name]} = {' - '.join(DIFFERENCES[name])}"


def _written(operator: Operator) -> str:
    """As in ``square(a): \\left(a\\right)^2`` and ``a > b (a truth, for where)``."""
    numbers = iter("abc")
    names = [next(numbers) if kind == NUMBER else "truth" for kind in operator.takes]
    pattern = operator.python or f"{operator.name}({', '.join(f'{{{i}}}' for i in range(len(names)))})"
    gives = " (a truth, for where)" if operator.gives == TRUTH else ""
    meaning = "" if operator.binds else f": {operator.latex.format(*names)}"
    return pattern.format(*names) + meaning + gives


def _parents(population: Population, parents: Sequence[Member]) -> str:
    places = {member.number: place for place, member in enumerate(population.members, start=1)}
    lines = [
        f"{len(population.members)} objectives were trained so far, and ranked, 1 being the best. Some of them:",
        f"(A score is a mean with its 95 % interval, in {population.unit}; overlapping intervals are not told apart.)",
    ]
    for member in parents:
        rank = f"rank {places[member.number]} of {len(population.members)}"
        lines += [
            f"\n{member.name} ({rank}, island {member.island}, trained as far as {member.rung})",
            f"score: {member.score}, n = {member.score.n}",
        ]
        lines += [f"likeness: {member.likeness}"] if member.likeness else []
        lines.append(_objective(member.tree, population.beta))
    return "\n".join(lines)


@lru_cache(maxsize=512)  # good parents are shown again and again, and a shape over batches takes a second
def _objective(tree: Expression, beta: float) -> str:
    return f"shape at beta {beta:g}: {'; '.join(in_words(tree, beta))}\ncode: {to_python(tree)}"


def _failures(failures: Sequence[Failure]) -> str:
    """The newest, one for each reason."""
    newest: dict[str, str] = {}
    for failure in reversed(failures):
        newest.setdefault(failure.why, failure.text)
    lines = [
        f"- {_short(text, LONGEST_FAILURE)}\n  refused: {_short(why, LONGEST_WHY)}"
        for why, text in list(newest.items())[:FAILURES]
    ]
    return "\n".join(["These were refused; avoid what they have done:", *lines]) if lines else ""


def _short(text: str, longest: int) -> str:
    """On one line, so that a model's own words stay where they are told as such."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"
