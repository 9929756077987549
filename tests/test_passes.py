"""Each pass alone, in a PassManager, and beside other people's passes."""

import pytest
import torch
from helpers.models import ConvNet, Counter, SharedNorm, Transformer
from helpers.steps import assert_drop_in
from torch import fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import fxmem
from fxmem.capture import capture
from fxmem.cost import cost_model
from fxmem.fake_kernels import FakeTensorMode
from fxmem.inplace import INPLACE_FORMS
from fxmem.lowering import BATCH_NORM, lower
from fxmem.passes import (
    Costs,
    Liveness,
    MarkRegions,
    MatchEager,
    MergeCopies,
    NameNodes,
    Rematerialize,
    ShapeProp,
    UpdateBuffers,
)
from fxmem.schedule import plain_schedule, simulate
from fxmem.torch_internals import cpu_memory_events, pytree

aten = torch.ops.aten
KB4 = 4 * 1024


def roofline():
    return cost_model("roofline", torch.device("cpu"))


def joint(module=None, args=None):
    args = (torch.randn(2, 3, 16, 16),) if args is None else args
    return capture(module or ConvNet(), args, {}).joint


def hand_made():
    """x -> exp -> view -> exp -> out, with a use of the first exp at the end; 1024 floats each."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(aten.exp.default, (x,), name="a")
    v = graph.call_function(aten.view.default, (a, [32, 32]), name="v")
    b = graph.call_function(aten.exp.default, (v,), name="b")
    c = graph.call_function(aten.tanh.default, (b,), name="c")
    d = graph.call_function(aten.add.Tensor, (c, v), name="d")
    graph.output((d,))
    return fx.GraphModule(nn.Module(), graph)


def named(graph_module):
    return {n.name: n for n in graph_module.graph.nodes}


def test_shape_prop_finds_storages_through_views():
    module = hand_made()
    result = ShapeProp((torch.empty(1024),))(module)
    nodes = named(module)
    assert result.modified is False and result.graph_module is module
    assert nodes["v"].meta["fxmem_storages"] == nodes["a"].meta["fxmem_storages"] == (1,)
    assert [info.size_bytes for info in module.meta["fxmem_storages"]] == [KB4] * 5
    assert nodes["v"].meta["val"].shape == (32, 32)


@pytest.mark.parametrize(("alignment", "size"), [(1, 40), (512, 512)])
def test_shape_prop_rounds_as_the_allocator_does(alignment, size):
    module = hand_made()
    module.graph.erase_node(module.graph.output_node())
    for node in reversed(list(module.graph.nodes)[2:]):
        module.graph.erase_node(node)
    module.graph.output((named(module)["a"],))
    ShapeProp((torch.empty(10),), alignment_bytes=alignment)(module)
    assert [info.size_bytes for info in module.meta["fxmem_storages"]] == [size, size]


def test_liveness():
    module = hand_made()
    PassManager(passes=[ShapeProp((torch.empty(1024),)), Liveness()])(module)
    nodes = named(module)
    assert {n: nodes[n].meta["fxmem_frees"] for n in "avbcd"} == {"a": (), "v": (), "b": (), "c": (2,), "d": (1, 3)}
    assert [nodes[n].meta["fxmem_live_bytes"] // KB4 for n in "avbcd"] == [2, 2, 3, 4, 4]
    assert module.meta["fxmem_peak_bytes"] == 4 * KB4


@pytest.mark.parametrize(
    "graph_pass", [Liveness(), MarkRegions(), Costs(roofline()), Rematerialize("min")], ids=lambda p: type(p).__name__
)
def test_a_pass_says_what_has_to_run_before_it(graph_pass):
    with pytest.raises(fxmem.CaptureError, match="ShapeProp"):
        graph_pass(hand_made())


def test_update_buffers_needs_roles():
    with pytest.raises(fxmem.CaptureError, match="roles"):
        UpdateBuffers()(hand_made())


def test_costs():
    module = hand_made()
    ShapeProp((torch.empty(1024),))(module)
    assert Costs(roofline())(module).modified is False
    nodes = named(module)
    assert nodes["v"].meta["fxmem_time_s"] == 0 < nodes["a"].meta["fxmem_time_s"]
    assert all(nodes[n].meta["fxmem_workspace_bytes"] == 0 for n in "avbcd")


class NoStats(fxmem.CostModel):
    """A node more expensive than any budget of time."""

    name = "from the test"

    def cost(self, node):
        return fxmem.OpCost(float("nan") if node.name == "b" else 1.0, 0)


def test_costs_name_the_node_that_has_none():
    module = hand_made()
    ShapeProp((torch.empty(1024),))(module)
    with pytest.raises(fxmem.CostError, match="'b'"):
        Costs(NoStats())(module)


def test_match_eager_rewrites_dropout_and_batch_norm():
    graph_module = joint()
    result = MatchEager()(graph_module)
    targets = [n.target for n in graph_module.graph.nodes]
    assert result.modified and aten.native_dropout_backward.default not in targets
    norms = [n for n in graph_module.graph.nodes if n.target is aten.native_batch_norm_backward.default]
    assert norms and all(n.args[3:5] == (None, None) for n in norms)
    assert MatchEager()(joint(nn.Linear(3, 3), (torch.randn(2, 3),))).modified is False


def test_update_buffers_writes_where_a_buffer_changes():
    graph_module = joint(SharedNorm(), (torch.randn(4, 8),))
    before = [r.kind for r in graph_module.graph.output_node().meta["fxmem_roles"]]
    assert UpdateBuffers()(graph_module).modified
    output = graph_module.graph.output_node()
    assert "buffer_update" in before and "buffer_update" not in [r.kind for r in output.meta["fxmem_roles"]]
    assert len(output.args[0]) == len(output.meta["fxmem_roles"]) == len(before) - before.count("buffer_update")
    writes = [n for n in graph_module.graph.nodes if n.target is aten.copy_.default]
    twice = ["norm.running_mean"] * 2 + ["norm.running_var"] * 2  # by each of the two calls, as in the plain module
    assert sorted(n.args[0].meta["fxmem_role"].key for n in writes) == ["norm.num_batches_tracked", *twice]
    norms = [n for n in graph_module.graph.nodes if n.target is BATCH_NORM]
    assert all(n.args[3].op == n.args[4].op == "placeholder" for n in norms)
    assert not any(n.meta.get("fxmem_backward") for n in writes)
    assert UpdateBuffers()(graph_module).modified is False


def test_update_buffers_keeps_an_old_value_that_is_read_later():
    graph_module = joint(Counter(), (torch.randn(4, 8),))
    UpdateBuffers()(graph_module)
    graph_module.graph.lint()
    position = {n: i for i, n in enumerate(graph_module.graph.nodes)}
    for write in (n for n in graph_module.graph.nodes if n.target is aten.copy_.default):
        late = [u for u in write.args[0].users if position[u] > position[write]]
        assert late == []


def test_names_say_module_and_operation():
    graph_module = joint()
    NameNodes()(graph_module)
    names = [n.name for n in graph_module.graph.nodes]
    assert {
        "stem_weight",
        "blocks_0_1_running_mean",
        "input_0",
        "grad_output_0",
        "stem_convolution",
        "blocks_0_1_batch_norm_mean",
    } <= set(names)
    assert len(names) == len(set(names))


def test_regions_are_contiguous_and_mirrored():
    graph_module = joint(Transformer(layers=2), (torch.arange(12).view(2, 6),))
    PassManager(passes=[ShapeProp(), MarkRegions()])(graph_module)
    places = [
        (n.meta.get("fxmem_backward", False), n.meta["fxmem_region"])
        for n in graph_module.graph.nodes
        if "fxmem_region" in n.meta
    ]
    forward, backward = ([r for b, r in places if b is part] for part in (False, True))
    assert forward == sorted(forward) and backward == sorted(backward, reverse=True)
    assert set(forward) == set(range(len(graph_module.meta["fxmem_regions"])))
    assert all(name.isidentifier() for name in graph_module.meta["fxmem_regions"])


def default_passes():
    return [NameNodes(), MatchEager(), UpdateBuffers(), ShapeProp(), Liveness(), MarkRegions(), Costs(roofline())]


def run(graph_module, seed=0):
    """All results of a joint graph on the same random inputs."""
    generator = torch.Generator().manual_seed(0)
    values = [n.meta["val"] for n in graph_module.graph.nodes if n.op == "placeholder"]
    inputs = [
        torch.rand(v.shape, generator=generator) if v.is_floating_point() else torch.zeros(v.shape, dtype=v.dtype)
        for v in values
    ]
    torch.manual_seed(seed)
    return graph_module(*inputs)


@pytest.mark.parametrize("budget", [None, 0.8, "min"])
def test_rematerialize_computes_the_same(budget):
    graph_module = joint(ConvNet(blocks=4))
    PassManager(passes=default_passes())(graph_module)
    expected, problem = run(graph_module), lower(graph_module).problem
    result = Rematerialize(budget, time_limit_s=0.5)(graph_module)
    assert result.modified
    found = run(graph_module)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    recomputed = [n for n in graph_module.graph.nodes if "fxmem_recomputes" in n.meta]
    assert bool(recomputed) == (budget is not None)
    assert all(n.name.startswith(n.meta["fxmem_recomputes"]) for n in recomputed)
    share = graph_module.meta["fxmem_solution"].timeline.peak_bytes / simulate(problem, plain_schedule(problem)).peak_bytes
    assert share == 1 if budget is None else share <= 0.8


class Count(PassBase):
    """Somebody else's pass."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, graph_module):
        self.seen.append(len(graph_module.graph.nodes))
        return PassResult(graph_module, False)


class Rename(PassBase):
    """Somebody else's pass, which makes every node anew."""

    def call(self, graph_module):
        graph, copies = fx.Graph(), {}
        output = graph.graph_copy(graph_module.graph, copies)
        copied = graph.output(output)
        copied.meta = dict(graph_module.graph.output_node().meta)
        graph_module.graph = graph
        return PassResult(graph_module, True)


def test_among_other_peoples_passes():
    mine, theirs = joint(), joint()
    PassManager(passes=[*default_passes(), Rematerialize("min", time_limit_s=0.5)])(mine)
    count = Count()
    passes = [
        count,
        Rename(),
        *default_passes()[:3],
        Rename(),
        count,
        *default_passes()[3:],
        Rematerialize("min", time_limit_s=0.5),
        count,
        Rename(),
    ]
    PassManager(passes=passes)(theirs)
    assert len(count.seen) == 3
    assert mine.meta["fxmem_solution"].timeline.peak_bytes == theirs.meta["fxmem_solution"].timeline.peak_bytes
    assert all(torch.equal(a, b) for a, b in zip(run(mine), run(theirs), strict=True))


def test_passes_read_fake_values_of_others():
    module = hand_made()
    with FakeTensorMode() as mode:
        FakeTensorProp(module, mode).propagate(torch.empty(1024))
    ShapeProp()(module)
    assert len(module.meta["fxmem_storages"]) == 5


@pytest.mark.parametrize(
    ("function", "copies"),
    [
        (lambda x: torch.cat([torch.sin(x)]).cos(), 0),
        (lambda x: torch.sin(x).clone().cos(), 0),
        (lambda x: torch.sin(x).view(-1).clone().view(8, 6).cos(), 0),
        (lambda x: torch.sin(x).clone().clone().clone().cos(), 0),
        (lambda x: x.clone().clone().cos(), 1),  # of what the caller gave
        (lambda x: torch.sin(x).clone(), 1),  # what the caller gets
        (lambda x: torch.sin(x).clone().view(-1), 1),
        (lambda x: (lambda y: (y[1:], y.clone().cos()))(torch.sin(x)), 1),
        (lambda x: torch.sin(x).t().clone(memory_format=torch.contiguous_format).cos(), 1),  # which lies otherwise
        (lambda x: (lambda y: (y.clone().mul_(3) + y).cos())(torch.sin(x)), 0),  # written to by nobody, once traced
    ],
)
def test_copies_are_their_originals(function, copies):
    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    x = torch.randn(8, 6, requires_grad=True)
    module = capture(Model(), (x,), {}).joint
    MergeCopies()(module)
    targets = [n.target for n in module.graph.nodes]
    assert targets.count(torch.ops.aten.clone.default) + targets.count(torch.ops.aten.cat.default) == copies
    assert not MergeCopies()(module).modified
    assert_drop_in(Model(), (x,))


def _index(target, values) -> torch.Tensor:
    """Places without repetition: columns, elements, or elements of each row."""
    if target is torch.ops.aten.index_add.default:
        return torch.randperm(values.shape[1])
    return torch.randperm(values.numel()).view(values.shape) if target is torch.ops.aten.put.default else values.argsort()


def _arguments(target, values, dtype) -> list:
    """Arguments of an operator by its schema: random tensors, a mask or bits where it wants them."""
    given = []
    for argument in target._schema.arguments:
        if argument.kwarg_only:
            continue
        kind = str(argument.type)
        if kind == "Tensor" and argument.name == "mask":
            given.append(values > 0)
        elif kind == "Tensor" and argument.name == "bits":
            given.append(torch.randint(0, 256, (-(-values.numel() // 8),), dtype=torch.uint8))
        elif argument.name in ("weight", "bias", "mean", "variance", "save_mean", "save_rstd"):  # of a batch norm's channels
            given.append(torch.rand(values.shape[1]).to(dtype))
        elif argument.name == "rstd":  # of rows
            given.append(torch.rand(len(values), 1).to(dtype))
        elif argument.name == "shape":
            given.append([values.shape[1]])
        elif argument.name == "groups":
            given.append(1)
        elif argument.name == "dims":
            given.append([-1])
        elif argument.name == "count":
            given.append(values.shape[1])
        elif argument.name == "index":
            given.append(_index(target, values))
        elif argument.name == "indices" and "List" in kind:
            given.append([torch.randperm(len(values))])
        elif argument.name == "indices":
            given.append(torch.randint(len(values), values.shape[:1]))
        elif argument.name == "whole":  # of three parts, the second of which lies where the next argument says
            given.append((torch.randn(len(values), 3 * values.shape[1]) * 2).to(dtype))
        elif argument.name == "begin":
            given.append(values.shape[1])
        elif kind == "int":
            given.append(-1)
        elif argument.name == "stride":
            given.append(list(values.stride()))
        elif kind == "List[bool]":  # which gradients are wanted
            given.append([True] * 3)
        elif kind == "Tensor":
            given.append((torch.randn(values.shape) * 2).to(dtype))
        else:
            given.append(argument.default_value if argument.has_default_value() else False if kind == "bool" else 0.3)
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", INPLACE_FORMS, ids=str)
def test_forms_in_place_are_bitwise(target, dtype):
    torch.manual_seed(0)
    form, values = INPLACE_FORMS[target], torch.randn(9, 501).to(dtype)
    arguments = _arguments(target, values, dtype)
    expected = pytree.tree_leaves(target(*arguments))
    written = pytree.tree_leaves(form.target(*arguments, **({form.out: arguments[0]} if form.out else {})))
    assert written[0].data_ptr() == arguments[0].data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(expected, written, strict=True))
    if form.second:
        arguments = _arguments(target, values, dtype)
        expected = pytree.tree_leaves(target(*arguments))
        written = pytree.tree_leaves(form.second(arguments[1], arguments[0], *arguments[2:]))
        assert written[0].data_ptr() == arguments[1].data_ptr()
        assert all(torch.equal(a, b) for a, b in zip(expected, written, strict=True))


@pytest.mark.parametrize("target", [t for t in INPLACE_FORMS if "rows" not in str(t)], ids=str)  # those take what rows need
def test_forms_in_place_allocate_nothing_of_their_size(target):
    form, values = INPLACE_FORMS[target], torch.randn(1 << 10, 1 << 10)
    arguments = _arguments(target, values, values.dtype)
    _, events = cpu_memory_events(lambda: form.target(*arguments, **({form.out: arguments[0]} if form.out else {})))
    running = [sum(events[: i + 1]) for i in range(len(events))]
    copies = values.nbytes if "dropout" in str(target) else 0  # the mask, as noise in the values' type
    if "norm_backward_from_output" in str(
        target
    ):  # two pieces of a quarter; of single pixels, a group norm's sums are as large
        copies = values.nbytes if "group" in str(target) else values.nbytes // 2
    assert max(running, default=0) <= copies + (3 << 19)
