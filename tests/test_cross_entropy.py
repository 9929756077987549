"""The linear layer and cross entropy in pieces of rows: exact enough, offered where it may be, taken where it is better."""

import copy
import itertools

import pytest
import torch
from helpers.steps import transform
from torch import nn

import fxmem
from fxmem.checking import force
from fxmem.errors import ImplementationError
from fxmem.implementations import cross_entropy
from fxmem.prepared import prepare

ACCURATE = {"exactness": "accurate", "cost": "V100"}
CLASSES = 500


class Language(nn.Module):
    """Embedding, a layer, and a head tied to the embedding, with labels shifted and padded as transformers does it."""

    def __init__(self, width: int = 8, returns_logits: bool = False, bias: bool = False, classes: int = CLASSES, **options):
        super().__init__()
        self.table, self.layer = nn.Embedding(classes, width), nn.Linear(width, width)
        self.head = nn.Linear(width, classes, bias=bias)
        self.head.weight = self.table.weight
        self.returns_logits, self.options = returns_logits, options

    def forward(self, ids):
        logits = self.head(torch.tanh(self.layer(self.table(ids))))
        labels = nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
        rows = logits.flatten(0, 1)
        rows = rows if rows.dtype is torch.float64 else rows.float()
        loss = nn.functional.cross_entropy(rows, labels.view(-1), **self.options)
        return (loss, logits) if self.returns_logits else loss


class Unlike(nn.Module):
    """What looks like a linear layer's cross entropy: a softmax over rows, or a matrix added to the logits."""

    def __init__(self, dim: int = 1, matrix: bool = False):
        super().__init__()
        self.layer, self.head, self.dim = nn.Embedding(CLASSES, 8), nn.Linear(8, CLASSES), dim
        self.register_buffer("matrix", torch.randn(180, CLASSES) if matrix else None)

    def forward(self, ids):
        x = torch.tanh(self.layer(ids).flatten(0, 1))
        logits = self.head(x) if self.matrix is None else torch.addmm(self.matrix, x, self.head.weight.t())
        return nn.functional.nll_loss(nn.functional.log_softmax(logits, self.dim), ids.flatten())


def ids(batch: int = 3, length: int = 60) -> torch.Tensor:
    return torch.randint(CLASSES, (batch, length), generator=torch.Generator().manual_seed(0))


def is_offered(module: nn.Module, x: torch.Tensor, output_gradients=None, **options) -> bool:
    return prepare(module, (x,), {}, "V100", output_gradients, **{"exactness": "accurate"} | options).rewritten is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("reduction", "bias"), list(itertools.product(("mean", "sum"), (False, True))))
def test_as_exact_as_the_whole(dtype, reduction, bias):
    torch.manual_seed(0)
    module = Language(reduction=reduction, bias=bias).to(dtype)
    assert fxmem.check_implementation("chunked_cross_entropy", module, (ids(),)).places == 1


def test_no_row_counts():
    class Ignoring(Unlike):
        def forward(self, ids):
            return nn.functional.cross_entropy(
                self.head(torch.tanh(self.layer(ids).flatten(0, 1))), ids.flatten(), ignore_index=0
            )

    nothing = torch.zeros(4, 60, dtype=torch.long)
    planned, places = force("chunked_cross_entropy", Ignoring(), (nothing,), {})
    loss = planned(nothing)
    loss.backward()
    assert places and loss.isnan() and all(p.grad is None or not p.grad.any() for p in planned.parameters())


def test_many_small_pieces(monkeypatch):
    monkeypatch.setattr(cross_entropy, "LARGEST", 2 * CLASSES)
    torch.manual_seed(0)
    assert fxmem.check_implementation("chunked_cross_entropy", Language(bias=True), (ids(),)).places == 1


@pytest.mark.parametrize("frozen", ["head", "layer"])
def test_only_the_gradients_that_are_asked_for(frozen):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    module[2 if frozen == "head" else 0].requires_grad_(False)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return nn.functional.cross_entropy(self.inner(x), torch.arange(len(x)), ignore_index=3)

    found = fxmem.check_implementation("chunked_cross_entropy", Loss(), (torch.randn(200, 8),))
    assert found.places == 1


def test_a_weight_that_is_not_transposed():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, CLASSES))

        def forward(self, x):
            return nn.functional.cross_entropy(x.tanh() @ self.weight, torch.arange(len(x)), reduction="sum")

    torch.manual_seed(0)
    found = fxmem.check_implementation("chunked_cross_entropy", Loss(), (torch.randn(200, 8, requires_grad=True),))
    assert found.places == 1


def test_the_logits_and_their_gradient_never_exist_whole():
    torch.manual_seed(0)
    module, x = Language(), ids(8, 200)
    logits_bytes = 8 * 200 * CLASSES * 4
    plain = fxmem.measure(copy.deepcopy(module), (x,)).peak_bytes
    planned = transform(module, (x,), **ACCURATE)
    assert plain >= 3 * logits_bytes
    assert fxmem.measure(planned, (x,)).peak_bytes <= planned.plan.predicted_peak_bytes < logits_bytes


def test_a_large_vocabulary_at_no_more_than_a_twentieth_of_extra_time():
    with torch.device("meta"):
        module, x = Language(width=768, classes=50257), torch.zeros(2, 512, dtype=torch.long)
    options = {"max_overhead": 0.05, "cost": "V100", "time_limit_s": 2.0}
    whole, pieces = (fxmem.plan(module, (x,), **options, exactness=e).predicted_peak_bytes for e in ("bitwise", "accurate"))
    logits_bytes = 1024 * 50257 * 4
    assert whole - pieces > 0.7 * logits_bytes and pieces < 3.3 * 768 * 50257 * 4


def test_logits_that_are_an_output_stay_what_they_are():
    torch.manual_seed(0)
    module, x = Language(returns_logits=True), ids(8, 200)
    plain = copy.deepcopy(module)
    planned = transform(module, (x,), **ACCURATE)
    least = transform(copy.deepcopy(module), (x,), cost="V100").plan.predicted_peak_bytes
    assert planned.plan.predicted_peak_bytes < 0.8 * least
    (loss, logits), (expected, whole) = planned(x), plain(x)
    assert torch.equal(logits, whole) and torch.allclose(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    for found, right in zip(planned.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, right.grad)


@pytest.mark.parametrize(
    ("module", "options", "offered"),
    [
        (Language(), {}, True),
        (Language(returns_logits=True), {}, True),
        (Language(returns_logits=True), {"output_gradients": "all"}, False),
        (Language(), {"exactness": "bitwise"}, False),
        (Language(), {"implementations": ("-chunked_cross_entropy",)}, False),
        (Language(), {"implementations": ()}, False),
        (Language(reduction="none"), {"output_gradients": "all"}, False),
        (Language(weight=torch.ones(CLASSES)), {}, False),
        (Language(label_smoothing=0.1), {}, False),
        (Language(width=400), {}, False),
        (Language().half(), {}, False),
        (Unlike(), {}, True),
        (Unlike(dim=-1), {}, True),
        (Unlike(dim=0), {}, False),
        (Unlike(matrix=True), {}, False),
    ],
)
def test_where_it_is_offered(module, options, offered):
    assert is_offered(module, ids(), **options) == offered


def test_a_class_that_is_not_there_is_an_error_as_before():
    x = ids()
    planned = transform(Language(ignore_index=-1), (x,), **ACCURATE)  # -100, at the end of each row, is no class then
    with pytest.raises(IndexError, match="Target -100 is out of bounds"):
        planned(x)


def test_by_name_it_needs_leave():
    with pytest.raises(ImplementationError, match="ask for exactness='accurate'"):
        transform(Language(), (ids(),), implementations=("chunked_cross_entropy",))


def test_a_tied_table_has_one_gradient():
    """No second table for the embedding's own."""
    torch.manual_seed(0)
    module, x = Language(width=16, classes=4000), ids(1, 8)
    table_bytes = 4000 * 16 * 4
    planned = transform(copy.deepcopy(module), (x,))
    left_out = transform(copy.deepcopy(module), (x,), implementations=("-embedding_rows",)).plan.predicted_peak_bytes
    found = fxmem.measure(planned, (x,)).peak_bytes
    assert found == pytest.approx(planned.plan.predicted_peak_bytes, rel=0.01)
    assert found < 2.7 * table_bytes and left_out > 3 * table_bytes


@pytest.mark.parametrize("padding", [None, 3])
def test_the_rows_of_a_table_are_bitwise(padding):
    torch.manual_seed(0)
    module = Language(width=16, classes=4000)
    module.table.padding_idx = padding
    x = ids(4, 60)
    x[0, :9] = 3
    found = fxmem.check_implementation("embedding_rows", module, (x,))
    assert found.is_bitwise and found.places == 1


@pytest.mark.parametrize(
    ("width", "length", "options"), [(8, 40, {}), (16, 40, {"scale_grad_by_freq": True}), (16, 2001, {}), (16, 40, {})]
)
def test_where_a_second_table_stays(width, length, options):
    module = Language(width=width, classes=4000)
    module.table.scale_grad_by_freq = options.get("scale_grad_by_freq", False)
    joint = prepare(module, (ids(1, length),), {}, "V100").captured.joint
    targets = {n.target for n in joint.graph.nodes}
    one_table = torch.ops.fxmem.embedding_add_rows.default in targets
    assert one_table == (width == 16 and not options and length == 40)
    assert one_table != (torch.ops.aten.embedding_dense_backward.default in targets)
