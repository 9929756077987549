"""The peak of the untransformed module, run by PyTorch's autograd: predicted, with nothing computed.

Forward and backward run on fake tensors, through the real autograd engine, so that what is saved, when it is freed and how
gradients are accumulated are PyTorch's own doing; a dispatch mode watches the storages come and go. Bytes that an operator
takes inside are added from a callback. One thing the engine does otherwise there: what is written into a gradient that nobody
else holds (the second gradient of a value is added into the first; those of chosen elements, into zeros), to fake tensors is
written by making another one.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import MeasureError
from .fake_kernels import FakeCopies, FakeTensorMode
from .measuring import attached_outputs, backward_roots
from .torch_internals import (
    TorchDispatchMode,
    captured_checkpoints,
    owners,
    pytree,
    restore_rng,
    tensors_in,
    without_saved_tensors_hooks,
)

KINDS = ("parameter", "buffer", "input", "activation", "gradient", "workspace")
aten = torch.ops.aten
INTO_ZEROS = {aten.scatter.src, aten.scatter_add.default, aten.index_put.default, aten.index_add.default, aten.put.default}
INTO_FIRST = {aten.add.Tensor, *INTO_ZEROS}
Workspace = Callable[[Any, tuple, dict, Any], int]


@dataclass(frozen=True)
class EagerTimeline:
    """Memory of one eager training step, operator by operator; all bytes include what is there before the step.

    peak_bytes, peak_by_kind: at the peak, by "parameter", "buffer", "input" (given output gradients too), "activation"
        (made by the forward), "gradient" (made by the backward) and "workspace".
    storages_peak_bytes: the most bytes that storages have at any moment, workspaces left out.
    during_bytes[i]: bytes alive while operator i, called op_names[i], runs; the first `num_forward` are the forward's.
    """

    peak_bytes: int
    peak_by_kind: dict[str, int]
    storages_peak_bytes: int
    during_bytes: tuple[int, ...]
    op_names: tuple[str, ...]
    num_forward: int


@without_saved_tensors_hooks()
def eager_timeline(
    module: nn.Module,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    workspace: Workspace | None = None,
    output_gradients: Iterable[torch.Tensor] | None = None,
    roots_of: Callable[[Any], list[torch.Tensor]] | None = None,
    inference: bool = False,
) -> EagerTimeline:
    """Predict the memory of `module`'s training step as `fxmem.measure` would find it.

    args, kwargs: real, fake or meta tensors in any pytree; meta tensors count as the CPU's.
    workspace: bytes that an operator takes inside, from (operator, args, kwargs, result); none if not given.
    output_gradients: as for `measure`; ones, alive from the start, where they are not given.
    roots_of: which tensors of the outputs the backward starts from; as for `measure` if not given.
    inference: whether a forward alone runs, without gradients.

    `module`, its gradients and buffers, and the random number generators are left as they are. Raises MeasureError where no
    output requires grad, and whatever the module raises on fake tensors (data-dependent control flow, mostly).
    """
    ledger = _Ledger(workspace, _alone())
    with (
        restore_rng(),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        torch.set_grad_enabled(not inference),
    ):
        fakes = FakeCopies(mode)
        parameters = {name: fakes.convert(p) for name, p in module.named_parameters()}
        buffers = {name: fakes.convert(b) for name, b in module.named_buffers()}
        inputs = pytree.tree_map_only(torch.Tensor, fakes.convert, (args, kwargs or {}))
        given = None if output_gradients is None else [fakes.convert(g) for g in output_gradients]
        for kind, tree in (("parameter", parameters), ("buffer", buffers), ("input", (inputs, given))):
            for tensor in tensors_in(tree):
                ledger.add(tensor, kind)
        fakes.forget()
        roots_of = roots_of or (backward_roots if given is None else attached_outputs)
        return _run(module, {**parameters, **buffers}, inputs, given, ledger, roots_of)


def _run(
    module: nn.Module, state: dict, inputs: tuple, given: list | None, ledger: _Ledger, roots_of: Callable
) -> EagerTimeline:
    """Forward and backward under the ledger's eyes; the outputs that the backward starts from live to the end."""
    with ledger, captured_checkpoints():
        outputs = torch.func.functional_call(module, state, *inputs)
        ledger.begin_backward()
        if not torch.is_grad_enabled():
            return ledger.timeline()
        roots = roots_of(outputs)
        del outputs
        if not roots:
            raise MeasureError(f"no output of {type(module).__name__} requires grad, so its training step has no backward")
        gradients = ledger.given_ones(roots) if given is None else given
        torch.autograd.backward(roots, gradients)
    return ledger.timeline()


class _Ledger(TorchDispatchMode):
    """Books every storage when an operator makes it, and strikes it out when its last reference goes."""

    def __init__(self, workspace: Workspace | None, alone: dict[Any, tuple[int, int]]):
        super().__init__()
        self._workspace, self._alone = workspace, alone
        self._making = "activation"
        self._watched: dict[int, weakref.ref] = {}
        self._live = dict.fromkeys(KINDS, 0)
        self._records: list[tuple[str, dict[str, int]]] = []
        self._num_forward = 0
        self._silent = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = tensors_in(out)
        if made and not self._silent:
            for tensor in made:
                self.add(tensor, self._making)
            inside = self._workspace(func, args, kwargs, out) if self._workspace else 0
            now = self._live | {"workspace": inside}
            if self._making == "gradient" and func in INTO_FIRST and self._is_written_into(func, args):
                now["gradient"] -= args[0].untyped_storage().nbytes()
            self._records.append((str(func), now))
        return out

    def _is_written_into(self, func: Any, args: tuple) -> bool:
        """Whether autograd would write what it adds or scatters into the first operand."""
        if func not in INTO_ZEROS and (len(args) != 2 or args[0].shape != getattr(args[1], "shape", None)):
            return False
        return owners(args[0]) == self._alone[func]

    def add(self, tensor: torch.Tensor, kind: str) -> None:
        """Book the storage behind `tensor`, unless it is booked."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._watched:
            return

        def strike(_: Any) -> None:
            del self._watched[key]
            self._live[kind] -= size

        self._watched[key] = weakref.ref(storage, strike)
        self._live[kind] += size

    def begin_backward(self) -> None:
        """What operators make from here on are gradients."""
        self._num_forward = len(self._records)
        self._making = "gradient"

    def given_ones(self, roots: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """Output gradients of ones, booked as if they had been there from the start; None for scalars."""
        self._silent = True
        ones = [None if root.dim() == 0 else torch.ones_like(root) for root in roots]
        self._silent = False
        before = self._live["input"]
        for tensor in tensors_in(ones):
            self.add(tensor, "input")
        for _, live in self._records:
            live["input"] += self._live["input"] - before
        return ones

    def timeline(self) -> EagerTimeline:
        during = tuple(sum(live.values()) for _, live in self._records)
        peak = max(range(len(during)), key=during.__getitem__)
        return EagerTimeline(
            peak_bytes=during[peak],
            peak_by_kind=dict(self._records[peak][1]),
            storages_peak_bytes=max(sum(live.values()) - live["workspace"] for _, live in self._records),
            during_bytes=during,
            op_names=tuple(name for name, _ in self._records),
            num_forward=self._num_forward,
        )


@functools.cache
def _alone() -> dict[Any, tuple[int, int]]:
    """What `owners` says, in the dispatch mode's place, of a gradient that autograd alone holds, by what is done to it."""
    found = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in INTO_FIRST:
                found.setdefault(func, owners(args[0]))
            return out

    with torch.inference_mode(False), torch.enable_grad():
        value, first = torch.ones(2, requires_grad=True) * 1, torch.zeros(1, dtype=torch.long)
        twice = value.sin() + value.cos()
        chosen = value.max(0).values + value.gather(0, first) + value[first] + value.index_select(0, first) + value.take(first)
        with Watch():
            twice.sum().backward(retain_graph=True)
            chosen.sum().backward()
    return found
