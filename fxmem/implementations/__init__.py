"""Other ways to run operators, which keep something else for the backward: one family a file.

An implementation looks at one backward node and offers a `Choice`: another operator in its place, and, where that reads
something that the graph does not hold, what makes it in the forward; or at one node of the forward, and offers other ways to
make it again. The solver chooses, node by node, together with what is kept and recomputed. Or it offers a `Rewrite`: one
operator for a part of forward and backward together; then the step is planned both ways, and the better plan is taken. Every
module of this package is imported here, so a new family is one new file.
"""

import importlib
import pkgutil

from .base import (
    CODE,
    IMPLEMENTATIONS,
    Call,
    Choice,
    Guard,
    Implementation,
    Result,
    Rewrite,
    choose_implementations,
    register_implementation,
)

__all__ = [
    "CODE", "IMPLEMENTATIONS", "Call", "Choice", "Guard", "Implementation", "Result", "Rewrite", "choose_implementations",
    "register_implementation",
]  # fmt: skip

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
