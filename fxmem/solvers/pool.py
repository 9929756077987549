"""Annealing runs in this process and, where it pays, one more.

The second process is a plain `python -m fxmem.solvers.pool` that reads runs and writes what they found: no fork of a process
that holds threads and devices, no second import of the caller's main module. Results do not depend on where a run was made;
if the second process fails, its runs are made here.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from .annealing import Incumbent, Run, anneal
from .base import Progress

log = logging.getLogger(__name__)

WORTHWHILE_S = 3.0  # the second process takes a few seconds to start
MOVE_STAGE_S = 2e-6  # seconds of one move, for each stage of the backward
PACK_MOVES = 10_000  # that packing takes as long as
GRACE_S = 30.0  # behind the deadline: a process that says nothing by then hangs


class Pool:
    """A context that holds the second process while a search lasts."""

    def __init__(self, stages: int):
        self.stages, self.process = stages, None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def run_all(self, runs: Sequence[Run], deadline: float, progress: Progress | None = None) -> list[Incumbent]:
        """The runs' incumbents, in the order of the runs. deadline: in time.monotonic() seconds."""
        estimate_s = sum(run.moves + (PACK_MOVES if run.packed else 0) for run in runs) * self.stages * MOVE_STAGE_S
        worthwhile = len(runs) > 1 and min(estimate_s, deadline - time.monotonic()) > WORTHWHILE_S
        away = list(runs[1::2]) if (worthwhile and _cores() > 1 and self._start()) else []
        returned: list[Incumbent] = []
        # Pickled before anything runs here: runs share what they remember of the problem, and that grows.
        question = pickle.dumps((away, time.time() + deadline - time.monotonic())) if away else b""
        thread = threading.Thread(target=self._ask, args=(question, returned), daemon=True)
        if away:
            thread.start()
        here = _anneal_all(runs[::2] if away else runs, deadline, progress)
        if not away:
            return here
        interrupted = any(i.interrupted for i in here)
        try:
            thread.join(1.0 if interrupted else _patience(deadline))
        except KeyboardInterrupt:
            interrupted = True
            for incumbent in here:
                incumbent.stopped = incumbent.interrupted = True
        if len(returned) != len(away):
            log.debug("the second process did not answer; its runs are made in this one")
            self._stop()
            returned = [] if interrupted else _anneal_all(away, deadline, progress)
        if not returned:
            return here
        both = [*here, *returned]
        both[::2], both[1::2] = here, returned
        return both

    def _start(self) -> bool:
        if self.process is None:
            root = str(Path(__file__).parents[2])
            environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))))
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "fxmem.solvers.pool"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                )
            except OSError:
                return False
        return True

    def _ask(self, question: bytes, returned: list[Incumbent]) -> None:
        try:
            self.process.stdin.write(question)
            self.process.stdin.flush()
            returned += pickle.load(self.process.stdout)
        except (OSError, EOFError, pickle.PickleError, ValueError):
            return

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def _patience(deadline: float) -> float | None:
    """Seconds to wait for the second process: it sees the deadline between two moves, or when a program of packing ends."""
    return None if math.isinf(deadline) else max(0.0, deadline - time.monotonic()) + GRACE_S


def _anneal_all(runs: Sequence[Run], deadline: float, progress: Progress | None = None) -> list[Incumbent]:
    """One run after the other; after one that was interrupted, none."""
    found: list[Incumbent] = []
    for run in runs:
        interrupted = bool(found) and found[-1].interrupted
        found.append(Incumbent(stopped=True, interrupted=True) if interrupted else anneal(run, deadline, progress))
    return found


def serve() -> None:
    """The second process: lists of runs with the time of day to stop at come in, lists of incumbents go out, until the end."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what libraries print must not come between the pickles
    while True:
        try:
            runs, until = pickle.load(source)
            deadline = time.monotonic() + until - time.time()
            pickle.dump(_anneal_all(runs, deadline), sink)
            sink.flush()
        except (EOFError, OSError, KeyboardInterrupt):
            return


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    serve()
