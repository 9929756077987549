"""The results as people read them: lines of text, and tables of Markdown for the README and the documentation."""

from __future__ import annotations

from collections.abc import Sequence

from .lecture_pictures import exponent, names_of
from .results import Results, Row

COLUMNS = (
    ("model", 13), ("method", 25), ("setting", 18), ("budget", 9), ("predicted", 10), ("measured", 9), ("above", 9),
    ("predicted", 10), ("measured", 9), ("seconds", 8), ("plan s", 7), ("gradients", 10), ("bitwise", 24),
)  # fmt: skip
TEXTS = ("model", "method", "setting", "bitwise")  # the columns that are no numbers
GROUPS = f"{'':<56}{'peak, MB':>37}{'extra time, %':>19}"


def header() -> str:
    return GROUPS + "\n" + _aligned([title for title, _ in COLUMNS])


def line(row: Row) -> str:
    """One row of text. Peaks in MB, `above` without what was there before; gradients: the largest relative difference."""
    if not row.is_ok:
        return _aligned([row.model, row.method, row.setting]) + f"  {row.outcome}"
    return _aligned([row.model, row.method, row.setting, *_numbers(row)])


def text_table(results: Results, models: list[str]) -> str:
    rows = [line(row) for row in results.rows if row.model in models]
    return "\n".join([f"{results.device}, torch {results.torch}, {results.threads} threads", header(), *rows])


def full_markdown(results: Results) -> str:
    """All rows."""
    titles = [title for title, _ in COLUMNS]
    peaks = ["peak predicted, MB", "peak measured, MB", "above the state before, MB"]
    titles[4:9] = [*peaks, "extra time predicted, %", "extra time measured, %"]
    rows = [[*row.key, *(_numbers(row) if row.is_ok else _empty(row))] for row in results.rows]
    return _markdown(_caption(results), titles, rows)


def readme_markdown(results: Results) -> str:
    """One row a model: peaks in MB and extra time, planned and by PyTorch's own means."""
    planned, peers = ["fxmem, 0.5", 'fxmem, "min"'], ["fxmem at that peak", "least activation_memory_budget"]
    titles = ["model", "plain", *planned, "checkpoint per block", *peers]
    table = _markdown(_caption(results), titles, [_readme_row(results, model) for model in results.models])
    return f"{table}\n\n{_promises(results)}"


def solvers_markdown(rows: list[dict]) -> str:
    """One row for each question to the solvers: the default's answer, and the best of the others."""
    questions: dict[tuple[str, str, str], dict[str, dict]] = {}
    for row in rows:
        questions.setdefault((row["instance"], row["device"], row["budget"]), {})[row["solver"]] = row
    titles = ["instance", "device", "budget", "extra time, %", "bound, %", "peak, of plain", "seconds", "best other", "its, %"]
    return _markdown("", titles, [_question(key, answers) for key, answers in questions.items() if "auto" in answers]).lstrip()


def planning_markdown(rows: list[dict]) -> str:
    """One row for each model planned."""
    titles = ["model", "device", "budget", "operators", "PyTorch's tracing alone, s", "capture, s", "passes, s", "solving, s"]
    titles += ["memory, GB", "extra time, %", "bound, %", "extra time in ten minutes, %"]
    return _markdown("", titles, [_planned(row) for row in rows]).lstrip()


def _planned(row: dict) -> list[str]:
    seconds = [f"{row[name]:.1f}" for name in ("torch_s", "capture_s", "passes_s", "solve_s")]
    long = "" if row["long_extra_time"] is None else f"{100 * row['long_extra_time']:.2f}"
    shares = f"{100 * row['extra_time']:.2f}", f"{100 * row['bound']:.2f}", long
    what = row["model"], row["device"], f"{row['budget']:g}", f"{row['operators']:,}"
    return [*what, *seconds, f"{row['peak_rss'] / 1e9:.2f}", *shares]


def static_markdown(rows: list[dict]) -> str:
    """One row for each instance and capacity; other allocators relative to the most bytes alive."""
    titles = ["instance", "intervals", "capacity", "max live", "arena", "status", "nodes", "seconds", "others"]
    lines = []
    for row in rows:
        others = ", ".join(f"{name} {size_bytes / row['max_live_bytes']:.2f}" for name, size_bytes in row["others"].items())
        cells = [row[key] for key in ("instance", "intervals", "capacity", "max_live_bytes", "arena_bytes", "status", "nodes")]
        lines.append(["" if cell is None else str(cell) for cell in (*cells, f"{row['seconds']:.1f}", others)])
    return _markdown("", titles, lines).lstrip()


def lecture_markdown(rows: list[dict], network: str) -> str:
    """Of one network, a row for each depth: MB by each method, with the extra time where there is any, and the least that it
    can be where that is known; then the exponents."""
    methods = names_of(rows, "method")
    found = {(r["depth"], r["method"]): r for r in rows if r["network"] == network}
    depths = sorted({depth for depth, _ in found})
    lines = [[str(depth), *(_grown(found.get((depth, method))) for method in methods)] for depth in depths]
    slopes = (exponent(rows, network, method) for method in methods)
    lines.append(["grows as", *("" if slope is None else f"depth^{slope:.2f}" for slope in slopes)])
    return _markdown("", [network, *methods], lines).lstrip()


def _grown(row: dict | None) -> str:
    if row is None or row["bytes"] is None:
        return "" if row is None else row["outcome"]
    extra = f", {_percent(row['extra_time'])} %" if row["extra_time"] else ""
    bound = f" (bound {100 * row['bound']:.1f})" if row.get("bound") else ""
    return f"{_megabytes(row['bytes'])}{extra}{bound}"


def arena_markdown(rows: list[dict]) -> str:
    """One row for each model and way; megabytes are of 10^6 bytes."""
    titles = [
        "model",
        "step",
        "way",
        "measured peak, MB",
        "arena, MB",
        "inside",
        "large allocations",
        "handed out",
        "page faults",
    ]
    titles += ["resident, MB", "time, of plain", "equal bits"]
    cells = [
        [f"{r['model']} ({r['sizes']})" if r["sizes"] else r["model"], r["what"], r["way"], f"{r['peak_bytes'] / 1e6:.1f}",
         f"{r['arena_bytes'] / 1e6:.1f}", f"{r['share_inside']:.0%}", str(r["large_allocations"]), str(r["handed_out"]),
         f"{r['page_faults']:.0f}", "" if r["resident_bytes"] is None else f"{r['resident_bytes'] / 1e6:.1f}",
         f"{r['time_ratio']:.2f}", "yes" if r["equal"] else "no"]
        for r in rows
    ]  # fmt: skip
    return _markdown("", titles, cells).lstrip()


def implementations_markdown(rows: list[dict], part: str) -> str:
    """The rows of one part of `benchmarks.implementations`."""
    found = [row for row in rows if row["part"] == part]
    if part == "table":
        titles = ["implementation", "serves", "what the backward keeps", "class", "error", "plain error"]
        cells = [
            [f"`{r['name']}`", ", ".join(f"`{t}`" for t in r["serves"]), r["keeps"], r["exactness"], f"{r['error']:.1e}",
             f"{r['plain_error']:.1e}"]
            for r in found
        ]  # fmt: skip
    elif part == "speed":
        titles, cells = ["", "device", "GB/s"], [[f"`{r['name']}`", r["device"], f"{r['gb_per_s']:.1f}"] for r in found]
    else:
        titles = ["model", "device", "budget", "way", "peak, of plain", "extra time, %", "bound, %", "MONeT, %"]
        cells = [[r["model"], r["device"], r["budget"], r["way"], *_beside_theirs(r)] for r in found]
    return _markdown("", titles, cells).lstrip()


def _beside_theirs(row: dict) -> list[str]:
    numbers = [row["outcome"], "", ""]
    if row["outcome"] == "ok":
        shares = f"{100 * row['extra_time']:.2f}", f"{100 * row['bound']:.2f}"
        numbers = [f"{row['peak_bytes'] / row['plain_peak_bytes']:.3f}", *shares]
    return [*numbers, f"{100 * row['theirs']:.1f}"]


def ways_markdown(rows: list[dict], ways: Sequence[str], is_measured: bool) -> str:
    """The models of `benchmarks.implementations`, as planned or as measured: a row for each budget, a column for each way."""
    rows = [row for row in rows if row["part"] == "models" and is_measured == (row["device"] == "this")]
    found = {(row["model"], row["budget"], row["way"]): row for row in rows}
    models = names_of(rows, "model")
    questions = sorted({key[:2] for key in found}, key=lambda key: (models.index(key[0]), -_room(key[1])))
    cells = [[*key, *(_way(found.get((*key, way)), is_measured) for way in ways)] for key in questions]
    return _markdown("", ["model", "budget", *ways], cells).lstrip()


def _room(budget: str) -> float:
    """A number to sort budgets by, the more of memory the larger."""
    if budget == "min":
        return 0.0
    if budget.endswith("%"):
        return 1 + 1 / (1 + float(budget.removesuffix("%")))
    return 3.0 if budget == "free" else float(budget)


def _way(row: dict | None, is_measured: bool) -> str:
    if row is None or row["outcome"] != "ok":
        return "" if row is None else row["outcome"].split(":")[0]
    plain, percent = row["plain_peak_bytes"], f"{100 * row['extra_time']:.2f}"
    if not is_measured:
        return f"{row['peak_bytes'] / plain:.3f}, {percent}"
    return f"{row['measured_peak_bytes'] / plain:.3f}, {_percent(row['measured_extra_time'])} (+{percent})"


def _question(key: tuple[str, str, str], answers: dict[str, dict]) -> list[str]:
    auto = answers["auto"]
    others = [row for solver, row in answers.items() if solver != "auto" and row["extra_time"] is not None]
    best = min(others, key=lambda row: row["extra_time"], default=None)
    cells = [f"{auto['seconds']:.1f}", best["solver"] if best else "", f"{100 * best['extra_time']:.2f}" if best else ""]
    if auto["extra_time"] is None:
        return [*key, auto["outcome"], "", "", *cells]
    return [*key, f"{100 * auto['extra_time']:.2f}", f"{100 * auto['bound']:.2f}", f"{auto['peak_fraction']:.3f}", *cells]


def _promises(results: Results) -> str:
    """What the planned rows say of budgets, predictions and equality."""
    rows = [row for row in results.rows if row.method == "fxmem" and row.is_ok]
    within = sum(row.budget_bytes is None or row.peak_bytes <= row.budget_bytes for row in rows)
    equal = sum(bool(row.equal_outputs and row.equal_gradients and row.equal_buffers) for row in rows)
    apart = max((abs(row.predicted_peak_bytes / row.peak_bytes - 1) for row in rows), default=0.0)
    return (
        f"Of {len(rows)} planned steps, {within} stay within their budget, and {equal} leave outputs, gradients and buffers "
        f"bitwise equal to the plain module's; predicted and measured peaks differ by {100 * apart:.2f} % at most."
    )


def _readme_row(results: Results, model: str) -> list[str]:
    budgets = [r for r in results.rows if (r.model, r.method) == (model, "activation_memory_budget") and r.is_ok]
    least = min(budgets, key=lambda r: r.peak_bytes, default=None)
    cells = [
        results.find(model, "fxmem", "0.5"),
        results.find(model, "fxmem", "min"),
        results.find(model, "checkpoint", "per block"),
        results.find(model, "fxmem", "checkpoint's peak"),
        least,
    ]
    plain = results.find(model, "plain")
    return [model, _megabytes(plain.peak_bytes) if plain else "", *map(_cell, cells)]


def _cell(row: Row | None) -> str:
    """Peak and extra time; says so where the gradients are wrong by more than rounding."""
    if row is None or not row.is_ok:
        return "" if row is None else row.outcome.split(":")[0]
    wrong = ", wrong gradients" if row.gradient_difference > 1e-2 else ""
    return f"{_megabytes(row.peak_bytes)}, {_percent(row.overhead)} %{wrong}"


def _caption(results: Results) -> str:
    return f"{results.device}, PyTorch {results.torch}, {results.threads} threads:"


def _markdown(caption: str, titles: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)] if rows else ["Not run yet."]
    return "\n".join([caption, "", *lines])


def _numbers(row: Row) -> list[str]:
    return [
        _megabytes(row.budget_bytes),
        _megabytes(row.predicted_peak_bytes),
        _megabytes(row.peak_bytes),
        _megabytes(row.peak_bytes - row.before_bytes),
        _percent(row.predicted_overhead),
        _percent(row.overhead),
        f"{row.time_s:.3f}",
        "" if row.plan_time_s is None else f"{row.plan_time_s:.1f}",
        f"{row.gradient_difference:.0e}" if row.gradient_difference else "0",
        _bitwise(row),
    ]


def _empty(row: Row) -> list[str]:
    return [row.outcome, *[""] * (len(COLUMNS) - 4)]


def _bitwise(row: Row) -> str:
    parts = {"outputs": row.equal_outputs, "gradients": row.equal_gradients, "buffers": row.equal_buffers}
    differ = [name for name, equal in parts.items() if not equal]
    return "equal" if not differ else f"other {', '.join(differ)}"


def _megabytes(size_bytes: int | None) -> str:
    return "" if size_bytes is None else f"{size_bytes / 1e6:.1f}"


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:+.1f}"


def _aligned(cells: list[str]) -> str:
    columns = zip(cells, COLUMNS, strict=False)
    return " ".join(f"{cell:{'<' if title in TEXTS else '>'}{width}}" for cell, (title, width) in columns).rstrip()
