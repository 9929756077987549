"""Calls of a module: one way to write the arguments, and what of module and arguments a plan depends on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..torch_internals import pytree

CONSTANTS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Call:
    """A call of a module as far as a plan depends on it; two calls with equal keys can share a plan.

    key: of the arguments structure, shapes, and values of what is no tensor; of the module modes, the settings of PyTorch's own
        layers (a dropout's probability, a batch norm's momentum), and shapes of parameters and buffers.
    autocast: where it is in force, and its dtype.
    """

    key: tuple
    autocast: tuple

    @staticmethod
    def of(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Call:
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        settings = tuple(_settings(m) for m in module.modules())
        state = tuple(_leaf_key(t) for t in (*module.parameters(), *module.buffers()))
        key = (repr(spec), tuple(_leaf_key(leaf) for leaf in leaves), settings, state)
        kinds = (k for k in ("cpu", "cuda") if torch.is_autocast_enabled(k))
        return Call(key, tuple((k, torch.get_autocast_dtype(k)) for k in kinds))


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), repr(leaf)


def _settings(module: nn.Module) -> tuple:
    """Mode, and, of PyTorch's own layers, constants: those of a user's module may count steps, and would plan each anew."""
    if not type(module).__module__.startswith("torch.nn."):
        return (module.training,)
    return tuple(value for name, value in vars(module).items() if isinstance(value, CONSTANTS) and not name.startswith("_"))


def canonical_call(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The same arguments whichever way the caller wrote them: positional where that can be, and without spelt out defaults."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    for name, value in list(bound.arguments.items()):
        if isinstance(value, CONSTANTS) and _same(value, bound.signature.parameters[name].default):
            del bound.arguments[name]
    return bound.args, bound.kwargs


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default
