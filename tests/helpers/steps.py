"""One training step of a module, and what it leaves: to hold a planned module against the plain one, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import fxmem

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FAST = {"cost": "roofline", "time_limit_s": 0.2}
each_device = pytest.mark.parametrize("device", DEVICES)


def on(device: str, tree: Any) -> Any:
    """Modules and tensors of a pytree on a device; tensors made there keep requires_grad."""
    if isinstance(tree, nn.Module):
        return tree.to(device)
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().to(device).requires_grad_(t.requires_grad), tree)


def transform(module: nn.Module, args: tuple | None = None, kwargs: dict | None = None, **options) -> fxmem.PlannedModule:
    """fxmem.transform, planned quickly; without a word about the budget, to the least peak."""
    return fxmem.transform(module, args, kwargs, **FAST | {"budget": "min"} | options)


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors of a pytree, dataclasses looked into."""
    leaves = [v for leaf in pytree.tree_leaves(tree) for v in (vars(leaf).values() if is_dataclass(leaf) else (leaf,))]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def fresh(tree: Any) -> Any:
    """The same inputs as leaves of their own, which need gradients where the given ones do."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), tree)


def loss_of(outputs: list[torch.Tensor], used: Any = None) -> torch.Tensor:
    """A weighted sum of the outputs (of those at the indices in `used`), so that every element gets a gradient of its own."""
    chosen = [t for i, t in enumerate(outputs) if t.requires_grad and (used is None or i in used)]
    return sum((t.float() * torch.linspace(0.5, 1.5, t.numel(), device=t.device).view(t.shape)).sum() for t in chosen)


def step(module: nn.Module, args: tuple = (), kwargs: dict | None = None, *, used: Any = None, seed: int = 0) -> dict[str, Any]:
    """One forward and backward on copies of the inputs, and all it leaves behind."""
    args, kwargs = fresh((args, kwargs or {}))
    torch.manual_seed(seed)
    module.zero_grad(set_to_none=True)
    returned = tensors(module(*args, **kwargs))
    loss_of(returned, used).backward()
    return {
        "outputs": [t.detach().clone() for t in returned],
        "requires_grad": [t.requires_grad for t in returned],
        "grads": {n: p.grad for n, p in module.named_parameters()},
        "inputs": [t.grad for t in tensors((args, kwargs))],
        "buffers": {n: b.clone() for n, b in module.named_buffers() if not n.startswith("fxmem_regions.")},
        "random": [torch.rand(3), *([torch.rand(3, device="cuda")] if torch.cuda.is_available() else [])],
    }


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal bit for bit, through dicts and lists; None only equals None."""
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor), where
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), where
        assert torch.equal(a, b), f"{where} differs by {(a - b).abs().max()}"
    else:
        assert a == b, where


def assert_same_steps(
    plain: nn.Module, planned: nn.Module, args: tuple = (), kwargs: dict | None = None, *, steps: int = 2, used: Any = None
):
    """Train both side by side: everything that each step leaves must be the same, bit for bit."""
    for seed in range(steps):
        expected, found = (step(module, args, kwargs, used=used, seed=seed) for module in (plain, planned))
        assert_same(expected, found, f"step {seed}")


def assert_drop_in(
    module: nn.Module, args: tuple = (), kwargs: dict | None = None, *, used: Any = None, **options
) -> fxmem.PlannedModule:
    """Transform `module` and train it beside a copy that stays plain."""
    plain = copy.deepcopy(module)
    planned = transform(module, args, kwargs, **options)
    assert_same_steps(plain, planned, args, kwargs, used=used)
    return planned


@contextlib.contextmanager
def messages() -> Iterator[list[str]]:
    """What fxmem logs meanwhile."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("fxmem").addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger("fxmem").removeHandler(handler)
