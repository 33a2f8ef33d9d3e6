"""Names to objects. Built-ins and outside packages are found through the same entry points."""

import importlib.util
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from sartor.errors import UserError, unknown


def resolve(kind: str, name: str) -> Any:
    """The object called ``name`` in the group ``sartor.<kind>`` ("losses", "rewards"), or ``path/to/file.py:function``.

    Raises:
        UserError: an unknown name (the known ones are listed), or a file or function that is not there.
    """
    file, _, function = name.partition(".py")
    if name.endswith(".py") or function.startswith(":"):
        return _from_file(f"{file}.py", function.removeprefix(":"))
    known = {point.name: point for point in entry_points(group=f"sartor.{kind}")}
    if name not in known:
        raise unknown(kind.removesuffix("es") if kind == "losses" else kind.removesuffix("s"), name, known)
    return known[name].load()


@cache
def _from_file(file: str, function: str) -> Any:
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"{file}:{function}: no such file {path}")
    spec = importlib.util.spec_from_file_location(f"sartor_user_{path.stem}", path)
    assert spec is not None  # a .py file always has a loader
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, function):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == spec.name]
        functions = sorted(name for name in own if not name.startswith("_"))
        if not function:
            raise UserError(f"{file}: name a function in it: {', '.join(f'{file}:{name}' for name in functions)}")
        raise unknown(f"function in {file}", function, functions)
    return getattr(module, function)
