"""What fxmem is doing, shown by rich while it takes: one line on stderr, gone when it is over.

Quiet where stderr is no terminal, where rich is not installed, and where somebody else's live display is on. Each phase also
goes to the log, at INFO. What takes long calls `phase` and `detail`; whoever called `showing` decides whether they are seen.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar

log = logging.getLogger(__name__)

_show: ContextVar[Callable[[str], None] | None] = ContextVar("_show", default=None)
_phase: ContextVar[str] = ContextVar("_phase", default="")


@contextlib.contextmanager
def showing(wanted: bool | None = None) -> Iterator[None]:
    """Inside, phases and details are shown. wanted: False for never; otherwise where stderr is a terminal."""
    status = None if wanted is False or not sys.stderr.isatty() else _status()
    if status is None:
        yield
        return
    token = _show.set(status.update)
    try:
        yield
    finally:
        _show.reset(token)
        status.stop()


def phase(name: str) -> None:
    """A new phase begins: "capturing", say."""
    log.info("%s", name)
    _phase.set(name)
    detail("")


def detail(text: str) -> None:
    """How far the phase is: "extra time 3.1 %", say."""
    show = _show.get()
    if show is not None:
        show(": ".join(part for part in (f"fxmem is {_phase.get()}", text) if part))


def _status():
    """A line that moves, started; None where there can be none."""
    try:
        from rich.console import Console
        from rich.errors import LiveError
    except ModuleNotFoundError:
        return None
    status = Console(stderr=True).status("fxmem")
    try:
        status.start()
    except LiveError:
        return None
    return status
