"""From ``--loss dpo:1.0 sft:0.1`` to an objective: names, weights and options, and help for names from elsewhere."""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sartor import plugins
from sartor.errors import UserError, unknown
from sartor.objectives.contract import Loss, examine
from sartor.objectives.objective import Objective, Term

SPEC = re.compile(r"(?P<name>[^:,]*\.py(?::\w*)?|[^:,]+)(?::(?P<weight>[^,]*))?(?:,(?P<options>.*))?")
BETA = 0.1  # for a loss that asks for β and has no default of its own
# What these are called elsewhere, TRL above all.
ELSEWHERE = {
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo_norm",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "sppo_hard": "sppo",
    "aot_pair": "aot",
    "discopop": "lrml",
    "slic": "hinge",
    "rso": "hinge",
    "odpo": "dpo_margin",
    "smaug": "dpop",
    "nll": "sft",
    "rpo": "dpo sft:1 (two losses)",
    "f_dpo": "dpo_forward_kl, dpo_js or dpo_alpha",
    "wpo": "--wpo (it weighs any pairwise loss)",
    "ld_dpo": "--ld-alpha 0.5 (it weighs any pairwise loss)",
}


def parse_objective(
    specs: Sequence[str | Loss], beta: float | None = None, wpo: bool = False, ld_alpha: float | None = None
) -> Objective:
    """The objective that ``--loss`` names: each ``NAME[:WEIGHT][,OPTION=VALUE ...]``, or a function.

    Args:
        specs: names of registered losses or ``file.py:function``, with weight and options, or functions.
        beta: for every loss that has a β and is not given one by its own options.
        wpo: weigh pairs by WPO.
        ld_alpha: weigh tokens beyond the shared length.

    Raises:
        UserError: a name, weight or option that is not known, or a loss that breaks its contract.
    """
    terms = tuple(_term(spec, beta) for spec in specs)
    if not any(term.weight > 0 for term in terms):
        raise UserError("--loss: wanted at least one objective with a weight above 0")
    if beta is not None and all(term.beta is None for term in terms):
        raise UserError(f"--beta {beta:g}: {' and '.join(term.name for term in terms)} has no β; leave it out")
    others = [term.name for term in terms if term.traits.kind != "pairs"]
    if others and (wpo or ld_alpha is not None):
        raise UserError(f"--{'wpo' if wpo else 'ld-alpha'} acts on pairwise losses, and {others[0]} is none")
    return Objective(terms, wpo, ld_alpha)


def name_of(loss: Loss) -> str:
    """What a function, a partial one or an object with ``__call__`` is called."""
    written = getattr(loss, "func", loss)
    return getattr(written, "__name__", type(written).__name__)


def options_of(loss: Loss) -> list[inspect.Parameter]:
    """What can be set of a loss: everything after its first argument."""
    return list(inspect.signature(loss).parameters.values())[1:]


def _term(spec: str | Loss, beta: float | None) -> Term:
    if not isinstance(spec, str):
        return _bound(name_of(spec), spec, 1.0, {}, beta)
    found = SPEC.fullmatch(spec)
    if found is None:
        raise UserError(f"--loss {spec!r}: wanted NAME[:WEIGHT][,OPTION=VALUE]")
    weight = _number(spec, "weight", found["weight"] or "1")
    name, loss = _resolved(found["name"].strip())
    texts = dict(_option(spec, part) for part in (found["options"] or "").split(",") if part)
    known = {p.name: p for p in options_of(loss)}
    for option in texts:
        if option not in known:
            raise unknown(f"option of loss {name}", option, known)
    options = {option: _value(spec, known[option], text) for option, text in texts.items()}
    return _bound(name.rsplit(":", 1)[-1], loss, weight, options, beta)


def _resolved(name: str) -> tuple[str, Loss]:
    try:
        loss = plugins.resolve("losses", name)
    except UserError:
        folded = name.lower()
        if folded in ELSEWHERE:
            raise UserError(f"unknown loss {name!r}: it is called {ELSEWHERE[folded]} here") from None
        if folded == name or ".py" in name:
            raise
        return _resolved(folded)
    if inspect.isclass(loss):
        raise UserError(f"loss {name} is a class: name an instance of it, or a function")
    if not callable(loss):
        raise UserError(f"loss {name}: wanted a function, got {type(loss).__name__}")
    return name, loss


def _bound(name: str, loss: Loss, weight: float, options: Mapping[str, Any], beta: float | None) -> Term:
    given = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in options.items())
    own = {p.name: p for p in options_of(loss)}
    if "beta" in own:
        default = BETA if own["beta"].default is inspect.Parameter.empty else own["beta"].default
        options = {"beta": default if beta is None else beta, **options}
    for option, parameter in own.items():
        needed = parameter.default is inspect.Parameter.empty
        if needed and option not in options and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UserError(
                f"loss {name}: {option} has no default: --loss {name},{option}=VALUE. (A loss sees one argument, a "
                "PairLogps; what follows are options)"
            )
    if not options.get("beta", 1.0) > 0:
        raise UserError(f"loss {name}: β {options['beta']:g}: wanted above 0")
    if not 0 <= options.get("label_smoothing", 0.0) < 0.5:
        raise UserError(f"loss {name}: label_smoothing {options['label_smoothing']:g}: wanted 0 or more, below 0.5")
    bound = partial(loss, **options) if options else loss
    return Term(name, bound, weight, examine(name, bound), options.get("beta"), given)


def _option(spec: str, part: str) -> tuple[str, str]:
    name, mark, value = part.partition("=")
    if not mark:
        hint = "; several losses stand side by side, with a space between them"
        raise UserError(f"--loss {spec!r}: wanted OPTION=VALUE after the comma, got {part!r}{hint}")
    return name.strip().replace("-", "_"), value.strip()


def _value(spec: str, parameter: inspect.Parameter, text: str) -> Any:
    """The option's text as the type of its default."""
    default = parameter.default
    if isinstance(default, bool):
        truth = {"true": True, "false": False}
        if text.lower() not in truth:
            raise UserError(f"--loss {spec!r}: {parameter.name} wanted true or false, got {text!r}")
        return truth[text.lower()]
    if isinstance(default, str):
        return text
    value = _number(spec, parameter.name, text)
    if isinstance(default, int):
        if value != int(value):
            raise UserError(f"--loss {spec!r}: {parameter.name} wanted a whole number, got {text!r}")
        return int(value)
    return value


def _number(spec: str, name: str, text: str) -> float:
    hint = f"; options follow a comma: {spec.replace(':', ',', 1)}" if name == "weight" and "=" in text else ""
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"--loss {spec!r}: {name} wanted a number, got {text!r}{hint}") from None
    if not math.isfinite(value):
        raise UserError(f"--loss {spec!r}: {name} wanted a finite number, got {text!r}")
    return value
