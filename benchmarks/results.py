"""Results on disk: JSON files whose rows are replaced one by one, so that a run can have parts.

Of `benchmarks.step` one file a device, with what it was measured on; of the other benchmarks lists of rows.
"""

from __future__ import annotations

import json
import pathlib
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from .models import MODELS

FOLDER = pathlib.Path(__file__).parent / "results"
METHODS = ("plain", "fxmem", "checkpoint", "activation_memory_budget")


@dataclass(frozen=True)
class Row:
    """One model's training step by one method in one setting.

    method: one of METHODS; setting: the budget as it was asked for, or the peer's own.
    outcome: "ok", or in one line why there are no numbers. Peaks are bytes, all that is alive counted (`fxmem.measure`);
    before_bytes of them were there before the step. Overheads are extra time as a fraction of the plain module's step.
    time_s: median seconds of a step. plan_time_s: of all that comes before the first step; solve_time_s is part of it.
    gradient_difference: see `compare.Difference`; for the plain method, of two runs of it.
    """

    model: str
    method: str
    setting: str = ""
    outcome: str = "ok"
    budget_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    peak_bytes: int | None = None
    before_bytes: int | None = None
    predicted_overhead: float | None = None
    lower_bound_overhead: float | None = None
    overhead: float | None = None
    time_s: float | None = None
    plan_time_s: float | None = None
    solve_time_s: float | None = None
    status: str | None = None
    gradient_difference: float | None = None
    equal_outputs: bool | None = None
    equal_gradients: bool | None = None
    equal_buffers: bool | None = None

    @property
    def is_ok(self) -> bool:
        return self.outcome == "ok"

    @property
    def key(self) -> tuple[str, str, str]:
        return self.model, self.method, self.setting


@dataclass(frozen=True)
class Results:
    """All rows of one device, and what they were measured with last."""

    device: str
    torch: str
    threads: int
    rows: tuple[Row, ...]

    def find(self, model: str, method: str, setting: str = "") -> Row | None:
        return next((row for row in self.rows if row.key == (model, method, setting)), None)

    @property
    def models(self) -> list[str]:
        return [name for name in MODELS if any(row.model == name for row in self.rows)]


def path_of(device: str) -> pathlib.Path:
    """Where the results of `device` ("cpu", "cuda") lie; CUDA devices by their own name."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return FOLDER / f"step-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def load(path: pathlib.Path) -> Results | None:
    """The results in that file; None where there is none."""
    if not path.exists():
        return None
    data = json.loads(path.read_text())
    return Results(data["device"], data["torch"], data["threads"], tuple(Row(**row) for row in data["rows"]))


def save(row: Row, device: str) -> None:
    """Add the row to the device's results, or put it in place of the one with its key."""
    path = path_of(device)
    before = load(path)
    rows = {r.key: r for r in (before.rows if before else ())} | {row.key: row}
    ordered = sorted(rows.values(), key=lambda r: (list(MODELS).index(r.model), METHODS.index(r.method)))
    results = Results(_device_name(device), torch.__version__, torch.get_num_threads(), tuple(ordered))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(results), indent=1) + "\n")


def stored_rows(path: pathlib.Path) -> list[dict]:
    """The rows of a file that `save_row` writes; none where there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def save_row(path: pathlib.Path, row: dict, key: Sequence[str]) -> None:
    """Add the row to those in the file, or put it in place of the one that has the same values under the names in `key`."""
    rows = {tuple(r.get(name) for name in key): r for r in (*stored_rows(path), row)}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(list(rows.values()), indent=1) + "\n")


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()
