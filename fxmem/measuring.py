"""Measuring a real training step: the peak of memory and the time of forward and backward.

The peak counts every byte alive at a time: parameters, buffers, inputs and given output gradients (each storage once), all
that the step computes, gradients included, and what operators take and give back inside. On a CPU it comes from the
allocator's events under PyTorch's profiler, on CUDA from the caching allocator's own statistics.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .codegen.calls import check_is_tuple
from .errors import MeasureError
from .torch_internals import cpu_memory_events, pytree, storage_key, tensors_in


@dataclass(frozen=True)
class Measurement:
    """One module's training step, as it ran.

    peak_bytes: the most bytes alive at any moment; before_bytes of them were there before the step.
    before_bytes: parameters, buffers, inputs and given output gradients, each storage once.
    gradient_bytes: the new gradients of parameters and inputs.
    time_s: median wall seconds of forward and backward, over the runs in `times_s`, none of which was profiled.
    device: where the step ran.
    """

    peak_bytes: int
    before_bytes: int
    gradient_bytes: int
    time_s: float
    times_s: tuple[float, ...]
    device: str


@dataclass(frozen=True)
class PairMeasurement:
    """Two modules' steps, run alternately in one process.

    a_time_s, b_time_s: median wall seconds of each. ratio: the median of the runs' paired ratios b / a.
    """

    a_time_s: float
    b_time_s: float
    ratio: float


def measure(
    module: nn.Module,
    example_inputs: tuple = (),
    example_kwargs: dict[str, Any] | None = None,
    *,
    repeats: int = 3,
    warmup: int = 1,
    output_gradients: Iterable[torch.Tensor] | None = None,
) -> Measurement:
    """Run `module`'s training step and measure its peak and its time.

    The backward starts from `output_gradients` (one for each floating point output that requires grad, in order); without
    them from the scalar outputs if there are any, else from all of them with ones. Other outputs are let go of before it.
    Gradients, buffers and random number generators are afterwards what they were. One more step than `repeats + warmup` runs,
    for the peak.

    Raises MeasureError where no output requires grad, the tensors lie on several devices, or repeats is less than one.
    """
    _check_counts(repeats, warmup)
    step = _Step(module, example_inputs, example_kwargs or {}, output_gradients)
    with _state_kept(module, step.device):
        for _ in range(warmup):
            step.run()
        peak_bytes, gradient_bytes = step.peak()
        times_s = tuple(step.seconds() for _ in range(repeats))
    return Measurement(
        peak_bytes=peak_bytes,
        before_bytes=step.before_bytes,
        gradient_bytes=gradient_bytes,
        time_s=statistics.median(times_s),
        times_s=times_s,
        device=str(step.device),
    )


def measure_pair(
    a: nn.Module,
    b: nn.Module,
    example_inputs: tuple = (),
    example_kwargs: dict[str, Any] | None = None,
    *,
    repeats: int = 5,
    warmup: int = 1,
    output_gradients: Iterable[torch.Tensor] | None = None,
) -> PairMeasurement:
    """Time two modules' steps in turns, which cancels what slows the machine down for a while. See `measure`."""
    _check_counts(repeats, warmup)
    gradients = None if output_gradients is None else tuple(output_gradients)
    steps = [_Step(module, example_inputs, example_kwargs or {}, gradients) for module in (a, b)]
    with _state_kept(a, steps[0].device), _state_kept(b, steps[1].device):
        for step in steps * warmup:
            step.run()
        pairs = [(steps[0].seconds(), steps[1].seconds()) for _ in range(repeats)]
    a_times, b_times = zip(*pairs, strict=True)
    ratio = statistics.median(second / first for first, second in pairs)
    return PairMeasurement(statistics.median(a_times), statistics.median(b_times), ratio)


def _check_counts(repeats: int, warmup: int) -> None:
    if not (isinstance(repeats, int) and isinstance(warmup, int)) or repeats < 1 or warmup < 0:
        raise MeasureError(f"repeats={repeats} and warmup={warmup}; need at least one repeat and no negative warm-up")


def attached_outputs(outputs: Any) -> list[torch.Tensor]:
    """The outputs that require grad, in order."""
    return [t for t in tensors_in(outputs) if t.requires_grad]


def backward_roots(outputs: Any) -> list[torch.Tensor]:
    """The outputs that the backward starts from if nobody says otherwise: scalar ones that require grad, else all that do."""
    tensors = attached_outputs(outputs)
    scalars = [t for t in tensors if t.dim() == 0]
    return scalars or tensors


def _checked_gradients(given: Any) -> list[torch.Tensor | None]:
    """Output gradients as a list; MeasureError for anything else than some tensors."""
    if not isinstance(given, Iterable) or isinstance(given, torch.Tensor | str):
        raise MeasureError(
            f"output_gradients is a {type(given).__name__}; give a tensor for each output that requires grad, as in (gradient,)"
        )
    gradients = list(given)
    wrong = next((g for g in gradients if not (g is None or isinstance(g, torch.Tensor))), None)
    if wrong is not None:
        raise MeasureError(f"{wrong!r} is among the output gradients; give tensors, or None for a gradient of one")
    return gradients


class _Step:
    """A training step of one module on given inputs, that can be run again and again."""

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict, output_gradients: Iterable[torch.Tensor] | None):
        if not isinstance(module, nn.Module):
            raise MeasureError(f"a training step is one of a torch.nn.Module; a {type(module).__name__} was given")
        check_is_tuple(args, MeasureError)
        self.module = module
        self.args, self.kwargs = _own_leaves((args, kwargs))
        self.inputs = tensors_in((self.args, self.kwargs))
        self.device = _one_device([*module.parameters(), *module.buffers(), *self.inputs])
        self.roots_of = backward_roots if output_gradients is None else attached_outputs
        self.gradients = self._ones() if output_gradients is None else _checked_gradients(output_gradients)

    def _ones(self) -> list[torch.Tensor | None]:
        """Output gradients of ones, made before the step; None for a scalar, whose gradient of one is implied."""
        with _state_kept(self.module, self.device):
            roots = self._roots(self.module(*self.args, **self.kwargs))
            return [None if root.dim() == 0 else torch.ones_like(root) for root in roots]

    def _roots(self, outputs: Any) -> list[torch.Tensor]:
        roots = self.roots_of(outputs)
        if not roots:
            raise MeasureError(
                f"no output of {type(self.module).__name__} requires grad, so there is no backward to measure: "
                "let a parameter or an input require grad, and call outside torch.no_grad()"
            )
        return roots

    @property
    def trained(self) -> list[torch.Tensor]:
        return [t for t in (*self.module.parameters(), *self.inputs) if t.requires_grad]

    @property
    def before_bytes(self) -> int:
        given = [g for g in self.gradients if g is not None]
        return distinct_bytes([*self.module.parameters(), *self.module.buffers(), *self.inputs, *given])

    def _drop_gradients(self) -> None:
        for tensor in self.trained:
            tensor.grad = None

    def _forward_backward(self) -> Any:
        """Returns the outputs that the backward starts from, which live to the end of the step; the others are dropped first,
        as in `loss = model(batch).loss; loss.backward()`."""
        roots = self._roots(self.module(*self.args, **self.kwargs))
        if len(roots) != len(self.gradients):
            raise MeasureError(
                f"{len(self.gradients)} output gradients were given for {len(roots)} outputs that require grad: give one for "
                "each of these, in their order, or none at all"
            )
        for root, gradient in zip(roots, self.gradients, strict=True):
            if (gradient is None and root.dim()) or (gradient is not None and gradient.shape != root.shape):
                found = "None" if gradient is None else str(tuple(gradient.shape))
                raise MeasureError(f"an output gradient of shape {found} was given for an output of {tuple(root.shape)}")
        torch.autograd.backward(roots, self.gradients)
        return roots

    def run(self) -> None:
        """One step, from no gradients to no gradients."""
        outputs = self._forward_backward()
        del outputs
        self._drop_gradients()

    def seconds(self) -> float:
        """Wall seconds of one step, the device's work included."""
        _synchronize(self.device)
        start = time.perf_counter()
        outputs = self._forward_backward()
        _synchronize(self.device)
        seconds = time.perf_counter() - start
        del outputs
        self._drop_gradients()
        return seconds

    def peak(self) -> tuple[int, int]:
        """The most bytes alive during one step, and the bytes of the gradients that it leaves."""
        release = getattr(self.module, "release_arena", None)
        if release is not None:
            release()  # so that the arena is allocated, and counted, in this step
        gc.collect()  # else garbage of earlier runs would be released, and counted as released, in this one
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                peak = _cuda_peak(self._forward_backward)
        else:
            peak = _cpu_peak(self._forward_backward)
        gradient_bytes = distinct_bytes(t.grad for t in self.trained if t.grad is not None)
        self._drop_gradients()
        return self.before_bytes + peak, gradient_bytes


def _cpu_peak(run: Callable[[], Any]) -> int:
    """The highest running sum of the allocator's events during `run`."""
    outputs, events = cpu_memory_events(run)
    del outputs
    running = peak = 0
    for size in events:
        running += size
        peak = max(peak, running)
    return peak


def _cuda_peak(run: Callable[[], Any]) -> int:
    """The most bytes that `run` holds on the current device above what is allocated there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del outputs
    return peak - before


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _own_leaves(tree: Any) -> Any:
    """The same storages as leaves of their own, so that neither the caller's `.grad` nor the graph behind it is touched."""
    leaves: dict[int, torch.Tensor] = {}

    def own(tensor: torch.Tensor) -> torch.Tensor:
        return leaves.setdefault(id(tensor), tensor.detach().requires_grad_(tensor.requires_grad))

    return pytree.tree_map_only(torch.Tensor, own, tree)


def _one_device(tensors: Iterable[torch.Tensor]) -> torch.device:
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise MeasureError(
            f"parameters, buffers and inputs lie on several devices ({', '.join(sorted(map(str, devices)))}); move them to one"
        )
    return devices.pop() if devices else torch.device("cpu")


def distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    return sum({storage_key(t): t.untyped_storage().nbytes() for t in tensors if t.layout is torch.strided}.values())


@contextlib.contextmanager
def _state_kept(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Sets gradients aside; puts them, buffers and random number generators back as they were."""
    gradients = [(p, p.grad) for p in module.parameters()]
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    cuda = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
