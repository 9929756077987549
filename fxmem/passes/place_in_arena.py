"""Memory planned ahead for a graph that is in its final order: results go into slices of one block where operators allow it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ..codegen.arena import Layout, Slot
from ..codegen.operators import replay
from ..graph_meta import require
from ..layouts import fills_its_storage
from ..lowering import Lowered, node_device
from ..memory import ArenaPlan, Buffer, Place, buffers_of, plan_arena
from ..outforms import OutForm, out_form
from ..schedule import Schedule
from ..torch_internals import tensors_in
from .base import Pass

ALIGNMENT_BYTES = {"cpu": 64, "cuda": 512}  # as the allocators'
LEAST_BYTES = 4096  # what is smaller, allocators serve without a page of its own


class PlaceInArena(Pass):
    """Rewrites a scheduled graph so that operators with an `out` form of their own write into an arena.

    lowered, schedule: what `Rematerialize` has emitted the graph for. limit_bytes: what the step's peak is to stay within, the
    arena counted; None for the schedule's own peak.
    The graph gets a placeholder for the arena, and `arena.write("node", operator, ...)` in the place of the operators' calls.
    The graph module's meta gets "fxmem_arena" (an ArenaPlan) and "fxmem_layout" (a Layout).
    """

    def __init__(self, lowered: Lowered, schedule: Schedule, limit_bytes: int | None = None):
        super().__init__()
        self.lowered, self.schedule, self.limit_bytes = lowered, schedule, limit_bytes

    def apply(self, graph_module: fx.GraphModule) -> bool:
        require(graph_module, "fxmem_solution", "Rematerialize")
        problem, graph = self.lowered.problem, graph_module.graph
        buffers = buffers_of(problem, self.schedule)
        device_type = self._device_type(graph)
        writers = {n.meta["fxmem_step"]: self._writer(n, device_type) for n in graph.nodes if "fxmem_step" in n.meta}
        reasons = {i: why for i, b in enumerate(buffers) if (why := _reason(b, writers.get(b.users[0])))}
        plan = plan_arena(problem, self.schedule, reasons, self.limit_bytes, ALIGNMENT_BYTES.get(device_type, 512))
        layout = Layout(plan.arena_bytes, device_type, _rewrite(graph, writers, _placed(buffers, plan)))
        graph_module.meta.update(fxmem_arena=plan, fxmem_layout=layout)
        return bool(layout.slots)

    def _device_type(self, graph: fx.Graph) -> str:
        """Where the step runs: "cuda" as soon as one of its arguments is there, since only numbers stay on the CPU then."""
        found = {
            node_device(n).type for n in graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)
        }
        return max(found, default="cpu")

    def _writer(self, node: fx.Node, device_type: str) -> _Writer:
        made = self.lowered.problem.operators[self.schedule.steps[node.meta["fxmem_step"]]].outputs
        return _Writer.of(node, frozenset(made), device_type)


@dataclass(frozen=True)
class _Writer:
    """A node that makes storages: its out form or why it has none, and (storage, value) of each of its results."""

    node: fx.Node
    form: OutForm | None
    reason: str
    results: tuple[tuple[int, torch.Tensor], ...]

    @classmethod
    def of(cls, node: fx.Node, made: frozenset[int], device_type: str) -> _Writer:
        values = tensors_in(node.meta["val"])
        results = tuple(zip(node.meta["fxmem_storages"], values, strict=False))
        form = None if "fxmem_inplace_over" in node.meta else out_form(node.target, node.args, node.kwargs, device_type)
        if node.target is replay:
            return cls(node, None, "it runs again on stored random numbers", results)
        if form is None:
            return cls(node, None, f"{node.target} has no out kernel of its own on {device_type}", results)
        if any(v.device.type != device_type for v in values):
            return cls(node, None, f"not on {device_type}", results)
        each_has_one = len(values) == len(node.meta["fxmem_storages"])
        results = results[: len(form.names)]
        if not each_has_one or not all(s in made and fills_its_storage(v) for s, v in results):
            return cls(node, None, f"{node.target} makes results with gaps, or views", results)
        return cls(node, form, "", results)


def _reason(buffer: Buffer, writer: _Writer | None) -> str:
    """Why the allocator has to serve a buffer; "" where the arena may."""
    if buffer.size_bytes < LEAST_BYTES:
        return f"smaller than {LEAST_BYTES:,} bytes"
    if writer is None or buffer.storages[0] not in dict(writer.results):
        return "no operator writes it" if writer is None or writer.form else writer.reason
    return writer.reason


def _placed(buffers: tuple[Buffer, ...], plan: ArenaPlan) -> dict[tuple[int, int], Place]:
    """What lies inside, by the step that makes it and its first storage."""
    pairs = zip(buffers, plan.places, strict=True)
    return {(b.users[0], b.storages[0]): place for b, place in pairs if place.offset is not None}


def _rewrite(graph: fx.Graph, writers: dict[int, _Writer], placed: dict[tuple[int, int], Place]) -> dict[str, tuple[Slot, ...]]:
    """Let the nodes that make what lies inside write there; the slots of each."""
    slots: dict[str, tuple[Slot, ...]] = {}
    arena = None
    for step, writer in writers.items():
        if writer.form is None or not any((step, storage) in placed for storage, _ in writer.results):
            continue
        arena = arena or _placeholder(graph)
        node = writer.node
        slots[node.name] = tuple(_slots(step, writer, placed))
        node.op, node.target, taken = "call_method", "write", (arena, node.name, writer.form.target, *writer.form.args)
        node.args, node.kwargs = taken, writer.form.kwargs
        inside = [s for s in slots[node.name] if s.offset is not None]
        node.meta["fxmem_slots"] = tuple((s.offset, s.offset + s.size_bytes) for s in inside)
    return slots


def _placeholder(graph: fx.Graph) -> fx.Node:
    last = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_after(last[-1]) if last else graph.inserting_before():
        arena = graph.placeholder("arena")
    arena.meta["fxmem_is_arena"] = True
    return arena


def _slots(step: int, writer: _Writer, placed: dict[tuple[int, int], Place]) -> Iterator[Slot]:
    for keyword, (storage, value) in zip(writer.form.names, writer.results, strict=True):
        place = placed.get((step, storage))
        begin, end, offset = (place.begin, place.end, place.offset) if place else (step, step + 1, None)
        size_bytes = value.untyped_storage().nbytes()
        yield Slot(keyword, offset, size_bytes, tuple(value.shape), tuple(value.stride()), value.dtype, begin, end)
