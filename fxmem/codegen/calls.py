"""Calls of a module: one way to write the arguments, and what of module and arguments a plan depends on."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..torch_internals import attribute_at, pytree

CONSTANTS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Call:
    """A call of a module as far as a plan depends on it; two calls with equal keys can share a plan.

    key: of the arguments structure, shapes, and values of what is no tensor; of the module types and modes of its submodules,
        the settings of PyTorch's own layers (a dropout's probability, a batch norm's momentum), and shapes of parameters and
        buffers.
    autocast: where it is in force, and its dtype.
    read: (path, what stands there) of the other attributes that the captured graph has read.
    """

    key: tuple
    autocast: tuple
    read: tuple[tuple[str, Any], ...] = ()

    @staticmethod
    def of(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], paths: Iterable[str] = ()) -> Call:
        """A call of a module that a plan is to be made for. paths: of the attributes that its graph has read."""
        return Call._of(module, args, kwargs, _other_names(module, paths))

    @staticmethod
    def _of(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], paths: Iterable[tuple[str, str | None]]) -> Call:
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        settings = tuple(_settings(m) for m in module.modules())
        state = tuple(_leaf_key(t) for t in (*module.parameters(), *module.buffers()))
        key = (repr(spec), tuple(_leaf_key(leaf) for leaf in leaves), settings, state)
        kinds = (k for k in ("cpu", "cuda") if torch.is_autocast_enabled(k))
        autocast = tuple((k, torch.get_autocast_dtype(k)) for k in kinds)
        return Call(key, autocast, tuple(_read(module, paths)))

    def serves(self, other: Call) -> bool:
        """Whether a plan for this call is one for another. One that was made under autocast runs so anywhere."""
        return (self.key, self.read) == (other.key, other.read) and bool(self.autocast or not other.autocast)

    def again(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Call:
        """Another call, as far as this one's plan depends on it."""
        return Call._of(module, args, kwargs, ((path, other) for path, (_, other) in self.read))


def _other_names(module: nn.Module, paths: Iterable[str]) -> list[tuple[str, str | None]]:
    """Each path, and another one by which the module holds the same tensor: of two, the first is the second one's."""
    values = [(path, attribute_at(module, path)) for path in paths]
    tensors = [(path, value) for path, value in values if isinstance(value, torch.Tensor)]
    state = (*module.named_parameters(), *module.named_buffers()) if tensors else ()
    first: dict[int, str] = {}
    for path, tensor in (*((f".{name}", tensor) for name, tensor in state), *tensors):
        first.setdefault(id(tensor), path)
    return [(path, other if (other := first.get(id(value))) != path else None) for path, value in values]


def _read(module: nn.Module, paths: Iterable[tuple[str, str | None]]) -> Iterator[tuple[str, Any]]:
    """What stands at each path; of tensors not their values, but whether they still are the same as at the other path."""
    for path, other in paths:
        value = attribute_at(module, path)
        yield path, (_leaf_key(value), other if other is None or attribute_at(module, other) is value else "another tensor")


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), repr(leaf)


def _settings(module: nn.Module) -> tuple:
    """Type and mode, and, of PyTorch's own layers, constants: of those of a user's module only what the graph holds counts, as
    others may count steps, and would plan each anew."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"  # every GraphModule has a class of its own
    if not kind.startswith("torch.nn."):
        return kind, module.training
    return kind, *(repr(v) for name, v in vars(module).items() if _is_constant(v) and not name.startswith("_"))


def _is_constant(value: Any) -> bool:
    return isinstance(value, CONSTANTS) or (isinstance(value, tuple | list) and all(map(_is_constant, value)))


def check_is_tuple(args: Any, error: type[Exception]) -> None:
    """Raise `error` for a tensor or a dict where a tuple of arguments is to be given."""
    if isinstance(args, torch.Tensor):
        raise error("example_inputs is a tensor; give a tuple of the module's arguments, as in example_inputs=(x,)")
    if isinstance(args, Mapping):
        raise error("example_inputs is a dict; give keyword arguments as example_kwargs, or a dict argument as (it,)")


def canonical_call(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The same arguments whichever way the caller wrote them: positional where that can be, and without spelt out defaults."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    parameters, by_place = bound.signature.parameters, False
    for name, value in reversed(list(bound.arguments.items())):
        if not by_place and isinstance(value, CONSTANTS) and _same(value, parameters[name].default):
            del bound.arguments[name]
        elif parameters[name].kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
            by_place = True  # so that what is before it has to be written out
    return bound.args, bound.kwargs


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default
