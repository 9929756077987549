"""Capture: one joint graph, whose placeholders and outputs have roles in the user's names."""

import pytest
import torch
from helpers.models import ConvNet, Counter, NestedInputs, Transformer, TwoHeads
from helpers.steps import transform
from torch import nn

import fxmem
from fxmem.capture import capture, example_inputs_of
from fxmem.errors import CaptureError
from fxmem.graph_meta import module_of, source_of
from fxmem.torch_internals import tensors_in

ROWS = (torch.randn(4, 8),)


def roles(captured, op):
    node = captured.joint.graph.output_node()
    if op == "output":
        return [(r.kind, getattr(r.key, "key", r.key)) for r in node.meta["fxmem_roles"]]
    return [(n.meta["fxmem_role"].kind, n.meta["fxmem_role"].key) for n in captured.joint.graph.find_nodes(op="placeholder")]


def test_roles():
    captured = capture(TwoHeads(), (torch.randn(4, 8, requires_grad=True),), {})
    names = [f"{layer}.{kind}" for layer in ("body", "first", "second") for kind in ("weight", "bias")]
    assert sorted(roles(captured, "placeholder")) == sorted(
        [*(("parameter", n) for n in names), ("input", 0), ("tangent", 0), ("tangent", 1)]
    )
    assert sorted(roles(captured, "output"), key=str) == sorted(
        [("output", 0), ("output", 1), *(("gradient", n) for n in names), ("gradient", 0)], key=str
    )
    assert captured.differentiated == captured.attached == (0, 1)


@pytest.mark.parametrize(("wanted", "differentiated"), [(None, (0,)), ("all", (0, 1)), ([1], (1,)), ([1, 0], (0, 1))])
def test_which_outputs_are_differentiated(wanted, differentiated):
    ids = torch.arange(12).view(2, 6)
    captured = capture(Transformer(), (ids, ids), {}, wanted)
    assert captured.differentiated == differentiated and captured.attached == (0, 1)
    assert [k for kind, k in roles(captured, "placeholder") if kind == "tangent"] == list(differentiated)
    assert sorted(k for kind, k in roles(captured, "output") if kind == "output") == list(differentiated)


def test_tied_weights_are_one_placeholder_with_the_first_name():
    ids = torch.arange(12).view(2, 6)
    names = [k for kind, k in roles(capture(Transformer(), (ids,), {}), "placeholder") if kind == "parameter"]
    assert "embed.weight" in names and "head.weight" not in names and len(names) == len(set(names))


def test_buffer_updates_and_constants():
    captured = capture(Counter(), ROWS, {})
    updates = {k for kind, k in roles(captured, "output") if kind == "buffer_update"}
    assert updates == {"steps", "average", "scratch"}
    assert captured.constants == {}

    class Literal(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 2)
            self.scale = torch.tensor([1.0, 2.0])  # no buffer

        def forward(self, x):
            return self.lin(x) * self.scale + torch.tensor([3.0, 4.0])

    captured = capture(Literal(), ROWS, {})
    assert sorted(t.tolist() for t in captured.constants.values()) in ([[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]])


def test_nested_inputs_and_outputs():
    batch = {"x": torch.randn(4, 8), "more": [torch.randn(8), None]}
    captured = capture(NestedInputs(), (batch,), {"bias": torch.randn(8)})
    assert [k for kind, k in roles(captured, "placeholder") if kind == "input"] == [0, 1, 3]
    assert len(tensors_in(captured.call)) + 1 == 4  # and a number


def test_the_backward_is_marked_even_of_ones_own_function():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 100

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x):
            return Scale.apply(self.lin(x))

    captured = capture(Model(), ROWS, {})
    for node in captured.joint.graph.nodes:
        if node.op == "call_function":
            assert not any(n.meta.get("fxmem_backward") for n in node.all_input_nodes) or node.meta.get("fxmem_backward")


def test_nodes_know_their_module_and_line():
    captured = capture(ConvNet(), (torch.randn(2, 3, 8, 8),), {})
    convolution = next(
        n for n in captured.joint.graph.nodes if n.target is torch.ops.aten.convolution.default and module_of(n) == "blocks.1.0"
    )
    assert "of module 'blocks.1.0'" in source_of(convolution) and ".py:" in source_of(convolution)


def test_nothing_runs_and_nothing_is_allocated():
    with torch.device("meta"):
        module, x = nn.Sequential(nn.Linear(2**20, 2**20), nn.ReLU()), torch.empty(2**16, 2**20)
    captured = capture(module, (x,), {})
    sizes = {tuple(n.meta["val"].shape) for n in captured.joint.graph.find_nodes(op="placeholder")}
    assert (2**20, 2**20) in sizes


def test_example_inputs_of_a_traced_module():
    module = torch.fx.symbolic_trace(TwoHeads())
    with pytest.raises(CaptureError, match="tensor_meta"):
        example_inputs_of(module)
    torch.fx.passes.shape_prop.ShapeProp(module).propagate(*ROWS)
    (found,) = example_inputs_of(module)
    assert found.shape == (4, 8) and found.dtype == torch.float32


def two_rows():
    whole = torch.randn(6, 4)
    return whole[:2], whole[2:4]


@pytest.mark.parametrize(
    ("args", "size_bytes"),
    [
        (lambda: (torch.randn(20, 4)[:2],), [320]),  # the storage lives as long as its slice
        (two_rows, [96]),  # one storage behind both
        (lambda: (torch.randn(2, 4), torch.randn(2, 4)), [32, 32]),
    ],
)
def test_storages_of_inputs_count_whole_and_once(args, size_bytes):
    class Total(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, *rows):
            return sum((row * self.scale).sum() for row in rows)

    args = args()
    planned = transform(Total(), args, cost="measured")
    assert [s.size_bytes for s in planned.plan.problem.storages if s.kind == "input" and s.size_bytes > 4] == size_bytes
    assert fxmem.measure(planned, args).peak_bytes == planned.plan.predicted_peak_bytes
