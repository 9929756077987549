"""The benchmarks on models of a few kilobytes: all methods make their rows, which are stored, replaced and shown."""

import json
from dataclasses import fields

import pytest
import torch
from helpers.instances import FOLDER
from torch import nn

from benchmarks import implementations, planning, results, solvers, step, tables
from benchmarks.compare import difference, step_result
from benchmarks.models import EXAMPLES, MODELS, SOLVER_MODELS, Example, on_meta
from benchmarks.peers import checkpointed


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.1)

    def forward(self, x):
        return x + self.dropout(torch.relu(self.norm(self.linear(x))))


def tiny(batch: int = 256) -> Example:
    return Example(nn.Sequential(*(Block() for _ in range(4))), (torch.randn(batch, 64),), blocks=("Block",))


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """The stored rows of a run over the tiny model, by method and setting."""
    for known in (MODELS, EXAMPLES):
        monkeypatch.setitem(known, "tiny", tiny)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    options = step.Options("cpu", "roofline", repeats=1, time_limit_s=1.0, batch=None)
    step.run_model("tiny", ["None"], False, options)
    step.run_model("tiny", ["None", "min", "1000"], True, options)  # replaces the rows that are there
    return {(row.method, row.setting): row for row in results.load(results.path_of("cpu")).rows}


def test_rows(rows):
    plain, free, least = rows["plain", ""], rows["fxmem", "None"], rows["fxmem", "min"]
    assert all(row.equal_outputs and row.equal_gradients and row.equal_buffers for row in (plain, free, least))
    assert least.peak_bytes <= least.budget_bytes < free.peak_bytes <= plain.peak_bytes
    assert least.predicted_overhead > 0 == free.predicted_overhead
    assert rows["fxmem", "1000"].outcome.startswith("infeasible: the least peak is")
    peer = rows["checkpoint", "per block"]
    assert peer.equal_gradients and not peer.equal_buffers  # batch norm's statistics move twice
    assert peer.before_bytes < peer.peak_bytes < plain.peak_bytes
    assert {setting for method, setting in rows if method == "activation_memory_budget"} == {
        "1.0",
        "0.75",
        "0.5",
        "0.25",
        "0.0",
    }
    assert rows["activation_memory_budget", "1.0"].is_ok
    stored = results.load(results.path_of("cpu"))
    assert len(stored.rows) == len(rows)
    for text in (tables.text_table(stored, ["tiny"]), tables.full_markdown(stored), tables.readme_markdown(stored)):
        assert text.count("tiny") >= 1


def test_difference():
    example = tiny(8)
    plain = step_result(example.module, example)
    assert difference(plain, step_result(example.module, example)).equal_gradients
    assert difference(plain, step_result(checkpointed(example), example)).gradient == 0
    other = step_result(example.module, example, seed=2)
    apart = difference(plain, other)
    assert apart.gradient > 0 and not apart.equal_outputs and apart.equal_buffers is False


def test_solvers_on_a_stored_instance(capsys):
    file = str(FOLDER / "vgg16_32.json.gz")
    arguments = ["--budget", "0.7,0.5,min", "--solvers", "auto,checkmate_lp,per_block", "--time-limit", "4", "--json"]
    assert solvers.main(["--instance", file, *arguments]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {(row["budget"], row["solver"]): row for row in rows}
    assert set(rows[0]) == {f.name for f in fields(solvers.Row)} and rows[0]["instance"] == "vgg16_32"
    ours, other, least = found["0.7", "auto"], found["0.7", "checkmate_lp"], found["min", "auto"]
    assert ours["bound"] <= ours["extra_time"] <= other["extra_time"]
    assert max(ours["peak_fraction"], other["peak_fraction"]) <= 0.7
    assert found["0.7", "per_block"]["outcome"] == "nothing that fits" and "infeasible" in found["0.5", "auto"]["outcome"]
    assert 0.624 < least["peak_fraction"] < 0.64 and ("min", "checkmate_lp") not in found


def test_solvers_on_a_model_that_is_never_built(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(SOLVER_MODELS, "tiny", on_meta(tiny))
    monkeypatch.setattr(solvers, "RESULTS", tmp_path / "solvers.json")
    for _ in range(2):
        assert solvers.main(["--models", "tiny", "--devices", "P100", "--budget", "0.8", "--solvers", "auto,chen_sqrt"]) == 0
    stored = json.loads(solvers.RESULTS.read_text())
    assert [row["solver"] for row in stored] == ["auto", "chen_sqrt"] and stored[0]["extra_time"] <= stored[1]["extra_time"]
    assert capsys.readouterr().out.count("tiny") == 4


@pytest.mark.parametrize(("ways", "more"), [(["recompute", "all"], []), (["all"], ["--measure"])])
def test_ways_of_running_operators(monkeypatch, tmp_path, ways, more):
    monkeypatch.setitem(EXAMPLES, "tiny", lambda: tiny(1024))
    monkeypatch.setattr(implementations, "RESULTS", tmp_path / "implementations.json")
    asked = ["--ways", ",".join(ways), "--budget", "free,0.6,1000", "--time-limit", "1"]
    arguments = ["--models", "tiny", *asked, *more]
    assert implementations.main(arguments) == 0
    rows = json.loads(implementations.RESULTS.read_text())
    found = {(row["budget"], row["way"]): row for row in rows}
    if not more:  # measured costs come out otherwise each time
        assert found["0.6", "all"]["extra_time"] <= found["0.6", "recompute"]["extra_time"]
        assert found["free", "all"]["peak_bytes"] <= found["free", "recompute"]["peak_bytes"]
    assert all(row["extra_time"] <= 0.005 for (budget, _), row in found.items() if budget == "free")
    assert "infeasible" in found["1000", "all"]["outcome"]
    if more:
        done = [row for row in rows if row["outcome"] == "ok"]
        assert all(0.99 * row["peak_bytes"] <= row["measured_peak_bytes"] <= row["peak_bytes"] for row in done)
    head, _, *lines = tables.ways_markdown(rows, ways, bool(more)).splitlines()
    assert head == f"| model | budget | {' | '.join(ways)} |"
    assert [line.split(" | ")[1] for line in lines] == ["1000", "free", "0.6"] and "infeasible" in lines[0]


def test_ways_that_are_not_there(capsys):
    assert implementations.main(["--ways", "luck"]) == 2
    assert "unknown way 'luck'; ways: recompute" in capsys.readouterr().err


def test_what_planning_takes(monkeypatch):
    monkeypatch.setitem(SOLVER_MODELS, "tiny", on_meta(tiny))
    row = planning.plan_one("tiny", 0.8, "P100", 2.0, False)
    assert min(row.torch_s, row.capture_s, row.solve_s) > 0 and 0 < row.bound <= row.extra_time and "tiny" in row.line


def test_solvers_that_are_not_there(capsys):
    assert solvers.main(["--solvers", "gurobi", "--models", "alexnet"]) == 2
    assert "solver 'gurobi', model 'alexnet'" in capsys.readouterr().err
