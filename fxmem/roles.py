"""What a joint graph's placeholders and outputs are to the user: parameters, buffers, inputs, gradients of these, outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .errors import CaptureError
from .fake_kernels import fake_mode_of
from .graph_meta import source_of
from .torch_internals import input_role, output_role, pytree


@dataclass(frozen=True)
class Role:
    """What a placeholder or output of the joint graph is to the user.

    kind: "parameter", "buffer", "input", "tangent" (placeholders); "output", "output_only" (an output that gets no gradient),
        "buffer_update", "gradient" (outputs).
    key: the parameter's or buffer's name, or the index of the input or output leaf; of a gradient, the Role it is for.
    """

    kind: str
    key: Any


def assign_roles(
    joint: fx.GraphModule,
    traced: fx.GraphModule,
    names: Mapping[int, str],
    input_names: list[str],
    differentiated: tuple[int, ...],
) -> tuple[dict[str, torch.Tensor], dict[int, Any]]:
    """Mark the placeholders and outputs of a joint graph with their Roles, in `meta["fxmem_role"]` and `meta["fxmem_roles"]`.

    traced: the torch-level graph that the joint graph was made from. names: the user's name of each parameter and buffer, by
    its id. input_names: the user's names of the input leaves. differentiated: indices of the outputs that get gradients.
    Returns tensors that the graph reads and nobody named, and the outputs that are no tensors.
    """
    naming = _Naming(traced, names)
    _refuse_mutations(joint, naming, input_names)
    _mark_inputs(joint, naming)
    _merge_tied_inputs(joint.graph)
    fixed_outputs = _mark_outputs(joint, naming, differentiated)
    joint.graph.eliminate_dead_code()
    joint.recompile()
    return naming.constants, fixed_outputs


class _Naming:
    """Roles in the user's names; what has none becomes a constant."""

    def __init__(self, traced: fx.GraphModule, names: Mapping[int, str]):
        self.tensors = dict((*traced.named_parameters(remove_duplicate=False), *traced.named_buffers(remove_duplicate=False)))
        self.names = names
        self.constants: dict[str, torch.Tensor] = {}

    def role(self, found: tuple[str, Any] | None, what: str) -> Role:
        if found is None:
            raise CaptureError(f"{what} of the joint graph is of a kind that fxmem does not know; please report the model")
        kind, key = found
        if kind not in ("parameter", "buffer"):
            return Role(kind, key)
        tensor = self.tensors[key]
        if id(tensor) in self.names:
            return Role(kind, self.names[id(tensor)])
        name = f"constant_{key}".replace(".", "_")
        self.constants.setdefault(name, tensor)
        return Role("buffer", name)


def _results(joint: fx.GraphModule) -> list[tuple[str | None, Any, Any]]:
    """(kind, key, value) of everything that the joint graph returns."""
    output = joint.graph.output_node()
    values = pytree.tree_leaves(output.args, is_leaf=lambda v: v is None)
    described = [(d, v) for v, d in zip(values, output.meta["desc"], strict=True) if d is not None]
    return [(*(output_role(d) or (None, d)), v) for d, v in described]


def _refuse_mutations(joint: fx.GraphModule, naming: _Naming, input_names: list[str]) -> None:
    for kind, key, value in _results(joint):
        if kind != "mutation":
            continue
        role = naming.role(key, "a mutated input")
        if role.kind != "buffer":
            name = input_names[role.key] if role.kind == "input" else role.key
            raise CaptureError(
                f"{role.kind} {name!r} is changed in place by the module ({source_of(value)}): a planned module "
                "may only change "
                "buffers; work on a clone of it instead"
            )


def _mark_inputs(joint: fx.GraphModule, naming: _Naming) -> None:
    for node in joint.graph.nodes:
        if node.op == "placeholder" and not node.users and "val" not in node.meta:
            joint.graph.erase_node(node)  # an argument that is no tensor: its value is part of the graph
        elif node.op == "placeholder":
            role = naming.role(input_role(node.meta["desc"]), f"input {node.name!r} ({node.meta['desc']})")
            node.meta["fxmem_role"] = role
            if role.kind == "tangent":  # traced as a view of an input where its output is one
                with fake_mode_of(node.meta["val"]):
                    node.meta["val"] = torch.empty_like(node.meta["val"])
        elif node.op == "get_attr":
            naming.constants[node.name] = _lift_constant(joint, node)


def _mark_outputs(joint: fx.GraphModule, naming: _Naming, differentiated: tuple[int, ...]) -> dict[int, Any]:
    """Leaves tensors alone among the outputs; returns the output leaves that are none."""
    found, fixed = [], {}
    for kind, key, value in _results(joint):
        role = _output_role(kind, key, naming, differentiated)
        if isinstance(value, fx.Node):
            found.append((role, value))
        elif role.kind.startswith("output"):
            fixed[role.key] = value
    results = dict(found)
    if len(results) < len(found):
        raise CaptureError("a tensor has two gradients in the joint graph, which must not be; please report the model")
    output = joint.graph.output_node()
    output.args = (tuple(results.values()),)
    output.meta["fxmem_roles"] = tuple(results)
    return fixed


def _output_role(kind: str | None, key: Any, naming: _Naming, differentiated: tuple[int, ...]) -> Role:
    if kind == "mutation":
        return Role("buffer_update", naming.role(key, "a mutated input").key)
    if kind == "gradient":
        return Role("gradient", naming.role(key, "an input with a gradient"))
    role = naming.role((kind, key) if kind else None, f"output {key}")
    return role if role.key in differentiated else Role("output_only", role.key)


def _merge_tied_inputs(graph: fx.Graph) -> None:
    """One placeholder for each buffer: a GraphModule's are traced once for every name that they have."""
    first: dict[Role, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        kept = first.setdefault(node.meta["fxmem_role"], node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)


def _lift_constant(joint: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    """Make a tensor that tracing put on the graph module (a literal in the user's code) an input of the joint graph."""
    value = getattr(joint, node.target, None)
    if not isinstance(value, torch.Tensor):
        raise CaptureError(
            f"{source_of(next(iter(node.users)))} is a higher-order operator (it runs a graph of its own), which "
            "fxmem cannot plan yet: "
            "keep it outside of the transformed module"
        )
    first = next(iter(joint.graph.nodes))
    with joint.graph.inserting_before(first):
        placeholder = joint.graph.placeholder(node.name)
    placeholder.meta.update(node.meta, val=value, fxmem_role=Role("buffer", node.name))
    node.replace_all_uses_with(placeholder)
    joint.graph.erase_node(node)
    return value
