"""Gradients as autograd keeps them: nobody else's bytes, in the parameter's layout, counted in the plan."""

import copy

import pytest
import torch
from helpers.steps import assert_drop_in, assert_same, assert_same_steps, transform
from torch import nn

import fxmem
from fxmem.prepared import prepare


class Added(nn.Module):
    """A layer whose output other parameters are added to: their gradients are the output's."""

    def __init__(self, *added: torch.Tensor, last: nn.Module | None = None):
        super().__init__()
        self.layer, self.added, self.last = nn.Linear(8, 8), nn.ParameterList(added), last or nn.Identity()

    def forward(self, x):
        x = self.layer(x)
        for term in self.added:
            x = x + term
        return self.last(x)


def rows():
    return torch.randn(16, 8)


CASES = {
    "the output's": lambda: Added(rows()),
    "the output's, to two": lambda: Added(rows(), rows()),
    "an activation's, to two": lambda: Added(rows(), rows(), last=nn.Tanh()),
    "one that an earlier layer reads": lambda: Added(rows(), last=nn.Sequential(nn.Tanh(), nn.Linear(8, 8), nn.Tanh())),
    "in another layout": lambda: Added(torch.randn(8, 16).t(), last=nn.Tanh()),
    "in a layout that is not dense": lambda: Added(torch.randn(16, 15)[:, ::2], last=nn.Tanh()),
    "the output's in another shape": lambda: Added(rows(), last=nn.Unflatten(1, (2, 4))),
}


@pytest.mark.parametrize("name", CASES)
def test_the_users_gradient_stays_the_users(name):
    torch.manual_seed(0)
    plain, x = CASES[name](), rows()
    planned = transform(copy.deepcopy(plain), (x,))
    given = torch.ones_like(planned(x))
    for _ in range(2):
        planned(x).backward(given)
        plain(x).backward(torch.ones_like(given))
        nn.utils.clip_grad_norm_(planned.parameters(), 0.1)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    assert torch.equal(given, torch.ones_like(given))
    assert_same([p.grad for p in plain.parameters()], [p.grad for p in planned.parameters()])


@pytest.mark.parametrize("name", CASES)
def test_autograd_takes_gradients_as_they_are(name):
    planned = transform(CASES[name](), (rows(),))
    planned(rows()).sum().backward()
    assert fxmem.measure(planned, (rows(),)).peak_bytes == planned.plan.predicted_peak_bytes
    pointers = [p.grad.untyped_storage().data_ptr() for p in planned.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_a_hook_may_change_a_gradient_before_the_backward_is_over():

    def forget(parameter):
        parameter.grad.zero_()

    torch.manual_seed(0)
    plain, x = CASES["one that an earlier layer reads"](), rows()
    planned = transform(copy.deepcopy(plain), (x,), budget=None)
    for module in (plain, planned):
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(forget)
        module.layer.weight.register_hook(lambda gradient: found.append(gradient.clone()))
    found: list[torch.Tensor] = []
    for module in (plain, planned):
        module(x).sum().backward()
    assert_same(*found)


class Holds(nn.Module):
    """A module with state that it does not read."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(8, 8), nn.Linear(100, 100)
        self.tied, self.part = self.other.weight, nn.Parameter(self.other.weight[:3].detach())
        self.register_buffer("table", torch.zeros(999))

    def forward(self, x):
        return torch.tanh(self.layer(x))


@pytest.mark.parametrize("traced", [False, True])
def test_state_that_is_not_read_counts(traced):
    module, x = Holds(), rows()
    given = torch.fx.symbolic_trace(module) if traced else module
    if traced:  # which would leave it out
        given.other = module.other
        given.register_buffer("table", module.table)
    planned = transform(given, (x,))
    assert planned.plan.baseline_peak_bytes == fxmem.measure(given, (x,)).peak_bytes
    assert planned.plan.predicted_peak_bytes == fxmem.measure(planned, (x,)).peak_bytes
    assert planned.plan.problem.fixed_bytes > 4 * (100 * 101 + 999)
    assert_same_steps(copy.deepcopy(given), planned, (x,))


def test_state_that_is_neither_read_nor_dense_is_let_be():
    module, x = Holds(), rows()
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    planned = transform(module, (x,))
    assert torch.equal(planned(x), module(x)) and planned.sparse is module.sparse


def test_a_step_takes_no_copy_where_none_is_needed():
    joint = prepare(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), (rows(),), {}, "cpu").captured.joint
    assert torch.ops.aten.clone.default not in {n.target for n in joint.graph.nodes}


class Loop(nn.Module):
    """A cell, three times."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x, state):
        for _ in range(3):
            state = self.cell(x, state)
        return state


@pytest.mark.parametrize("size", [16, 24, 64, 100])
@pytest.mark.parametrize("cell", [nn.GRUCell, nn.RNNCell], ids=str)
def test_cells_round_as_the_plain_ones(cell, size):
    """A GRU's gates are computed in place, side by side, where vectors end elsewhere."""
    torch.manual_seed(0)
    module, args = Loop(cell(8, size)), (torch.randn(5, 8, requires_grad=True), torch.randn(5, size))
    planned = assert_drop_in(module, args, budget="min", cost="measured", time_limit_s=2.0)
    assert fxmem.measure(planned, args, repeats=1).peak_bytes <= planned.plan.predicted_peak_bytes
