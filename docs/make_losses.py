"""The pages of the catalogue: one a loss from its docstring and from what is measured of it, and an index.

usage: python docs/make_losses.py [FOLDER]     (make docs; a test says when the pages are out of date)
"""

import re
import sys
from pathlib import Path

from sartor.objectives.catalogue import Entry, catalogue
from sartor.objectives.plot import draw

HERE = Path(__file__).parent / "losses"


def page(entry: Entry) -> str:
    """One loss as Markdown."""
    sections = entry.sections
    options = "".join(f"| `{name}` | {default} | {meaning} |\n" for name, default, meaning in described(entry))
    measured = "".join(f"| {name} | {value} |\n" for name, value in entry.properties().items())
    papers = "\n".join(f"* {line}" for line in cited(sections["References"]))
    table = f"## Options\n\n| option | default | meaning |\n| --- | --- | --- |\n{options}\n" if options else ""
    first = next(iter(entry.options.items()), None)
    example = entry.name + (f",{first[0]}={first[1]}" if first else "")
    idea = f"\n{single(entry.idea)}\n" if entry.idea else ""
    return f"""<!-- Written by make docs from the docstring of {entry.loss.__module__}.{entry.name}. -->
# {entry.name}

{single(entry.summary)}
{idea}
```text
{sections["Formula"]}
```

**Use it:** {single(sections["Use it"])}

Train with `sartor dpo --loss {example}`; `sartor losses {entry.name}` shows this page in the terminal.

![Loss and gradient weights of {entry.name} over the margin]({entry.name}.svg)

{table}## Measured

| property | value |
| --- | --- |
{measured}
What it returns: {lower(single(flow(sections["Returns"])))}

## Papers

{papers}

[All losses](README.md) · [which one for my data?](../which-loss.md)
"""


def index(entries: tuple[Entry, ...]) -> str:
    """The table of all losses, by family."""
    lines = [
        "<!-- Written by make docs. -->",
        "# The catalogue of objectives",
        "",
        f"{len(entries)} losses. `sartor losses` prints this table, `sartor losses NAME --plot` draws one,",
        "`sartor dpo --loss NAME` trains with it. [Which one for my data?](../which-loss.md)",
        "",
        "How to read *Measured* on their pages: *slope at zero* is the derivative of the loss by the margin ρ where",
        "training starts, negative where it raises the margin; *lowers the margin* says where it does the reverse;",
        "*nearest other* is the loss whose gradient weights are most nearly proportional, over margins, shifts and",
        "lengths, with the cosine between them",
        "(1: trains alike, up to the learning rate; ties do not enter).",
    ]
    family = ""
    for entry in entries:
        if entry.family != family:
            family = entry.family
            lines += ["", f"## {family}", "", "| loss | what it is for | needs |", "| --- | --- | --- |"]
        lines.append(f"| [{entry.name}]({entry.name}.md) | {single(entry.summary)} | {entry.needs} |")
    return "\n".join(lines) + "\n"


def described(entry: Entry) -> list[tuple[str, object, str]]:
    """Each option with its default and what the docstring says of it."""
    found = dict(re.findall(r"^(\w+): (.*?)(?=^\w+: |\Z)", entry.sections.get("Args", ""), re.M | re.S))
    return [(name, default, single(flow(found[name]))) for name, default in entry.options.items()]


def cited(references: str) -> list[str]:
    """One line a paper: each ends with its address."""
    return [single(line.strip()) for line in re.findall(r".*?https?://\S+", flow(references))]


def flow(text: str) -> str:
    """Text without the line breaks of the source."""
    return " ".join(text.split())


def single(text: str) -> str:
    """Docstrings mark code with two backticks, Markdown with one; a bar would end a table's cell."""
    return text.replace("``", "`").replace("|", "\\|")


def lower(text: str) -> str:
    """A sentence that goes on after a colon."""
    return text[:1].lower() + text[1:]


def write(folder: Path, plots: bool = True) -> None:
    """Write all pages into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = tuple(entry for entry in catalogue() if (entry.loss.__module__ or "").startswith("sartor."))
    for entry in ours:
        (folder / f"{entry.name}.md").write_text(page(entry), encoding="utf-8")
        if plots:
            draw([entry.term], folder / f"{entry.name}.svg")
    (folder / "README.md").write_text(index(ours), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
