"""The default: what suits the problem."""

from __future__ import annotations

from .base import Answer, Task, find_solver, register_solver


@register_solver("auto")
def auto(task: Task) -> Answer:
    """The search."""
    return find_solver("search")(task)
