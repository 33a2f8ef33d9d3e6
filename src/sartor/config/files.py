"""Options in YAML: what ``--config`` reads, and what a run writes down of itself."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import yaml

from sartor.errors import UserError, unknown


def from_yaml(path: Path, config: type) -> dict[str, Any]:
    """The fields of ``config`` that a YAML file sets, with unknown names refused.

    Raises:
        UserError: no such file, no YAML mapping, or a name that the verb does not have.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: wanted lines of 'name: value', got {type(values).__name__}")
    names = {f.name.replace("-", "_"): f for f in dataclasses.fields(config)}
    fields = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name, value in fields.items():
        if name not in names:
            raise unknown(f"option in {path}", name, names)
        fields[name] = _coerce(value, typing.get_type_hints(config)[name], f"{path}: {name}")
    return fields


def to_yaml(config: Any) -> str:
    """A config as YAML that ``--config`` reads back."""
    values = {
        f.name: str(value) if isinstance(value := getattr(config, f.name), Path) else value
        for f in dataclasses.fields(config)
        if f.name != "resume"
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """A YAML value as the field's type: 2e-5 is a string to YAML, and an int will do for a float."""
    if typing.get_origin(hint) is tuple:
        # A mapping is what YAML makes of "sft: 0.1", with the space that it asks for.
        parts = [value] if isinstance(value, str | dict) else value if isinstance(value, list) else [None]
        found = [f"{k}:{v}" for part in parts if isinstance(part, dict) for k, v in part.items()]
        found = [*(part for part in parts if isinstance(part, str)), *found]
        if all(isinstance(part, str | dict) for part in parts):
            return tuple(found)
        raise UserError(f"{where}: wanted a name or a list of them, got {value!r}")
    allowed = typing.get_args(hint) or (hint,)
    if value is None and type(None) in allowed:
        return None
    for kind in allowed:
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is float and not isinstance(value, bool):
            try:
                return float(value)
            except (TypeError, ValueError):
                continue
        if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed if kind is not type(None))
    raise UserError(f"{where}: wanted {names}, got {value!r}")


def coerce(config: type, name: str, text: str, where: str) -> Any:
    """The text of an option as the type of a field of ``config``.

    Raises:
        UserError: it is of no such type.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    return _coerce(value, typing.get_type_hints(config)[name], where)
