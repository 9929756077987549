"""What PyTorch's own partitioner would keep, at each value of `activation_memory_budget`, as schedules to be judged like ours.

The values that its forward graph hands to its backward graph are kept from the forward on; everything else that the backward
reads is made again when it is first read, and then stays until its last use.
"""

from __future__ import annotations

import copy

import torch
from torch import fx

from .lowering import Lowered
from .schedule import Schedule
from .solvers.stages import compile_problem
from .solvers.state import State
from .torch_internals import saved_by_partitioner

FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)


def partitioner_schedules(joint: fx.GraphModule, lowered: Lowered) -> tuple[Schedule, ...]:
    """One schedule for each of FRACTIONS. joint: the annotated graph that `lowered` was made from."""
    compiled = compile_problem(lowered.problem)
    bit = {s: 1 << k for k, s in enumerate(compiled.storages)}
    storages_of = {n.name: n.meta.get("fxmem_storages", ()) for n in joint.graph.nodes}
    found = []
    for fraction in FRACTIONS:
        graph_module, forward_outputs = _as_partitioner_expects(joint)
        kept = 0
        for name in saved_by_partitioner(graph_module, forward_outputs, fraction):
            for storage in storages_of.get(name, ()):
                kept |= bit.get(storage, 0)
        later = [compiled.everything] * (len(compiled.stages) - 1)
        found.append(State(compiled, 1, [kept, *later]).schedule())
    return tuple(found)


def _as_partitioner_expects(joint: fx.GraphModule) -> tuple[fx.GraphModule, int]:
    """A copy whose placeholders are called primals and tangents and whose forward outputs come first; and their number."""
    graph = copy.deepcopy(joint.graph)
    for node, role in ((n, n.meta["fxmem_role"]) for n in graph.nodes if n.op == "placeholder"):
        node.target = f"{'tangents' if role.kind == 'tangent' else 'primals'}_{node.name}"
    for node in reversed(list(graph.nodes)):
        if "fxmem_offers" in node.meta or (node.target is torch.ops.aten.copy_.default and not node.users):
            graph.erase_node(node)
    output = graph.output_node()
    gradients = [role.kind == "gradient" for role in output.meta["fxmem_roles"]]
    values = sorted(zip(gradients, output.args[0], strict=True), key=lambda pair: pair[0])
    output.args = ([value for _, value in values],)
    return fx.GraphModule(joint, graph), gradients.count(False)
