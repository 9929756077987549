"""From an annotated joint graph to the torch-free Problem.

Every node that makes a storage, or writes one, becomes an operator; views become nothing, since whoever needs a view can make
it again from its base for free. Order is the graph's own. What implementations offer stands beside the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from .graph_meta import StorageInfo, is_backward, is_view, line_of, module_of, require, storages_read
from .problem import Operator, Problem, Storage
from .torch_internals import OpOverload

aten = torch.ops.aten

TAGGED = ("aten", "prims", "fxmem", "torchvision")  # whose operators say of themselves that they draw random numbers
BATCH_NORM = aten._native_batch_norm_legit_functional.default


@dataclass(frozen=True)
class Lowered:
    """A Problem and the nodes that its operators stand for: `nodes[i]` is operator i, the dropout for a dropout's variant."""

    problem: Problem
    nodes: tuple[fx.Node, ...]


def lower(graph_module: fx.GraphModule, order: Sequence[int] | None = None) -> Lowered:
    """The Problem of a joint graph that ShapeProp and Costs have annotated.

    order: that of the program's operators, where it is to be another than the graph's.
    """
    require(graph_module, "fxmem_storages", "ShapeProp")
    infos = graph_module.meta["fxmem_storages"]
    made = [n for n in graph_module.graph.nodes if n.op == "call_function" and not is_view(n, infos)]
    nodes = sorted((n for n in made if "fxmem_offers" not in n.meta), key=is_backward)
    # Stable: what the backward computes without tangents may stand anywhere.
    written = {s for n in nodes if "fxmem_writes" in n.meta for s in n.args[0].meta["fxmem_storages"]}
    returned = set(_returned(graph_module, ("output", "output_only", "gradient")))
    operators = [_operator(node, infos, written, returned) for node in nodes]
    forward_end = sum(not is_backward(n) for n in nodes)
    operators.insert(forward_end, _return_operator(graph_module))
    nodes.insert(forward_end, graph_module.graph.output_node())
    if order is not None:
        operators, nodes = [operators[p] for p in order], [nodes[p] for p in order]
    beside = [(n, _dropout_variant(n, o)) for n, o in zip(nodes, operators, strict=True) if "fxmem_variant_cost" in n.meta]
    beside += _offers(made, {n: p for p, n in enumerate(nodes)}, operators, infos, written, returned)
    problem = Problem(
        storages=tuple(_storage(info) for info in infos),
        operators=(*operators, *(operator for _, operator in beside)),
        num_forward=forward_end + 1,
        num_program=len(nodes),
        outputs=_outputs(graph_module, infos),
        extra_bytes=sum(rng_state_bytes(n) for n in nodes if n.op == "call_function" and draws_random_numbers(n)),
    )
    return Lowered(problem, (*nodes, *(n for n, _ in beside)))


def _offers(
    made: list[fx.Node],
    place: dict[fx.Node, int],
    operators: list[Operator],
    infos: tuple[StorageInfo, ...],
    written: set[int],
    returned: set[int],
) -> list[tuple[fx.Node, Operator]]:
    """What `OfferImplementations` has added, encoders first."""
    found = []
    for what in ("encoder", "variant", "alternative"):
        for node in made:
            if node.meta.get("fxmem_offers") == what:
                operator = _operator(node, infos, written, returned)
                if what == "alternative":
                    index = place[infos[node.meta["fxmem_storages"][0]].node]
                    if set(operators[index].outputs) != set(operator.outputs):
                        continue  # it makes a part of what it would stand for
                    operator = replace(operator, replaces=index)
                found.append((node, operator))
    return found


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether the node takes numbers from the device's default generator. Operators of others may, whatever their tags say."""
    if not isinstance(node.target, OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags and node.target.namespace in TAGGED:
        return False
    arguments = node.normalized_arguments(node.graph.owning_module, normalize_to_only_use_kwargs=True)
    return not arguments or arguments.kwargs.get("dropout_p") != 0.0


def node_device(node: fx.Node) -> torch.device:
    """The device of the node's first tensor."""
    value = node.meta["val"]
    first = value if isinstance(value, torch.Tensor) else next(v for v in value if isinstance(v, torch.Tensor))
    return first.device


def rng_state_bytes(node: fx.Node) -> int:
    """Bytes of a saved state of the generator that the node draws from (Mersenne Twister, or Philox seed and offset)."""
    return 16 if node_device(node).type == "cuda" else 5056


def _storage(info: StorageInfo) -> Storage:
    role = info.node.meta.get("fxmem_role")
    if info.is_input:
        kind = role.kind if role and role.kind in ("parameter", "buffer") else "input"
    else:
        kind = "gradient" if is_backward(info.node) else "activation"
    return Storage(info.node.name, info.size_bytes, kind)


def _outputs(graph_module: fx.GraphModule, infos: tuple[StorageInfo, ...]) -> frozenset[int]:
    """Storages that outlive the step and are not there from the start: gradients, and outputs that the backward starts from."""
    return frozenset(s for s in _returned(graph_module, ("gradient", "output")) if not infos[s].is_input)


def _return_operator(graph_module: fx.GraphModule) -> Operator:
    """The end of the forward: every output is there. Those that get no gradient may die here: a training step drops them."""
    inputs = _returned(graph_module, ("output", "output_only"))
    return Operator("return", tuple(dict.fromkeys(inputs)), (), recomputable=False)


def _returned(graph_module: fx.GraphModule, kinds: tuple[str, ...]) -> list[int]:
    """Storages of the graph's results whose roles are of the given kinds, where no roles are known of all."""
    output = graph_module.graph.output_node()
    roles = output.meta.get("fxmem_roles")
    nodes = (
        output.all_input_nodes if roles is None else [v for v, r in zip(output.args[0], roles, strict=True) if r.kind in kinds]
    )
    return [s for n in nodes for s in n.meta["fxmem_storages"]]


def _operator(node: fx.Node, infos: tuple[StorageInfo, ...], written: set[int], returned: set[int]) -> Operator:
    stands_in = "fxmem_stands_for" in node.meta
    outputs = tuple(s for s in node.meta["fxmem_storages"] if stands_in or infos[s].node is node)
    inputs = tuple(dict.fromkeys(storages_read(node)))
    going_back_bytes = rng_state_bytes(node) if draws_random_numbers(node) else 0  # to the generator's state after a repeat
    return Operator(
        name=node.name,
        inputs=inputs,
        outputs=outputs,
        time_s=node.meta["fxmem_time_s"],
        workspace_bytes=node.meta["fxmem_workspace_bytes"] + going_back_bytes,
        inplace=_inplace_pairs(node, outputs, infos, returned),
        recomputable=_recomputable(node, written),
        module=module_of(node),
        source=line_of(node),
        implementation=node.meta.get("fxmem_implementation", ""),
    )


def _recomputable(node: fx.Node, written: set[int]) -> bool:
    """False for what must run once: writes, asserts, own generators, and readers of buffers that have moved on since."""
    if not node.meta["fxmem_storages"] or "fxmem_writes" in node.meta:
        return False
    if node.kwargs.get("generator") is not None:
        return False
    if node.target is BATCH_NORM and node.args[5] is True:
        # Run again it neither reads nor makes running statistics, so nobody may want these later.
        moved = (u for u in node.users if u.args[1] in (3, 4))
        if node.args[1] is None and node.args[2] is None and node.meta["val"][1].dtype != node.args[0].meta["val"].dtype:
            return False  # without the running statistics, nothing tells the repeat to sum up in their type
        return all("fxmem_writes" in u.meta or u.op == "output" for item in moved for u in item.users)
    return written.isdisjoint(storages_read(node))  # through views, too


def _inplace_pairs(
    node: fx.Node, outputs: tuple[int, ...], infos: tuple[StorageInfo, ...], returned: set[int]
) -> tuple[tuple[int, int], ...]:
    """(input, output) pairs that `MarkInplace` found, but for what a caller can see: an output may outlive its last use."""
    operands = [node.args[i].meta["fxmem_storages"][0] for i in node.meta.get("fxmem_inplace", ())]
    return tuple((s, outputs[0]) for s in operands if not infos[s].is_input and s not in returned)


def _dropout_variant(node: fx.Node, dropout: Operator) -> Operator:
    """A dropout whose mask was kept runs again as two multiplications, without drawing."""
    cost = node.meta["fxmem_variant_cost"]
    result, mask = dropout.outputs
    source = node.args[0].meta["fxmem_storages"][0]
    return Operator(
        name=f"{dropout.name}_from_mask",
        inputs=(source, mask),
        outputs=(result,),
        time_s=cost.time_s,
        workspace_bytes=cost.workspace_bytes,
        module=dropout.module,
        source=dropout.source,
    )
