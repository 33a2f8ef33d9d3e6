"""A search small enough for tests: a tiny model, preferences that it can learn, few of everything."""

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def options(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Of ``DiscoverConfig``: some dozen candidates, two of them really trained. Capital letters are preferred."""
    rows = [{"prompt": f"Name {i}. ", "chosen": f"A{i} YES", "rejected": f"b{i} no"} for i in range(24)]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(tiny_folder),
        "task": "preferences",
        "data": str(tmp_path / "prefs.jsonl"),
        "output": tmp_path / "search",
        "start": ("dpo", "hinge"),
        "candidates": 40,
        "adapters": 2,
        "seeds": 2,
        "lora_r": 2,
        "batch_size": 2,
        "dtype": "float32",
    }
