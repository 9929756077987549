"""Fake tensors whose strides, sizes and types are those that the CPU's kernels give, in dimensions of size one too.

PyTorch's fake operators promise shapes and (of all but batch norm's statistics) types; strides they get right for the usual
layouts. But kernels, decompositions and autograd's formulas read memory formats off strides, those of dimensions of size one
included, and choose by them what is copied and in which order sums are taken: a captured graph rounds as the plain module does
only where fake strides are the real ones.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from .kernel_strides import KEPT, LAID_ANEW, VIEWS, Rule, Strides, rules_of, view_strides
from .torch_internals import FakeTensor, TorchFakeTensorMode, dense_strides, pytree, storage_key

aten = torch.ops.aten
CPU = torch.device("cpu")
# Their kernels write the loss of each element to where the mean or sum then stands, whose storage stays as large.
LOSSES = {
    aten.mse_loss.default, aten.smooth_l1_loss.default, aten.binary_cross_entropy.default, aten.soft_margin_loss.default,
}  # fmt: skip


IN_PLACE = {f"{packet.__name__}_" for packet in LAID_ANEW}
_in_place: ContextVar[bool] = ContextVar("in_place", default=False)


class LaidOutInPlace(TorchFunctionMode):
    """While it is on, what a method computes in place lies as its tensor does. Traced, it is a new tensor, which the kernel
    would lay out by rules of its own."""

    @staticmethod
    def is_for(node: fx.Node) -> bool:
        """Whether a node of a torch-level graph is such a method."""
        return getattr(node.target, "__name__", node.target) in IN_PLACE

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = _in_place.set(getattr(func, "__name__", "") in IN_PLACE)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            _in_place.reset(before)


class FakeTensorMode(TorchFakeTensorMode):
    """PyTorch's, but that results lie in memory as the CPU's kernels lay them."""

    def dispatch(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        taken = args
        if func is aten.native_group_norm_backward.default:  # transposed, it would refuse what the kernel takes
            taken = (*(self._laid_out(a, dense_strides(a.shape)) for a in args[:2]), *args[2:])
        made = super().dispatch(func, types, taken, kwargs)
        if func is aten.col2im.default:
            return self._shrunk(made, args[0].numel())
        if func in LOSSES and not made.dim():
            return self._shrunk(made, math.prod(torch.broadcast_shapes(args[0].shape, args[1].shape)))
        if func is aten._embedding_bag.default:
            result, bag_of, bag_sizes, *rest = made
            longer = bag_of.numel() and bag_of.numel() + 1  # it is made with one more, which is then cut off
            return result, self._shrunk(bag_of, longer), self._shrunk(bag_sizes, args[2].numel()), *rest
        if func is aten._native_batch_norm_legit_functional.default and made[0].device.type == "cpu":
            made = self._of_types(made, _statistics_types(*args[:5]))
        kwargs = kwargs or {}
        if func in VIEWS:
            return self._viewed(made, args[0])
        kept = _in_place.get() and getattr(func, "overloadpacket", None) in LAID_ANEW
        rules = (KEPT,) if kept else rules_of(func, args, kwargs)
        if not rules:
            return made
        results = made if isinstance(made, tuple) else (made,)
        given = (*args, *kwargs.values())
        ruled = (self._ruled(result, rule, given) for result, rule in zip(results, rules, strict=False))
        results = (*ruled, *results[len(rules) :])
        return results if isinstance(made, tuple) else results[0]

    def _ruled(self, made: torch.Tensor | None, rule: Rule, given: tuple) -> torch.Tensor | None:
        if made is None or made.device.type != "cpu" or made.dim() < 2:
            return made
        return self._laid_out(made, rule(made, given))

    def _laid_out(self, tensor: torch.Tensor, strides: Strides) -> torch.Tensor:
        if tensor.device.type != "cpu" or tensor.stride() == strides:
            return tensor
        keywords = {"dtype": tensor.dtype, "device": tensor.device}
        return super().dispatch(aten.empty_strided.default, (), (list(tensor.shape), list(strides)), keywords)

    def _viewed(self, made: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        strides = view_strides(base.shape, base.stride(), made.shape)
        if strides is None or made.stride() == strides:
            return made
        return super().dispatch(aten.as_strided.default, (), (base, list(made.shape), list(strides), base.storage_offset()))

    def _of_types(self, made: tuple, dtypes: tuple) -> tuple:
        return tuple(
            t if t.dtype is dtype else super(FakeTensorMode, self).dispatch(aten.empty_like.default, (), (t,), {"dtype": dtype})
            for t, dtype in zip(made, dtypes, strict=True)
        )

    def _shrunk(self, tensor: torch.Tensor, count: int) -> torch.Tensor:
        """The tensor as the first part of `count` elements, which the CPU's kernel took for it before it knew its size."""
        if tensor.device.type != "cpu" or count <= tensor.numel():
            return tensor
        whole = super().dispatch(aten.empty.memory_format, (), ([count],), {"dtype": tensor.dtype, "device": tensor.device})
        return super().dispatch(aten.as_strided.default, (), (whole, list(tensor.shape), list(tensor.stride())))


def _statistics_types(x, weight, bias, mean, variance) -> tuple:
    """Of a batch norm's results on the CPU: in half precision, statistics are wide only where weights or running ones are."""
    others = {t.dtype for t in (weight, bias, mean, variance) if t is not None}
    saved = torch.float32 if torch.float32 in others else x.dtype
    return x.dtype, saved, saved, mean.dtype, variance.dtype


class FakeCopies:
    """Fake copies of real, meta or foreign fake tensors: leaves of their own, over storages as large as the given ones', which
    they share where these do. meta_as: the device that meta tensors count as being on."""

    def __init__(self, mode: FakeTensorMode, meta_as: torch.device = CPU):
        self._mode, self._meta_as = mode, meta_as
        self._flat: dict[tuple, torch.Tensor] = {}
        self._made: dict[int, torch.Tensor] = {}

    def convert(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._made:
            flat = self._storage(tensor)
            with self._mode, torch.no_grad():
                view = torch.as_strided(flat, tensor.shape, tensor.stride(), tensor.storage_offset())
                self._made[id(tensor)] = view.detach().requires_grad_(tensor.requires_grad)
        return self._made[id(tensor)]

    def forget(self) -> None:
        """Let go of what was made, so that it lives only as long as the step needs it."""
        self._flat.clear()
        self._made.clear()

    def _storage(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage_key(tensor), tensor.dtype
        if key not in self._flat:
            device = self._meta_as if tensor.is_meta else tensor.device
            with self._mode:
                self._flat[key] = torch.empty(storage.nbytes() // tensor.element_size(), dtype=tensor.dtype, device=device)
        return self._flat[key]


@contextlib.contextmanager
def fake_mode_of(tree: Any, allow_real: bool = False) -> Iterator[FakeTensorMode]:
    """The fake mode of the fake tensors in `tree` (a new one if there are none), on; real tensors may mix in if allowed."""
    mode = next((t.fake_mode for t in pytree.tree_leaves(tree) if isinstance(t, FakeTensor)), None) or FakeTensorMode()
    before, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, allow_real
    try:
        with mode:
            yield mode
    finally:
        mode.allow_non_fake_inputs = before
