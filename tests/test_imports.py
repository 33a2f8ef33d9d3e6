"""The layers of CONTRIBUTING.md, held by the imports themselves."""

import ast
from pathlib import Path

import sartor

ROOT = Path(sartor.__file__).parent
LAYERS = [
    {"errors", "types", "plugins", "console", "machine", "config"},
    {"data", "losses"},
    {"model"},
    {"rollout", "rewards", "objectives"},
    {"evaluate", "plan", "report", "tasks"},
    {"train"},
    {"demo", "compare", "discover"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Statistics are arithmetic without a layer; the report reads a run folder and nothing else.
EXCEPTIONS = {("train", "report"), ("rollout", "rewards"), ("report", "evaluate")}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names |= {module for module in modules if module.split(".")[0] == "sartor"}
    return names


def test_imports_point_one_way() -> None:
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for module in imported(path):
            other = module.split(".")[1] if "." in module else None
            if room != "__init__" and other and other != room and (room, other) not in EXCEPTIONS:
                assert LEVEL[other] <= LEVEL[room], f"{path.name} ({room}) imports {module}"


def test_losses_know_torch_types_and_stable_forms_only() -> None:
    for path in (ROOT / "losses").rglob("*.py"):
        assert imported(path) <= {"sartor.types", "sartor.losses.stable"}, path
        tree = ast.parse(path.read_text(encoding="utf-8"))
        outside = {
            node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
        }
        assert outside <= {"sartor", "torch", "jaxtyping", "collections", "typing", "dataclasses", "math"}, path


def test_sizes_stay_readable() -> None:
    """Yardsticks of the design: a loss file 80 lines, a module 500."""
    for path in ROOT.rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= (80 if ROOT / "losses" in path.parents else 500), f"{path} has {lines} lines"
