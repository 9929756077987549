"""Buffer updates where they happen: the joint graph hands new values out at its end, the plain module writes them at once."""

from __future__ import annotations

import torch
from torch import fx

from ..codegen.operators import SCATTERS
from ..errors import CaptureError
from ..graph_meta import result_of
from ..lowering import BATCH_NORM
from .base import Pass, made_like

aten = torch.ops.aten
VIEWS = {  # what each scatter writes to
    SCATTERS[aten.slice_scatter.default]: aten.slice.Tensor,
    SCATTERS[aten.select_scatter.default]: aten.select.int,
    SCATTERS[aten.diagonal_scatter.default]: aten.diagonal.default,
}


class UpdateBuffers(Pass):
    """Writes each updated buffer, or what of it is new, by a `copy_` right after that is made, and takes it off the outputs.

    What reads the old value later on (in the backward, say) gets a clone of it that is made before the write. Running
    statistics that move several times are written each time, so that a batch norm finds them in its buffers, always.
    Needs the roles that `fxmem.capture` leaves.
    """

    def apply(self, graph_module: fx.GraphModule) -> bool:
        graph = graph_module.graph
        output = graph.output_node()
        if "fxmem_roles" not in output.meta:
            raise CaptureError("UpdateBuffers needs the roles of a captured joint graph: run fxmem.capture.capture first")
        buffers = {
            n.meta["fxmem_role"].key: n for n in graph.nodes if n.op == "placeholder" and n.meta["fxmem_role"].kind == "buffer"
        }
        position = {n: i for i, n in enumerate(graph.nodes)}
        modified = _write_between(graph, set(buffers.values()), position)
        kept = []
        for value, role in zip(output.args[0], output.meta["fxmem_roles"], strict=True):
            if role.kind == "buffer_update":
                _write(graph, buffers[role.key], value, position)
            else:
                kept.append((value, role))
        modified = modified or len(kept) < len(output.args[0])
        output.args = (tuple(v for v, _ in kept),)
        output.meta["fxmem_roles"] = tuple(r for _, r in kept)
        for node in reversed(graph.nodes):
            if node.target in VIEWS and not node.users:
                graph.erase_node(node)
        return modified


def _write_between(graph: fx.Graph, buffers: set[fx.Node], position: dict[fx.Node, int]) -> bool:
    """Write the running statistics that one batch norm hands to the next use of the same module."""
    modified = False
    for node in graph.find_nodes(op="call_function", target=BATCH_NORM):
        for item in (3, 4):  # where it takes them, and where it hands them out
            buffer = node.args[item]
            made = result_of(node, item)
            later = [] if made is None else [u for u in made.users if u.target is BATCH_NORM and made in u.args[3:5]]
            if buffer in buffers and later:
                _write(graph, buffer, made, position)
                for user in later:
                    user.replace_input_with(made, buffer)
                modified = True
    return modified


def _write(graph: fx.Graph, buffer: fx.Node, value: fx.Node, position: dict[fx.Node, int]) -> None:
    late = [u for u in buffer.users if position.get(u, 0) > position[value]]
    if late:
        with graph.inserting_before(min(buffer.users, key=lambda u: position.get(u, 0))):
            clone = graph.call_function(aten.clone.default, (buffer,))
        clone.meta["val"] = buffer.meta["val"]
        for user in late:
            user.replace_input_with(buffer, clone)
    after = value.next
    while after.op == "placeholder":
        after = after.next
    while after.target is torch.ops.aten.copy_.default or (value.args and after.args[:1] == value.args[:1]):
        after = after.next  # stay behind the other results of the same operator
    parts = _parts(buffer, value)
    with graph.inserting_before(after):
        for part in parts:
            view = made_like(part, VIEWS[part.target], (buffer, *part.args[2:]))
            _copy(graph, view, part.args[1])
        if not parts:
            _copy(graph, buffer, value)


def _copy(graph: fx.Graph, target: fx.Node, value: fx.Node) -> None:
    write = graph.call_function(aten.copy_.default, (target, value))
    write.meta.update(val=target.meta["val"], fxmem_writes=True)
    write.meta.update({k: value.meta[k] for k in ("nn_module_stack", "stack_trace", "seq_nr") if k in value.meta})


def _parts(buffer: fx.Node, value: fx.Node) -> list[fx.Node]:
    """The scatters, one into the other, by which parts of a buffer become its new value, where nothing else reads what they
    make: these parts alone are written then, as the plain module does."""
    found, user = [], None
    while value is not buffer:
        if value.target not in VIEWS or not set(value.users) <= {user, value.graph.output_node()}:
            return []
        found.append(value)
        value, user = value.args[0], value
    return found[::-1]
