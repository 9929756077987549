"""Annealing runs, one after another."""

from __future__ import annotations

from collections.abc import Sequence

from .annealing import Incumbent, Run, anneal
from .base import Progress


def run_all(runs: Sequence[Run], deadline: float, progress: Progress | None = None) -> list[Incumbent]:
    """The runs' incumbents, in the order of the runs."""
    return [anneal(run, deadline, progress) for run in runs]
