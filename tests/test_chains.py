"""Chains of pointwise operators as one kernel: which are found, what they compute, and what they hold."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from helpers.steps import assert_same_steps
from torch import nn

import fxmem
from benchmarks.implementation_cases import CASES, images
from fxmem.checking import force
from fxmem.cost import MeasuredCost, OpCall, RooflineCost
from fxmem.implementations import IMPLEMENTATIONS, programs
from fxmem.prepared import prepare
from fxmem.torch_internals import COMPILE_ERRORS

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def chains_of_small_tensors(monkeypatch):
    for name in ("chain", "chain_accurate"):
        monkeypatch.setitem(IMPLEMENTATIONS, name, replace(IMPLEMENTATIONS[name], least_bytes=2000))


NORM = "fxmem.batch_norm_again.default(x0, w1, w2, w3, w4)"


class Block(nn.Module):
    """A residual block as ResNet has it, and what else may stand in the places of its parts."""

    def __init__(self, act=torch.relu, norm=nn.BatchNorm2d, shortcut=None):
        super().__init__()
        self.a, self.b, self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), norm(8), norm(8)
        self.act, self.shortcut = act, shortcut or nn.Identity()

    def forward(self, x):
        return self.act(self.two(self.b(self.act(self.one(self.a(x))))) + self.shortcut(x))


def offered(module: nn.Module, exactness: str = "bitwise", pixels: int = 16) -> set[str]:
    """The programs of all chains, of tensors of `pixels` x `pixels` x 32 bytes."""
    model = nn.Sequential(nn.Conv2d(8, 8, 1), module, nn.Conv2d(8, 8, 1)).to("meta")
    x = torch.empty(1, 8, pixels, pixels, device="meta")
    joint = prepare(model, (x,), {}, "V100", "all", None, exactness).captured.joint
    return {n.args[1] for n in joint.graph.nodes if n.target is programs.chain}


@pytest.mark.parametrize(
    ("module", "exactness", "expected"),
    [
        (Block(), "bitwise", {
            f"y0 = {NORM}; aten.relu.default(y0)",
            f"y0 = {NORM}; y1 = aten.add.Tensor(y0, x5); aten.relu.default(y1)",
        }),
        (Block(shortcut=nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))), "bitwise", {
            f"y0 = {NORM}; aten.relu.default(y0)",
            f"y0 = {NORM}; y1 = fxmem.batch_norm_again.default(x5, w6, w7, w8, w9); y2 = aten.add.Tensor(y0, y1); "
            "aten.relu.default(y2)",
        }),
        (Block(act=nn.functional.silu), "bitwise", {f"y0 = {NORM}; aten.add.Tensor(y0, x5)"}),  # silu's backward reads it
        (Block(act=nn.functional.silu), "accurate", {
            f"y0 = {NORM}; aten.silu.default(y0)",
            f"y0 = {NORM}; aten.add.Tensor(y0, x5)",
            f"y0 = {NORM}; y1 = aten.add.Tensor(y0, x5); aten.silu.default(y1)",
        }),
        (Block(norm=lambda channels: nn.GroupNorm(2, channels)), "accurate", {
            "y0 = fxmem.group_norm_again.default(x0, w1, w2, x3, x4); aten.relu.default(y0)",
            "y0 = fxmem.group_norm_again.default(x0, w1, w2, x3, x4); y1 = aten.add.Tensor(y0, x5); aten.relu.default(y1)",
        }),
        (nn.Sequential(nn.Sigmoid(), nn.Dropout(0.5), nn.ReLU()), "bitwise", {
            "y0 = fxmem.dropout_apply.default(x0, x1, 2.0); aten.relu.default(y0)",
        }),
        (nn.Sequential(nn.BatchNorm2d(8), nn.Dropout(0.5)), "bitwise", set()),  # the sum would be contracted with the product
        (nn.Sequential(nn.ReLU(), nn.Sigmoid()), "bitwise", set()),
    ],
    ids=["block", "downsample", "silu", "silu accurate", "group norm", "dropout", "norm and dropout", "one operator"],
)  # fmt: skip
def test_which_chains_are_found(module, exactness, expected):
    assert offered(module, exactness) == expected


def test_small_tensors_are_not_worth_a_compiler():
    assert offered(Block(), pixels=4) == set()


def test_nothing_is_offered_where_no_code_can_be_generated(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert offered(Block()) == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_generated_kernel_gives_the_same_bits(dtype, caplog):
    """In a step of the planned module, within the bytes that were promised."""
    torch.manual_seed(0)
    module, x = CASES["chain"]().to(dtype), images(dtype)
    with caplog.at_level(logging.WARNING, "fxmem"):
        planned, places = force("chain", copy.deepcopy(module), (x,), {})
        assert_same_steps(module, planned, (x,))
        measured = fxmem.measure(planned, (x,))
    assert places == 2 and not caplog.records
    assert measured.peak_bytes <= planned.plan.predicted_peak_bytes


def test_a_generated_kernel_of_an_accurate_chain():
    torch.manual_seed(0)
    found = fxmem.check_implementation("chain_accurate", CASES["chain_accurate"](), (images(),))
    assert found.places == 4 and not found.is_bitwise


def operands(dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, shortcut = (torch.randn(4, 3, 5, 7, generator=generator, dtype=dtype) for _ in range(2))
    return [x, *(torch.rand(3, generator=generator, dtype=dtype) for _ in range(4)), shortcut]


PROGRAM = f"y0 = {NORM}; y1 = aten.add.Tensor(y0, x5); aten.hardtanh.default(y1, -0.5, inf)"


def plain(x, weight, bias, mean, rstd, shortcut):
    norm = torch.ops.fxmem.batch_norm_again(x, weight, bias, mean, rstd)
    return nn.functional.hardtanh(norm + shortcut, -0.5, float("inf"))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (lambda *given: plain(*given) * (1 + 1e-7), "the code that was generated for it rounds otherwise"),
        (lambda *given: 1 / 0, "no code could be generated for it"),
    ],
)
def test_a_kernel_that_gives_other_bits_is_not_used(kernel, message, monkeypatch, caplog):
    monkeypatch.setattr(programs, "_trusted", {})
    monkeypatch.setattr(programs, "_generated", lambda program: kernel)
    monkeypatch.setattr(programs, "PIECE_BYTES", 500)  # one image at a time
    with caplog.at_level(logging.WARNING, "fxmem"):
        for _ in range(2):
            assert torch.equal(programs.chain(operands(), PROGRAM, True), plain(*operands()))
    (record,) = caplog.records
    assert message in record.getMessage()


def test_a_kernel_that_cannot_be_made_for_other_sizes(monkeypatch, caplog):
    calls = []

    def kernel(*given):
        calls.append(given)
        if len(calls) > 1:
            raise COMPILE_ERRORS[1]("too many kernels")
        return plain(*given)

    monkeypatch.setattr(programs, "_trusted", {})
    monkeypatch.setattr(programs, "_generated", lambda program: kernel)
    with caplog.at_level(logging.WARNING, "fxmem"):
        for _ in range(2):
            assert torch.equal(programs.chain(operands(), PROGRAM, True), plain(*operands()))
    (record,) = caplog.records
    assert "too many kernels" in record.getMessage() and len(calls) == 2


def test_parameters_of_other_sizes_share_a_kernel(monkeypatch):
    """Of a parameter Dynamo fixes the sizes, so that each width would have a kernel of its own, up to a limit."""
    given = []
    monkeypatch.setattr(programs, "_trusted", {})
    monkeypatch.setattr(programs, "_generated", lambda program: lambda *values: given.append(values) or plain(*values))
    programs.chain([nn.Parameter(o) for o in operands()], PROGRAM, True)
    assert given and not any(isinstance(o, nn.Parameter) for values in given for o in values)


def test_each_pattern_of_sizes_and_strides_is_tried(monkeypatch):
    """With infinities and NaN, rows of features too."""
    rows, tried = [torch.randn(6, 4), torch.randn(6, 4), torch.randn(4)], []
    small = programs._small(rows)
    assert [t.shape for t in small] == [(5, 8), (5, 8), (8,)] and all(t.isnan().any() and t.isinf().any() for t in small[:2])
    assert not small[2].isnan().any()
    monkeypatch.setattr(programs, "_trusted", {})
    monkeypatch.setattr(programs, "_is_right", lambda program, exact, given: bool(tried.append(given)))
    program = "y0 = aten.add.Tensor(x0, x1); aten.relu.default(y0)"
    for pair in ((rows[0], rows[1]), (rows[0][:3], rows[1][:3]), (rows[0].t(), rows[1].t()), (rows[0], rows[1][:, :1])):
        assert torch.equal(programs.chain(list(pair), program, True), torch.relu(pair[0] + pair[1]))
    assert len(tried) == 3


def test_what_a_chain_costs():
    """One kernel: by the roofline every operand once; measured, as much as the slowest of its operators."""
    given = [o.to("meta") for o in operands()]
    made = torch.empty_like(given[0])
    call = OpCall(programs.chain, (given, PROGRAM, True), {}, made)
    cost = RooflineCost("V100").cost_of_call(call)
    moved_bytes = 3 * given[0].nbytes + 4 * given[1].nbytes
    assert cost.time_s == pytest.approx(3e-6 + moved_bytes / (0.78 * 0.9e12)) and cost.workspace_bytes == 0
    model = MeasuredCost(torch.device("cpu"))
    parts = [OpCall(aten.add.Tensor, (given[0], given[5]), out=made)]
    assert model.cost_of_call(call).time_s >= model.cost_of_call(parts[0]).time_s


def test_a_program_is_read_as_it_is_written():
    graph = programs.graph_of(PROGRAM)
    assert [n.name for n in graph.nodes if n.op == "placeholder"] == ["x0", "w1", "w2", "w3", "w4", "x5"]
    targets = [n.target for n in graph.nodes if n.op == "call_function"]
    assert targets == [torch.ops.fxmem.batch_norm_again.default, aten.add.Tensor, aten.hardtanh.default]
    assert next(n for n in graph.nodes if n.target is aten.hardtanh.default).args[1:] == (-0.5, float("inf"))
