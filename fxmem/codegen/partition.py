"""Cuts an emitted graph into the forward and backward graph of every region, and says what passes between them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from ..roles import Role


@dataclass(frozen=True)
class GraphSpec:
    """How one graph of a region is called.

    inputs: where each of its arguments comes from: ("argument", index), ("tape", name), or ("arena", "").
    taken: names of the tape's values that no later graph needs: this graph gets the last reference to them.
    outputs: names of the values that it returns, all of which go onto the tape.
    """

    inputs: tuple[tuple[str, int | str], ...]
    taken: frozenset[str]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class RegionSpec:
    """One region: how its graphs are called, and what it exchanges with autograd.

    arguments: the Roles (parameters, buffers, inputs) of its arguments.
    saved: indices of the arguments that its backward reads.
    gradients: for each gradient that it hands over (argument index, its name on the tape, output leaves that it depends on).
    results: in the last region, for each tensor output of the model (leaf index, its name on the tape, whether the backward
        reads it too).
    tangents: in the last region, for each incoming gradient (leaf index, the name that it gets on the tape, strides).
    """

    name: str
    forward: GraphSpec
    backward: GraphSpec
    arguments: tuple[Role, ...]
    saved: tuple[int, ...]
    gradients: tuple[tuple[int, str, frozenset[int]], ...]
    results: tuple[tuple[int, str, bool], ...] = ()
    tangents: tuple[tuple[int, str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class RegionGraphs:
    """A region's spec and its two graphs."""

    spec: RegionSpec
    forward: fx.Graph
    backward: fx.Graph


def partition(graph: fx.Graph, names: tuple[str, ...]) -> tuple[RegionGraphs, ...]:
    """Cut an emitted joint graph (see `emit`) into its regions, in forward order."""
    return _Partition(graph, names or ("root",)).run()


class _Partition:
    """Graphs are numbered in the order in which they run: forward 0..K-1, then backward K-1..0."""

    def __init__(self, graph: fx.Graph, names: tuple[str, ...]):
        self.graph, self.names, self.count = graph, names, len(names)
        self.members: list[list[fx.Node]] = [[] for _ in range(2 * self.count)]
        self.home: dict[fx.Node, int] = {}
        for node in graph.nodes:
            if node.op not in ("placeholder", "output"):
                self.home[node] = self._number(node)
                self.members[self.home[node]].append(node)
        self.roles = {n: n.meta["fxmem_role"] for n in graph.nodes if n.op == "placeholder" and "fxmem_role" in n.meta}
        output = graph.output_node()
        pairs = list(zip(output.args[0], output.meta["fxmem_roles"], strict=True))
        self.results = [(role.key, value) for value, role in pairs if role.kind in ("output", "output_only")]
        self.gradients = [(role.key, value) for value, role in pairs if role.kind == "gradient"]
        self.last_read = self._last_reads()
        self.last_use = self._last_uses()
        self.tangents = _tangent_dependencies(graph)

    def run(self) -> tuple[RegionGraphs, ...]:
        return tuple(self._region(r) for r in range(self.count))

    def _number(self, node: fx.Node) -> int:
        region = node.meta["fxmem_region"]
        return region if node.meta["fxmem_phase"] == "forward" else 2 * self.count - 1 - region

    def _giver(self, value: fx.Node) -> int:
        """The backward graph that hands a gradient over: the last one that reads its bytes, since a hook may change them."""
        return max(self.last_read[s] for s in value.meta["fxmem_storages"])

    def _last_reads(self) -> dict[int, int]:
        """The last graph that makes or reads the bytes of each storage."""
        last: dict[int, int] = {}
        for number, nodes in enumerate(self.members):
            for node in nodes:
                for shown in (node, *node.all_input_nodes):
                    last.update(dict.fromkeys(shown.meta.get("fxmem_storages", ()), number))
        return last

    def _last_uses(self) -> dict[fx.Node, int]:
        """The last graph that reads each value; the model's outputs are read by the last forward graph."""
        last: dict[fx.Node, int] = {}
        for number, nodes in enumerate(self.members):
            for node in nodes:
                last.update(dict.fromkeys(node.all_input_nodes, number))
        for _, value in self.results:
            last[value] = max(last.get(value, 0), self.count - 1)
        for _, value in self.gradients:
            last[value] = max(last.get(value, 0), self._giver(value))
        return last

    def _region(self, region: int) -> RegionGraphs:
        forward_number, backward_number = region, 2 * self.count - 1 - region
        gradients = [(role, value) for role, value in self.gradients if self._giver(value) == backward_number]
        forward_reads = self._reads(forward_number)
        backward_reads = self._reads(backward_number, [v for _, v in gradients])
        role_of = {role: node for node, role in self.roles.items()}
        fixed = [n for n in (*forward_reads, *backward_reads, *(role_of[r] for r, _ in gradients)) if self._is_argument(n)]
        results = self.results if region == self.count - 1 else []
        arguments = {node: i for i, node in enumerate(dict.fromkeys(fixed))}
        spec = RegionSpec(
            name=self.names[region],
            forward=self._spec(forward_number, forward_reads, arguments),
            backward=self._spec(backward_number, backward_reads, arguments, [v for _, v in gradients]),
            arguments=tuple(self.roles[n] for n in arguments),
            saved=tuple(arguments[n] for n in backward_reads if n in arguments),
            gradients=tuple((arguments[role_of[r]], v.name, self.tangents[v]) for r, v in gradients),
            results=tuple((leaf, v.name, self.last_use[v] > forward_number) for leaf, v in results),
            tangents=self._tangents() if region == self.count - 1 else (),
        )
        return RegionGraphs(
            spec,
            self._graph(forward_number, forward_reads, spec.forward),
            self._graph(backward_number, backward_reads, spec.backward),
        )

    def _is_argument(self, node: fx.Node) -> bool:
        return node in self.roles and self.roles[node].kind != "tangent"

    def _tangents(self) -> tuple[tuple[int, str, tuple[int, ...]], ...]:
        found = ((n, role) for n, role in self.roles.items() if role.kind == "tangent" and n in self.last_use)
        return tuple((role.key, n.name, n.meta["val"].stride()) for n, role in found)

    def _source(self, node: fx.Node, arguments: dict[fx.Node, int]) -> tuple[str, int | str]:
        if "fxmem_is_arena" in node.meta:
            return ("arena", "")
        return ("argument", arguments[node]) if node in arguments else ("tape", node.name)

    def _reads(self, number: int, returned: list[fx.Node] = ()) -> list[fx.Node]:
        """What a graph takes from outside, in the order of first use; what it only returns comes last."""
        used = [n for node in self.members[number] for n in node.all_input_nodes] + list(returned)
        return [n for n in dict.fromkeys(used) if self.home.get(n, -1) != number]

    def _spec(self, number: int, reads: list[fx.Node], arguments: dict, returned: list[fx.Node] = ()) -> GraphSpec:
        carried = [n for n in self.members[number] if self.last_use.get(n, -1) > number or self._is_result(n, number)]
        outputs = dict.fromkeys([*carried, *returned])
        return GraphSpec(
            inputs=tuple(self._source(n, arguments) for n in reads),
            taken=frozenset(n.name for n in reads if n not in arguments and self.last_use[n] == number),
            outputs=tuple(n.name for n in outputs),
        )

    def _is_result(self, node: fx.Node, number: int) -> bool:
        return number == self.count - 1 and any(value is node for _, value in self.results)

    def _graph(self, number: int, reads: list[fx.Node], spec: GraphSpec) -> fx.Graph:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in reads:
            copies[node] = graph.create_node("placeholder", node.name, name=node.name)
            copies[node].target = copies[node].name  # else the argument's own variable would hold the value to the end
            copies[node].meta = dict(node.meta)
        for node in self.members[number]:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        by_name = {n.name: copy for n, copy in copies.items()}
        graph.output(tuple(by_name[name] for name in spec.outputs))
        return boxed(graph)


def boxed(graph: fx.Graph) -> fx.Graph:
    """Make `graph` take its arguments in one list, and say in its code what is a recompute."""
    graph.set_codegen(BoxedCodeGen())
    graph.on_generate_code(lambda _: Comments(graph))
    return graph


class BoxedCodeGen(fx.graph.CodeGen):
    """Graphs that take their arguments in one list and empty it, so that nothing outside keeps an argument alive."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_) -> str:
        names = [v.split(":")[0].split("=")[0].strip() for v in free_vars if v != "self"]
        unpack = f"\n    {', '.join(names)}, = boxed_args\n    boxed_args.clear()" if names else ""
        return f"def forward(self, boxed_args):{unpack}"


class Comments:
    """Writes above every recompute what it repeats and how many bytes are not kept for it, and names what runs in place and by
    another implementation."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph

    def __call__(self, body: list[str]) -> list[str]:
        notes = {}
        for node in self.graph.nodes:
            found = list(_notes(node))
            if found:
                notes[node.name] = f"# {'; '.join(found)}\n"
        written = []
        for line in body:
            name = re.match(r"\s*(\w+)(?: :[^=]*)? = ", line)
            if name and name[1] in notes:
                written.append(notes[name[1]])
            written.append(line)
        return written


def _notes(node: fx.Node) -> Iterator[str]:
    meta = node.meta
    if "fxmem_recomputes" in meta:
        again = meta["fxmem_recomputes"]
        what = (
            f"{again} by {meta['fxmem_implementation']}" if meta.get("fxmem_offers") == "variant" else f"recompute of {again}"
        )
        yield f"{what}: {meta.get('fxmem_avoided_bytes', 0):,} bytes not kept"
    elif meta.get("fxmem_offers") == "encoder":
        yield f"what {meta['fxmem_implementation']} keeps"
    elif meta.get("fxmem_offers") == "alternative":
        yield f"by {meta['fxmem_implementation']}"
    if "fxmem_inplace_over" in meta:
        yield f"in place of {meta['fxmem_inplace_over']}"
    if "fxmem_slots" in meta:
        yield f"bytes {', '.join(f'{begin:,} to {end:,}' for begin, end in meta['fxmem_slots'])} of the arena"


def _tangent_dependencies(graph: fx.Graph) -> dict[fx.Node, frozenset[int]]:
    """For each node the output leaves whose incoming gradients it depends on."""
    found: dict[fx.Node, frozenset[int]] = {}
    for node in graph.nodes:
        role = node.meta.get("fxmem_role") if node.op == "placeholder" else None
        own = frozenset([role.key]) if role and role.kind == "tangent" else frozenset()
        found[node] = own.union(*(found[n] for n in node.all_input_nodes))
    return found
