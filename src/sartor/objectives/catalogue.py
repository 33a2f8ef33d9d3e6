"""The catalogue: every registered loss with what its docstring teaches and what was measured of it."""

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import entry_points

import numpy as np

from sartor.console import say
from sartor.errors import UserError
from sartor.objectives.contract import Loss
from sartor.objectives.objective import Term
from sartor.objectives.shape import Candidate, Likeness, Shape, fingerprint, is_bounded, nearest, shape
from sartor.objectives.specs import options_of, parse_objective

SECTIONS = ("Formula", "Use it", "Args", "Returns", "Examples", "References")
BETAS = tuple(np.geomspace(0.01, 10.0, 25).tolist())  # where the nearest other loss is sought
FAMILIES = {
    "pairs": "Pairwise",
    "free": "Pairwise, no reference",
    "tokens": "Token-level",
    "completions": "Pointwise",
    "rankings": "Listwise",
    "discovered": "Discovered",
}


@dataclass(frozen=True)
class Entry:
    """A loss as the catalogue shows it: its docstring by section, and its bound form."""

    term: Term
    loss: Loss
    summary: str
    idea: str
    sections: dict[str, str]

    @property
    def name(self) -> str:
        """As ``--loss`` knows it."""
        return self.term.name

    @property
    def family(self) -> str:
        """The heading it stands under."""
        traits = self.term.traits
        if ".discovered" in (self.loss.__module__ or ""):
            return FAMILIES["discovered"]
        if traits.kind != "pairs":
            return FAMILIES[traits.kind]
        if "chosen_kl" in traits.depends_on:
            return FAMILIES["tokens"]
        return FAMILIES["pairs" if traits.needs_reference else "free"]

    @property
    def needs(self) -> str:
        """What it has to know besides the policy's log-probs, in words."""
        fields = self.term.traits.depends_on
        words = {
            "reference": any("reference" in f for f in fields),
            "lengths": any("length" in f for f in fields),
            "KL at every token": "chosen_kl" in fields,
            "ties": "tie" in fields,
            "strengths": "strength" in fields,
            "mismatched pairs": "mismatched_policy" in fields,
            "whole batch": self.term.traits.whole_batch,
        }
        return ", ".join(word for word, needed in words.items() if needed) or "nothing"

    @property
    def options(self) -> dict[str, object]:
        """Its hyper-parameters as they stand: what was set, else their defaults."""
        set_here = self.term.loss.keywords if isinstance(self.term.loss, partial) else {}
        return {p.name: set_here.get(p.name, p.default) for p in options_of(self.loss)}

    @property
    def papers(self) -> list[str]:
        """Addresses of its papers."""
        return re.findall(r"https?://\S+", self.sections.get("References", ""))

    def properties(self) -> dict[str, str]:
        """What was measured, in words for a reader."""
        drawn = shape(self.term)
        likeness = nearest(self.term, candidates())
        return {
            "slope at zero": f"{drawn.slope:+.3g}{_start(drawn)}",
            "convex": "yes" if drawn.convex else "no",
            "bounded": "yes" if is_bounded(self.term) else "no",
            "lowers the margin": _rises(drawn),
            "needs": self.needs,
            "nearest other": str(likeness) + _same(likeness),
        }


def _start(drawn: Shape) -> str:
    return "" if drawn.slope <= 0 else " (training starts by lowering the margin)"


def _rises(drawn: Shape) -> str:
    first, last = drawn.margin[[0, -1]]
    words = []
    for low, high in drawn.rises:
        if (low, high) == (first, last):
            words.append("everywhere")
        elif low == first:
            words.append(f"below {high:.3g} nats")
        elif high == last:
            words.append(f"above {low:.3g} nats")
        else:
            words.append(f"between {low:.3g} and {high:.3g} nats")
    return " and ".join(words) or "never"


def _same(likeness: Likeness) -> str:
    return " (trains alike, up to the learning rate)" if likeness.cosine > 0.999 else ""


def entry(spec: str | Loss, beta: float | None = None) -> Entry:
    """The catalogue's entry of ``NAME[,OPTION=VALUE]``, ``file.py:function`` or a function.

    Raises:
        UserError: a loss that is not known or breaks its contract.
    """
    term = parse_objective([spec], beta).terms[0]
    loss = term.loss.func if isinstance(term.loss, partial) else term.loss
    summary, idea, sections = _read(inspect.getdoc(loss) or "")
    return Entry(term, loss, summary, idea, sections)


@cache
def catalogue() -> tuple[Entry, ...]:
    """Every registered loss, by family and name; one of an outside package that is broken is named and left out."""
    entries = []
    for name in sorted({point.name for point in entry_points(group="sartor.losses")}):
        try:
            entries.append(entry(name))
        except (UserError, ImportError, AttributeError) as error:
            say(f"note    loss {name} is left out: {error}")
    order = list(FAMILIES.values())
    return tuple(sorted(entries, key=lambda e: (order.index(e.family), e.name != "dpo", e.name)))


@cache
def candidates() -> tuple[Candidate, ...]:
    """Every registered loss at many β, where it has one: what a loss is compared with."""
    return tuple(Candidate(term, fingerprint(term)) for e in catalogue() for term in _at_many_betas(e.term))


def _at_many_betas(term: Term) -> Iterable[Term]:
    if term.beta is None:
        return [term]
    return [replace(term, loss=partial(term.loss, beta=beta), beta=beta) for beta in (term.beta, *BETAS)]


def _read(doc: str) -> tuple[str, str, dict[str, str]]:
    """A docstring's first line, the text under it, and its sections."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", doc, flags=re.M)
    summary, _, idea = parts[0].strip().partition("\n")
    sections = {name: inspect.cleandoc(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    return summary, _flow(idea), sections | {"Use it": _flow(sections.get("Use it", ""))}


def _flow(text: str) -> str:
    """Paragraphs without the line breaks of the source."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))
