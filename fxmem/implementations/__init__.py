"""Other ways to run operators, which keep something else for the backward: one family a file.

An implementation looks at one backward node and offers a `Choice`: another operator in its place, and, where that reads
something that the graph does not hold, what makes it in the forward. The solver chooses, node by node, together with what is
kept and recomputed.

relu       ReLU and leaky ReLU from a bit, from the input, from the output
hardtanh   hardtanh and ReLU6 from a bit, from the output
batch_norm   again from the statistics that are kept
convolution   the input's gradient without the input
max_pool   from the indices alone, from a byte
dropout    the mask as bits
"""

from . import batch_norm, convolution, dropout, hardtanh, max_pool, relu
from .base import CODE, IMPLEMENTATIONS, Call, Choice, Implementation, choose_implementations, register_implementation

__all__ = [
    "CODE", "IMPLEMENTATIONS", "Call", "Choice", "Implementation", "batch_norm", "choose_implementations", "convolution",
    "dropout",
    "hardtanh", "max_pool", "register_implementation", "relu",
]  # fmt: skip
