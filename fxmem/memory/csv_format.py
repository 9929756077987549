"""MiniMalloc's CSV (google/minimalloc): a row for each buffer, the columns id, lower, upper and size, in any order.

A column `alignment` is optional, `offset` is a solution's. Older files have a column `end`, for the last moment alive in some
and for the one after it in others, so these are refused; so are `gaps` in a life.
"""

from __future__ import annotations

import contextlib
import csv
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TextIO

from ..errors import OffsetError
from .intervals import Interval, check_intervals

COLUMNS = ("id", "lower", "upper", "size")
OPTIONAL = ("alignment", "offset")
Path = str | os.PathLike[str]


def read_csv(path: Path) -> tuple[Interval, ...]:
    """The intervals of a file, with or without a solution. Raises OffsetError, with the line, where it does not parse."""
    intervals = []
    for line, row in _rows(path):
        numbers = {name: _integer(path, line, name, text) for name, text in row.items() if name != "id"}
        span = numbers["lower"], numbers["upper"]
        intervals.append(Interval(row["id"], *span, numbers["size"], numbers.get("alignment", 1)))
        try:
            check_intervals(intervals[-1:])
        except OffsetError as error:
            raise OffsetError(f"{os.fspath(path)}, line {line}: {error}") from None
    check_intervals(intervals)
    return tuple(intervals)


def read_offsets(path: Path) -> tuple[int, ...]:
    """The offsets of a file with a solution, in the order of `read_csv`."""
    offsets = []
    for line, row in _rows(path):
        if "offset" not in row:
            raise OffsetError(f"{os.fspath(path)} has no column 'offset': it holds no solution")
        offsets.append(_integer(path, line, "offset", row["offset"]))
    return tuple(offsets)


def write_csv(path: Path, intervals: Sequence[Interval], offsets: Sequence[int] | None = None) -> None:
    """Write intervals, and their offsets where they are given, as MiniMalloc reads and writes them. Raises OffsetError."""
    check_intervals(intervals)
    if offsets is not None and len(offsets) != len(intervals):
        raise OffsetError(f"{len(offsets)} offsets were given for {len(intervals)} intervals; each needs one")
    aligned = any(v.alignment > 1 for v in intervals)
    columns: dict[str, Sequence] = {
        "id": [v.id for v in intervals],
        "lower": [v.begin for v in intervals],
        "upper": [v.end for v in intervals],
        "size": [v.size_bytes for v in intervals],
    }
    if aligned:
        columns["alignment"] = [v.alignment for v in intervals]
    if offsets is not None:
        columns["offset"] = offsets
    try:
        with pathlib.Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
    except OSError as error:
        raise OffsetError(f"{os.fspath(path)} cannot be written: {error.strerror}") from error


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row's line in the file, and its fields by column."""
    with _reading(path) as file:
        reader = csv.reader(file)
        names = [name.strip() for name in next(reader, [])]
        _check_columns(path, names)
        for fields in reader:
            if len(fields) not in (0, len(names)):
                raise OffsetError(
                    f"{os.fspath(path)}, line {reader.line_num}: {len(fields)} fields, {','.join(fields)!r}, for the "
                    f"{len(names)} columns {', '.join(names)}"
                )
            if fields:
                yield reader.line_num, dict(zip(names, (f.strip() for f in fields), strict=True))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[TextIO]:
    try:
        with pathlib.Path(path).open(newline="", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise OffsetError(f"{os.fspath(path)} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise OffsetError(f"{os.fspath(path)} is no CSV: {error}") from error


def _check_columns(path: Path, names: list[str]) -> None:
    unknown = [n for n in names if n not in (*COLUMNS, *OPTIONAL)]
    missing = [c for c in COLUMNS if c not in names]
    if unknown or missing or len(set(names)) < len(names):
        raise OffsetError(
            f"{os.fspath(path)}, line 1: columns {', '.join(names) or 'none'}; needed, once each: {', '.join(COLUMNS)}; "
            f"optional: {', '.join(OPTIONAL)}"
        )


def _integer(path: Path, line: int, name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise OffsetError(f"{os.fspath(path)}, line {line}: {name} is {text!r}, which is no integer") from None
