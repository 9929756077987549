"""Values of frozen dataclasses against their annotations: what a file held may be of any type."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

NUMBERS = {float: (int, float), int: (int,)}  # JSON writes 1.0 and 1 alike


def wrongly_typed(value: Any, hint: Any, name: str) -> Iterator[str]:
    """What of `value`, called `name`, is not what the type `hint` says: "storages[3].size_bytes is '7'; it must be int"."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        found = [list(wrongly_typed(value, one, name)) for one in inner]
        if all(found):
            yield _told(value, hint, name)
    elif is_dataclass(hint) and isinstance(value, hint):
        hints = _hints(hint)
        for field in fields(hint):
            yield from wrongly_typed(getattr(value, field.name), hints[field.name], f"{name}.{field.name}".lstrip("."))
    elif not isinstance(value, NUMBERS.get(hint, origin or hint)) or (isinstance(value, bool) and hint in NUMBERS):
        yield _told(value, hint, name)
    elif origin is dict:
        for key, item in value.items():
            yield from wrongly_typed(key, inner[0], f"a key of {name}")
            yield from wrongly_typed(item, inner[1], f"{name}[{key!r}]")
    elif origin in (tuple, frozenset):
        same = inner[-1] is Ellipsis or origin is frozenset
        if not same and len(value) != len(inner):
            yield _told(value, hint, name)
        for i, item in enumerate(value):
            yield from wrongly_typed(item, inner[0 if same else min(i, len(inner) - 1)], f"{name}[{i}]")


_hints = functools.cache(get_type_hints)


def _told(value: Any, hint: Any, name: str) -> str:
    return f"{name} is {value!r}; it must be {hint.__name__ if isinstance(hint, type) and not get_args(hint) else hint}"
