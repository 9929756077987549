"""Capture: a module and example inputs become one joint forward and backward aten graph, or a refusal that says where.

A plain `nn.Module` goes through Dynamo first, which sees a user's own autograd Functions rightly and refuses graph breaks; a
`GraphModule` (symbolic_trace, export) is taken as it is, unless weights in it are tied, which Dynamo makes one, or it has
hooks. Then AOTAutograd traces forward and backward together. Everything runs on fake tensors: no data is touched and nothing of
the model's size is allocated.

In the joint graph that `capture` returns, every placeholder carries `meta["fxmem_role"]` and the output node
`meta["fxmem_roles"]`, one role for each of its values; backward nodes carry `meta["fxmem_backward"] = True`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from .errors import CaptureError, FxmemError
from .fake_kernels import FakeCopies, FakeTensorMode, LaidOutInPlace, fake_mode_of
from .graph_meta import is_backward, source_of
from .roles import assign_roles
from .torch_internals import (
    Assignment,
    FakeTensor,
    Read,
    attribute_at,
    dynamo_graph,
    flatten_outputs,
    joint_graph,
    pytree,
    quiet_tracing,
    restore_rng,
    tensors_in,
    without_saved_tensors_hooks,
)

log = logging.getLogger(__name__)

STATE = re.compile(r"\._(parameters|buffers)\['[^']*'\]$")  # how a path ends that leads to a registered tensor
NO_INPUTS = (torch.dtype, torch.device, torch.layout, torch.memory_format, complex)

# The same bytes with the same strides, under a tensor that neither tracing nor autograd takes for a view. Traced, never run.
_library = torch.library.Library("fxmem", "FRAGMENT")
_library.define("own(Tensor value) -> Tensor")
_library.impl("own", torch.ops.aten.alias.default, "CompositeExplicitAutograd")
torch.library.register_autograd("fxmem::own", lambda _, gradient: gradient, lib=_library)
own = torch.ops.fxmem.own.default


@dataclass(frozen=True)
class Capture:
    """A captured module.

    joint: the joint graph, flat arguments, roles in its meta.
    out_spec: pytree spec of the outputs.
    differentiated: indices of the output leaves that get a gradient in the planned step.
    attached: indices of all output leaves that autograd would connect to the parameters or inputs.
    constants: tensors that the graph reads but no parameter or buffer names, by the name that their role carries.
    attributes: paths (see `attribute_at`) of tensors that are attributes of the module or hang on it, and are no parameters or
        buffers: the constant that each of them is, or None where it is another name for a parameter or buffer.
    fixed_outputs: output leaves that are no tensors, by their index.
    read: which of the module's attributes the graph has read (none of a GraphModule that was taken as it is).
    torch_level, call: the torch-level graph that was traced, and the (args, kwargs) of fake tensors that it was called with.
    """

    joint: fx.GraphModule
    out_spec: Any
    differentiated: tuple[int, ...]
    attached: tuple[int, ...]
    constants: Mapping[str, torch.Tensor]
    attributes: Mapping[str, str | None]
    fixed_outputs: Mapping[int, Any]
    read: Read
    torch_level: fx.GraphModule
    call: tuple[tuple, dict[str, Any]]


@without_saved_tensors_hooks()
def capture(
    module: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any],
    output_gradients: str | Sequence[int] | None = None,
    inference: bool = False,
) -> Capture:
    """Capture `module` called with `*args, **kwargs` (real, fake or meta tensors) as one joint graph.

    output_gradients: which output leaves get a gradient: None (the scalar ones if there is any, else all), "all", or their
        indices. A loss among the outputs is what a step starts from; the other outputs are then only looked at.
    inference: what runs without gradients is captured: a graph of a forward alone.
    Raises CaptureError, naming node, module and source line, for what cannot be captured rightly.
    """
    kwargs = dict(kwargs)
    _check_state(module)
    _check_devices(module, args, kwargs)
    with restore_rng(), torch.no_grad() if inference else contextlib.nullcontext():
        module, args, kwargs = on_fake_tensors(module, args, kwargs)
        names, input_names = _names(module), _input_names(module, args, kwargs)
        graph_module, read, args, kwargs = _torch_level(module, args, kwargs)
        _add_unused_state(graph_module, module)
        values = _output_values(graph_module, args, kwargs)
        differentiated, attached = _detach_outputs(graph_module, values, output_gradients, inference)
        structure = flatten_outputs(graph_module)
        joint, out_spec = _aot(graph_module, args, kwargs)
    constants, fixed_outputs = assign_roles(joint, graph_module, names, input_names, differentiated)
    known = constants, _attributes(module, read, constants), fixed_outputs
    torch_level = graph_module, (args, kwargs)
    return Capture(joint, structure or out_spec, differentiated, attached, *known, read, *torch_level)


def example_inputs_of(graph_module: nn.Module) -> tuple[torch.Tensor, ...]:
    """Fake inputs from the placeholders' `meta["val"]` or `meta["tensor_meta"]` (as shape propagation leaves them).

    Raises CaptureError where there are neither.
    """
    placeholders = (
        [n for n in graph_module.graph.nodes if n.op == "placeholder"] if isinstance(graph_module, fx.GraphModule) else []
    )
    found = []
    device = next((p.device for p in graph_module.parameters()), torch.device("cpu"))
    mode = FakeTensorMode()
    for node in placeholders:
        value, meta = node.meta.get("val"), node.meta.get("tensor_meta")
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif meta is not None:
            with mode:
                fake = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=device)
            found.append(fake.requires_grad_(meta.requires_grad))
    if not placeholders or len(found) < len(placeholders):
        raise CaptureError(
            f"no example inputs were given, and {type(graph_module).__name__} carries no shapes: pass example_inputs=(x, ...), "
            'or a GraphModule whose placeholders carry meta["val"] or meta["tensor_meta"] '
            "(torch.fx.passes.shape_prop.ShapeProp)"
        )
    return tuple(found)


def on_fake_tensors(module: nn.Module, args: tuple, kwargs: dict) -> tuple[nn.Module, tuple, dict]:
    """The module and a call of it as they are traced: inputs fake, and parameters and buffers too where they were on meta."""
    module = _without_meta(module)
    return module, *_fake_inputs(module, args, kwargs)


def tensors_of(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Parameters, buffers, and the tensors of a call."""
    return [*module.parameters(), *module.buffers(), *tensors_in((args, kwargs))]


def device_of(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> torch.device | None:
    """Where a call's tensors are; None where all are on meta."""
    return next((t.device for t in tensors_of(module, args, kwargs) if not t.is_meta), None)


def _check_state(module: nn.Module) -> None:
    lazy = next((name for name, t in (*module.named_parameters(), *module.named_buffers()) if is_lazy(t)), None)
    if lazy is not None:
        raise CaptureError(f"{lazy!r} is not initialized yet: call the module once, so that its lazy layers learn their shapes")


def check_inputs(args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuse tensors that are not dense, and what a graph cannot take for an input."""
    for path, leaf in pytree.tree_leaves_with_path((args, dict(kwargs))):
        if isinstance(leaf, NO_INPUTS):
            raise CaptureError(
                f"input {pytree.keystr(path)} is {leaf!r}, a {type(leaf).__name__}, which a graph cannot take: set it as an "
                "attribute that the module's forward reads, or call the module through one that fills it in"
            )
        if isinstance(leaf, torch.Tensor) and (leaf.layout is not torch.strided or leaf.is_nested):
            kind = "nested" if leaf.is_nested else str(leaf.layout)
            raise CaptureError(f"input {pytree.keystr(path)} is a {kind} tensor; fxmem plans dense ones: make it one first")


def _check_devices(module: nn.Module, args: tuple, kwargs: dict) -> None:
    devices: dict[torch.device, str] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        devices.setdefault(tensor.device, name)
    for path, leaf in pytree.tree_leaves_with_path((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            devices.setdefault(leaf.device, f"input {pytree.keystr(path)}")
    real = {device: name for device, name in devices.items() if device.type != "meta"}
    if len(real) > 1:
        listed = ", ".join(f"{name!r} on {device}" for device, name in real.items())
        raise CaptureError(
            f"the module and its inputs are on several devices ({listed}): move all of them to one with .to(device)"
        )
    absent = next((device for device in real if device.type == "cuda" and not torch.cuda.is_available()), None)
    if absent is not None:  # PyTorch would end the process
        raise CaptureError(
            f'no gradients can be traced on {absent} where no such device is: give meta or CPU tensors, and cost="A100", say'
        )


def _without_meta(module: nn.Module) -> nn.Module:
    """`module`, or, where it has meta parameters or buffers, a fake copy on the CPU: nothing is allocated either way."""
    state = [*module.parameters(), *module.buffers()]
    if not any(t.is_meta for t in state):
        return module
    mode = FakeTensorMode()
    return copy.deepcopy(module, {id(t): _fake_state(mode, t) for t in state})


def _fake_state(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A fake stand-in for a parameter or buffer; what is on the meta device counts as the CPU's."""
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _fake_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The inputs as fake tensors on the module's device, with shapes, strides, storages and requires_grad as given.

    A tensor that is given twice becomes two, each with bytes of its own: a plan is one for other values, too, which need not be
    the same for both arguments.
    """
    device = device_of(module, args, kwargs) or torch.device("cpu")
    mode = next((t.fake_mode for t in tensors_of(module, args, kwargs) if isinstance(t, FakeTensor)), None) or FakeTensorMode()
    copies, seen = FakeCopies(mode, meta_as=device), set()

    def fake(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in seen:
            return FakeCopies(mode, meta_as=device).convert(leaf)
        seen.add(id(leaf))
        return leaf if isinstance(leaf, FakeTensor) and leaf.fake_mode is mode else copies.convert(leaf)

    return pytree.tree_map(fake, (args, kwargs))


def _names(module: nn.Module) -> dict[int, str]:
    """id of each parameter and buffer -> the name that the user's module gives it (the first, where it is tied)."""
    return {id(t): name for name, t in (*module.named_buffers(), *module.named_parameters())}


def _attributes(module: nn.Module, read: Read, constants: Mapping[str, torch.Tensor]) -> dict[str, str | None]:
    """The tensors that a graph has read of attributes that are no parameters or buffers, by their paths: names of constants,
    or None, where the attribute is another name for a parameter or buffer."""
    names = {id(tensor): name for name, tensor in constants.items()}
    own = [path for path in read.tensors if not STATE.search(path)]
    return {path: names.get(id(attribute_at(module, path))) for path in own}


def _input_names(module: nn.Module, args: tuple, kwargs: dict) -> list[str]:
    """What the user calls each input leaf: "x", or "batch['image']"."""
    parameters = inspect.signature(module.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    tops = [(positional[i] if i < len(positional) else f"argument {i}", value) for i, value in enumerate(args)]
    return [
        name + pytree.keystr(path)
        for name, value in (*tops, *kwargs.items())
        for path, _ in pytree.tree_leaves_with_path(value)
    ]


def _torch_level(module: nn.Module, args: tuple, kwargs: dict) -> tuple[fx.GraphModule, Read, tuple, dict]:
    """One torch-level GraphModule to trace, ours to change, which attributes it has read, and the arguments to call it with."""
    if isinstance(module, fx.GraphModule):
        _check_recurrent(module)
        copied, hooked = _by_first_names(module), _has_hooks(module)
        if not hooked and not _is_tied(copied):
            if kwargs and type(module.graph._codegen) is fx.graph.CodeGen:
                bound = inspect.signature(module.forward).bind(*args, **kwargs)
                bound.apply_defaults()
                return copied, Read(), bound.args, {}
            return copied, Read(), args, kwargs
        module = module if hooked else copied  # without an exporter's own check of its inputs
    with refusing(type(module).__name__):
        traced, assignments, read = dynamo_graph(module, args, kwargs)
    _check_assignments(module, traced, assignments)
    return traced, read, args, kwargs


def _by_first_names(module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph reads each parameter by the first of its names; an export lists a tied weight by every name."""
    graph, names = copy.deepcopy(module.graph), _names(module)
    tensors = dict(module.named_parameters(remove_duplicate=False))
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in tensors:
            node.target = names[id(tensors[node.target])]
    return fx.GraphModule(module, graph)


def _is_tied(module: nn.Module) -> bool:
    """Whether a parameter has several names, for each of which AOTAutograd would trace a gradient of its own: added up name by
    name, they round otherwise than use by use."""
    return len([*module.parameters()]) < len([*module.named_parameters(remove_duplicate=False)])


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody has put a hook on the module itself; an exporter's checks its inputs."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not getattr(hook, "__module__", "").startswith("torch.") for hook in hooks)


def _add_unused_state(graph_module: fx.GraphModule, module: nn.Module) -> None:
    """What the module holds but does not read is there during the step all the same."""
    held = (*graph_module.parameters(), *graph_module.buffers(), *vars(graph_module).values())
    used = {id(t) for t in held if isinstance(t, torch.Tensor)}
    state = (t for t in (*module.parameters(), *module.buffers()) if t.layout is torch.strided)
    for i, tensor in enumerate(t for t in state if id(t) not in used):
        if isinstance(tensor, nn.Parameter):
            graph_module.register_parameter(f"fxmem_unused_{i}", tensor)
        else:
            graph_module.register_buffer(f"fxmem_unused_{i}", tensor)


def _check_recurrent(graph_module: fx.GraphModule) -> None:
    """Refuse nn.LSTM and its kin: tracing takes their kernel apart, with other rounding and without dropout between layers."""
    for node in graph_module.graph.nodes:
        layer = graph_module.get_submodule(node.target) if node.op == "call_module" else None
        called = str(node.target) if node.op == "call_function" else ""
        if isinstance(layer, nn.RNNBase) or re.search(r"\b(lstm|gru|rnn_tanh|rnn_relu)\b", called):
            raise CaptureError(
                f"{source_of(node)} is a recurrent layer, of which PyTorch's tracing loses the dropout between "
                "its layers and the fused "
                "kernel: unroll it with nn.LSTMCell or nn.GRUCell, or transform the modules around it one by one"
            )


def _check_assignments(module: nn.Module, traced: fx.GraphModule, assignments: list[Assignment]) -> None:
    """Refuse state that the module's Python code moves from step to step: the graph would repeat the first step for ever."""
    read = {id(t) for t in (*traced.parameters(), *traced.buffers(), *vars(traced).values()) if isinstance(t, torch.Tensor)}
    for found in assignments:
        name = f"{found.path}.{found.name}".lstrip(".")
        before = _attribute(module, name)
        if found.is_buffer:
            raise CaptureError(
                f"buffer {name!r} is replaced by a new tensor, at {found.where}: a planned module can only write "
                "into its buffers, as "
                f"in self.{found.name}.copy_(value)"
            )
        if isinstance(before, (bool, int, float, str)) or id(before) in read:
            raise CaptureError(
                f"attribute {name!r} is changed by the module's Python code, at {found.where}, and a planned step "
                "would never see it "
                "move: make it a buffer and write into it, or change it outside of forward"
            )
        log.warning("attribute %r, set at %s, is left alone by planned steps", name, found.where)


def _attribute(module: nn.Module, name: str) -> Any:
    """What stands at a dotted name now; None where nothing does yet."""
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        return None


def _refusal(name: str, error: Exception) -> str:
    """What stood in the way of one graph, in the user's terms: the first lines of PyTorch's message and the user's own line."""
    text = str(error).strip() or type(error).__name__
    failed = re.search(r"Dynamo failed to run FX node with fake tensors: (.*?)\(\*.*got \w+\((['\"])(.+?)\2\)", text)
    if failed:
        return f"{name} fails on tensors like the example inputs: {failed[3]} (in {failed[1]})"
    checked = re.search(r"with_effects.*While executing %(\w+).*?target=(?:torch\._C\._linalg\.)?([\w.]+)\]", text, re.DOTALL)
    own_frames = [f for f in re.findall(r'File "([^"]+)", line (\d+), in (\w+)', text) if "/torch/" not in f[0]]
    where = f" (at {own_frames[-1][0]}:{own_frames[-1][1]}, in {own_frames[-1][2]})" if own_frames else ""
    if checked:
        return (
            f"node {checked[1]!r}{where} calls {checked[2]}, which stops the step where its result is wrong; a graph cannot: "
            "call the form that returns an error code instead (torch.linalg.inv_ex, cholesky_ex, solve_ex), or transform the "
            "submodules around it one by one"
        )
    reason = " ".join(line.strip() for line in text.splitlines()[:4] if line.strip())
    hint = "fxmem needs the whole module as one graph: rewrite the line, or transform the submodules around it one by one"
    if "unrecognized type UserDefinedObjectVariable" in text:
        hint = (
            "an output is an object that fxmem cannot look into: make the module return tensors in tuples, lists or dicts, "
            "or register its type (torch.export.register_dataclass; for a key-value cache, pass use_cache=False instead)"
        )
    return f"{name} cannot be captured as one graph{where}: {reason}. {hint}."


def _detach_outputs(
    graph_module: fx.GraphModule, values: list[Any], wanted: str | Sequence[int] | None, inference: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rewrite the outputs so that only the differentiated ones reach autograd; returns (differentiated, attached) leaf indices.

    Every output also becomes a value of its own, since AOTAutograd would otherwise hand out the base of outputs that alias each
    other, and rebuild them outside of the graph. (A view in the same shape would not do: kernels give it, and the gradient
    behind it, other strides in dimensions of size one.)
    """
    output = graph_module.graph.output_node()
    nodes = pytree.tree_leaves(output.args)
    tensors = {i: value for i, value in enumerate(values) if isinstance(nodes[i], fx.Node) and isinstance(value, torch.Tensor)}
    attached = tuple(i for i, value in tensors.items() if value.requires_grad)
    differentiated = () if inference else _choose_differentiated({i: tensors[i] for i in attached}, wanted)
    graph, replaced = graph_module.graph, {}
    with graph.inserting_before(output):
        for i in tensors:
            node = nodes[i] if i in differentiated else graph.call_function(torch.ops.aten.detach.default, (nodes[i],))
            shown = graph.call_function(own, (node,))
            shown.meta.update({k: nodes[i].meta[k] for k in ("nn_module_stack", "stack_trace") if k in nodes[i].meta})
            replaced[i] = shown
    indices = iter(range(len(nodes)))
    output.args = pytree.tree_map(lambda leaf: replaced.get(next(indices), leaf), output.args)
    graph_module.recompile()
    return differentiated, attached


def _choose_differentiated(attached: dict[int, torch.Tensor], wanted: str | Sequence[int] | None) -> tuple[int, ...]:
    if not attached:
        raise CaptureError(
            "no output needs gradients, so there is no training step to plan: give some parameter or input requires_grad=True "
            "(and leave torch.no_grad), or use the module as it is for inference"
        )
    if wanted == "all":
        return tuple(attached)
    if wanted is None:
        return tuple(i for i, value in attached.items() if value.dim() == 0) or tuple(attached)
    if isinstance(wanted, str) or not wanted or any(i not in attached for i in wanted):
        raise CaptureError(
            f'output_gradients={wanted!r}: allowed are None, "all", or indices among {tuple(attached)}, the '
            "output leaves that need gradients"
        )
    return tuple(sorted(set(wanted)))


def _output_values(graph_module: fx.GraphModule, args: tuple, kwargs: dict) -> list[Any]:
    """The output leaves on fake tensors: as Dynamo noted them, else by running the graph."""
    leaves = pytree.tree_leaves(graph_module.graph.output_node().args)
    noted = [leaf.meta.get("example_value") if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    if not any(value is None and isinstance(leaf, fx.Node) for value, leaf in zip(noted, leaves, strict=True)):
        return noted
    with refusing(type(graph_module).__name__), fake_mode_of((args, kwargs), allow_real=True) as mode:
        state = {name: _fake_state(mode, t) for name, t in (*graph_module.named_parameters(), *graph_module.named_buffers())}
        return pytree.tree_leaves(torch.func.functional_call(graph_module, state, args, kwargs))


def _aot(graph_module: fx.GraphModule, args: tuple, kwargs: dict) -> tuple[fx.GraphModule, Any]:
    # The mode takes time at every call.
    laid_out = LaidOutInPlace() if any(map(LaidOutInPlace.is_for, graph_module.graph.nodes)) else contextlib.nullcontext()
    with refusing(type(graph_module).__name__), laid_out:
        joint, out_spec = joint_graph(graph_module, args, kwargs)
    joint.graph.set_codegen(fx.graph.CodeGen())
    for node in joint.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        node.replace_all_uses_with(node.args[0])  # autograd's business, and there is none in this graph
        joint.graph.erase_node(node)
    for node in joint.graph.find_nodes(op="call_function", target=own):
        node.target = torch.ops.aten.detach.default  # the same where no autograd looks, and anybody's tools know it
    for node in joint.graph.nodes:
        # The backward of a user's own autograd Function carries no tag: what needs an incoming gradient is of the backward.
        tagged = node.meta.get("partitioner_tag") == "is_backward"
        if node.op != "output" and (tagged or any(is_backward(n) for n in node.all_input_nodes)):
            node.meta["fxmem_backward"] = True
    return joint, out_spec


@contextlib.contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turn whatever PyTorch raises while it traces a module, called so, into a CaptureError in the user's terms."""
    try:
        with quiet_tracing():
            yield
    except FxmemError:
        raise
    except Exception as error:
        raise CaptureError(_refusal(name, error)) from error
