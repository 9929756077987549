"""PlannedModule: the chain of regions as an fx.GraphModule that stands in for the module that it was made from.

Its `forward` is the planned graph, for inputs like the example's. Calling the module picks what fits the call: the planned
graph; a plan of its own for other shapes, modes or dtypes, or for values of parameters that the planned one is not for (see
`ValueGuard`), made once and kept; or, without gradients, the plain module. Parameters, buffers and submodules are the
original's own.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError, FxmemError
from ..graph_meta import clean_path
from ..guards import ValueGuard, broken_guards
from ..torch_internals import attribute_at, is_being_traced, pytree, spec_from_data, spec_to_data, tensors_in
from .calls import Call, canonical_call
from .runtime import Region
from .serialize import graph_from_data, graph_to_data

log = logging.getLogger(__name__)

HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks")
HOOKS += ("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook")


class RegionChain(nn.Module):
    """The regions of a planned module in forward order: by index, by name as attributes, or one after another.

    constants: tensors that the graph reads beside parameters and buffers. attributes: which of the source's attributes some of
    them are, by their paths (see `Capture`).
    """

    def __init__(
        self,
        regions: list[Region],
        constants: Mapping[str, torch.Tensor],
        attributes: Mapping[str, str | None],
        output_spec: Any,
    ):
        super().__init__()
        self.attributes = dict(attributes)
        for region in regions:
            self.add_module(region.name, region)
        for name, tensor in constants.items():
            self.register_buffer(name, tensor, persistent=False)
        self.output_structure = OutputStructure(output_spec)

    def follow(self, source: nn.Module) -> None:
        """Take the tensors that the source's attributes have become, where somebody has put others there."""
        for path, name in self.attributes.items():
            if name is not None:
                self._buffers[name] = attribute_at(source, path)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RegionChain:
        """Move constants, but leave their types alone: `half()` changes none of what the user's code writes out."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, constant in before.items():
            self._buffers[name] = constant.to(self._buffers[name].device)
        return self

    def _regions(self) -> list[Region]:
        return [m for m in self.children() if isinstance(m, Region)]

    def __getitem__(self, index: int) -> Region:
        return self._regions()[index]

    def __iter__(self):
        return iter(self._regions())

    def __len__(self) -> int:
        return len(self._regions())


class OutputStructure(nn.Module):
    """Puts the model's output leaves back into the structure (a dataclass, say) that the model returns."""

    def __init__(self, spec: Any):
        super().__init__()
        self.spec = spec

    def forward(self, *leaves):
        with _AsTheyAre():
            return pytree.tree_unflatten(leaves, self.spec)


class _AsTheyAre(TorchFunctionMode):
    """A key-value cache is put together again by joining nothing with each output: it gets these themselves, not copies."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.cat and args and all(type(t) is torch.Tensor for t in args[0]):
            filled = [t for t in args[0] if t.numel()]
            if len(filled) == 1:
                return filled[0]
        return function(*args, **(kwargs or {}))


class PlannedModule(fx.GraphModule):
    """What `fxmem.transform` returns. `plan` tells what was decided, `regions` holds the chain, `code` shows it."""

    def __init__(
        self,
        source: nn.Module,
        graph: fx.Graph,
        chain: RegionChain,
        plan: Any,
        call: Call,
        replan: Callable | None,
        infer: Callable | None = None,
        guards: Collection[ValueGuard] = (),
    ):
        super().__init__({}, fx.Graph(), type(source).__name__)
        self.__dict__.update(_source=source, _call=call, _guards=guards, _plan=plan, _replan=replan, _infer=infer)
        self.__dict__.update(_variants={}, _others=[], _withheld=frozenset())
        # One set of tensors for both: what moves or swaps the parameters of one does so for the other.
        self._parameters, self._buffers = source._parameters, source._buffers
        self._non_persistent_buffers_set = source._non_persistent_buffers_set
        for name, child in source._modules.items():
            self._modules[name] = child
        self.add_module("fxmem_regions", chain)
        self.training = source.training
        self.graph = graph

    @property
    def plan(self):
        """The decisions behind this module: see `fxmem.Plan`."""
        return self._plan

    def draw(self, module: str | None = None, axes: Any = None) -> Any:
        """The graph of one of the user's modules as it runs: see `fxmem.Plan.draw`."""
        return self._plan.draw(module, axes)

    @property
    def source(self) -> nn.Module:
        """The module that this one was made from."""
        return self._source

    @property
    def regions(self) -> RegionChain:
        """The chain of regions, in forward order."""
        return self._modules["fxmem_regions"]

    def release_arena(self) -> None:
        """Let go of the memory of all arenas (those that a step is using, when it is over); the next step allocates anew."""
        if self.regions[0].arenas is not None:
            self.regions[0].arenas.release()
        for other in (*filter(None, self._variants.values()), *self._others):
            other.release_arena()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_source" not in self.__dict__ or name.startswith("__"):
                raise
            return getattr(self.__dict__["_source"], name)  # config, for example

    def __setattr__(self, name: str, value: Any) -> None:
        source = self.__dict__.get("_source")
        of_source = source is not None and (name in vars(source) or hasattr(type(source), name))
        if of_source and name not in vars(self) and not hasattr(type(self), name):
            setattr(source, name, value)  # a number that the model computes with, say; it is read from there, too
            return
        super().__setattr__(name, value)
        if name in getattr(self.__dict__.get("_source"), "_modules", ()):
            setattr(self._source, name, value)  # another head, say, is one for inference and other plans too

    # Which plan a call gets depends on more than Dynamo guards: code that is compiled around this one calls it as it is.
    @torch.compiler.disable
    def __call__(self, *args, **kwargs):
        if is_being_traced(args, kwargs):
            return super().__call__(*args, **kwargs)
        if self._replan is None:  # a plan of inference, for one kind of call
            self.regions.follow(self._source)
            return super().__call__(*args, **kwargs)
        self._modules.update(self._source._modules)
        args, kwargs = canonical_call(self._source, args, kwargs)
        if not self._needs_gradients(args, kwargs):
            return self._alone(self._without_gradients(args, kwargs))(*args, **kwargs)
        call = self._call.again(self._source, args, kwargs)
        if not self._call.serves(call):
            return self._alone(self._variant(call, args, kwargs))(*args, **kwargs)
        broken = broken_guards(self._guards, self._source)
        if broken:
            return self._alone(self._for_other_values(broken, args, kwargs))(*args, **kwargs)
        self._alone(self)
        self.regions.follow(self._source)
        return super().__call__(*args, **kwargs)

    def _alone(self, runs: nn.Module) -> nn.Module:
        """What runs next, with no arena kept but its own: each was planned as if there were no other."""
        for other in (self, *self._variants.values(), *self._others):
            if isinstance(other, PlannedModule) and other is not runs and other.regions[0].arenas is not None:
                other.regions[0].arenas.keep_none()
        return runs

    def train(self, mode: bool = True):
        super().train(mode)
        self._source.training = mode
        return self

    def _needs_gradients(self, args: tuple, kwargs: dict) -> bool:
        if not torch.is_grad_enabled():
            return False
        return any(t.requires_grad for t in (*self._source.parameters(), *tensors_in((args, kwargs))))

    def _plain(self) -> nn.Module:
        """The source, with this module's hooks."""
        plain = _Plain(self._source)
        self._share_hooks(plain)
        return plain

    def inference_plan(self, *args: Any, **kwargs: Any) -> Any:
        """The `Plan` by which such a call runs without gradients; None where it runs plainly, as it does without an arena."""
        runs = self._without_gradients(*canonical_call(self._source, args, kwargs))
        return runs.plan if isinstance(runs, PlannedModule) else None

    def _without_gradients(self, args: tuple, kwargs: dict) -> nn.Module:
        """With an arena, a plan of a forward alone, made the first time; else the source."""
        if self._infer is None:
            return self._plain()
        call = self._call.again(self._source, args, kwargs), "inference"
        known = self._variants.get(call)
        if call not in self._variants or (known and known._call.again(self._source, args, kwargs).read != known._call.read):
            try:
                self._variants[call] = self._infer(self._source, args, kwargs)
                self._share_hooks(self._variants[call])
            except FxmemError as error:
                log.warning("inference of %s runs without a plan: %s", self._get_name(), error)
                self._variants[call] = None
        return self._variants[call] or self._plain()

    def _variant(self, call: Call, args: tuple, kwargs: dict) -> nn.Module:
        """A planned module for another kind of call, planned the first time."""
        if call not in self._variants:
            log.warning("%s is called with %s: planning anew, once", self._get_name(), self._what_differs(call))
            self._variants[call] = self._replan(self._source, args, kwargs)
            self._share_hooks(self._variants[call])
        return self._variants[call]

    def _for_other_values(self, broken: list[ValueGuard], args: tuple, kwargs: dict) -> nn.Module:
        """Another plan of the same call, whose guards hold; where there is none, one that goes by none that ever was broken, so
        that there are never more plans than guards."""
        for other in self._others:
            found = broken_guards(other._guards, self._source)
            if not found:
                return other
            broken = [*broken, *found]
        self.__dict__["_withheld"] |= {guard.key for guard in broken}
        first = broken[0]
        log.warning(
            "%s is called with values of %s for which %s is not accurate: planning anew, without that",
            self._get_name(),
            first if len(broken) == 1 else f"{first} and others",
            first.implementation,
        )
        self._others.append(self._replan(self._source, args, kwargs, withheld=self._withheld))
        self._share_hooks(self._others[-1])
        return self._others[-1]

    def _what_differs(self, call: Call) -> str:
        moved = [path for (path, now), (_, then) in zip(call.read, self._call.read, strict=True) if now != then]
        others = f"another {clean_path(moved[0])!r}" if moved else "other shapes, modes or dtypes"
        return f"{others} than it was planned for"

    def _share_hooks(self, other: nn.Module) -> None:
        other.__dict__.update({name: self.__dict__[name] for name in HOOKS if name in self.__dict__})

    def _state(self) -> dict[str, Any]:
        """All that it takes to build this module again, as data that copies and pickles; not the variants."""
        chain = self.regions
        return {
            "source": self._source,
            "regions": list(chain),
            "constants": dict(chain.named_buffers(recurse=False)),
            "attributes": chain.attributes,
            "output_structure": spec_to_data(chain.output_structure.spec),
            "graph": graph_to_data(self.graph),
            "hooks": {name: self.__dict__[name] for name in HOOKS if name in self.__dict__},
            "rest": (self._plan, self._call, self._replan, self._infer, self._guards),
        }

    def __deepcopy__(self, memo: dict) -> PlannedModule:
        state = self._state()
        rest = state.pop("rest")
        copied = _rebuild(copy.deepcopy(state, memo) | {"rest": rest})
        memo[id(self)] = copied
        return copied

    def __reduce__(self):
        return _rebuild, (self._state(),)

    def __copy__(self) -> PlannedModule:
        return _rebuild(self._state())


def check_names(module: nn.Module) -> None:
    """Raise CaptureError where a name in `module` is one that a PlannedModule needs for itself."""
    taken = [n for n in (*module._modules, *module._parameters, *module._buffers) if hasattr(PlannedModule, n)]
    if taken:
        raise CaptureError(
            f"{type(module).__name__} has a submodule, parameter or buffer called {taken[0]!r}, which a planned "
            "module needs for itself: "
            "rename it, or transform a module that holds this one"
        )


class _Plain(nn.Module):
    """Runs the original module as it is."""

    def __init__(self, source: nn.Module):
        super().__init__()
        self.__dict__["source"] = source

    def forward(self, *args, **kwargs):
        return self.source(*args, **kwargs)


def _rebuild(state: dict[str, Any]) -> PlannedModule:
    chain = RegionChain(state["regions"], state["constants"], state["attributes"], spec_from_data(state["output_structure"]))
    planned = PlannedModule(state["source"], graph_from_data(state["graph"]), chain, *state["rest"])
    planned.__dict__.update(state["hooks"])
    return planned
