"""Small modules that each implementation applies to: for tests, and for the table of what each of them does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Between(nn.Module):
    """A layer between two that need gradients, its input scaled so that every case occurs."""

    def __init__(self, *layers: nn.Module, channels: int = 4):
        super().__init__()
        self.before, self.layers = nn.Conv2d(3, channels, 3, padding=1), nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(4 * self.before(x)) * 2


CASES: dict[str, Callable[[], nn.Module]] = {
    "batch_norm_statistics": lambda: Between(nn.BatchNorm2d(4), nn.SiLU(), nn.BatchNorm2d(4, affine=False), nn.SiLU()),
    "convolution_transposed": lambda: Between(nn.Conv2d(4, 6, 5, 2, 1), nn.Conv2d(6, 6, 5, padding=1)),
    "relu_bits": lambda: Between(nn.ReLU()),
    "relu_input": lambda: Between(nn.ReLU()),
    "leaky_relu_bits": lambda: Between(nn.LeakyReLU(0.1)),
    "leaky_relu_output": lambda: Between(nn.LeakyReLU(0.1)),
    "hardtanh_bits": lambda: Between(nn.ReLU6(inplace=True), nn.Hardtanh(-2.0, 1.5)),
    "hardtanh_output": lambda: Between(nn.ReLU6(inplace=True), nn.Hardtanh(-2.0, 1.5)),
    "dropout_bits": lambda: Between(nn.Dropout(0.3), nn.Dropout(0.5)),
    "max_pool_indices": lambda: Between(nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2)),
    "max_pool_offsets": lambda: Between(nn.MaxPool2d((3, 2), (1, 2), (1, 0), (2, 1), ceil_mode=True), nn.MaxPool2d(2)),
}


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 3, 10, 12, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
