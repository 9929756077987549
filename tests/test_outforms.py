"""Forms that write where they are told: the same bits as the operator, into the given memory, without another such result."""

import pytest
import torch
from helpers.steps import each_device

from fxmem import outforms
from fxmem.codegen.operators import dropout_apply
from fxmem.outforms import MADE_UP, normalize, out_form
from fxmem.torch_internals import cpu_memory_events, out_overload

aten = torch.ops.aten
X = torch.randn(4, 8, 32, 32)
WEIGHTS = torch.rand(8), torch.randn(8), torch.randn(8), torch.rand(8)
ROWS = torch.cat([torch.randn(512, 128), torch.full((2, 128), -torch.inf)])
CALLS = {
    aten.relu.default: (X,),
    aten.add.Scalar: (X, 0.3),
    aten.sub.Scalar: (X, 0.3),
    aten.mul.Scalar: (X, 0.3),
    aten.div.Scalar: (X, 0.3),
    aten.clone.default: (X,),
    aten._to_copy.default: (X, {"dtype": torch.float64}),
    aten.zeros_like.default: (X,),
    aten.new_zeros.default: (X, [64, 512]),
    aten.embedding.default: (torch.randn(10, 512), torch.randint(10, (3, 40))),
    aten._safe_softmax.default: (ROWS, -1),
    aten.native_dropout.default: (X, 0.3, True),
    aten._native_batch_norm_legit_functional.default: (X, *WEIGHTS, True, 0.1, 1e-5),
    aten._native_batch_norm_legit_no_training.default: (X, *WEIGHTS, 0.1, 1e-5),
    aten._native_batch_norm_legit.no_stats: (X, *WEIGHTS[:2], True, 0.1, 1e-5),
    normalize: (X, *WEIGHTS, 1e-5),
    dropout_apply: (X, X > 0, 1.25),
    aten.mm.default: (ROWS[:512], torch.randn(128, 64)),
    aten.addmm.default: (torch.randn(64), ROWS[:512], torch.randn(128, 64)),
    aten.bmm.default: (torch.randn(4, 64, 32), torch.randn(4, 32, 64)),
    aten.gelu.default: (X,),
    aten.cat.default: ([X, X], 1),
    aten.sum.dim_IntList: (torch.randn(64, 64, 64), [0]),
    aten.mean.dim: (torch.randn(64, 64, 64), [0]),
    aten.max_pool2d_with_indices.default: (X, [2, 2], [2, 2]),
    aten._log_softmax.default: (ROWS[:512], 1, False),
    aten.threshold_backward.default: (X, X + 1, 0),
}


def split(call):
    return (call[:-1], call[-1]) if isinstance(call[-1], dict) else (call, {})


def leaves(made):
    return list(made) if isinstance(made, (tuple, list)) else [made]


def run(target, args, kwargs):
    torch.manual_seed(0)
    return leaves(target(*args, **kwargs))


@each_device
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", CALLS, ids=str)
def test_same_bits_in_the_given_memory(target, dtype, layout, device):
    def taken(value):
        if isinstance(value, list) and isinstance(value[0], torch.Tensor):
            return [taken(v) for v in value]
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value.to(device) if isinstance(value, torch.Tensor) else value
        value = value.to(device, dtype)
        return value.contiguous(memory_format=layout) if value.dim() == 4 else value

    args, kwargs = split(CALLS[target])
    args = tuple(taken(a) for a in args)
    form = out_form(target, args, kwargs, device)
    if form is None:
        assert device != "cpu"
        return
    expected = run(target, args, kwargs)
    given = [torch.full_like(t, 1) for t in expected]
    addresses = [t.data_ptr() for t in given]
    run(form.target, form.args, form.kwargs | dict(zip(form.names, given, strict=True)))
    for a, b, address in zip(expected, given, addresses, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
        assert b.data_ptr() == address


@pytest.mark.parametrize("target", CALLS, ids=str)
def test_no_second_result(target):
    """A form that computed elsewhere and copied would allocate what its operator does, and not the results' bytes less."""
    args, kwargs = split(CALLS[target])
    form = out_form(target, args, kwargs, "cpu")
    made, plain = cpu_memory_events(lambda: leaves(target(*args, **kwargs)))
    given = dict(zip(form.names, [torch.empty_like(t) for t in made], strict=True))
    _, ours = cpu_memory_events(lambda: form.target(*form.args, **form.kwargs, **given))
    plain_bytes, our_bytes = (sum(size for size in events if size > 0) for events in (plain, ours))
    assert our_bytes <= plain_bytes - sum(t.nbytes for t in made) + 64


def test_every_made_up_form_is_tested():
    assert set(MADE_UP) <= set(CALLS)


@pytest.mark.parametrize(
    "target", [aten.convolution.default, aten.convolution_backward.default, aten.native_layer_norm.default,
               aten.native_batch_norm_backward.default]
)  # fmt: skip
def test_what_computes_elsewhere_and_copies_does_not_count(target):
    assert target.overloadpacket.out is not None and out_overload(target, "cpu") is None


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.native_dropout.default, (X, 0.3, False)),
        (aten.native_dropout.default, (X, 1.0, True)),
        (aten.add.Scalar, (X, 1.0, 2)),
        (aten._native_batch_norm_legit_functional.default, (X.bfloat16(), *WEIGHTS, True, 0.1, 1e-5)),
    ],
)
def test_calls_that_a_form_does_not_cover(target, args):
    assert out_form(target, args, {}, "cpu") is None and outforms.out_form("no operator", (), {}, "cpu") is None


def test_normalize_in_place():
    x = X.clone()
    assert torch.equal(torch.ops.fxmem.normalize_.default(x, *WEIGHTS, 1e-5), normalize(X, *WEIGHTS, 1e-5))
