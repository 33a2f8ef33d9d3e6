"""``sartor losses``: the catalogue, one loss in full, and what they look like."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from sartor.config import LossesConfig
from sartor.console import say
from sartor.errors import UserError
from sartor.objectives.catalogue import Entry, catalogue, entry
from sartor.objectives.plot import draw

DRAWN = (".png", ".svg", ".pdf")
# What goes without saying in a family.
USUAL = dict.fromkeys(("Pairwise", "Pointwise", "Listwise", "Discovered"), "reference")


def run_losses(config: LossesConfig) -> None:
    """Print the catalogue, or the losses named, and draw them on demand.

    Raises:
        UserError: a loss that is not known or breaks its contract, or a drawing that cannot be written.
    """
    output = Console(highlight=False, markup=False)
    if not config.names:
        if config.plot:
            raise UserError("--plot: name the losses to draw: sartor losses dpo lrml --plot")
        output.print(_table(catalogue()))
        output.print(
            "\nIn full: sartor losses dpo kto    Drawn: sartor losses dpo lrml --plot\n"
            "Yours:   sartor losses my.py:my_loss    Train: sartor dpo --loss kto, --loss dpo sft:0.1"
        )
        return
    _check(config)
    entries = [entry(name, config.beta) for name in config.names]
    for one in entries:
        _describe(output, one)
    if config.plot:
        say(f"drawn   {draw([one.term for one in entries], config.output, config.reach)}")


def _check(config: LossesConfig) -> None:
    path: Path = config.output
    if not config.plot:
        return
    if path.suffix not in DRAWN:
        raise UserError(f"--output {path}: wanted a file that ends in {', '.join(DRAWN)}")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: no such folder {path.parent}")


def _table(entries: tuple[Entry, ...]) -> Table:
    """One row a loss, under its family; two columns, so that it reads on 80 characters."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    family = ""
    for one in entries:
        if one.family != family:
            family = one.family
            table.add_row(f"\n{family}", "", style="cyan")
        needs = f" [needs {one.needs}]" if one.needs != USUAL.get(family) else ""
        table.add_row(one.name, one.summary + needs)
    return table


def _describe(output: Console, one: Entry) -> None:
    options = ", ".join(f"{name} = {value}" for name, value in one.options.items()) or "none"
    output.print(f"{one.name}  ({one.family.lower()})", style="bold")
    output.print(one.summary)
    for heading in ("Formula", "Use it"):
        if one.sections.get(heading):
            output.print(f"\n{heading.lower()}", style="cyan")
            output.print(one.sections[heading].replace("``", ""), soft_wrap=heading == "Formula")
    output.print("\nmeasured", style="cyan")
    for name, value in {"options": options, **one.properties()}.items():
        output.print(f"  {name:<18} {value}", soft_wrap=True)
    for paper in one.papers:
        output.print(f"  {'paper':<18} {paper}")
    output.print()
