"""The page of ``sartor discover``."""

from pathlib import Path


def write_discovery(folder: Path) -> Path:
    """Write ``report.html`` from ``discovery.json`` and return its path."""
    report = folder / "report.html"
    report.write_text("<p>soon</p>", encoding="utf-8")
    return report
