"""What people read and see of a plan: the account, the pictures, the snapshot."""

import io
import itertools
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import matplotlib
import pytest
import torch
from helpers.models import ConvNet, LossAndLogits
from matplotlib import pyplot
from rich.console import Console

import fxmem
from benchmarks.models import gpt2, on_meta, resnet50
from fxmem.errors import FxmemError, MissingExtraError, PlanError
from fxmem.planning import none_better
from fxmem.problem import Operator, Problem, Storage
from fxmem.report.account import Account, Table, account_of_plan
from fxmem.report.axes import title_of
from fxmem.report.replay import bytes_by_kind, chosen_implementations, is_recompute, shares_by_module, step_times_s
from fxmem.report.snapshot import snapshot_of
from fxmem.report.summary import WIDTH, as_text
from fxmem.schedule import Schedule, plain_schedule, simulate
from fxmem.torch_internals import memory_viz
from fxmem.units import format_bytes, format_percent, format_seconds

matplotlib.use("Agg")
FAST = {"cost": "V100", "time_limit_s": 0.5}


@pytest.fixture(scope="module")
def plan():
    return fxmem.plan(ConvNet(), (torch.randn(8, 3, 16, 16),), budget="min", **FAST)


@pytest.fixture(scope="module")
def large():
    """ResNet-50 and GPT-2, planned by a peer that takes no time."""
    image, text = on_meta(resnet50, batch=8, size=128)(), on_meta(gpt2, batch=4, length=256, layers=3)()
    rotor = {"cost": "V100", "implementations": (), "solver": "rotor", "time_limit_s": 1.0}
    return [fxmem.plan(e.module, e.args, e.kwargs, budget=b, **rotor) for e, b in ((image, 0.75), (text, 0.92))]


def chain() -> tuple[Problem, Schedule]:
    """x -> a -> b -> gradients, with a made again, an encoder of a, and an alternative that reads what it makes."""
    storages = tuple(
        Storage(name, size, kind)
        for name, size, kind in (
            ("x", 10, "input"), ("a", 4, "activation"), ("b", 8, "activation"), ("gb", 8, "gradient"), ("ga", 4, "gradient"),
            ("bits", 1, "activation"),
        )
    )  # fmt: skip
    operators = (
        Operator("a", (0,), (1,), 1.0, module="first", source="net.py:3"),
        Operator("b", (1,), (2,), 2.0, module="second"),
        Operator("gb", (2,), (3,), 4.0),
        Operator("ga", (1, 3), (4,), 8.0, workspace_bytes=3),
        Operator("bits", (1,), (5,), 0.25, module="second", implementation="sign_bits"),
        Operator("gb_bits", (5,), (3,), 4.5, module="second", implementation="sign_bits", replaces=2),
    )
    return Problem(storages, operators, 2, 4, frozenset({4})), Schedule((0, 4, 1, 5, 0, 3))


def test_replay():
    problem, schedule = chain()
    timeline = simulate(problem, schedule)
    assert step_times_s(problem, schedule) == [1.0, 0.25, 2.0, 4.5, 1.0, 8.0]
    assert sum(step_times_s(problem, schedule)) == timeline.time_s == 16.75
    assert is_recompute(problem, schedule) == [False, False, False, False, True, False]
    kinds = bytes_by_kind(problem, schedule, timeline)
    assert kinds["activation"] == [4, 5, 13, 1, 4, 4] and kinds["gradient"] == [0, 0, 0, 8, 8, 12]
    assert kinds["input"] == [10] * 6 and kinds["workspace"] == [0, 0, 0, 0, 0, 3]
    assert tuple(map(sum, zip(*kinds.values(), strict=True))) == timeline.during_bytes
    shares = shares_by_module(problem, schedule, timeline)
    assert (shares["second"].kept_bytes, shares["first"].recomputed_bytes, shares["first"].recomputed_s) == (1, 4, 1.0)
    chosen = chosen_implementations(problem, schedule, timeline)["sign_bits"]
    assert (chosen.places, chosen.code_bytes, chosen.encoders_s, chosen.slower_s) == (1, 1, 0.25, 0.5)


def test_the_plain_step_adds_up():
    problem, _ = chain()
    assert step_times_s(problem, plain_schedule(problem)) == [1.0, 2.0, 4.0, 8.0]


def test_account(plan):
    account = account_of_plan(plan)
    tables = {table.title.split(",")[0].split(" (")[0]: table for table in itertools.chain.from_iterable(account.tables)}
    assert set(tables) >= {"At the peak", "Largest at the peak", "Kept", "Recomputed"}
    assert [row[0] for row in tables["At the peak"].rows][:3] == ["parameters", "buffers", "inputs"]
    assert [row[2] for row in tables["At the peak"].rows] == [format_bytes(size) for size in plan.peak_by_kind.values()]
    largest = tables["Largest at the peak"].rows
    assert 0 < len(largest) <= 10 and all(row[4].startswith("models.py:") for row in largest)
    assert {row[3] for row in largest} & {"blocks.0.0", "blocks.1.0", "blocks.0.1", "blocks.1.1", "stem", "(root)"}
    assert dict(account.facts)["peak"].startswith(f"{format_bytes(plan.baseline_peak_bytes)} -> ")


@pytest.mark.parametrize(("output_gradients", "said"), [(None, True), ("all", False), ([0], True)])
def test_outputs_that_are_not_counted_are_told_of(output_gradients, said):
    plan = fxmem.plan(LossAndLogits(), (torch.randn(512, 64),), output_gradients=output_gradients, time_limit_s=0.2)
    facts = dict(account_of_plan(plan).facts)
    assert (facts.get("outputs", "").startswith("up to 131.1 KB more")) == said == ("outputs" in facts)


def test_summary_is_one_screen(plan, large):
    for one in (plan, *large):
        lines = str(one).splitlines()
        assert len(lines) <= 50 and max(map(len, lines)) <= WIDTH and one.summary() == str(one)
    assert "resnet.py:" in str(large[0]) and "layer1" in str(large[0]) and "transformer.h." in str(large[1])


def test_no_name_is_too_long():
    """Names lose their beginnings, facts are wrapped, titles cut."""
    name = "encoder." * 20 + "last"
    columns = ("storage", "kind", "size", "module", "line")
    table = Table(name, columns, ((name, "activation", "1,023.9 MB", name, f"{name}.py:12345"),))
    lines = as_text(Account("m", (("found", "one word " * 30),), ((table,), (table, table)))).splitlines()
    assert max(map(len, lines)) <= WIDTH and sum("coder.last" in line for line in lines) == 3
    assert [line[:7] for line in lines[1:4]] == ["found  ", " " * 7, " " * 7]


@pytest.mark.parametrize("words", range(70, 90))
def test_no_number_without_its_unit(words):
    lines = as_text(Account("m", (("found", f"{'x' * words} below 4.3 %; 1.5 GB, 7.9 s to capture"),), ())).splitlines()
    assert all(part in "\n".join(lines) for part in ("4.3 %", "1.5 GB", "7.9 s")) and max(map(len, lines)) <= WIDTH


def test_a_long_title_has_two_lines():
    assert title_of("Net", "peak against time") == "Net: peak against time"
    assert title_of("N" * 45, "peak against time") == "N" * 45 + ":\npeak against time"


def test_rich_and_html_say_the_same(plan):
    console = Console(file=io.StringIO(), width=120)
    console.print(plan)
    shown, page = console.file.getvalue(), plan._repr_html_()
    tables = itertools.chain.from_iterable(account_of_plan(plan).tables)
    for cell in itertools.chain.from_iterable(row for table in tables for row in table.rows):
        assert len(cell) >= 12 or (cell in shown and cell in page)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_seconds(0), "0"),
        (format_seconds(2e-6), "2.0 us"),
        (format_seconds(0.0125), "12.50 ms"),
        (format_seconds(3), "3.00 s"),
        (format_bytes(0), "0 B"),
        (format_bytes(999), "999 B"),
        (format_bytes(1_500), "1.5 KB"),
        (format_bytes(387e6), "387.0 MB"),
        (format_bytes(1_250_000_000), "1.25 GB"),
        (format_bytes(-2e6), "-2.0 MB"),
        (format_percent(0.0749), "7.5 %"),
        (format_percent(0.5, 0), "50 %"),
        (format_percent(-0.123, 2, sign=True), "-12.30 %"),
        (format_percent(0.1, sign=True), "+10.0 %"),
        (format_percent(12), "1,200.0 %"),
    ],
)
def test_units(text, expected):
    assert text == expected


def overlaps(figure) -> list[tuple[str, str]]:
    """Pairs of texts (titles, labels, ticks, annotations, legends) that lie over each other or leave the picture."""
    renderer = figure.canvas.get_renderer()
    boxes = []
    for text in figure.findobj(matplotlib.text.Text):
        box = text.get_window_extent(renderer)
        if text.get_visible() and text.get_text().strip() and box.width and _drawn(text):
            boxes.append((text.get_text(), box.shrunk(0.9, 0.8)))
    cut = [(name, "the edge") for name, b in boxes if min(b.x0, b.y0) < 0 or b.x1 > figure.bbox.x1 or b.y1 > figure.bbox.y1]
    return cut + [(a, b) for (a, p), (b, q) in itertools.combinations(boxes, 2) if p.overlaps(q)]


def _drawn(text) -> bool:
    """Ticks exist beyond the axes' limits, and are not drawn there."""
    axis = [(t, a) for ax in text.figure.axes for a in (ax.xaxis, ax.yaxis) for t in (*a.get_majorticklabels(),) if t is text]
    shown = {id(tick.label1) for ax in text.figure.axes for a in (ax.xaxis, ax.yaxis) for tick in a._update_ticks()}
    return not axis or id(text) in shown


def rendered(axes, path) -> None:
    """Saves the picture, and checks that nothing in it is cut, overlaps, or lacks its words."""
    figure = axes.figure
    figure.savefig(path, dpi=100)
    assert path.read_bytes().startswith(b"\x89PNG") and overlaps(figure) == []
    for each in figure.axes:
        assert each.get_title() and (each.get_xlabel() or each.get_shared_x_axes().get_siblings(each)[1:])
    pyplot.close(figure)


def test_pictures_of_large_models(large, tmp_path):
    for plan in large:
        axes = plan.plot_timeline()
        assert [a.get_ylabel() for a in axes] == [f"memory ({'GB' if plan.baseline_peak_bytes >= 1e9 else 'MB'})"] * 2
        rendered(axes[0], tmp_path / "timeline.png")
        rendered(plan.plot_schedule(), tmp_path / "schedule.png")
        rendered(plan.plot_memory_map(), tmp_path / "memory_map.png")
        rendered(plan.draw(), tmp_path / "graph.png")


def test_timeline_is_the_simulators(plan):
    above, below = plan.plot_timeline()
    heights = [path.vertices[:, 1].max() for collection in below.collections for path in collection.get_paths()]
    assert max(heights) == pytest.approx(plan.predicted_peak_bytes / 1e3)
    assert {line.get_label() for line in (*above.lines, *below.lines)} >= {"plain PyTorch's peak", "budget"}


def test_schedule_marks_every_step(plan):
    axes = plan.plot_schedule()
    marks = [line for line in axes.lines if line.get_marker() == "s"]
    assert sum(len(line.get_xdata()) for line in marks) == len(plan.solution.schedule.steps)
    again = sum(is_recompute(plan.problem, plan.solution.schedule))
    assert again == len(marks[-1].get_xdata()) > 0


def test_graph_of_a_module():
    planned = fxmem.transform(ConvNet(), (torch.randn(2, 3, 16, 16),), budget="min", **FAST)
    axes = planned.draw(module="blocks.0")
    names = {text.get_text() for text in axes.texts}
    assert {"0_convolution", "1_batch_norm", "2_relu"} <= names and not any("stem" in name for name in names)
    assert "in blocks.0" in axes.get_title()
    with pytest.raises(FxmemError, match=r"'no.such'; the outermost modules are: .*blocks.*stem"):
        planned.draw(module="no.such")


@pytest.fixture(scope="module")
def frontier():
    return fxmem.frontier(
        ConvNet(),
        (torch.randn(8, 3, 16, 16),),
        points=4,
        cost="V100",
        time_limit_s=2,
        peers=("chen_sqrt", "rotor", "torch_budget"),
    )


def test_frontier(frontier, tmp_path):
    axes = frontier.plot()
    line = next(line for line in axes.lines if line.get_label() == "fxmem")
    assert list(line.get_ydata()) == [100 * p.predicted_overhead for p in frontier]
    assert {"chen_sqrt", "rotor", "torch_budget", "plain PyTorch's peak"} <= {
        text.get_text() for text in axes.get_legend().texts
    }
    rendered(axes, tmp_path / "frontier.png")
    assert str(frontier).count("\n") == len(frontier) + 2 and "extra time" in frontier._repr_html_()


def test_no_peer_is_better(frontier):
    peers = [peer for plans in frontier.peers.values() for peer in plans]
    assert peers and all(peer.predicted_peak_bytes <= peer.budget_bytes for peer in peers)
    for peer in peers:
        ours = [plan.predicted_overhead for plan in frontier if plan.predicted_peak_bytes <= peer.budget_bytes]
        assert min(ours) <= peer.predicted_overhead + 1e-9


def test_a_better_peer_takes_the_place():
    """Where time was short: within its peak, and no plan twice; what was proven of that peak is still known."""
    names = ("x", "a", "b", "gb", "ga")
    storages = tuple(Storage(name, 10) for name in names)
    operators = (Operator("a", (0,), (1,), 1.0), Operator("b", (1,), (2,), 1.0), Operator("gb", (1, 2), (3,), 1.0))
    problem = Problem(storages, (*operators, Operator("ga", (0, 3), (4,), 1.0)), 2, 4, frozenset({4}))

    def made(steps, peak_bytes, bound=0.0):
        solution = _solution(problem, Schedule(steps))
        timeline = replace(solution.timeline, peak_bytes=peak_bytes)
        return fxmem.Plan(
            "m", peak_bytes, 100, {}, problem, replace(solution, timeline=timeline, lower_bound_overhead=bound), "given", 0.0
        )

    plain, slow, slower = made((0, 1, 2, 3), 90), made((0, 1, 0, 1, 2, 3), 60, 0.2), made((0, 1, 0, 1, 0, 2, 3), 50)
    peer = made((0, 1, 0, 2, 3), 55)
    first, second, third = none_better((plain, slow, slower), [peer])
    assert first is plain and third is slower
    assert (second.predicted_peak_bytes, second.predicted_overhead, second.budget_bytes) == (55, 0.25, 60)
    assert second.lower_bound_overhead == 0.2 and second.status == "within 4.0 % of the bound (stopped by the time limit)"
    best = none_better((plain, slow, slower), [made((0, 1, 0, 2, 3), 45)])
    assert [p.predicted_peak_bytes for p in best] == [90, 45]


def test_unknown_peer():
    with pytest.raises(FxmemError, match="unknown solver 'magic'"):
        fxmem.frontier(ConvNet(), (torch.randn(2, 3, 16, 16),), peers=("magic",))


def test_pictures_name_their_extra(plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingExtraError, match=r"fxmem\[plot\]"):
        plan.plot_schedule()


def test_printing_needs_neither_matplotlib_nor_rich():
    blocked = "import sys; sys.modules['matplotlib'] = sys.modules['rich'] = None; import torch, fxmem; "
    code = blocked + "print(fxmem.plan(torch.nn.Linear(3, 3), (torch.randn(2, 3),), progress=True))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("Linear: nothing recomputed")


def running_peak(trace: list[dict]) -> tuple[int, int]:
    """The most bytes allocated in a snapshot's trace, and those left at its end."""
    live = peak = 0
    for event in trace:
        live += {"alloc": event["size"], "free_completed": -event["size"]}.get(event["action"], 0)
        peak = max(peak, live)
    return peak, live


def test_snapshot_is_the_timeline(plan, large):
    for each in (plan, *large):
        snapshot = snapshot_of(each)
        peak, left = running_peak(snapshot["device_traces"][0])
        assert peak == each.predicted_peak_bytes
        assert left == each.solution.timeline.after_bytes[-1] == snapshot["segments"][0]["allocated_size"]


def test_snapshot_of_every_case():
    """A kept output made twice, pairs in place of unequal sizes, workspaces, and bytes of no storage."""
    storages = tuple(Storage(n, s) for n, s in (("x", 7), ("a", 6), ("b", 2), ("c", 9), ("d", 3)))
    operators = (
        Operator("a", (0,), (1,), 1.0, workspace_bytes=50),
        Operator("b", (1,), (2,), 1.0, inplace=((1, 2),)),
        Operator("c", (2,), (3,), 1.0, inplace=((2, 3),)),
        Operator("d", (0, 3), (4,), 1.0),
    )
    problem = Problem(storages, operators, 3, 4, frozenset({3, 4}), extra_bytes=5)
    schedule = Schedule((0, 1, 2, 0, 1, 2, 3))
    plan = fxmem.Plan("m", None, 1, {}, problem, _solution(problem, schedule), "none", 0.0)
    assert running_peak(snapshot_of(plan)["device_traces"][0])[0] == plan.predicted_peak_bytes


def _solution(problem, schedule):
    from fxmem.solvers import Solution

    return Solution(schedule, simulate(problem, schedule), 0.0, "feasible", "none", 0.0)


def test_torch_reads_the_snapshot(plan, tmp_path):
    """Its own converter, every view that needs no download."""
    plan.save_snapshot(tmp_path / "snapshot.pickle")
    snapshot, viz = pickle.loads((tmp_path / "snapshot.pickle").read_bytes()), memory_viz()
    assert "TOTAL MEM" in viz.trace(snapshot) and "Summary of segments" in viz.segsum(snapshot)
    lines = viz.memory(snapshot, format_flamegraph=lambda text: text)
    assert "active_allocated" in lines and "models.py:" in lines
    assert "Active Memory Timeline" in viz.trace_plot(snapshot)
    plan.save_snapshot(tmp_path / "snapshot.html")
    assert (tmp_path / "snapshot.html").read_text() == viz.trace_plot(snapshot)
    with pytest.raises(PlanError, match="cannot be written"):
        plan.save_snapshot(tmp_path / "snapshot.html" / "snapshot.pickle")


def test_numbers_are_json(plan):
    json.dumps(snapshot_of(plan))
