"""Planning memory ahead of time, on plain data without torch: offsets in an arena, their check, lives, and sharing."""

from .arena import ArenaPlan, Place, plan_arena
from .csv_format import read_csv, read_offsets, write_csv
from .intervals import Interval, MaxLive, max_live
from .lifetimes import Buffer, buffers_of, intervals_of
from .offsets import OffsetPlan, plan_offsets
from .sharing import Sharing, share, sharing_curve
from .verify import verify

__all__ = [
    "ArenaPlan", "Buffer", "Interval", "MaxLive", "OffsetPlan", "Place", "Sharing", "buffers_of", "intervals_of", "max_live",
    "plan_arena", "plan_offsets", "read_csv", "read_offsets", "share", "sharing_curve", "verify", "write_csv",
]  # fmt: skip
