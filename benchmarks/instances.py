"""Rematerialization instances as gzipped JSON: joint graphs captured elsewhere, in numbers alone.

`storages[i]`: size_bytes, and producer, the operator that makes it (-1: there before the step). `operators[j]`: target, inputs,
outputs, time_s; the first num_forward are the forward. `outputs` live to the end. See tests/data/remat.
"""

from __future__ import annotations

import gzip
import json
import pathlib

from fxmem.problem import Operator, Problem, Storage


def read_instance(path: str | pathlib.Path) -> Problem:
    """The joint graph in a file as a Problem. What no operator makes is a parameter there."""
    with gzip.open(path, "rt") as file:
        data = json.load(file)
    storages = tuple(
        Storage(f"s{k}", s["size_bytes"], "parameter" if s["producer"] < 0 else "activation")
        for k, s in enumerate(data["storages"])
    )
    operators = tuple(Operator(o["target"], tuple(o["inputs"]), tuple(o["outputs"]), o["time_s"]) for o in data["operators"])
    return Problem(storages, operators, data["num_forward"], len(operators), frozenset(data["outputs"]))
