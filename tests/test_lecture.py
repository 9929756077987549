"""The lecture's figures: rows of a network of a few layers, what is stored and taken up again, exponents, table, pictures."""

import json

import pytest
import torch
from torch import nn

from benchmarks import lecture
from benchmarks.lecture_pictures import exponent, series
from benchmarks.models import Example
from benchmarks.tables import lecture_markdown

METHODS = list(lecture.METHODS)


def convolutions(depth):
    layers = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()) for _ in range(depth)]
    return Example(nn.Sequential(*layers).to("meta"), (torch.empty(16, 4, 8, 8, device="meta"),))


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setitem(lecture.FAMILIES, "ResNet", convolutions)
    monkeypatch.setitem(lecture.QUICK_DEPTHS, "ResNet", (4, 12))
    where = ["--results", str(tmp_path / "lecture.json"), "--figures", str(tmp_path)]

    def call(*options):
        assert lecture.main(["--networks", "ResNet", "--time-limit", "1", *where, *options]) == 0
        return json.loads((tmp_path / "lecture.json").read_text())

    return call


def test_rows(run, tmp_path, capsys):
    rows = run("--quick")
    assert [(r["depth"], r["method"]) for r in rows] == [(depth, method) for depth in (4, 12) for method in METHODS]
    found = {r["method"]: r for r in rows if r["depth"] == 12}
    layer = 16 * 4 * 8 * 8 * 4  # bytes
    # 12 convolutions, 12 tanhs (the last is the output) forward; gradients of 12 tanhs and of 11 convolutions' inputs
    assert found["no optimization"]["bytes"] == (12 + 11 + 12 + 11) * layer
    assert found["both"]["bytes"] <= min(found["in place"]["bytes"], found["sharing"]["bytes"])
    assert found["sqrt(N)"]["bytes"] < found["both"]["bytes"] and found["sqrt(N)"]["extra_time"] > 0
    ours, smaller, theirs = found["fxmem, its peak"], found["fxmem, its time"], found["sqrt(N)"]
    assert ours["peak_bytes"] <= theirs["peak_bytes"] and 0 < ours["bound"] <= ours["extra_time"] <= theirs["extra_time"]
    assert f"(bound {100 * ours['bound']:.1f})" in lecture_markdown(rows, "ResNet")
    assert smaller["peak_bytes"] <= theirs["peak_bytes"] and smaller["extra_time"] <= theirs["extra_time"]
    assert {p.name for p in tmp_path.glob("*.png")} == {"lecture-resnet.png", "lecture-planning.png"}
    capsys.readouterr()
    assert run("--quick") == rows and "no optimization" not in capsys.readouterr().out  # nothing is left to do


def test_a_network_that_takes_too_long(run, monkeypatch):
    monkeypatch.setitem(lecture.DEPTHS, "ResNet", (9,))
    rows = run("--limit", "0.01")
    assert [r["outcome"] for r in rows] == ["cut off after 0 s for the network"] * len(METHODS)
    assert "cut off" in lecture_markdown(rows, "ResNet")


def test_exponents():
    rows = [
        {"network": "N", "depth": depth, "method": method, "bytes": size, "extra_time": 0.25, "outcome": "ok"}
        for depth in (16, 64, 256)
        for method, size in (("linear", 10**6 * depth), ("root", 10**6 * int(depth**0.5)), ("cut", None))
    ]
    assert [exponent(rows, "N", method) for method in ("linear", "root", "cut")] == [pytest.approx(1), pytest.approx(0.5), None]
    assert series(rows, "N", "root", "bytes") == ([16, 64, 256], [4e6, 8e6, 16e6])
    assert "| grows as | depth^1.00 | depth^0.50 |  |" in lecture_markdown(rows, "N")
    assert "| 64 | 64.0, +25.0 % | 8.0, +25.0 % | ok |" in lecture_markdown(rows, "N")
