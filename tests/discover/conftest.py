"""A search small enough for tests: a tiny model, preferences that it can learn, few of everything."""

import json
from pathlib import Path
from typing import Any

import pytest

from sartor.config import DiscoverConfig
from sartor.discover.command import run_discover


@pytest.fixture(scope="session")
def small(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of ``DiscoverConfig``: some dozen candidates, two of them really trained. Capital letters are preferred."""
    rows = [{"prompt": f"Name {i}. ", "chosen": f"A{i} YES", "rejected": f"b{i} no"} for i in range(24)]
    data = tmp_path_factory.mktemp("data") / "prefs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(tiny_folder),
        "task": "preferences",
        "data": str(data),
        "start": ("dpo", "hinge"),
        "candidates": 40,
        "adapters": 2,
        "seeds": 2,
        "lora_r": 2,
        "batch_size": 2,
        "dtype": "float32",
    }


@pytest.fixture
def options(small: dict[str, Any], few_known_losses: None, tmp_path: Path) -> dict[str, Any]:
    """The same, with a folder of its own."""
    return {**small, "output": tmp_path / "search"}


@pytest.fixture(scope="session")
def whole(small: dict[str, Any], few_known_losses: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a search, run once without interruption."""
    folder = tmp_path_factory.mktemp("search") / "whole"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SARTOR_CACHE", str(folder.parent / "cache"))
        run_discover(DiscoverConfig(**small, output=folder), "sartor discover ...")
    return folder
