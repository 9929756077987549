"""What shows while planning takes: phases and details in a terminal, the log, and silence elsewhere."""

import contextlib
import io
import logging
import sys

import pytest
import torch
from helpers.models import ConvNet
from rich.console import Console
from rich.status import Status

import fxmem
from fxmem.progress import detail, phase, showing
from fxmem.schedule import plain_schedule, simulate
from fxmem.solvers import solve


class Terminal(io.StringIO):
    def isatty(self):
        return True


@contextlib.contextmanager
def terminal():
    """A terminal in the place of stderr; pytest has its own in a fixture's place."""
    with contextlib.redirect_stderr(Terminal()) as shown:
        yield shown


@pytest.fixture(autouse=True)
def xterm(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")


def plan(**options):
    return fxmem.plan(ConvNet(), (torch.randn(2, 3, 16, 16),), budget="min", cost="V100", time_limit_s=0.2, **options)


def test_shown_in_a_terminal():
    with terminal() as shown, showing():
        phase("counting")
        detail("3 of 7")
    assert "fxmem is counting: 3 of 7" in shown.getvalue()


def test_planning_shows_and_cleans_up():
    with terminal() as shown:
        plan()
        assert "fxmem is" in shown.getvalue()
        before = shown.getvalue()
        phase("afterwards")
        assert shown.getvalue() == before


def test_quiet_when_asked():
    with terminal() as shown:
        plan(progress=False)
    assert shown.getvalue() == ""


def test_quiet_without_a_terminal(capsys):
    plan(progress=True)
    assert capsys.readouterr() == ("", "")


def test_quiet_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with terminal() as shown:
        plan()
    assert shown.getvalue() == ""


def test_beside_somebody_elses_display():
    """Nothing breaks where a live display is on already."""
    with terminal(), Status("training", console=Console(file=io.StringIO(), force_terminal=True)):
        plan()


def test_details_of_the_search():
    """The bound and the gap are told when they are known."""
    told, least = [], plan(progress=False)
    budget_bytes = (least.predicted_peak_bytes + simulate(least.problem, plain_schedule(least.problem)).peak_bytes) // 2
    solve(least.problem, budget_bytes, time_limit_s=2, progress=told.append)
    assert any("no schedule below" in line and "gap" in line for line in told)


def test_phases_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="fxmem"):
        plan()
    assert [r.message for r in caplog.records if r.name == "fxmem.progress"] == ["capturing", "preparing", "solving"]
