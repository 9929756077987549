"""The predicted timeline as a memory snapshot: what `torch.cuda.memory._dump_snapshot` writes of a real run, for the same
viewer (https://pytorch.org/memory_viz), so that prediction and reality are seen side by side.

Every storage is a block with an address of its own while it lives, found first fit; a block written in place is freed and
allocated again. Times are the cost model's, in microseconds.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import pickle
from typing import TYPE_CHECKING, Any

from ..problem import Operator
from ..saving import write_whole
from .replay import step_times_s

if TYPE_CHECKING:
    from ..decisions import Plan

BASE = 1 << 32  # addresses begin here, as real ones do not begin at zero


def snapshot_of(plan: Plan) -> dict[str, Any]:
    """The snapshot as the plain dict that is pickled: one device, one segment, one trace."""
    problem, schedule, timeline = plan.problem, plan.solution.schedule, plan.solution.timeline
    heap = _Heap()
    for index, storage in enumerate(problem.storages):
        if not problem.producers[index]:
            heap.allocate(index, storage.size_bytes, storage.kind, _frames(storage.name, None))
    heap.allocate("extra", problem.extra_bytes, "unknown", _frames("generator states", None))
    starts = itertools.accumulate(step_times_s(problem, schedule), initial=0.0)
    for step, (index, start_s) in enumerate(zip(schedule.steps, starts, strict=False)):
        operator, heap.now_us = problem.operators[index], round(start_s * 1e6)
        _run_step(plan, heap, operator, timeline.inplace[step], timeline.frees[step])
    return {"segments": [heap.segment()], "device_traces": [heap.trace], "allocator_settings": {}, "external_annotations": []}


def save_snapshot(plan: Plan, path: str | os.PathLike) -> None:
    """Write the snapshot, pickled; or the viewer's page with it inside, where the name ends in .html. Raises PlanError."""
    path, snapshot = pathlib.Path(path), snapshot_of(plan)
    if path.suffix == ".html":
        from ..torch_internals import memory_viz

        content = memory_viz().trace_plot(snapshot).encode()
    else:
        content = pickle.dumps(snapshot)
    write_whole(path, content)


def _run_step(plan: Plan, heap: _Heap, operator: Operator, pair: tuple[int, int] | None, frees: tuple[int, ...]) -> None:
    """Allocate what a step makes and takes inside, then free what dies in it: the running sum is what `simulate` counts."""
    storages, maker = plan.problem.storages, _frames(operator.name, operator)

    def allocate(storage: int) -> None:
        kind = storages[storage].kind
        if storage in heap.blocks:  # a kept output is made a second time, and dropped at once
            heap.allocate(("again", storage), storages[storage].size_bytes, kind, maker)
        else:
            heap.allocate(storage, storages[storage].size_bytes, kind, maker)

    within = pair and storages[pair[0]].size_bytes > storages[pair[1]].size_bytes
    if pair and not within:
        heap.free(pair[0])
    for storage in operator.outputs:
        if not (within and storage == pair[1]):
            allocate(storage)
    heap.allocate("workspace", operator.workspace_bytes, "workspace", maker)
    heap.free("workspace")
    if within:
        heap.free(pair[0])
        allocate(pair[1])
    for key in (*frees, *(("again", storage) for storage in operator.outputs)):
        heap.free(key)


def _frames(name: str, operator: Operator | None) -> list[dict[str, Any]]:
    """The "stack" that the viewer shows: the operator, then its module at the user's line."""
    frames = [{"filename": "", "line": 0, "name": name}]
    if operator and (operator.module or operator.source):
        file, _, line = operator.source.partition(":")
        frames.append({"filename": file, "line": int(line or 0), "name": operator.module or "(root)"})
    return frames


class _Heap:
    """Blocks by their keys, and the trace of their coming and going."""

    def __init__(self):
        self.blocks: dict[Any, dict[str, Any]] = {}
        self.trace: list[dict[str, Any]] = []
        self.now_us, self.end = 0, BASE

    def allocate(self, key: Any, size: int, category: str, frames: list[dict[str, Any]]) -> None:
        if not size:
            return
        block = {"addr": self._fit(size), "size": size, "stream": 0, "frames": frames, "category": category}
        self.blocks[key] = block
        self.end = max(self.end, block["addr"] + size)
        self.trace.append({"action": "alloc", "time_us": self.now_us, **block})

    def free(self, key: Any) -> None:
        """Nothing, where no such block is there."""
        block = self.blocks.pop(key, None)
        for action in ("free_requested", "free_completed") if block else ():
            self.trace.append({"action": action, "time_us": self.now_us, **block})

    def segment(self) -> dict[str, Any]:
        """What is there in the end."""
        blocks, at = [], BASE
        for block in sorted(self.blocks.values(), key=lambda b: b["addr"]):
            blocks += self._gap(at, block["addr"])
            blocks.append(
                {"address": block["addr"], "size": block["size"], "requested_size": block["size"],
                 "state": "active_allocated", "frames": block["frames"], "category": block["category"]}
            )  # fmt: skip
            at = block["addr"] + block["size"]
        alive = sum(block["size"] for block in self.blocks.values())
        return {
            "device": 0, "address": BASE, "total_size": self.end - BASE, "allocated_size": alive, "active_size": alive,
            "requested_size": alive, "stream": 0, "segment_type": "large", "segment_pool_id": (0, 0), "is_expandable": False,
            "frames": [], "blocks": blocks + self._gap(at, self.end),
        }  # fmt: skip

    def _gap(self, start: int, end: int) -> list[dict[str, Any]]:
        free = {"address": start, "size": end - start, "requested_size": 0, "state": "inactive", "frames": []}
        return [free] if end > start else []

    def _fit(self, size: int) -> int:
        """The lowest address with so much room above it."""
        at = BASE
        for block in sorted(self.blocks.values(), key=lambda b: b["addr"]):
            if block["addr"] - at >= size:
                break
            at = max(at, block["addr"] + block["size"])
        return at
