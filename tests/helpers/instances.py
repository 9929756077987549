"""Reads the joint graphs in tests/data/remat (see the README there)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from fxmem.problem import Operator, Problem, Storage

FOLDER = Path(__file__).parents[1] / "data" / "remat"


def load_instance(name: str, folder: Path = FOLDER) -> Problem:
    """The joint graph `name` as a Problem. What no operator makes is a parameter there."""
    with gzip.open(Path(folder) / f"{name}.json.gz", "rt") as file:
        data = json.load(file)
    storages = tuple(
        Storage(f"s{k}", s["size_bytes"], "parameter" if s["producer"] < 0 else "activation")
        for k, s in enumerate(data["storages"])
    )
    operators = tuple(Operator(o["target"], tuple(o["inputs"]), tuple(o["outputs"]), o["time_s"]) for o in data["operators"])
    return Problem(storages, operators, data["num_forward"], len(operators), frozenset(data["outputs"]))
