"""Measured costs: each different operator is run alone, on the device it will run on, on operands of its own.

One operator's memory at a time is needed, so a model that does not fit can still be measured for. Two calls are the same
operator when target, shapes, strides, types, devices, aliasing and plain arguments are equal; results are kept for the
process. The random number generators are left as they were.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from ..torch_internals import OpOverload, cpu_memory_events, pytree, real_tensors, storage_key
from .base import OpCall, OpCost, call_of
from .devices import row_for
from .operands import real_operands
from .roofline import RooflineCost
from .workspace import workspace_bytes

log = logging.getLogger(__name__)

MIN_RUNS, MAX_RUNS = 2, 15
SECONDS_PER_OPERATOR = 0.1  # operators are repeated for about this long, which steadies the median of short ones

# For operators that are compiled when they first run, which planning does not wait for: the slowest of these takes as long.
STAND_INS: dict[Any, Callable[[OpCall], Iterable[OpCall]]] = {}

_measured: dict[tuple, OpCost | None] = {}


class MeasuredCost:
    """Cost model that times operators on `device` (a device without an index means the current one).

    What cannot run alone (no dispatcher operator, or one that raises on made-up operands) is costed by the roofline, and
    logged once.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._roofline = RooflineCost(row_for(device))
        self.name = "measured"

    def cost(self, node: fx.Node) -> OpCost:
        """Measured cost of a call_function node; CostError, naming it, where a value is missing."""
        return self.cost_of_call(call_of(node))

    def cost_of_call(self, call: OpCall) -> OpCost:
        """Measured cost of one operator call on fake tensors."""
        if call.is_alias or not call.outputs:
            return OpCost(0.0, 0)
        if call.packet in STAND_INS:
            slowest_s = max(self.cost_of_call(other).time_s for other in STAND_INS[call.packet](call))
            return OpCost(slowest_s, workspace_bytes(call))
        key = (_signature(call), self._device, torch.get_num_threads())
        if key not in _measured:
            _measured[key] = self._measure(call)
        return _measured[key] or self._roofline.cost_of_call(call)

    def _measure(self, call: OpCall) -> OpCost | None:
        """Run `call` alone; None, with a word in the log, where that cannot be done."""
        if not isinstance(call.target, OpOverload):
            log.info("%s is no dispatcher operator; its cost comes from the roofline", call.target)
            return None
        devices = [t.device for t in (*call.inputs, *call.outputs) if t.device.type == "cuda"]
        device = devices[0] if devices else self._device
        try:
            with real_tensors(), torch.random.fork_rng(_cuda_indices(device)), torch.no_grad():
                return _run_alone(call, device)
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
            log.info("%s cannot run alone (%s); its cost comes from the roofline", call.target, str(error).split("\n")[0])
            return None


def _cuda_indices(device: torch.device) -> list[int]:
    if device.type != "cuda":
        return []
    return [torch.cuda.current_device() if device.index is None else device.index]


def _run_alone(call: OpCall, device: torch.device) -> OpCost:
    """Workspace from a first run, which also warms up; then the median of a few timed ones."""
    args, kwargs = real_operands(call, device)

    def run() -> Any:
        return call.target(*args, **kwargs)

    on_cuda = device.type == "cuda"
    if not on_cuda:
        workspace = _cpu_workspace(run, call.new_output_bytes)
        return OpCost(_median_s(lambda: _cpu_seconds(run)), workspace)
    with torch.cuda.device(device):
        workspace = _cuda_workspace(run)
        return OpCost(_median_s(lambda: _cuda_seconds(run)), workspace)


def _median_s(seconds: Callable[[], float]) -> float:
    times = [seconds()]
    count = min(MAX_RUNS, max(MIN_RUNS, int(SECONDS_PER_OPERATOR / max(times[0], 1e-9))))
    times += [seconds() for _ in range(count - 1)]
    return statistics.median_low(times)


def _cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    del result
    return seconds


def _cpu_workspace(run: Callable[[], Any], output_bytes: int) -> int:
    """The highest running sum of the allocator's events, less the outputs."""
    _, events = cpu_memory_events(run)
    running = peak = 0
    for size in events:
        running += size
        peak = max(peak, running)
    return max(0, peak - output_bytes)


def _cuda_seconds(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _cuda_workspace(run: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del result
    return max(0, peak - max(after, before))


def _signature(call: OpCall) -> tuple:
    """What makes two calls the same operator: equal for equal work, hashable."""
    storages: dict[int, int] = {}

    def describe(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return repr(leaf)
        alias = storages.setdefault(storage_key(leaf), len(storages))
        where = leaf.stride(), leaf.storage_offset() % 16, alias
        return leaf.dtype, leaf.is_conj(), leaf.device, tuple(leaf.shape), *where

    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    return str(call.target), tuple(describe(leaf) for leaf in leaves), str(spec)
