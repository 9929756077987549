"""Running a chain of regions: the tape that they share, and the one autograd Function behind all of them.

A region's forward takes arguments (parameters, buffers, inputs) and what earlier regions left on the tape; its backward takes
incoming gradients and the tape's values, and hands over gradients of its arguments. Activations and their gradients never pass
through autograd: only a token does, of no bytes, from region to region, which fixes the order of the backward.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ..errors import TapeError
from ..layouts import with_strides
from .arena import ArenaPool, Lease, lend
from .partition import GraphSpec, RegionGraphs, RegionSpec, boxed
from .serialize import graph_from_data, graph_to_data


class Tape:
    """Where the values of one forward call live between its regions, each until its last use.

    values: by the name of the node that made them. awaiting: the region whose backward comes next.
    watched: (leaf index, alias, version) of the model outputs whose bytes the backward will read.
    absent: output leaves that got no gradient.
    lease: of the arena in which the graphs write, where there is one.
    """

    __slots__ = ("absent", "awaiting", "lease", "token", "values", "watched")

    def __init__(self, regions: int, device: torch.device, lease: Lease | None = None):
        self.values: dict[str, torch.Tensor] = {}
        self.token: torch.Tensor | None = torch.empty(0, device=device, requires_grad=True)
        self.awaiting = regions - 1
        self.absent: set[int] = set()
        self.watched: list[tuple[int, torch.Tensor, int]] = []
        self.lease = lease

    def begin_backward(self, region: Region) -> None:
        """Check that this backward may run: each tape serves one, in order, on values nobody has changed since."""
        if torch.is_grad_enabled():
            raise TapeError(
                "double backward (create_graph=True, torch.func.grad) through a planned module is not supported: "
                "its backward is not recorded; "
                "use the module that it was made from"
            )
        if self.awaiting != region.index:
            raise TapeError(
                f"the backward of region {region.name!r} runs a second time, but the values that it needs were freed by the "
                "first: run the forward again (retain_graph=True does not keep a planned module's values)"
            )
        self.awaiting -= 1
        for leaf, alias, version in self.watched:
            if alias._version != version:
                raise TapeError(
                    f"output {leaf} of the planned module was changed in place before the backward, which needs "
                    "it: change a clone instead"
                )
        self.watched.clear()

    def end(self) -> None:
        """The step is over: its arena is free for the next."""
        if self.lease is not None:
            self.lease.end()


class Region(nn.Module):
    """A part of the model that one autograd Function runs; called with the tape (but for the first) and its arguments.

    forward_graph, backward_graph: GraphModules over a boxed list of arguments; `.code` shows what runs.
    arenas: in the first region, where the chain gets its arena from; None without one.
    Returns the tape, or, from the last region, the model's tensor outputs.
    """

    def __init__(
        self,
        graphs: RegionGraphs,
        index: int,
        count: int,
        expected: frozenset[int],
        attached: frozenset[int],
        arenas: ArenaPool | None = None,
    ):
        super().__init__()
        self.arenas = arenas
        self.spec, self.index, self.count = graphs.spec, index, count
        self.expected, self.attached = expected, attached
        self.forward_graph = fx.GraphModule({}, graphs.forward, "Forward")
        self.backward_graph = fx.GraphModule({}, graphs.backward, "Backward")

    def __reduce__(self):
        graphs = graph_to_data(self.forward_graph.graph), graph_to_data(self.backward_graph.graph)
        return _region, (self.spec, *graphs, self.index, self.count, self.expected, self.attached, self.arenas)

    def __deepcopy__(self, memo: dict) -> Region:
        function, arguments = self.__reduce__()
        memo[id(self)] = copied = function(*arguments[:-1], copy.deepcopy(self.arenas, memo))
        return copied

    @property
    def name(self) -> str:
        return self.spec.name

    def forward(self, *inputs):
        return run_region(self, *inputs)

    def extra_repr(self) -> str:
        forward, backward = (len(graph_module.graph.nodes) for graph_module in (self.forward_graph, self.backward_graph))
        return f"{self.name}, {forward} forward and {backward} backward nodes"

    def run_forward(self, tape: Tape, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Run the forward graph; in the last region, return the model's tensor outputs in the order of `spec.results`."""
        _run(self.forward_graph, self.spec.forward, tape, arguments)
        outputs = tuple(tape.values.pop(name) for _, name, _ in self.spec.results)
        for (_, name, kept), value in zip(self.spec.results, outputs, strict=True):
            if kept:  # under another tensor: an output that its own graph refers to would never be freed
                tape.values[name] = value.detach()
        if outputs:
            read_later = {value.untyped_storage().data_ptr() for value in tape.values.values()}
            tape.watched = [
                (leaf, value.detach(), value._version)
                for (leaf, _, _), value in zip(self.spec.results, outputs, strict=True)
                if value.untyped_storage().data_ptr() in read_later
            ]
        return outputs

    def run_backward(self, tape: Tape, arguments: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Run the backward graph; returns the gradients that are complete then, by argument index."""
        _run(self.backward_graph, self.spec.backward, tape, arguments)
        complete = {argument: tape.values.pop(name) for argument, name, _ in self.spec.gradients}
        return {a: complete[a] for a, _, depends_on in self.spec.gradients if not depends_on or depends_on - tape.absent}


def _region(spec: RegionSpec, forward: list, backward: list, *rest) -> Region:
    """A region from the data that its pickle holds."""
    return Region(RegionGraphs(spec, boxed(graph_from_data(forward)), boxed(graph_from_data(backward))), *rest)


def _run(graph: fx.GraphModule, spec: GraphSpec, tape: Tape, arguments: Any) -> None:
    """Call a graph, boxed: nothing here keeps a value that the graph is the last to read."""
    boxed = []
    for where, key in spec.inputs:
        if where == "argument":
            boxed.append(arguments[key])
        elif where == "arena":
            boxed.append(tape.lease.arena)
        else:
            boxed.append(tape.values.pop(key) if key in spec.taken else tape.values[key])
    with _precision_as_captured():
        made = graph.forward(boxed)
    tape.values.update(zip(spec.outputs, made, strict=True))


@contextlib.contextmanager
def _precision_as_captured() -> Iterator[None]:
    """Autocast is part of the captured graph already; it must not act a second time."""
    active = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    with contextlib.ExitStack() as stack:
        for kind in active:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@fx.wrap
def run_region(region: Region, *inputs):
    """Run one region of the chain: `inputs` are the tape (but for the first region) and the region's arguments."""
    tape, arguments = (_tape(region, inputs), inputs) if region.index == 0 else (inputs[0], inputs[1:])
    token, *outputs = RegionFunction.apply(region, tape, tape.token, *arguments)
    if region.index < region.count - 1:
        tape.token = token
        return tape
    tape.token = None  # the chain is complete: autograd holds it from the outputs
    return tuple(outputs)


def _tape(region: Region, inputs: tuple[torch.Tensor, ...]) -> Tape:
    return Tape(region.count, inputs[0].device, lend(region.arenas, inputs))


class RegionFunction(torch.autograd.Function):
    """The one autograd Function behind all regions; which graphs it runs is data."""

    @staticmethod
    def forward(region: Region, tape: Tape, token: torch.Tensor, *arguments: torch.Tensor):
        outputs = region.run_forward(tape, arguments)
        return torch.empty_like(token), *outputs

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        region, tape, token, *arguments = inputs
        ctx.region, ctx.tape, ctx.token_device = region, tape, token.device
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(arguments[i] for i in region.spec.saved))
        leaves = [leaf for leaf, _, _ in region.spec.results]
        ctx.mark_non_differentiable(*(v for leaf, v in zip(leaves, output[1:], strict=True) if leaf not in region.attached))
        ctx.templates = [
            (leaf, v.shape, v.dtype, v.device) for leaf, v in zip(leaves, output[1:], strict=True) if leaf in region.expected
        ]

    @staticmethod
    def backward(ctx, token_gradient, *output_gradients):
        region, tape = ctx.region, ctx.tape
        tape.begin_backward(region)
        _put_tangents(region, tape, ctx.templates, output_gradients)
        arguments = dict(zip(region.spec.saved, ctx.saved_tensors, strict=True))
        ctx.maybe_clear_saved_tensors()
        gradients = region.run_backward(tape, arguments)
        if region.index == 0:
            tape.end()
        wanted = ctx.needs_input_grad[3:]
        token_gradient = torch.empty(0, device=ctx.token_device) if region.index else None
        return None, None, token_gradient, *(gradients.pop(i, None) if needed else None for i, needed in enumerate(wanted))


def _put_tangents(region: Region, tape: Tape, templates: list[tuple], gradients: tuple[torch.Tensor | None, ...]) -> None:
    """Put the incoming gradients on the tape; an output that got none counts as zero."""
    given = {
        leaf: gradient for (leaf, _, _), gradient in zip(region.spec.results, gradients, strict=True) if gradient is not None
    }
    surprising = sorted(set(given) - region.expected)
    if surprising:
        raise TapeError(
            f"output leaf {surprising[0]} got a gradient, but the step was planned for gradients of leaves "
            f"{sorted(region.expected)} "
            "alone (a scalar loss among the outputs is taken for the start of the backward): transform with "
            'output_gradients="all"'
        )
    planned = {leaf: (name, stride) for leaf, name, stride in region.spec.tangents}
    tape.absent |= {leaf for leaf in planned if leaf not in given}
    for leaf, shape, dtype, device in templates:
        if leaf in planned:
            name, stride = planned[leaf]
            tangent = given[leaf] if leaf in given else torch.zeros(shape, dtype=dtype, device=device)
            tape.values[name] = with_strides(tangent, stride)  # a view of any other may not exist
