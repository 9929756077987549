"""What every cost model shares: the call of one operator on fake tensors, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx

from ..errors import CostError
from ..torch_internals import OpOverload, is_view_operator, storage_key, tensors_in


@dataclass(frozen=True)
class OpCost:
    """Cost of one run of one operator.

    time_s: seconds.
    workspace_bytes: the most bytes that it holds while it runs, above its inputs and its outputs.
    """

    time_s: float
    workspace_bytes: int


@dataclass(frozen=True)
class OpCall:
    """One call of an operator: its target, and tensors (fake or meta) or plain values as arguments and results.

    on_gpu: whether it is costed for a GPU, wherever the tensors are; None: where they are.
    """

    target: Any
    args: tuple
    kwargs: dict = field(default_factory=dict)
    out: Any = None
    on_gpu: bool | None = None

    @property
    def packet(self) -> Any:
        """The operator without its overload: aten.add for aten.add.Tensor; None for what is no dispatcher operator."""
        return getattr(self.target, "overloadpacket", None)

    @property
    def inputs(self) -> list[torch.Tensor]:
        return tensors_in((self.args, self.kwargs))

    @property
    def outputs(self) -> list[torch.Tensor]:
        return tensors_in(self.out)

    @property
    def new_output_bytes(self) -> int:
        """Bytes of the storages that the call makes: outputs that alias no input, each storage once."""
        given = {storage_key(t) for t in self.inputs}
        made = {storage_key(t): t.untyped_storage().nbytes() for t in self.outputs}
        return sum(size for key, size in made.items() if key not in given)

    @property
    def is_alias(self) -> bool:
        """True for what moves no data: views, and picking one of several results."""
        if isinstance(self.target, OpOverload):
            if is_view_operator(self.target):
                return True
            return not self.target._schema.is_mutable and bool(self.outputs) and self.new_output_bytes == 0 and not self._empty
        return getattr(self.target, "__name__", "") == "getitem"

    @property
    def _empty(self) -> bool:
        return all(t.numel() == 0 for t in self.outputs)


def call_of(node: fx.Node) -> OpCall:
    """The call that `node` (a call_function) makes, from the fake values in `meta["val"]` of it and of its arguments.

    Raises CostError, naming the node, where a value is missing.
    """

    def value(argument: fx.Node) -> Any:
        if "val" not in argument.meta:
            raise CostError(
                f"node {node.name!r} cannot be costed: {argument.name!r} carries no meta['val']; run the shape "
                "propagation pass first"
            )
        return argument.meta["val"]

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
    return OpCall(node.target, tuple(args), dict(kwargs), value(node))


@runtime_checkable
class CostModel(Protocol):
    """Anything with a name that tells the cost of a node."""

    name: str

    def cost(self, node: fx.Node) -> OpCost:
        """Cost of a call_function node whose arguments and result carry fake tensors in `meta["val"]`."""
