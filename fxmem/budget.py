"""Budgets as users write them: bytes, "4GiB", a fraction of the plain peak, "min", or None."""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from .errors import BudgetError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
ACCEPTED = (
    'a positive number of bytes (int), a size like "900MiB" or "4GB", a fraction of the plain peak (float, 0 < f <= 1), "min", '
    "or None; or, instead of a budget, max_overhead=0.10 (extra time as a fraction)"
)


@dataclass(frozen=True)
class Budget:
    """What a user asked for: at most one of the first four is set; none of them means that nothing is to be recomputed.

    size_bytes: absolute. fraction: of the plain module's peak. least: the least reachable peak. max_overhead: the least peak
    that costs at most this extra time. at_least_bytes: what a fraction may always take: a last, smaller batch has the room that
    the others have.
    """

    size_bytes: int | None = None
    fraction: float | None = None
    least: bool = False
    max_overhead: float | None = None
    at_least_bytes: int = 0

    @property
    def is_free(self) -> bool:
        """Whether nothing is to be recomputed."""
        return self == Budget()

    def tightness(self, plain_peak_bytes: int) -> float:
        """A number to sort budgets by, the tightest first, so that each plan is a start for the next."""
        if self.is_free:
            return float("inf")
        if self.max_overhead is not None:
            return plain_peak_bytes
        return 0 if self.least else self.resolve(plain_peak_bytes)

    def resolve(self, plain_peak_bytes: int) -> int | None:
        """The budget in bytes, where it is one."""
        return self.size_bytes if self.fraction is None else max(self.at_least_bytes, int(self.fraction * plain_peak_bytes))


def parse_budget(budget: int | float | str | Budget | None, max_overhead: float | None = None) -> Budget:
    """Read a budget. Raises BudgetError, with what was given and the accepted forms, for anything else."""
    if isinstance(budget, Budget):
        return budget
    if max_overhead is not None:
        if budget is not None:
            raise _refusal(f"both budget={budget!r} and max_overhead={max_overhead!r} were given")
        if isinstance(max_overhead, bool) or not isinstance(max_overhead, Real) or not 0 <= max_overhead < float("inf"):
            raise _refusal(f"max_overhead={max_overhead!r} was given; it must be a number, zero or more")
        return Budget(max_overhead=float(max_overhead))
    if budget is None:
        return Budget()
    if isinstance(budget, str):
        return _parse_text(budget)
    if isinstance(budget, Integral) and not isinstance(budget, bool) and budget > 0:
        return Budget(size_bytes=int(budget))
    if isinstance(budget, float) and 0 < budget <= 1:
        return Budget(fraction=budget)
    raise _refusal(f"budget={budget!r} was given")


def budget_from_text(text: str) -> int | float | str | None:
    """A budget as typed on a command line, in the form that `parse_budget` reads: "0.5" is a fraction, "1000" are bytes."""
    if text.strip().lower() == "none":
        return None
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _parse_text(text: str) -> Budget:
    if text.strip().lower() == "min":
        return Budget(least=True)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)\s*", text, re.IGNORECASE)
    size_bytes = float(match[1]) * UNITS[match[2].upper()] if match and match[2].upper() in UNITS else 0.0
    if not 1 <= size_bytes < float("inf"):
        raise _refusal(f"budget={text!r} was given")
    return Budget(size_bytes=int(size_bytes))


def check_time_limit(time_limit_s: Any) -> None:
    """Raise BudgetError for a time limit that is no number of seconds."""
    if isinstance(time_limit_s, bool) or not isinstance(time_limit_s, Real) or not 0 <= time_limit_s < float("inf"):
        raise BudgetError(f"time_limit_s={time_limit_s!r} was given; it must be a finite number of seconds, zero or more")


def _refusal(given: str) -> BudgetError:
    return BudgetError(f"{given}, but a budget is {ACCEPTED}")
