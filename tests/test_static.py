"""The benchmark of static plans: its rows, and the allocators that plans are held against."""

import json
import pathlib

import pytest
import torch
from torch import nn

from benchmarks import static
from benchmarks.allocators import MIB, caching_allocator_bytes, other_allocators
from benchmarks.models import Example
from fxmem.memory import Interval

FOLDER = pathlib.Path(__file__).parent / "data" / "minimalloc"


def intervals_of(*rows):
    return tuple(Interval(str(k), *row) for k, row in enumerate(rows))


@pytest.mark.parametrize(
    ("rows", "reserved"),
    [
        ([(0, 1, 0), (1, 1, 5)], 0),
        ([(0, 1, 1)], 2 * MIB),
        ([(0, 2, MIB), (0, 2, MIB - 511), (1, 2, 1)], 4 * MIB),  # two fill the segment
        ([(0, 2, MIB + 1), (0, 2, 9 * MIB), (0, 2, 5 * MIB)], 20 * MIB),
        ([(0, 2, 19 * MIB), (0, 2, MIB + 1)], 40 * MIB),  # the last MiB of the segment is not split off
        ([(0, 2, 11 * MIB + 1)], 12 * MIB),
        ([(0, 1, 30 * MIB), (1, 2, 20 * MIB), (1, 2, 10 * MIB)], 30 * MIB),
        ([(0, 1, 9 * MIB), (0, 1, 9 * MIB), (1, 2, 18 * MIB)], 20 * MIB),  # freed neighbours are one again
        ([(0, 3, 9 * MIB), (0, 1, 9 * MIB), (1, 2, 18 * MIB)], 38 * MIB),
        ([(0, 1, 30 * MIB), (0, 1, 20 * MIB), (1, 2, 19 * MIB), (1, 2, 30 * MIB)], 50 * MIB),  # the tightest block
    ],
)
def test_caching_allocator(rows, reserved):
    assert caching_allocator_bytes(intervals_of(*rows)) == reserved


def test_other_allocators():
    # as they come, the last finds a hole of 2 where the first was, and goes on top
    assert other_allocators(intervals_of((0, 2, 2 * MIB), (1, 4, MIB), (2, 4, 3 * MIB))) == {
        "by size": 4 * MIB,
        "by breadth": 4 * MIB,
        "best fit": 6 * MIB,
        "caching allocator": 22 * MIB,
    }
    assert set(other_allocators(()).values()) == {0}


def test_instances(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(static, "RESULTS", tmp_path / "static.json")
    files = [str(FOLDER / f"{name}.1048576.csv") for name in "AC"]
    assert static.main(["--instances", *files]) == 0
    assert capsys.readouterr().out.count("optimal") == 2
    assert static.main(["--instances", files[0], "--capacity", "1048575", "--json"]) == 1
    assert static.main(["--instances", files[0], "--time-limit", "0", "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["status"], row["capacity"]) for row in rows] == [("impossible", 1048575), ("not found in time", 1048576)]
    stored = json.loads(static.RESULTS.read_text())
    assert [(row["instance"], row["status"]) for row in stored] == [
        ("A.1048576", "not found in time"), ("C.1048576", "optimal"), ("A.1048576", "impossible")
    ]  # fmt: skip
    assert stored[1]["arena_bytes"] == stored[1]["max_live_bytes"] == 1039360


def test_a_file_that_is_none(capsys, tmp_path):
    (tmp_path / "bad.csv").write_text("id,lower,upper,size\na,0,3\n")
    assert static.main(["--instances", str(tmp_path / "bad.csv")]) == 2
    assert "bad.csv, line 2" in capsys.readouterr().err
    assert static.main(["--instances", str(tmp_path / "none.csv")]) == 2


@pytest.mark.parametrize(("name", "capacity"), [("A.1048576.csv", 1048576), ("joint.csv", None), ("a.b.csv", None)])
def test_capacities_are_in_names(name, capacity):
    assert static.capacity_in(pathlib.Path(name)) == capacity


def test_the_steps_of_models(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(static, "RESULTS", tmp_path / "static.json")
    layers = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()) for _ in range(8)]
    monkeypatch.setitem(static.MODELS, "chain", lambda: Example(nn.Sequential(*layers).to("meta"), (torch.randn(2, 4, 8, 8),)))
    assert static.main(["--models", "chain", "--budget", "0.7", "--time-limit", "1"]) == 0
    rows = json.loads(static.RESULTS.read_text())
    assert [r["instance"] for r in rows] == ["chain, plain", "chain, 0.7"]
    assert all(r["arena_bytes"] == r["lower_bound_bytes"] == r["max_live_bytes"] for r in rows)
    assert rows[1]["arena_bytes"] < rows[0]["arena_bytes"]
    assert static.main(["--models", "none"]) == 2
