"""The device table of the roofline: what a machine can do at best, and what share of it operators reach.

Peaks are the vendors' dense figures. `efficiency` and `bandwidth_efficiency` are the usual 0.7 to 0.8 of them that large
kernels reach; V100's come to the 0.7 x 15 TFLOP/s, 0.7 TB/s and 3 microseconds that rematerialization papers plan with,
P100's peaks are those of MONeT's experiments (Shah et al., 2020).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ..errors import CostError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """Peak rates of a device.

    fp32, tf32, half: FLOP/s of matrix work in fp32, in TF32, and in bf16 or fp16.
    bandwidth: bytes/s of device memory. launch_s: seconds that even an empty operator takes.
    """

    name: str
    fp32: float
    tf32: float
    half: float
    bandwidth: float
    launch_s: float = 3e-6
    efficiency: float = 0.7
    bandwidth_efficiency: float = 0.78

    def flops_per_s(self, dtype: torch.dtype, *, convolution: bool = False) -> float:
        """Attainable FLOP/s for `dtype`: TF32 where PyTorch's settings allow it (convolutions by default, matmul not)."""
        if dtype in (torch.float16, torch.bfloat16):
            peak = self.half
        elif dtype in (torch.float64, torch.complex128):
            peak = self.fp32 / 2
        else:
            allowed = torch.backends.cudnn.allow_tf32 if convolution else torch.get_float32_matmul_precision() != "highest"
            peak = self.tf32 if allowed else self.fp32
        return peak * self.efficiency

    @property
    def bytes_per_s(self) -> float:
        """Attainable bytes/s."""
        return self.bandwidth * self.bandwidth_efficiency


TERA = 1e12
DEVICES = {
    "P100": Device("P100", fp32=9.3 * TERA, tf32=9.3 * TERA, half=18.7 * TERA, bandwidth=0.732 * TERA),
    "V100": Device("V100", fp32=15 * TERA, tf32=15 * TERA, half=120 * TERA, bandwidth=0.9 * TERA),
    "A100": Device("A100", fp32=19.5 * TERA, tf32=156 * TERA, half=312 * TERA, bandwidth=2.0 * TERA),
    "H100": Device("H100", fp32=67 * TERA, tf32=495 * TERA, half=989 * TERA, bandwidth=3.35 * TERA),
    "H200": Device("H200", fp32=67 * TERA, tf32=495 * TERA, half=989 * TERA, bandwidth=4.8 * TERA),
}
DEVICE_NAMES = (*DEVICES, "cpu")

CORE_FLOPS_PER_S = 120e9  # one core with 256 to 512 bit fused multiply-add near 3 GHz
CPU_BANDWIDTH = 12e9  # fresh pages are faulted in at every large allocation, which halves what the memory itself can do


def device_table(name: str) -> Device:
    """The table row called `name`; "cpu" is scaled by the number of threads that torch uses now.

    Raises CostError, listing the rows, for a name that is not there.
    """
    if name == "cpu":
        peak = CORE_FLOPS_PER_S * torch.get_num_threads()
        return Device("cpu", fp32=peak, tf32=peak, half=peak, bandwidth=CPU_BANDWIDTH, launch_s=5e-6)
    if name not in DEVICES:
        raise CostError(f"unknown device {name!r}; the table has {', '.join(DEVICE_NAMES)}")
    return DEVICES[name]


def row_for(device: torch.device) -> str:
    """The table row of the device at hand; H100, with a warning, for a GPU that the table does not have."""
    if device.type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no GPU at hand"
    row = next((known for known in DEVICES if known in name), None)
    if row is None:
        log.warning("the device table has no row for %r; planning with H100's", name)
    return row or "H100"
