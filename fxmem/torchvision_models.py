"""torchvision, also beside a torch that torchvision's compiled operators do not load with (a CPU-only one, say).

torchvision's import registers fake kernels for its operators nms and qnms, and fails where the compiled library that defines
them did not load. Its models need neither, so it is enough that the two schemas exist.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from .errors import MissingExtraError

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: list[torch.library.Library] = []  # what a Library defines lasts as long as the Library


def load_torchvision() -> ModuleType:
    """Import and return torchvision. Also to be called before transformers, which imports torchvision where it is installed.

    Raises MissingExtraError where torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise MissingExtraError('torchvision is not installed: pip install "fxmem[demo]" brings one that fits') from error
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _library.append(library)
    return importlib.import_module("torchvision")
