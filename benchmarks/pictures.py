"""Draw the pictures of the documentation, `python -m benchmarks.pictures`: stored results, and a plan made anew."""

from __future__ import annotations

import pathlib
from typing import Any

import fxmem
from fxmem.report.plots import plot_points

from .models import build, on_meta, resnet50
from .report import ROOT, solver_rows

FOLDER = ROOT / "docs" / "images"
MODEL, DEVICE = "resnet50", "P100"


def frontier() -> Any:
    """What `benchmarks.solvers` stored of one model: every solver at every budget. Returns the Axes."""
    rows = [r for r in solver_rows() if (r["instance"], r["device"]) == (MODEL, DEVICE) and r["extra_time"] is not None]
    found: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda r: -r["peak_fraction"]):
        found.setdefault(row["solver"], []).append((100 * row["peak_fraction"], row["extra_time"]))
    ours = [(100.0, 0.0), *found.pop("auto")]
    bounds = [(100 * r["peak_fraction"], r["bound"]) for r in rows if r["solver"] == "auto"]
    axes = plot_points(ours, sorted([(100.0, 0.0), *bounds]), dict(sorted(found.items())), 100.0)
    axes.set(xlabel="peak of the step (% of plain PyTorch's)", ylabel=f"extra time (%, {DEVICE} roofline)")
    axes.set_title(f"{MODEL}, batch 184: peak against time")
    return axes


def plan() -> fxmem.Plan:
    """ResNet-50 at half of its peak, for the other pictures."""
    example = on_meta(resnet50, batch=32)()
    return fxmem.plan(example.module, example.args, budget=0.5, cost="H100")


def arena() -> fxmem.Plan:
    """A step of ResNet-50 in an arena, at a size that the CPU at hand has no trouble with."""
    example = build(MODEL, batch=4, size=128)
    return fxmem.transform(example.module, example.args, arena=True, cost="roofline").plan


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    made = plan()
    _save(arena().plot_memory_map(), FOLDER / "memory_map.png")
    for name, axes in (("frontier", frontier()), ("timeline", made.plot_timeline()[0]), ("schedule", made.plot_schedule())):
        _save(axes, FOLDER / f"{name}.png")


def _save(axes: Any, path: pathlib.Path) -> None:
    axes.figure.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
