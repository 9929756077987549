"""The joint graphs in tests/data/remat (see the README there)."""

from __future__ import annotations

from pathlib import Path

from benchmarks.instances import read_instance
from fxmem.problem import Problem

FOLDER = Path(__file__).parents[1] / "data" / "remat"


def load_instance(name: str, folder: Path = FOLDER) -> Problem:
    """The joint graph `name` as a Problem."""
    return read_instance(Path(folder) / f"{name}.json.gz")
