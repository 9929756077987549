"""What PyTorch's partitioner decides (`torch.compile`'s `activation_memory_budget`), judged like any other schedule.

It decides on a graph of PyTorch's, not on a Problem: `fxmem.plan` and `fxmem.transform` read its decisions there and hand
them over as starts (see `fxmem.torch_budget`).
"""

from __future__ import annotations

from ..errors import FxmemError
from .base import Answer, Task, judge, register_solver


@register_solver("torch_budget")
def torch_budget(task: Task) -> Answer:
    """The best of the schedules that are given as starts."""
    if not task.starts:
        raise FxmemError(
            "solver='torch_budget' reads what PyTorch's partitioner decides on a module's graph: use it with fxmem.plan or "
            "fxmem.transform, or give its schedules as starts"
        )
    found = judge(task, task.starts)
    return Answer(found and found[0])
