"""What the subcommands of the command line do: each takes parsed options, prints, and raises FxmemError for bad ones."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import sys
from typing import Any

import torch
from torch import nn

from . import api
from .budget import budget_from_text
from .cost.devices import DEVICES
from .decisions import Frontier, Plan
from .errors import FxmemError, MissingExtraError
from .fake_kernels import FakeTensorMode
from .measuring import Measurement
from .measuring import measure as run_steps
from .saving import load_plan
from .torchvision_models import load_torchvision
from .units import format_bytes, format_percent, format_seconds

NUMBERS = (
    "model", "cost", "budget_bytes", "baseline_peak_bytes", "baseline_by_kind", "predicted_peak_bytes", "peak_by_kind",
    "predicted_overhead", "lower_bound_overhead", "status", "capture_time_s", "solve_time_s",
)  # fmt: skip


def demo(options: argparse.Namespace) -> None:
    """Train a model both ways."""
    from .demo import run  # needs the extra

    run(options.model, budget_from_text(options.budget), options.steps, options.batch, options.device)


def plan(options: argparse.Namespace) -> None:
    """Plan a model without making it: on fake tensors of the device, or on meta ones for a device that is not here."""
    module, args, kwargs = _planned_for(options)
    asked = {"max_overhead": options.max_overhead} if options.budget is None else {"budget": budget_from_text(options.budget)}
    made = api.plan(module, args, kwargs, **asked, cost=_cost(options), solver=options.solver, time_limit_s=options.time_limit)
    _print(made, _numbers(made), options.json)
    if options.save:
        made.save(options.save)


def frontier(options: argparse.Namespace) -> None:
    """Plans from no recompute to the least peak."""
    module, args, kwargs = _planned_for(options)
    peers = tuple(name for name in options.peers.split(",") if name)
    made = api.frontier(
        module, args, kwargs, points=options.points, cost=_cost(options), time_limit_s=options.time_limit, peers=peers
    )
    peer_numbers = {name: [_numbers(p) for p in plans] for name, plans in made.peers.items()}
    _print(made, {"plans": [_numbers(p) for p in made], "peers": peer_numbers}, options.json)
    if options.plot:
        _save_figure(made.plot(), options.plot)


def measure(options: argparse.Namespace) -> None:
    """Run real steps of the plain model, and of the planned one where a budget or a plan is given."""
    if options.budget and options.plan:
        raise FxmemError("both --budget and --plan were given: leave one out")
    _check_device(options.device)
    with torch.device(options.device):
        module, args, kwargs = _call(options)
    found = {"plain": run_steps(module, args, kwargs, repeats=options.repeats)}
    if options.budget or options.plan:
        wanted = {"plan": options.plan} if options.plan else {"budget": budget_from_text(options.budget)}
        planned = api.transform(module, args, kwargs, time_limit_s=options.time_limit, **wanted)
        found["planned"] = run_steps(planned, args, kwargs, repeats=options.repeats)
        found["planned, predicted"] = planned.plan
    if options.json:
        print(json.dumps({name: _measured(what) for name, what in found.items()}))
        return
    for name, what in found.items():
        peak = what.peak_bytes if isinstance(what, Measurement) else what.predicted_peak_bytes
        seconds = (
            format_seconds(what.time_s) if isinstance(what, Measurement) else format_percent(what.predicted_overhead, sign=True)
        )
        print(f"{name:<20} peak {format_bytes(peak):>10}   time {seconds}")


def show(options: argparse.Namespace) -> None:
    """Print a saved plan, and draw it into files."""
    saved = load_plan(options.plan)
    _print(saved, _numbers(saved), options.json)
    if options.timeline:
        _save_figure(saved.plot_timeline()[0], options.timeline)
    if options.schedule:
        _save_figure(saved.plot_schedule(), options.schedule)
    if options.memory_map:
        _save_figure(saved.plot_memory_map(), options.memory_map)
    if options.graph:
        _save_figure(saved.draw(), options.graph)
    if options.snapshot:
        saved.save_snapshot(options.snapshot)


def _planned_for(options: argparse.Namespace) -> tuple[nn.Module, tuple, dict[str, Any]]:
    """The model and its inputs without any bytes."""
    if options.device_model is None:
        _check_device(options.device)
        with FakeTensorMode(), torch.device(options.device):
            return _call(options)
    if options.device_model not in DEVICES:
        raise FxmemError(f"unknown --device-model {options.device_model!r}; there are {', '.join(DEVICES)}")
    if options.measured:
        raise FxmemError("both --device-model and --measured were given: what is not here cannot be timed; leave one out")
    with torch.device("meta"):
        return _call(options)


def _cost(options: argparse.Namespace) -> str:
    return options.device_model or ("measured" if options.measured else "roofline")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FxmemError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error


def _call(options: argparse.Namespace) -> tuple[nn.Module, tuple, dict[str, Any]]:
    """The model in training mode, and the arguments that the specs describe, on the device in force."""
    inputs = [parse_input(spec) for spec in options.input]
    module = make_model(options.factory).train()
    args = tuple(_tensor(shape, dtype) for name, shape, dtype in inputs if not name)
    return module, args, {name: _tensor(shape, dtype) for name, shape, dtype in inputs if name}


def make_model(text: str) -> nn.Module:
    """The model that MODULE:FACTORY makes. Raises FxmemError where it cannot be imported, fails, or is no model."""
    match = re.fullmatch(r"([\w.]+):([\w.]+)", text)
    if not match:
        raise FxmemError(f"{text!r} was given; the model is named as MODULE:FACTORY, as in torchvision.models:resnet50")
    with contextlib.suppress(MissingExtraError):
        load_torchvision()  # the models of many packages import it
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory: Any = importlib.import_module(match[1])
    except Exception as error:
        raise FxmemError(f"{match[1]!r} cannot be imported ({type(error).__name__}: {error}); it is looked for from here, and "
                         "among installed packages") from error  # fmt: skip
    try:
        for name in match[2].split("."):
            factory = getattr(factory, name)
    except AttributeError as error:
        raise FxmemError(f"{match[1]!r} has no {match[2]!r}: {error}") from error
    try:
        module = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:
        raise FxmemError(f"{text} fails when it is called without arguments: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise FxmemError(f"{text} makes a {type(module).__name__}; it must make a torch.nn.Module")
    return module


def parse_input(spec: str) -> tuple[str, tuple[int, ...], torch.dtype]:
    """(name, shape, dtype) of "labels=2,512:int64"; the name may be missing, the dtype is float32 by default.

    Raises FxmemError for anything else.
    """
    match = re.fullmatch(r"(?:(\w+)=)?(\d+(?:,\d+)*|)(?::(\w+))?", spec.replace(" ", ""))
    dtype = getattr(torch, match[3] or "float32", None) if match else None
    if not match or not isinstance(dtype, torch.dtype):
        raise FxmemError(
            f"--input {spec!r} does not parse; it is a shape, with a name before and a type after it where needed: "
            "32,3,224,224 or labels=2,512:int64"
        )
    return match[1] or "", tuple(int(n) for n in match[2].split(",") if n), dtype


def _tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random where that is possible; zeros, which every vocabulary has, otherwise."""
    return torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def _print(what: Plan | Frontier, numbers: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(numbers))
        return
    if sys.stdout.isatty():
        with contextlib.suppress(ModuleNotFoundError):
            from rich.console import Console

            Console().print(what)
            return
    print(what)


def _numbers(plan_: Plan) -> dict[str, Any]:
    return {name: getattr(plan_, name) for name in NUMBERS}


def _measured(what: Measurement | Plan) -> dict[str, Any]:
    if isinstance(what, Plan):
        return _numbers(what)
    return {name: value for name, value in vars(what).items() if isinstance(value, (int, float, str))}


def _save_figure(axes: Any, path: str) -> None:
    try:
        axes.figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise FxmemError(f"{path} cannot be written: {error}") from error
