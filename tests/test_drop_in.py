"""A planned module in place of the plain one: state, copies, optimizers, hooks, gradients taken and taken again, fx tools."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from helpers.models import ConvNet, Counter, Transformer, TwoHeads
from helpers.steps import assert_same, assert_same_steps, messages, step, transform
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

import fxmem


def images(batch=4):
    return (torch.randn(batch, 3, 8, 8),)


def pair(make=ConvNet, args=None, budget="min"):
    """A plain module, a planned copy of it, and inputs."""
    plain, planned = copy.deepcopy(_planned(make, budget, *(images() if args is None else args)))
    return plain, planned, images() if args is None else args


_made = {}


def _planned(make, budget, *args):
    key = make, budget, *((a.shape, a.dtype) for a in args)
    if key not in _made:
        torch.manual_seed(0)
        plain = make()
        _made[key] = plain, transform(copy.deepcopy(plain), args, budget=budget)
    return _made[key]


def gradients(module):
    return {n: p.grad for n, p in module.named_parameters()}


IDS = (torch.arange(12).reshape(2, 6),)
STATES = [(ConvNet, images()), (Transformer, IDS), (Counter, (torch.randn(4, 8),))]


@pytest.mark.parametrize(("make", "args"), STATES)
def test_state_is_the_plain_modules(make, args):
    module = make()
    planned = transform(module, args)
    assert list(planned.state_dict()) == list(module.state_dict())
    assert [n for n, _ in planned.named_parameters()] == [n for n, _ in module.named_parameters()]
    assert [n for n, _ in planned.named_buffers()] == [n for n, _ in module.named_buffers()]
    assert all(a is b for a, b in zip(planned.parameters(), module.parameters(), strict=True))
    other = make()
    assert str(planned.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert_same(dict(module.state_dict()), dict(other.state_dict()))


def test_assigned_state_unties_weights_as_in_the_plain_module():
    plain, planned, _ = pair(Transformer, IDS)
    state = {name: tensor.clone() for name, tensor in Transformer().state_dict().items()}
    plain.load_state_dict(state, assign=True), planned.load_state_dict(state, assign=True)
    assert_same_steps(plain, planned, IDS, steps=1)


def test_moves_with_its_source():
    module = Transformer()
    planned = transform(module, IDS)
    planned.to(torch.float64)
    assert {p.dtype for p in module.parameters()} == {torch.float64} and planned.head.weight is planned.embed.weight
    assert_same_steps(copy.deepcopy(module), planned, IDS, steps=1)
    module.to(torch.float32)
    assert_same_steps(copy.deepcopy(module), planned, IDS, steps=1)


def test_channels_last_parameters_are_another_call():
    plain, planned, args = pair()
    for each in (plain, planned):
        each.to(memory_format=torch.channels_last)
    assert_same_steps(plain, planned, args, steps=1)


def test_settings_of_layers_count():
    plain, planned, args = pair()
    for module in (plain, planned):
        module.blocks[0][3].p, module.blocks[1][1].momentum = 0.6, 0.5
    with messages() as said:
        assert_same_steps(plain, planned, args, steps=1)
    assert len(said) == 1


def test_hooks_on_what_is_saved_see_no_planning():
    """A last, smaller batch under `torch.utils.checkpoint`, whose hooks are for real tensors."""
    plain, planned, (x,) = pair()
    seen = []

    def pack(tensor):
        seen.append(type(tensor))
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert_same_steps(plain, planned, (x[:1],), steps=1)
    assert seen and set(seen) <= {torch.Tensor, nn.Parameter}
    planned = transform(copy.deepcopy(plain), (x,))
    assert_same_steps(Around(plain), Around(planned), (x[:1],), steps=1)


class Around(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=False)


def test_settings_that_are_tuples_count():
    """Also of a GraphModule's layers, which is captured as it is."""
    for wrap in (torch.fx.symbolic_trace, lambda module: module):
        plain = wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d((1, 1)), nn.Conv2d(4, 4, 1)))
        args = (torch.randn(2, 3, 8, 8),)
        planned = transform(copy.deepcopy(plain), args, budget=None)
        for module in (plain, planned):
            module.get_submodule("1").output_size = (2, 2)
        assert_same_steps(plain, planned, args, steps=1)


class Scaled(nn.Module):
    """Computes with numbers of its own, at the top and inside, and counts what no gradient sees."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.scale, self.sizes, self.calls = scale, [1.0, 2.0], 0

    def forward(self, x):
        return self.inner(x) * self.scale * self.sizes[1]


@pytest.mark.parametrize("through", ["planned", "source"])
def test_attributes_that_the_model_computes_with(through):
    plain, planned, args = pair(Scaled, (torch.randn(4, 8),))
    for scale in (0.5, 1.0):
        plain.scale = scale
        (planned if through == "planned" else planned.source).scale = scale
        assert_same_steps(plain, planned, args, steps=1)
        with torch.no_grad():
            assert_same(plain(*args), planned(*args))
    plain.sizes[1] = planned.sizes[1] = 3.0
    with messages() as said:
        assert_same_steps(plain, planned, args, steps=1)
    assert len(said) == 1 and "another 'sizes.1'" in said[0]


class Weighted(nn.Module):
    """Computes with tensors that are no buffers, one of them a list's, another one a dict's."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.inner[0].many, self.inner[0].named = [torch.ones(8)], {"a": torch.ones(8)}
        self.weights = torch.ones(8)

    def forward(self, x):
        first = self.inner[0]
        return self.inner(x) * self.weights * first.many[0] * first.named["a"]


def test_tensors_that_are_attributes_may_be_replaced():
    plain, planned, args = pair(Weighted, (torch.randn(4, 8),))
    with messages() as said:
        for number in range(2, 5):
            for module in (plain, planned):
                module.weights = torch.full((8,), float(number))
                module.inner[0].many[0] = module.inner[0].named["a"] = torch.linspace(0, number, 8)
                module.inner[0].many[0].mul_(2)
            assert_same_steps(plain, planned, args, steps=1)
        copied = copy.deepcopy(planned)
        copied.weights = torch.zeros(8)
        assert_same_steps(plain, planned, args, steps=1)
        assert copied(*args).abs().max() == 0
    assert not said
    plain.weights, planned.weights = torch.ones(1), torch.ones(1)
    with messages() as said:
        assert_same_steps(plain, planned, args, steps=1)
    assert len(said) == 1 and "another 'weights'" in said[0]


class Settings:
    """What is no module."""


def numbers(value):
    return torch.full((8,), float(value))


class Deep(nn.Module):
    """Reads `where`, an expression of a tensor that hangs on it somewhere."""

    of_class = numbers(2)

    def __init__(self, where):
        super().__init__()
        self.layer, self.read = nn.Linear(8, 8), eval(f"lambda self: {where}")
        self.one = self.other = numbers(3)
        self.named, self.many = {"a": {-1: numbers(4)}}, (numbers(5), [numbers(6), self.layer.bias])
        self.config = Settings()
        self.config.scale = numbers(7)

    def forward(self, x):
        return self.layer(x) * self.read(self)


@pytest.mark.parametrize(
    ("where", "change", "planned_anew"),
    [
        ("self.named['a'][-1]", "self.named['a'][-1] = numbers(9)", False),
        ("self.many[1][0]", "self.many = (0, [numbers(9)])", False),
        ("self.config.scale", "self.config.scale = numbers(9)", False),
        ("self.of_class", "self.of_class = numbers(9)", False),
        ("self.one * self.other", "self.one = self.other = numbers(9)", False),
        ("self.one * self.other", "self.one = numbers(9)", True),
        ("self.one * self.other", "self.other = numbers(9)", True),
        ("self.many[1][1]", "self.many[1][1] = numbers(9)", True),
    ],
)
def test_tensors_may_be_replaced_wherever_they_hang(where, change, planned_anew):
    plain, planned, args = pair(lambda: Deep(where), (torch.randn(4, 8),))
    with messages() as said:
        assert_same_steps(plain, planned, args, steps=1)
        for module in (plain, planned):
            exec(change, {"self": module, "numbers": numbers})
        assert_same_steps(plain, planned, args, steps=1)
    assert len(said) == planned_anew


def test_a_tensor_under_a_key_that_no_path_names():
    module = Deep("self.named['it\\'s']")
    module.named["it's"] = numbers(3)
    assert torch.equal(transform(module, args := (torch.randn(4, 8),))(*args), module(*args))


class Literals(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x * torch.tensor([0.1, 0.2, 0.3, 0.4]))


def test_literals_keep_their_type():
    plain, planned, args = pair(Literals, (torch.randn(4, 4),))
    for module in (plain, planned):
        module.bfloat16().float()
    assert_same_steps(plain, planned, args, steps=1)


def test_attributes_that_the_model_does_not_read_plan_nothing():
    plain, planned, args = pair(Scaled, (torch.randn(4, 8),))
    planned.calls = 7
    with messages() as said:
        assert_same_steps(plain, planned, args, steps=1)
    assert planned.source.calls == 7 and not said


def test_attributes_count_in_inference_with_an_arena():
    module, args = Scaled(), (torch.randn(64, 8),)
    planned = transform(module, args, arena=True, budget=None)
    for scale in (1.0, 0.5):
        planned.scale = scale
        with torch.no_grad():
            assert_same(module(*args), planned(*args))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda planned: pickle.loads(pickle.dumps(planned))])
def test_copies_of_planned_graph_modules_plan_nothing(copied):
    module = fx.symbolic_trace(Scaled().inner)
    args = (torch.randn(4, 8),)
    planned = copied(transform(module, args))
    with messages() as said:
        assert_same_steps(copy.deepcopy(module), planned, args, steps=1)
    assert not said


@pytest.mark.parametrize("make", [nn.Sigmoid, lambda: nn.Sequential(nn.Tanh(), nn.Tanh())])
def test_a_replaced_layer_inside(make):
    plain, planned, args = pair(Scaled, (torch.randn(4, 8),))
    plain.inner[1], planned.inner[1] = make(), make()
    assert_same_steps(plain, planned, args, steps=1)


@pytest.mark.parametrize("through", ["planned", "source"])
def test_a_replaced_layer(through):
    plain, planned, args = pair(TwoHeads, (torch.randn(4, 8),))
    plain.first = nn.Linear(8, 3)
    (planned if through == "planned" else planned.source).first = copy.deepcopy(plain.first)
    assert_same_steps(plain, planned, args)
    with torch.no_grad():
        assert_same(plain(*args), planned(*args))


def pickled(planned):
    return pickle.loads(pickle.dumps(planned))


def saved(planned):
    file = io.BytesIO()
    torch.save(planned, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "pickle twice": lambda p: pickled(pickled(p)),
    "torch.save": saved,
    "copy": copy.copy,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(how):
    plain, planned, args = pair(Transformer, IDS)
    copied = COPIES[how](planned)
    assert (copied.embed.weight is planned.embed.weight) == (how == "copy") and copied.head.weight is copied.embed.weight
    assert copied.code == planned.code
    for a, b in zip(copied.regions, planned.regions, strict=True):
        assert (a.forward_graph.code, a.backward_graph.code) == (b.forward_graph.code, b.backward_graph.code)
    assert copied.plan.solution == planned.plan.solution
    assert_same_steps(plain, copied, args)


def test_a_copy_plans_anew_for_itself():
    plain, planned, _ = pair(TwoHeads, (torch.randn(4, 8),))
    copied = pickled(planned)
    assert_same_steps(plain, copied, (torch.randn(2, 8),))


def test_saved_state_loads_back():
    plain, planned, args = pair()
    file = io.BytesIO()
    torch.save(planned.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert_same_steps(plain, planned, args, steps=1)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), lambda p: torch.optim.AdamW(p, 1e-2)])
def test_optimizers(make):
    plain, planned, args = pair()
    for module in (plain, planned):
        optimizer = make(module.parameters())
        for seed in range(4):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            module(*args).square().mean().backward()
            optimizer.step()
    assert_same(dict(plain.state_dict()), dict(planned.state_dict()))


def test_accumulation():
    plain, planned, args = pair()
    for module in (plain, planned):
        torch.manual_seed(0)
        for _ in range(3):
            module(*args).sum().backward()
    assert_same(gradients(plain), gradients(planned))


def test_parameter_and_output_hooks():
    plain, planned, args = pair()
    seen = {}
    for name, module in (("plain", plain), ("planned", planned)):
        torch.manual_seed(0)
        module.stem.weight.register_hook(lambda g: g * 2)
        out = module(*args)
        out.register_hook(lambda g, name=name: seen.update({name: g.shape}) or g * 3)
        out.sum().backward()
    assert seen["plain"] == seen["planned"]
    assert_same(gradients(plain), gradients(planned))


def test_gradients_are_handed_over_region_by_region():
    _, planned, args = pair()
    region_of = {
        p: i
        for i, region in enumerate(planned.regions)
        for p in (region.spec.arguments[g[0]].key for g in region.spec.gradients)
    }
    events = []
    for name, parameter in planned.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: events.append((name, region_of[name])))
    planned(*args).sum().backward()
    assert sorted(n for n, _ in events) == sorted(n for n, _ in planned.named_parameters())
    regions = [region for _, region in events]
    assert regions == sorted(regions, reverse=True) and len(set(regions)) > 2


def test_module_hooks():
    plain, planned, args = pair()
    calls = []
    for module in (plain, planned):
        module.register_forward_pre_hook(lambda m, i: (i[0] * 2,))
        module.register_forward_hook(lambda m, i, o: calls.append("forward") or o * 3)
        module.register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
    for call in (args, (args[0][:2],)):  # also through another plan
        calls.clear()
        assert_same(step(plain, call), step(planned, call))
        assert calls == ["forward", "backward"] * 2
    with torch.no_grad():
        plain.eval(), planned.eval()
        assert torch.equal(plain(*args), planned(*args))


def test_hooks_that_the_module_had_are_part_of_the_plan():
    module = TwoHeads()
    module.register_forward_hook(lambda m, i, o: (o[0] * 3, o[1]))
    module.body.register_forward_pre_hook(lambda m, i: (i[0] * 2,))
    plain, x = copy.deepcopy(module), torch.randn(4, 8)
    with messages() as said:
        planned = transform(module, (x,))
    assert len(said) == 1 and "body" in said[0]
    assert_same_steps(plain, planned, (x,))
    with torch.no_grad():
        assert_same(plain(x), planned(x))


@pytest.mark.parametrize("names", [["stem.weight"], ["head.weight"], ["blocks.1.0.weight", "head.bias"]])
def test_autograd_grad_of_some(names):
    plain, planned, args = pair()
    found = []
    for module in (plain, planned):
        torch.manual_seed(1)
        parameters = dict(module.named_parameters())
        found.append(torch.autograd.grad(module(*args).sum(), [parameters[n] for n in names]))
    assert_same(*found)
    assert all(p.grad is None for p in planned.parameters())


def test_two_forwards_before_their_backwards():
    plain, planned, args = pair()
    other = images()
    for module in (plain, planned):
        torch.manual_seed(0)
        a, b = module(*args), module(*other)
        (2 * a.sum()).backward()
        b.sum().backward()
        torch.manual_seed(0)
        a = module(*args)
        (a.sum() + module(a.mean() * other[0]).sum()).backward()  # one inside the other's graph
    assert_same(gradients(plain), gradients(planned))
    assert_same(dict(plain.state_dict()), dict(planned.state_dict()))


def second_backward(planned, args):
    loss = planned(*args).sum()
    loss.backward()
    loss.backward()


def retained_graph(planned, args):
    loss = planned(*args).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def double_backward(planned, args):
    torch.autograd.grad(planned(*args).sum(), list(planned.parameters()), create_graph=True)


def one_part_after_another(planned, args):
    loss = planned(*args).sum()
    torch.autograd.grad(loss, [planned.head.weight], retain_graph=True)
    torch.autograd.grad(loss, [planned.stem.weight])


BACKWARDS = [
    (second_backward, "freed"),
    (retained_graph, "freed"),
    (double_backward, "double backward"),
    (one_part_after_another, "freed"),
]


@pytest.mark.parametrize(("run", "says"), BACKWARDS)
def test_backwards_that_cannot_be_right(run, says):
    plain, planned, args = pair()
    torch.manual_seed(0)
    with pytest.raises(fxmem.TapeError, match=says):
        run(planned, args)
    if run in (second_backward, retained_graph):  # what the first backward left is still right
        torch.manual_seed(0)
        plain(*args).sum().backward()
        assert_same(gradients(plain), gradients(planned))
    planned.zero_grad()
    plain.load_state_dict(planned.state_dict())
    assert_same_steps(plain, planned, args, steps=1)


class Saturating(nn.Module):
    """Its backward reads its output."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return torch.sigmoid(self.b(torch.relu(self.a(x))))


def test_an_output_changed_in_place():
    _, planned, args = pair(Saturating, (torch.randn(4, 8),))
    out = planned(*args)
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(fxmem.TapeError, match="output 0 .* changed in place"):
        out.sum().backward()
    plain, planned, args = pair(TwoHeads, (torch.randn(4, 8),))  # one that the backward does not read may change
    for module in (plain, planned):
        a, b = module(*args)
        a.mul_(2)
        (a.sum() + b.sum()).backward()
    assert_same(gradients(plain), gradients(planned))


@pytest.mark.parametrize("which", ["parameter", "input"])
def test_what_the_backward_reads_changed_in_place(which):
    _, planned, args = pair(Saturating, (torch.randn(4, 8),))
    out = planned(*args)
    with torch.no_grad():
        (planned.b.weight if which == "parameter" else args[0]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_gradient_of_an_output_that_was_planned_without():
    _, planned, _ = pair(Transformer, (IDS[0], IDS[0]))
    loss, logits = planned(IDS[0], IDS[0])
    with pytest.raises(fxmem.TapeError, match="output_gradients"):
        (loss + logits.sum()).backward()


@pytest.mark.parametrize("budget", [None, "min"])
def test_nothing_outlives_its_use(budget):
    """No reference cycles: what a call holds is gone with its outputs and after the backward, without the garbage collector."""
    _, planned, args = pair(budget=budget)
    out = planned(*args)
    held = [weakref.ref(t) for t in out.grad_fn.tape.values.values()]
    assert held
    del out
    assert not any(h() is not None for h in held)
    out = planned(*args)
    tape = out.grad_fn.tape
    out.sum().backward()
    assert tape.values == {}


def split(planned):
    regions = [n for n in planned.graph.nodes if n.op == "call_module"]
    second = set(regions[len(regions) // 2 :])
    return split_module(planned, planned, lambda n: int(n in second or n.op == "call_function"))


TOOLS = {
    "symbolic_trace": fx.symbolic_trace,
    "symbolic_trace twice": lambda p: fx.symbolic_trace(fx.symbolic_trace(p)),
    "Transformer": lambda p: fx.Transformer(p).transform(),
    "Interpreter": lambda p: fx.Interpreter(p).run,
    "split_module": split,
    "deepcopied graph": lambda p: fx.GraphModule(p, copy.deepcopy(p.graph)),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_fx_tools(tool):
    plain, planned, args = pair()
    run = TOOLS[tool](planned)
    found = []
    for module, call in ((plain, plain), (planned, run)):
        torch.manual_seed(0)
        out = call(*args)
        out.sum().backward()
        owner = call if isinstance(call, nn.Module) and tool != "split_module" else module
        found.append((out, {n: p.grad for n, p in owner.named_parameters()}))
    assert_same(found[0][0], found[1][0])
    assert_same(found[0][1], {n: g for n, g in found[1][1].items() if n in found[0][1]})
    planned.graph.lint()


def test_shape_prop_over_the_chain():
    _, planned, args = pair()
    ShapeProp(planned).propagate(*args)
    assert planned.graph.output_node().meta["tensor_meta"].shape == (4, 10)


def test_functional_call():
    plain, planned, args = pair()
    parameters = {n: torch.randn_like(p).requires_grad_() for n, p in plain.named_parameters()}
    found = []
    for module in (plain, planned):
        torch.manual_seed(0)
        buffers = {n: b.clone() for n, b in plain.named_buffers()}
        out = torch.func.functional_call(module, parameters | buffers, args)
        found.append((out, torch.autograd.grad(out.sum(), list(parameters.values())), buffers))
    assert_same(*found)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("around", [nn.Sequential, lambda module: module], ids=["around", "itself"])
def test_compiled(backend, around):
    """Compiled code around it runs it as planned, whatever the call: another batch, another mode."""
    plain, planned, args = pair()
    compiled = torch.compile(around(planned), backend=backend)
    for batch in (len(args[0]), len(args[0]) - 1):
        for module in (plain, compiled):
            torch.manual_seed(0)
            module(args[0][:batch]).sum().backward()
        assert_same(gradients(plain), gradients(planned))
    plain.eval(), planned.eval()
    with torch.no_grad():
        assert_same(plain(*args), compiled(*args))


def test_training_continues_as_a_part_of_another_module():
    plain, planned, args = pair()
    tail = nn.Linear(10, 2)
    whole, reference = nn.Sequential(planned, tail), nn.Sequential(plain, copy.deepcopy(tail))
    assert_same_steps(reference, whole, args)


class Two(nn.Module):
    """Two arguments, each in its own way."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, y):
        return self.layer(x) * self.layer(y["it"]).tanh()


@pytest.mark.parametrize("options", [{"budget": "min"}, {"budget": None, "arena": True}])
def test_one_tensor_for_two_arguments_is_two_for_the_plan(options):
    """Whether the example gives it, or a call of another shape, which is planned anew; with gradients and without."""
    torch.manual_seed(0)
    plain = Two()
    x, other = torch.randn(4, 8), torch.randn(4, 8)
    planned = transform(copy.deepcopy(plain), (x, {"it": x}), **options)
    planned(x[:3], {"it": x[:3]})
    for args in ((x, other), (x, x), (x[:3], other[:3])):
        args = args[0], {"it": args[1]}
        assert_same_steps(plain, planned, args)
        with torch.no_grad():
            assert torch.equal(plain(*args), planned(*args))
    both, one = (fxmem.measure(planned, (x, {"it": y}), repeats=1).peak_bytes for y in (other, x))
    assert one + x.nbytes == both <= planned.plan.predicted_peak_bytes


def test_one_fake_tensor_for_two_arguments_is_two_for_the_plan():
    with FakeTensorMode():
        x = torch.empty(4, 8)
    problem = fxmem.plan(Two(), (x, {"it": x}), budget="min").problem
    assert sum(storage.kind == "input" for storage in problem.storages) == 3  # and the gradient of the output


class Conjugate(nn.Module):
    """Sums over views that are only read as conjugate, or as negative."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        z = torch.complex(x, self.layer(x))
        return torch.view_as_real(z.conj() + z * z), (z * z).conj().imag * 2


def test_nothing_is_written_over_what_is_read_as_conjugate():
    torch.manual_seed(0)
    plain, x = Conjugate(), torch.randn(64, 16, requires_grad=True)
    planned = transform(copy.deepcopy(plain), (x,), budget="min", cost="measured")
    assert_same_steps(plain, planned, (x,))
    assert fxmem.measure(planned, (x,)).peak_bytes == planned.plan.predicted_peak_bytes
