"""Plans as files: written, read, followed without solving, and refused where they do not fit."""

import copy
import functools
import json
import logging
import operator
from dataclasses import replace

import pytest
import torch
from helpers.models import ConvNet, Transformer
from helpers.steps import assert_same_steps, transform

import fxmem
from fxmem import planning
from fxmem.saving import plan_from_data, plan_to_data

IMAGES = (torch.randn(8, 3, 16, 16),)


@pytest.fixture(scope="module")
def planned():
    torch.manual_seed(0)
    return transform(ConvNet(), IMAGES, budget=0.7)


@pytest.fixture
def path(planned, tmp_path):
    planned.plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.fixture
def no_solver(monkeypatch):
    """Nothing may be solved from here on."""

    def choose(*arguments, **keywords):
        raise AssertionError("something is solved")

    monkeypatch.setattr(planning, "choose_program", choose)


def test_a_file_holds_all_of_a_plan(planned, path):
    assert fxmem.load_plan(path) == planned.plan == plan_from_data(json.loads(json.dumps(plan_to_data(planned.plan))))
    assert str(fxmem.load_plan(path)) == str(planned.plan)


def test_a_saved_plan_is_followed(planned, path, no_solver):
    for plan in (path, str(path), planned.plan):
        again = fxmem.transform(planned.source, IMAGES, plan=plan)
        assert again.plan == planned.plan and again.code == planned.code
        codes = [(a.forward_graph.code, b.forward_graph.code) for a, b in zip(again.regions, planned.regions, strict=True)]
        codes += [(a.backward_graph.code, b.backward_graph.code) for a, b in zip(again.regions, planned.regions, strict=True)]
        assert all(a == b for a, b in codes)


def test_a_saved_plan_computes_the_same(path):
    torch.manual_seed(0)
    model = ConvNet()
    assert_same_steps(copy.deepcopy(model), fxmem.transform(model, IMAGES, plan=path), IMAGES)


def test_a_plan_of_a_rewritten_step_is_followed(tmp_path):
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 3000)

        def forward(self, x):
            return torch.nn.functional.cross_entropy(self.head(self.table(x)).flatten(0, 1), x.flatten())

    module, x = Loss(), torch.randint(0, 50, (4, 50))
    planned = transform(module, (x,), exactness="accurate")
    planned.plan.save(tmp_path / "plan.json")
    again = fxmem.transform(module, (x,), plan=tmp_path / "plan.json")
    assert "linear_cross_entropy" in planned.regions[-1].forward_graph.code == again.regions[-1].forward_graph.code
    assert again.plan == planned.plan


def test_another_call_is_planned_for_the_same_budget(path):
    again = fxmem.transform(ConvNet(), IMAGES, plan=path, time_limit_s=0.2, cost="roofline")
    again(torch.randn(4, 3, 16, 16)).sum().backward()
    (variant,) = again._variants.values()
    assert again.plan.asked == fxmem.budget.Budget(fraction=0.7)
    assert variant.plan.asked == fxmem.budget.Budget(fraction=0.7, at_least_bytes=again.plan.budget_bytes)


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (ConvNet(), (torch.randn(4, 3, 16, 16),), "input argument 0 is float32[8, 3, 16, 16] in the plan and float32[4, 3"),
        (ConvNet(), (torch.randn(8, 3, 16, 16).double(),), "and float64[8, 3, 16, 16] here"),
        (ConvNet(width=4), IMAGES, "storage 0 is stem_weight, 864 bytes, parameter in the plan and stem_weight, 432 bytes"),
        (ConvNet(blocks=3), IMAGES, "in the plan and blocks_2_0_weight, 2,304 bytes, parameter here"),
        (ConvNet(), (IMAGES[0].contiguous(memory_format=torch.channels_last),), "[8, 3, 16, 16] with strides (768, 1, 48, 3)"),
        (ConvNet().eval(), IMAGES, "the mode is train in the plan and eval here"),
        (Transformer(), (torch.randint(50, (2, 8)),), "the model is ConvNet in the plan and Transformer here"),
    ],
)
def test_another_module_or_call_is_refused(path, model, inputs, words):
    model = model.double() if inputs[0].dtype == torch.float64 else model
    with pytest.raises(fxmem.PlanError) as caught:
        fxmem.transform(model, inputs, plan=path)
    assert words in str(caught.value) and "Plan anew" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("torch", "1.0.0", "the torch version is 1.0.0 in the plan"), ("fxmem", "9", "the fxmem version is 9 in the plan")],
)
def test_another_version_is_refused(path, name, value, words):
    data = json.loads(path.read_text())
    data["origin"][name] = value
    path.write_text(json.dumps(data))
    with pytest.raises(fxmem.PlanError, match=words):
        fxmem.transform(ConvNet(), IMAGES, plan=path)


def shorter(data: dict) -> None:
    data["schedule"] = data["schedule"][:-1]


def nameless(data: dict) -> None:
    del data["model"]


def newer(data: dict) -> None:
    data["format"] = 99


def odd(data: dict) -> None:
    data["operators"][0]["colour"] = "red"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shorter, "damaged .*the schedule never runs"),
        (nameless, "damaged .*model"),
        (newer, "has format 99, and this version of fxmem reads format 1"),
        (odd, "damaged .*colour"),
    ],
)
def test_a_spoilt_file_is_refused(path, spoil, words):
    data = json.loads(path.read_text())
    spoil(data)
    path.write_text(json.dumps(data))
    with pytest.raises(fxmem.PlanError, match=words):
        fxmem.load_plan(path)


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("model",), 5, r"model is 5; it must be str"),
        (("budget_bytes",), "many", r"budget_bytes is 'many'; it must be int \| None"),
        (("capture_time_s",), None, r"capture_time_s is None; it must be float"),
        (("baseline_by_kind", "input"), True, r"baseline_by_kind\['input'\] is True; it must be int"),
        (("asked", "fraction"), "half", r"asked.fraction is 'half'; it must be float \| None"),
        (("storages", 3, 1), 7.5, r"problem.storages\[3\].size_bytes is 7.5; it must be int"),
        (("operators", 0, "name"), 1, r"problem.operators\[0\].name is 1; it must be str"),
        (("origin", "inputs", 0), ["x"], r"origin.inputs\[0\] is \('x',\); it must be tuple\[str, str\]"),
    ],
)
def test_a_field_of_another_type_is_refused(path, where, value, words):
    data = json.loads(path.read_text())
    *outer, last = where
    functools.reduce(operator.getitem, outer, data)[last] = value
    path.write_text(json.dumps(data))
    with pytest.raises(fxmem.PlanError, match=f"damaged .*{words}"):
        fxmem.load_plan(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "nonsense", '{"format": 1}', '"plan"'])
def test_what_is_no_plan_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(fxmem.PlanError, match="plan anew"):
        fxmem.load_plan(tmp_path / "plan.json")


def test_truncated_anywhere(path):
    text = path.read_text()
    for length in range(0, len(text), len(text) // 23):
        path.write_text(text[:length])
        with pytest.raises(fxmem.PlanError, match="no plan, or not a whole one"):
            fxmem.load_plan(path)


def test_files_that_cannot_be(planned, tmp_path):
    with pytest.raises(fxmem.PlanError, match="cannot be read: No such file"):
        fxmem.load_plan(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(fxmem.PlanError, match="cannot be written"):
        planned.plan.save(tmp_path / "file" / "plan.json")
    with pytest.raises(fxmem.PlanError, match="cache_dir=.*cannot be written to"):
        fxmem.transform(ConvNet(), IMAGES, budget="min", cache_dir=tmp_path / "file")


def test_a_plan_and_a_budget_are_too_much(path):
    with pytest.raises(fxmem.BudgetError, match="both a plan and a budget"):
        fxmem.transform(ConvNet(), IMAGES, budget=0.5, plan=path)


def test_the_cache(tmp_path, monkeypatch, caplog):
    options = {"cost": "V100", "time_limit_s": 0.2, "cache_dir": tmp_path / "plans"}
    first = fxmem.plan(ConvNet(), IMAGES, budget=0.7, **options)
    other = fxmem.plan(ConvNet(), IMAGES, budget=0.8, **options)
    assert len(list((tmp_path / "plans").iterdir())) == 2 and first != other
    with monkeypatch.context() as patched:
        patched.setattr(planning, "choose_program", None)
        assert fxmem.plan(ConvNet(), IMAGES, budget=0.7, **options) == first
        assert fxmem.transform(ConvNet(), IMAGES, budget=0.8, **options).plan == other
    for file in (tmp_path / "plans").iterdir():
        file.write_text("{")
    with caplog.at_level(logging.WARNING):
        again = fxmem.plan(ConvNet(), IMAGES, budget=0.7, **options)
    assert "planning anew" in caplog.text and again.predicted_peak_bytes <= again.budget_bytes == first.budget_bytes
    assert fxmem.plan(ConvNet(), IMAGES, budget=0.7, **options) == again


def test_the_cache_changes_no_budget(tmp_path):
    """A fraction is one of the plain peak as the given cost model has it."""
    asked = {"budget": 0.7, "cost": "measured", "time_limit_s": 0.2}
    found = [fxmem.plan(ConvNet(), IMAGES, **asked, **more) for more in ({}, {"cache_dir": tmp_path})]
    assert found[0].baseline_by_kind == found[1].baseline_by_kind and found[0].budget_bytes == found[1].budget_bytes


def test_an_interrupted_plan_is_not_kept(tmp_path, monkeypatch):
    solve_for = planning.solve_for

    def interrupted(*args):
        program, plan = solve_for(*args)
        return program, replace(plan, solution=replace(plan.solution, interrupted=True))

    monkeypatch.setattr(planning, "solve_for", interrupted)
    fxmem.plan(ConvNet(), IMAGES, budget=0.7, cost="V100", time_limit_s=0.2, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_cache_and_a_bad_cost(tmp_path):
    with pytest.raises(fxmem.CostError, match="unknown cost 5"):
        fxmem.plan(ConvNet(), IMAGES, budget="min", cost=5, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
