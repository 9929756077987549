"""Planning memory ahead of time, on plain data without torch: offsets in an arena, their check, lives, and sharing."""

from .csv_format import read_csv, read_offsets, write_csv
from .intervals import Interval, MaxLive, max_live
from .offsets import OffsetPlan, plan_offsets
from .verify import verify

__all__ = ["Interval", "MaxLive", "OffsetPlan", "max_live", "plan_offsets", "read_csv", "read_offsets", "verify", "write_csv"]
