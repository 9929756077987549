"""Steps in an arena: bitwise the plain module's, also with poison in what is dead; when arenas are made, lent and let go."""

import copy
import functools
import io
import pickle
import re
from dataclasses import replace

import pytest
import torch
from helpers.models import ConvNet, Transformer, UNet
from helpers.poison import poisoned_arenas
from helpers.steps import assert_same, assert_same_steps, each_device, messages, on, step, tensors, transform
from test_transform import MODELS
from torch import nn

import fxmem
from fxmem.codegen import arena as runtime
from fxmem.errors import ArenaError
from fxmem.passes import place_in_arena

IMAGES = (torch.randn(2, 3, 16, 16),)
IDS = (torch.arange(24).reshape(2, 12),)


@pytest.fixture(autouse=True)
def small_buffers_too(monkeypatch):
    """Of models that tests can afford, few buffers have a page."""
    monkeypatch.setattr(place_in_arena, "LEAST_BYTES", 1)


def planned_pair(make=ConvNet, args=IMAGES, budget=None):
    """A plain module and a planned copy of it, with an arena."""
    return copy.deepcopy(_planned(make, budget, *args))


@functools.cache
def _planned(make, budget, *args):
    torch.manual_seed(0)
    module = make()
    return copy.deepcopy(module), transform(module, args, arena=True, budget=budget)


CASES = (
    *(
        (name, None)
        for name in ("convolutions", "transformer with loss", "skips", "recurrent", "buffers by hand", "nested inputs")
    ),
    *((name, "min") for name in ("convolutions", "transformer", "skips", "shared batch norm", "statistics read")),
)


@each_device
@pytest.mark.parametrize(("name", "budget"), CASES)
def test_bitwise_though_poisoned(name, budget, device):
    torch.manual_seed(0)
    make, inputs, _ = MODELS[name]
    module, args = on(device, make()), on(device, inputs())
    plain = copy.deepcopy(module)
    planned = transform(module, args, budget=budget, output_gradients="all", arena=True)
    with poisoned_arenas() as made:
        assert_same_steps(plain, planned, args)
    assert len(made) == bool(planned.plan.arena.inside) and all(arena.poisoned for arena in made)


def test_a_view_of_a_slice_lives_from_forward_to_backward():
    """Transposed and split operands of an attention, in half precision and channels last besides."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.qkv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 24), nn.Linear(8, 5)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            h = torch.relu(self.norm(self.conv(x)))
            q, k, v = self.qkv(h.flatten(2).transpose(1, 2)).chunk(3, -1)
            weights = (q @ k.transpose(1, 2)).softmax(-1)
            values, indices = (weights @ v).max(1)
            return self.out(values), indices

    args = (torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),)
    plain, planned = planned_pair(Mixed, args)
    assert len(planned.plan.arena.inside) > 10
    with poisoned_arenas():
        assert_same_steps(plain, planned, args)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_steps(plain, planned, args)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_batch_norm_in_half_precision(dtype, wide):
    """Its statistics are wide only where its weights are."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, dtype=dtype), norm if wide else norm.to(dtype), nn.ReLU(), nn.Conv2d(8, 8, 3, dtype=dtype)
    )
    x = torch.randn(4, 3, 32, 32, dtype=dtype)
    planned = transform(copy.deepcopy(module), (x,), arena=True)
    assert_same_steps(module, planned, (x,))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(module)(x), planned(x))


@pytest.mark.parametrize("sideways", [False, True])
def test_batch_norm_of_what_has_gaps(sideways):
    """Told where to write, the kernel would begin its sums with what lies there."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            part = self.first(x).chunk(2, 1)[0]
            return self.last(self.norm(part.transpose(2, 3) if sideways else part))

    args = (torch.randn(4, 3, 16, 16),)
    plain, planned = planned_pair(Part, args)
    with poisoned_arenas():
        assert_same_steps(plain, planned, args)


def test_without_an_arena_nothing_changes():
    torch.manual_seed(0)
    planned = transform(ConvNet(), IMAGES, budget=None)
    assert planned.plan.arena is None and planned.inference_plan(*IMAGES) is None
    assert "arena" not in "".join(r.forward_graph.code + r.backward_graph.code for r in planned.regions)
    planned.release_arena()  # of which there is none


def test_the_code_says_where():
    _, planned = planned_pair(Transformer, IDS)
    code = "".join(r.forward_graph.code + r.backward_graph.code for r in planned.regions)
    lines = re.findall(r"# bytes ([\d,]+) to ([\d,]+)[^\n]* of the arena\n\s*(\w+) = arena\.write\('(\w+)', torch\.ops\.", code)
    written = {p.offset for p in planned.plan.arena.inside}
    assert len(lines) > 10 and all(name == node for _, _, name, node in lines)
    assert {int(begin.replace(",", "")) for begin, *_ in lines} <= written


def test_every_buffer_has_a_place_or_a_reason():
    _, planned = planned_pair()
    arena, problem = planned.plan.arena, planned.plan.problem
    assert all((p.offset is None) == bool(p.reason) for p in arena.places)
    made_bytes = sum(
        problem.storages[s].size_bytes for i in planned.plan.solution.schedule.steps for s in problem.operators[i].outputs
    )
    pairs = [pair for pair in planned.plan.solution.timeline.inplace if pair]
    assert sum(p.size_bytes for p in arena.places) == made_bytes - sum(problem.storages[s].size_bytes for _, s in pairs)
    why = {p.operator: p.reason for p in arena.outside}
    assert why["stem_convolution"] == "aten.convolution.default has no out kernel of its own on cpu"
    assert why["head_addmm"] == "an output of the module" and why["head_sum"] == "a gradient that is handed out"
    assert sum(p.size_bytes for p in arena.inside) / sum(p.size_bytes for p in arena.places) == arena.share > 0.3
    text = str(arena)
    assert f"arena of {arena.arena_bytes:,} bytes for {len(arena.inside)} of {len(arena.places)} buffers" in text
    assert all(place.name in text for place in arena.places)


def test_nothing_that_leaves_is_inside():
    plain, planned = planned_pair()
    with poisoned_arenas() as made:
        seen = []
        planned.register_forward_hook(lambda module, args, output: seen.append(output))
        planned.head.weight.register_hook(seen.append)
        out = planned(*IMAGES)
        out.sum().backward()
    begin = made[0]._memory.data_ptr()
    handed_out = [out, *seen, *(p.grad for p in planned.parameters()), *planned.buffers()]
    assert not any(begin <= t.data_ptr() < begin + planned.plan.arena.arena_bytes for t in handed_out)


def pool(planned):
    return planned.regions[0].arenas


def train(planned, count=1):
    for _ in range(count):
        planned(*IMAGES).sum().backward()


def test_one_arena_is_kept_from_step_to_step_until_it_is_released():
    _, planned = planned_pair()
    size_bytes = planned.plan.arena.arena_bytes
    with poisoned_arenas() as made:
        train(planned, 3)
        assert len(made) == 1 and pool(planned).allocated_bytes == size_bytes
        planned.release_arena()
        assert pool(planned).allocated_bytes == 0
        train(planned)
        assert len(made) == 2 and pool(planned).allocated_bytes == size_bytes


def test_an_arena_in_use_is_released_when_its_step_is_over():
    _, planned = planned_pair()
    out = planned(*IMAGES)
    planned.release_arena()
    out.sum().backward()
    assert pool(planned).allocated_bytes == 0


def test_a_second_forward_has_an_arena_of_its_own():
    plain, planned = planned_pair()
    other = (torch.randn(2, 3, 16, 16),)
    found = []
    with poisoned_arenas() as made:
        for module in (plain, planned):
            torch.manual_seed(0)
            first, second = module(*IMAGES), module(*other)
            second.square().sum().backward()
            first.square().sum().backward()
            found.append({n: p.grad for n, p in module.named_parameters()})
    assert_same(*found)
    assert len(made) == 2 and pool(planned).allocated_bytes == planned.plan.arena.arena_bytes


def test_a_forward_that_nobody_differentiates_gives_its_arena_back():
    _, planned = planned_pair()
    with poisoned_arenas() as made:
        for _ in range(4):
            planned(*IMAGES)
        (gradient,) = torch.autograd.grad(planned(*IMAGES).sum(), [planned.head.bias])  # a part of the backward
    assert len(made) == 1 and gradient.shape == (10,)


def test_a_smaller_last_batch_has_an_arena_of_its_own_and_the_only_one():
    plain, planned = planned_pair()

    def kept() -> list[bool]:
        pools = (module.regions[0].arenas for module in (planned, *planned._variants.values()))
        return [pool is not None and pool.allocated_bytes > 0 for pool in pools]

    with poisoned_arenas() as made:
        for args in (IMAGES, (torch.randn(1, 3, 16, 16),), IMAGES):
            assert_same(step(plain, args), step(planned, args))
            assert sum(kept()) == 1
    assert len(made) == 3
    with torch.no_grad():
        planned(*IMAGES)
    assert kept()[:2] == [False, False]
    planned.release_arena()
    assert not any(kept())


def test_nothing_is_in_place_in_inference_either_where_that_is_not_wanted():
    chain = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    x, pairs = torch.randn(64, 64), {}
    for inplace in (True, False):
        plan = fxmem.transform(chain, (x,), arena=True, inplace=inplace).inference_plan(x)
        pairs[inplace] = [operator.inplace for operator in plan.problem.operators if operator.inplace]
    assert pairs[True] and not pairs[False]


def test_an_arena_that_cannot_be_allocated(monkeypatch):
    plain, planned = planned_pair()
    size_bytes = planned.plan.arena.arena_bytes
    empty = torch.empty

    def full(*sizes, **options):
        if sizes == (size_bytes,):
            raise RuntimeError("not enough memory\nand a trace")
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", full)
    with messages() as said:
        assert_same_steps(plain, planned, IMAGES, steps=1)
    assert said == [
        f"an arena of {size_bytes:,} bytes cannot be allocated on cpu (not enough memory): lower the budget or the batch, or "
        "transform without the arena. This step runs without an arena"
    ]
    with pytest.raises(ArenaError, match=f"{size_bytes:,} bytes"):
        runtime.Arena(pool(planned).layout, torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shape": (2, 8, 16, 8), "stride": (1024, 128, 8, 1), "size_bytes": 8192}, "it takes more bytes"),
        ({"shape": (2, 16, 16, 8)}, "planned were (2, 16, 16, 8)"),
    ],
)
def test_a_result_that_does_not_fit_its_slice_stops_the_step(change, told):
    _, planned = planned_pair()
    layout = pool(planned).layout
    name = next(n for n, s in layout.slots.items() if s[0].shape == (2, 8, 16, 16) and len(s) == 1)
    slots = layout.slots | {name: (replace(layout.slots[name][0], **change),)}
    planned.regions[0].arenas = runtime.ArenaPool(replace(layout, slots=slots))
    with pytest.raises(ArenaError, match=re.escape(told)) as error:
        train(planned)
    assert repr(name) in str(error.value)


def test_the_peak_that_is_measured_has_the_arena_in_it():
    torch.manual_seed(0)
    args = (torch.randn(8, 3, 32, 32),)
    planned = transform(UNet(8), args, budget=None, arena=True, cost="measured")
    measured, predicted = fxmem.measure(planned, args, repeats=1), planned.plan.predicted_peak_bytes
    assert planned.plan.arena.peak_bytes == predicted <= planned.plan.baseline_peak_bytes
    assert 0.98 * predicted <= measured.peak_bytes <= predicted


def test_copies_have_arenas_of_their_own():
    plain, planned = planned_pair()
    buffer = io.BytesIO()
    torch.save(planned, buffer)
    buffer.seek(0)
    others = copy.deepcopy(planned), pickle.loads(pickle.dumps(planned)), torch.load(buffer, weights_only=False)
    expected = step(plain, IMAGES)
    for other in others:
        assert pool(other) is not pool(planned)
        assert_same(expected, step(other, IMAGES))
        assert pool(other).allocated_bytes == planned.plan.arena.arena_bytes
    assert pool(planned).allocated_bytes == 0


def test_compiled():
    plain, planned = planned_pair(UNet)
    found = []
    for module in (plain, torch.compile(planned, backend="aot_eager")):
        module(*IMAGES).square().sum().backward()
        found.append([p.grad for p in module.parameters()])
    assert_same(*found)
    assert pool(planned).allocated_bytes == planned.plan.arena.arena_bytes


def test_a_given_plan_is_placed_anew(tmp_path):
    _, planned = planned_pair(budget="min")
    planned.plan.save(tmp_path / "plan.json")
    torch.manual_seed(0)
    module = ConvNet()
    plain = copy.deepcopy(module)
    again = fxmem.transform(module, IMAGES, plan=tmp_path / "plan.json", arena=True)
    assert again.plan.arena == planned.plan.arena
    assert_same_steps(plain, again, IMAGES, steps=1)


INFERENCE = {
    "convolutions": (ConvNet, IMAGES),
    "transformer": (Transformer, IDS),
    "skips": (UNet, IMAGES),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", INFERENCE)
def test_inference_is_bitwise_though_poisoned(name, training, mode):
    make, args = INFERENCE[name]
    plain, planned = planned_pair(make, args)
    found = []
    with poisoned_arenas(), mode():
        for module in (plain, planned):
            module.train(training)
            torch.manual_seed(0)
            outputs = [t.clone() for _ in range(2) for t in tensors(module(*args))]
            found.append((outputs, {n: b.clone() for n, b in plain.named_buffers()}))
    assert_same(*found)
    plan = planned.inference_plan(*args)
    alone_bytes = plan.solution.timeline.peak_bytes
    assert plan.predicted_peak_bytes <= (max(plan.baseline_peak_bytes, alone_bytes) if training else plan.baseline_peak_bytes)


def test_planning_inference_leaves_hooks_and_python_alone():
    class Noted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.calls = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)), []

        def forward(self, x):
            self.calls.append(type(x))
            return self.body(x)

    args, seen = (torch.randn(64, 8),), []
    plain, planned = planned_pair(Noted, args)
    planned.source.body.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert planned.inference_plan(*args).arena.places and seen == planned.source.calls == []
    with torch.no_grad():
        assert torch.equal(plain(*args), planned(*args))


def test_inference_that_cannot_be_captured_runs_plainly():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x):
            h = self.lin(x)
            return h if self.training or h.sum() > 0 else -h

    args = (torch.randn(4, 8),)
    plain, planned = planned_pair(Branches, args)
    with torch.no_grad(), messages() as said:
        outputs = [planned.eval()(*args) for _ in range(2)]
        assert_same([plain.eval()(*args)] * 2, outputs)
    assert len(said) == 1 and said[0].startswith("inference of Branches runs without a plan: Branches cannot be captured")
