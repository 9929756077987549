"""What `benchmarks.lecture` stored, as growth exponents and figures."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np

FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "images"


def series(rows: list[dict], network: str, method: str, value: str) -> tuple[list[int], list[float]]:
    """Depths and values of one method, in order of depth, as far as there are any."""
    found = sorted(
        (r["depth"], r[value]) for r in rows if (r["network"], r["method"]) == (network, method) and r[value] is not None
    )
    return [depth for depth, _ in found], [value for _, value in found]


def exponent(rows: list[dict], network: str, method: str, value: str = "bytes") -> float | None:
    """The slope of the line of least squares through the logarithms of value and depth; None of fewer than two points."""
    depths, values = series(rows, network, method, value)
    return float(np.polyfit(np.log(depths), np.log(values), 1)[0]) if len(depths) > 1 else None


def names_of(rows: list[dict], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def draw(rows: list[dict], folder: pathlib.Path = FOLDER) -> Iterator[pathlib.Path]:
    """Memory and extra time against depth of each network, and planning time against the number of operators."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows if row["bytes"] is not None]
    figures = {f"lecture-{network.lower()}": _network(Figure, rows, network) for network in names_of(rows, "network")}
    if rows:
        figures["lecture-planning"] = _planning(Figure, rows)
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=100, metadata={"Software": None})
        yield path


def _network(figure_class: type, rows: list[dict], network: str):
    """Two axes: bytes and extra time."""
    figure = figure_class(figsize=(10, 5), layout="constrained")
    memory, extra = figure.subplots(1, 2)
    for number, method in enumerate(names_of(rows, "method")):
        depths, sizes = series(rows, network, method, "bytes")
        slope = exponent(rows, network, method)
        label = method if slope is None else f"{method}: depth^{slope:.2f}"
        style = dict(marker="o", markersize=4, color=f"C{number}")
        memory.plot(depths, [size / 1e6 for size in sizes], label=label, **style)
        depths, times = series(rows, network, method, "extra_time")
        if any(times):
            extra.plot(depths, [100 * t for t in times], **style)
    memory.set(xscale="log", yscale="log", xlabel="layers" if network == "ResNet" else "steps", ylabel="MB made and dropped")
    extra.set(xscale="log", xlabel=memory.get_xlabel(), ylabel="extra time (%)", ylim=(0, None))
    memory.set_title(f"{network}: memory of a training step")
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    depths = sorted({row["depth"] for row in rows if row["network"] == network})
    for axes in (memory, extra):
        axes.grid(alpha=0.3)
        axes.set_xticks(depths, map(str, depths))
        axes.minorticks_off()
    return figure


def _planning(figure_class: type, rows: list[dict]):
    """Seconds against the number of operators: everything before the solvers, and each plan."""
    figure = figure_class(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(m for m in names_of(rows, "method") if m.startswith(("fxmem", "sqrt", "recursive"))):
        for network, marker in zip(names_of(rows, "network"), "os^", strict=False):
            found = [r for r in rows if (r["network"], r["method"]) == (network, method) and r["operators"]]
            found.sort(key=lambda r: r["operators"])
            counts = [r["operators"] for r in found]
            style = dict(marker=marker, markersize=4)
            axes.plot(counts, [r["seconds"] for r in found], label=f"{network}, {method}", color=f"C{number}", **style)
            if number == 0:
                prepared = [r["prepare_s"] for r in found]
                axes.plot(counts, prepared, label=f"{network}, capture", color="gray", linestyle="--", **style)
    axes.set(xscale="log", yscale="log", xlabel="operators of the step", ylabel="seconds of planning")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return figure
