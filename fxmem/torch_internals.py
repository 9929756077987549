"""Every private PyTorch interface that fxmem uses, behind a name of ours: a new PyTorch is this file's work.

joint_graph         AOTAutograd's joint graph with descriptors        torch._functorch.aot_autograd, torch._ops
dynamo_graph        one torch-level graph of any nn.Module            torch._dynamo.functional_export, .side_effects
COMPILE_ERRORS      what code generation raises, not a kernel's run    torch._dynamo.exc
attribute_at        what a path names that a guard of Dynamo's holds  torch._dynamo.guards
what the joint graph's placeholders and outputs mean                  torch._functorch._aot_autograd.descriptors
pytree, tensors_in                                                    torch.utils._pytree
OpOverload          what an operator of the dispatcher is             torch._ops
OpOverloadPacket    all overloads of one name                         torch._ops
out_overload        which operators write where they are told         torch._C, the dispatcher's tables
FakeTensor, TorchFakeTensorMode   see `fake_kernels` for ours           torch._subclasses.fake_tensor
saved_by_partitioner   what PyTorch itself would keep                 torch._functorch.partitioners
cpu_memory_events   the CPU allocator's events, by the profiler       kineto_results of torch.autograd.profiler
TorchDispatchMode, and real tensors inside such modes (real_tensors)   torch.utils._python_dispatch
storage_key, suggested_format, dense_strides, is_dense         torch._prims_common
convolution_backend, convolution_backends   which kernels run a convolution                torch._C
has_float16_convolutions                                              torch.ops.mkldnn
spec_children, spec_to_data, spec_from_data, rename_node              torch.utils._pytree, torch.fx.Node
without_saved_tensors_hooks   hooks on what autograd saves            torch._C._autograd
owners              how many hold a tensor                            torch._C
flatten_outputs     outputs without the structure they are given      torch.fx.graph
captured_checkpoints   captured checkpoints, run eagerly              torch.utils.checkpoint, as captured graphs call it
memory_viz          from memory snapshots to text and pages           torch.cuda._memory_viz
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch._prims_common
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from torch import fx, nn
from torch._C import DispatchKey
from torch._dynamo import config as dynamo_config
from torch._dynamo import exc as dynamo_errors
from torch._dynamo.side_effects import SideEffects
from torch._functorch._aot_autograd import descriptors
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as TorchFakeTensorMode
from torch.amp import autocast_mode
from torch.fx.graph import _PyTreeCodeGen
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = [
    "FakeTensor",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "TorchFakeTensorMode",
    "pytree",
]  # and all that is defined here


aten = torch.ops.aten
DECOMPOSED = (
    aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d,
    aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d, aten._upsample_nearest_exact3d,
    aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten.upsample_trilinear3d,
    aten.multi_margin_loss, aten.multilabel_margin_loss_forward, aten.softshrink, aten.hardshrink,
)  # fmt: skip
COLLECTING_HOOKS = "transformers.utils.output_capturing"  # the module of hooks that only note what layers return
ENTER_AUTOCAST, EXIT_AUTOCAST = autocast_mode._enter_autocast, autocast_mode._exit_autocast
COMPILE_ERRORS = (dynamo_errors.TorchDynamoException, dynamo_errors.FailOnRecompileLimitHit)


STEP = re.compile(r"\.(\w+)|\['([^'\\]*)'\]|\[(-?\d+)\]")  # of a path as Dynamo writes it: an attribute, a key or an index
PATH = re.compile(f"(?:{STEP.pattern})+")
# An attribute that an object has from its class.
OF_CLASS = re.compile(r"dict\(type\((.*)\)(?:\.__mro__\[\d+\])?\.__dict__\)\['(\w+)'\]")
READS = {"CONSTANT_MATCH": "constants", "TENSOR_MATCH": "tensors", "DUPLICATE_INPUT": "tensors"}  # by Dynamo's guards


@dataclass(frozen=True)
class Assignment:
    """State of the module that its own Python code changes while it runs, which no graph of tensors holds.

    path: of the submodule, "" for the module itself. name: the attribute, or the list or dict in it, that is changed.
    is_buffer: whether a registered buffer is replaced by another tensor (a write into it is in the graph).
    where: "file:line" of the user's code, as far as it is known.
    """

    path: str
    name: str
    is_buffer: bool
    where: str


@dataclass(frozen=True)
class Read:
    """Which attributes of a module a graph of it has read, as paths from it ("._modules['0'].scale", ".config.sizes[1]";
    see `attribute_at`): numbers, texts and flags, which it holds as constants, and tensors, registered ones among them."""

    constants: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()


def dynamo_graph(module: nn.Module, args: tuple, kwargs: dict) -> tuple[fx.GraphModule, list[Assignment], Read]:
    """One torch-level graph of `module` as Dynamo sees it (static shapes, no graph break allowed), what it leaves out, and
    which of the module's attributes it has read."""
    try:
        return _dynamo_graph(module, args, kwargs)
    except dynamo_errors.Unsupported as error:
        if "lock" not in str(error):
            raise
        with _layer_hooks(module) as count:
            if not count:
                raise
            return _dynamo_graph(module, args, kwargs)


def _dynamo_graph(module: nn.Module, args: tuple, kwargs: dict) -> tuple[fx.GraphModule, list[Assignment], Read]:
    from torch._dynamo.functional_export import _dynamo_graph_capture_for_export

    _register_cache_outputs()
    found: dict[Assignment, None] = {}
    read: dict[str, set[str]] = {"constants": set(), "tensors": set()}
    codegen = SideEffects.codegen_update_mutated

    def spy(effects: SideEffects, *spy_args: Any, **spy_kwargs: Any) -> None:
        found.update(dict.fromkeys(_assignments(effects)))
        for kind, path in _attributes_read(effects):
            read[kind].add(path)
        codegen(effects, *spy_args, **spy_kwargs)

    config = dynamo_config.patch(automatic_dynamic_shapes=False, assume_static_by_default=True)
    with config, mock.patch.object(SideEffects, "codegen_update_mutated", spy):
        graph_module = _dynamo_graph_capture_for_export(module)(*args, **kwargs)
    return graph_module, list(found), Read(**{kind: tuple(sorted(paths)) for kind, paths in read.items()})


def _attributes_read(effects: SideEffects) -> Iterator[tuple[str, str]]:
    """What Dynamo read on the traced module and in what hangs on it: (a field of `Read`, the path)."""
    graph = effects.output_graph_weakref()
    for guard in graph.guards if graph else ():
        name = OF_CLASS.sub(r"\1.\2", guard.name)
        path = name.removeprefix("L['self']._modules['_export_root']")
        if guard.create_fn_name() in READS and path != name and PATH.fullmatch(path):
            yield READS[guard.create_fn_name()], path


def attribute_at(module: nn.Module, path: str) -> Any:
    """What stands at such a path from a module; None where nothing does any more."""
    found: Any = module
    try:
        for name, key in _steps(path):
            found = found[key] if name is None else getattr(found, name)
    except (AttributeError, KeyError, IndexError, TypeError):
        return None
    return found


@functools.cache
def _steps(path: str) -> tuple[tuple[str | None, str | int | None], ...]:
    return tuple((name or None, int(index) if index else key) for name, key, index in STEP.findall(path))


def _assignments(effects: SideEffects) -> Iterator[Assignment]:
    """What Dynamo noted as changed on the traced module, its submodules, and the lists, dicts and other objects in them."""
    for variable in effects._get_modified_vars():
        source = _source_name(variable)
        if not source.startswith("L['self']"):
            continue
        frames = [f for stack in effects.mutation_user_stacks.get(variable, ()) for f in stack]
        own = [f for f in frames if f"{os.sep}torch{os.sep}" not in f.filename]
        where = f"{own[-1].filename}:{own[-1].lineno}" if own else "an unknown line"
        _, *path = re.findall(r"_modules(?:'\])?\['([^']+)'\]", source)  # the first is Dynamo's name for the module itself
        rest = source.rpartition("]")[2].lstrip(".")
        if rest == "_buffers":
            items = {key.vt.as_python_constant(): value for key, value in variable.items.items()}
            names = [name for name, value in items.items() if not _is_written_in_place(value)]
        else:
            names = [f"{rest}.{name}".lstrip(".") for name in effects.store_attr_mutations.get(variable, {})] or [rest]
        for name in names:
            yield Assignment(".".join(path), name, rest == "_buffers", where)


def _source_name(variable: Any) -> str:
    """Where Dynamo found an object, as a Python expression; "" for what the traced code made."""
    try:
        return variable.source.name
    except (AttributeError, NotImplementedError):
        return ""


def _is_written_in_place(value: Any) -> bool:
    """Whether the tensor that a buffer's name ends up with is still the buffer (`self.steps += 1` assigns it to itself)."""
    node = value.as_proxy().node if value.is_tensor() else None
    if node is None:
        return True
    before = (n.meta.get("example_value") for n in node.graph.nodes if n.op in ("placeholder", "get_attr"))
    return any(node.meta.get("example_value") is tensor for tensor in before)


@contextlib.contextmanager
def captured_checkpoints() -> Iterator[None]:
    """Let a captured `torch.utils.checkpoint` run eagerly where it writes buffers (a batch norm's statistics). Capture makes
    arguments of them, and with arguments that have moved a checkpoint refuses to run again; here they are no arguments."""
    checkpoint = torch.utils.checkpoint.checkpoint

    def run(function: Callable, *args: Any, **kwargs: Any) -> Any:
        needed = [isinstance(a, torch.Tensor) and a.requires_grad for a in args]
        others = [None if given else a for a, given in zip(args, needed, strict=True)]

        def of_needed(*some: Any) -> Any:
            left = iter(some)
            return function(*(next(left) if given else other for other, given in zip(others, needed, strict=True)))

        return checkpoint(of_needed, *(a for a, given in zip(args, needed, strict=True) if given), **kwargs)

    with mock.patch.object(torch.utils.checkpoint, "checkpoint", run):
        yield


@contextlib.contextmanager
def _layer_hooks(module: nn.Module) -> Iterator[int]:
    """Transformers' models collect hidden states by hooks on their layers, which they install when they first run, behind a
    lock that Dynamo cannot enter. Here they are installed, as many as the count says, while it traces."""
    outputs = sys.modules.get(COLLECTING_HOOKS)
    layers, installed = list(module.modules()) if outputs else [], "_output_capturing_hooks_installed"
    before = [(dict(layer._forward_hooks), hasattr(layer, installed)) for layer in layers]
    try:
        for layer in layers:
            if outputs._CAN_RECORD_REGISTRY.get(layer):
                outputs.maybe_install_capturing_hooks(layer)
        yield sum(len(layer._forward_hooks) - len(hooks) for layer, (hooks, _) in zip(layers, before, strict=True))
    finally:
        for layer, (hooks, had) in zip(layers, before, strict=True):
            for key in set(layer._forward_hooks) - set(hooks):
                del layer._forward_hooks[key]
            if hasattr(layer, installed) and not had:
                delattr(layer, installed)


def _register_cache_outputs() -> None:
    """Transformers' key-value caches come out of most of its models but are no pytrees until its own export support says so;
    the pair of them that encoder-decoders give is none even then."""
    if "transformers.cache_utils" in sys.modules:
        with contextlib.suppress(ImportError, RuntimeError):  # RuntimeError: it imports a torchvision made for another torch
            from transformers.integrations.executorch import register_dynamic_cache_export_support

            register_dynamic_cache_export_support()
        with contextlib.suppress(ImportError, ValueError):  # ValueError: it is registered
            from transformers.cache_utils import EncoderDecoderCache

            names = "self_attention_cache", "cross_attention_cache"
            pytree.register_pytree_node(
                EncoderDecoderCache,
                lambda cache: ([getattr(cache, name) for name in names], None),
                lambda caches, _: EncoderDecoderCache(*caches),
                serialized_type_name="transformers.cache_utils.EncoderDecoderCache",
                flatten_with_keys_fn=lambda cache: ([(pytree.GetAttrKey(n), getattr(cache, n)) for n in names], None),
            )


def flatten_outputs(graph_module: fx.GraphModule) -> Any:
    """Let a graph module return its output leaves in a tuple; the structure that it gave them until now, None where it had no
    say. To build the structure can take operators: transformers' caches join what they are given to nothing."""
    codegen = graph_module.graph._codegen
    spec = codegen.pytree_info.out_spec if isinstance(codegen, _PyTreeCodeGen) else None
    if spec is not None:
        leaves = pytree.tree_structure((0,) * spec.num_leaves)
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=leaves)
        graph_module.recompile()
    return spec


def joint_graph(graph_module: fx.GraphModule, args: tuple, kwargs: dict) -> tuple[fx.GraphModule, Any]:
    """The joint forward and backward aten graph of `graph_module`, and the pytree spec of its outputs.

    Placeholders and outputs carry `meta["desc"]`; backward nodes carry `meta["partitioner_tag"] == "is_backward"`.
    """
    with _own_kernels(), contextlib.ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, graph_module, args, kwargs)
        return joint.graph_module, joint.out_spec


@contextlib.contextmanager
def _own_kernels() -> Iterator[None]:
    """Inside, operators are traced as their kernels run that PyTorch would trace by decompositions in Python, which round
    otherwise and keep more; and a dropout that is off is its input, not a copy."""
    taken = []
    for packet in (*DECOMPOSED, aten.dropout):
        for operator in (getattr(packet, name) for name in packet.overloads()):
            for key in (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd):
                if key in operator.py_kernels:
                    taken.append((operator, key, operator.py_kernels.pop(key)))
                    if packet is aten.dropout:
                        operator.py_kernels[key] = _dropout
                    operator._dispatch_cache.clear()
    try:
        yield
    finally:
        for operator, key, kernel in taken:
            operator.py_kernels[key] = kernel
            operator._dispatch_cache.clear()


def _dropout(value: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    return aten.native_dropout(value, p, train)[0] if train and p and value.numel() else value


@contextlib.contextmanager
def without_saved_tensors_hooks() -> Iterator[None]:
    """Inside, hooks of the user's on what autograd saves (`torch.utils.checkpoint` has such) see nothing of fake tensors."""
    hooks = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


@contextlib.contextmanager
def quiet_tracing() -> Iterator[None]:
    """Inside, fake tensors do not log what they raise: whoever catches it says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def saved_by_partitioner(joint: fx.GraphModule, forward_outputs: int, fraction: float) -> set[str]:
    """Names of the nodes that PyTorch's partitioner keeps for the backward at `activation_memory_budget=fraction`.

    joint: placeholders called primals_* and tangents_*, the first `forward_outputs` outputs the forward's; it is changed.
    """
    from torch._functorch import config
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    with config.patch(activation_memory_budget=fraction, cse=False):
        forward, _ = min_cut_rematerialization_partition(joint, None, num_fwd_outputs=forward_outputs)
    return {n.name for n in forward.graph.output_node().args[0][forward_outputs:] if isinstance(n, fx.Node)}


@contextlib.contextmanager
def restore_rng() -> Iterator[None]:
    """Put the random generators of the CPU and of the CUDA devices in use back as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


def input_role(desc: Any) -> tuple[str, Any] | None:
    """(kind, key) of a placeholder: ("parameter" | "buffer", name), ("input", flat index), ("tangent", output index)."""
    match desc:
        case descriptors.ParamAOTInput(target=name):
            return "parameter", name
        case descriptors.BufferAOTInput(target=name):
            return "buffer", name
        case descriptors.PlainAOTInput(idx=index):
            return "input", index
        case descriptors.TangentAOTInput(output=descriptors.PlainAOTOutput(idx=index)):
            return "tangent", index
    return None


def output_role(desc: Any) -> tuple[str, Any] | None:
    """(kind, key) of an output: ("output", index), ("mutation", input role), ("gradient", input role)."""
    match desc:
        case descriptors.PlainAOTOutput(idx=index):
            return "output", index
        case descriptors.InputMutationAOTOutput(mutated_input=source):
            return "mutation", input_role(source)
        case descriptors.GradAOTOutput(grad_of=source):
            return "gradient", input_role(source)
    return None


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors among a pytree's leaves."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage_key(tensor: torch.Tensor) -> int:
    """What two tensors over the same storage have in common, for as long as one of them lives."""
    return tensor.untyped_storage()._cdata


def is_view_operator(operator: OpOverload) -> bool:
    """Whether an operator always shows bytes of its operand."""
    return operator.is_view or operator is torch.ops.aten._unsafe_view.default


def owners(tensor: torch.Tensor) -> tuple[int, int]:
    """How many hold a tensor, and its storage, at this moment, the caller and the dispatcher among them."""
    return tensor._use_count(), torch._C._storage_Use_Count(storage_key(tensor))


def cpu_memory_events(run: Callable[[], Any]) -> tuple[Any, list[int]]:
    """Run `run()`; its result, and the signed bytes of every allocation and release on the CPU meanwhile, in time order.

    The profiler's tracing library announces each start on stderr unless its log level forbids it.
    """
    level = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    try:
        with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profiler:
            result = run()
    finally:
        if level is None:
            os.environ.pop("KINETO_LOG_LEVEL", None)
    events = profiler.kineto_results.events()
    memory = [
        (e.start_ns(), e.nbytes())
        for e in events
        if e.name() == "[memory]" and e.device_type() == torch.autograd.DeviceType.CPU
    ]
    return result, [size for _, size in sorted(memory, key=lambda event: event[0])]


def out_overload(operator: OpOverload, device_type: str) -> OpOverload | None:
    """The overload of `operator` that writes the same results where it is told, by a kernel of its own on a kind of device.

    PyTorch generates an overload with `out` for nearly every operator; most of them compute elsewhere and copy. Those bear a
    tag, and have no kernel for the device.
    """
    taken = [(a.name, str(a.type)) for a in operator._schema.arguments]
    keys = (device_type.upper(), "CompositeExplicitAutograd")
    for name in operator.overloadpacket.overloads():
        other = getattr(operator.overloadpacket, name)
        names = out_names(other)
        rest = [(a.name, str(a.type)) for a in other._schema.arguments if a.name not in names]
        if torch.Tag.generated in other.tags or rest != taken or len(names) != len(operator._schema.returns) or not names:
            continue
        if any(torch._C._dispatch_has_kernel_for_dispatch_key(other.name(), key) for key in keys):
            return other
    return None


def out_names(operator: OpOverload) -> tuple[str, ...]:
    """The keywords that an operator is told by where to write, in the order of its results."""
    arguments = operator._schema.arguments
    return tuple(a.name for a in arguments if a.kwarg_only and a.alias_info is not None and a.alias_info.is_write)


def spec_children(spec: Any) -> list[Any]:
    """The specs of a pytree spec's children."""
    return spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs


def is_being_traced(*tree: Any) -> bool:
    """Whether this call is an exporter's or an fx tracer's, not a real one."""
    return torch.compiler.is_compiling() or any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(tree))


def real_tensors() -> contextlib.AbstractContextManager:
    """Inside, no fake tensor mode nor any other dispatch mode is in force: operators compute."""
    return _disable_current_modes()


def rename_node(node: fx.Node, name: str) -> None:
    """Give an fx node a new name, made unique within its graph."""
    node._rename(name)


def spec_to_data(spec: Any) -> tuple | None:
    """A pytree spec as (type, context, children), None for a leaf: specs themselves pickle with a warning."""
    return None if spec.is_leaf() else (spec.type, spec.context, [spec_to_data(child) for child in spec_children(spec)])


def spec_from_data(data: tuple | None) -> Any:
    """The spec that `spec_to_data` was given."""
    if data is None:
        return pytree.tree_structure(0)
    kind, context, children = data
    return pytree.TreeSpec(kind, context, [spec_from_data(child) for child in children])


def memory_viz() -> ModuleType:
    """PyTorch's converter of memory snapshots: `trace_plot`, `trace`, `segsum` and others, from a snapshot's dict to text."""
    import torch.cuda._memory_viz

    return torch.cuda._memory_viz


def convolution_backends(x: Any, weight: Any, stride: Any, padding: Any, dilation: Any, groups: int, missing: Any, made: Any):
    """The names of the kernels that PyTorch picks for a convolution of x, and for the transposed one that leads from `made`, a
    tensor of its output's shape, back to x's shape, `missing` being its output padding."""
    there, bias_sizes = convolution_backend(x, weight, stride, padding, dilation, groups), [weight.shape[1] * groups]
    back = torch._C._select_conv_backend(made, weight, None, stride, padding, dilation, True, missing, groups, bias_sizes)
    return there.name, "MkldnnTranspose" if back.name == "???" else back.name  # the one kernel that has no name in Python


def has_float16_convolutions() -> bool:
    """Whether oneDNN has kernels for float16 on this processor."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return supported is not None and supported()


def convolution_backend(x: torch.Tensor, weight: torch.Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
    """The kernel that PyTorch picks for a convolution."""
    missing, bias_sizes = [0] * len(stride), [weight.shape[0]]
    return torch._C._select_conv_backend(x, weight, None, stride, padding, dilation, False, missing, groups, bias_sizes)


def suggested_format(tensor: torch.Tensor) -> torch.memory_format:
    """The memory format that PyTorch's own kernels read off the tensor's strides."""
    return torch._prims_common.suggest_memory_format(tensor)


def dense_strides(shape: Sequence[int], memory_format: torch.memory_format = torch.contiguous_format) -> tuple[int, ...]:
    """The strides of a new tensor of that shape and format."""
    if memory_format is torch.contiguous_format:
        return tuple(torch._prims_common.make_contiguous_strides_for(shape))
    return tuple(torch._prims_common.make_channels_last_strides_for(shape))


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor covers, without overlap or gap, one stretch of its storage."""
    return torch._prims_common.is_non_overlapping_and_dense_or_false(tensor)
