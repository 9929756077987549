"""Small modules that each implementation applies to: for tests, and for the table of what each of them does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Between(nn.Module):
    """A layer between two that need gradients, its input scaled so that every case occurs; norms' weights are not one, so that
    it shows in which order products are taken."""

    def __init__(self, *layers: nn.Module, channels: int = 4):
        super().__init__()
        self.before, self.layers = nn.Conv2d(3, channels, 3, padding=1), nn.Sequential(*layers)
        for weight in (p for p in self.layers.parameters() if p.dim() == 1):
            nn.init.uniform_(weight, 0.5, 1.5)

    def forward(self, x):
        return self.layers(4 * self.before(x)) * 2


def with_fixed_weight(norm: nn.Module) -> nn.Module:
    norm.weight.requires_grad_(False)
    return norm


class RowNorm(nn.Module):
    """Over rows of any length, without weights."""

    def __init__(self, norm: Callable = nn.functional.layer_norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x, x.shape[-1:])


class OfPixels(nn.Module):
    """A norm over the channels of every pixel, which come to lie side by side."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm
        nn.init.uniform_(norm.weight, 0.5, 1.5)

    def forward(self, x):
        return self.norm(x.movedim(1, -1).contiguous())


class RMSNorm(nn.Module):
    """Over rows of any length, by operators as models write it, in float32; a weight for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0, 2, channels).view(channels, 1))

    def forward(self, x):
        wide = x.float() if x.dtype is torch.bfloat16 else x
        made = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * made.to(x.dtype)


class CrossEntropy(nn.Module):
    """Of a linear layer over the channels of every pixel; some rows are ignored."""

    def __init__(self, channels: int = 4, classes: int = 30):
        super().__init__()
        self.head = nn.Linear(channels, classes)

    def forward(self, x):
        logits = self.head(x.movedim(1, -1).flatten(0, -2))
        classes = torch.arange(len(logits), device=x.device).remainder(logits.shape[1])
        return nn.functional.cross_entropy(logits, classes.where(classes > 0, -100))


class TiedHead(nn.Module):
    """Rows of a table are added to the pixels, and these multiplied by the same table."""

    def __init__(self, width: int = 16, rows: int = 800):
        super().__init__()
        self.table = nn.Embedding(rows, width, padding_idx=2)

    def forward(self, x):
        pixels = x.movedim(1, -1).flatten(0, -2)
        indices = torch.arange(len(pixels), device=x.device).remainder(7)
        return (pixels + self.table(indices)) @ self.table.weight.t()


class Residual(nn.Module):
    """What a residual block does between two convolutions; its values are read in the backward, not their signs alone."""

    def __init__(self, channels: int):
        super().__init__()
        self.one, self.two = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(self.two(x.clamp(-3, 3)) + torch.relu(self.one(x))) * x


class Dense(nn.Module):
    """Layers that read all that is before them, and activations that are joined."""

    def __init__(self, channels: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels * n) for n in (1, 2, 3))
        self.layers = nn.ModuleList(nn.Conv2d(channels * n, channels, 3, padding=1) for n in (1, 2, 3))

    def forward(self, x):
        found = [torch.relu(x)]
        for norm, layer, act in zip(self.norms, self.layers, (torch.sigmoid, torch.tanh, torch.relu), strict=True):
            found.append(act(layer(norm(torch.cat(found, 1)))))
        return torch.cat([*found, x], 1)


class Upsampled(nn.Module):
    """What a U-Net joins: a skip, and what comes up from half of its size."""

    def __init__(self, channels: int, kernel: int = 3, bias: bool = True):
        super().__init__()
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.joined = nn.Conv2d(2 * channels, channels, kernel, padding=kernel // 2, bias=bias)

    def forward(self, x):
        return self.joined(torch.cat([torch.sigmoid(x), torch.tanh(self.up(torch.tanh(self.down(x))))], 1))


CASES: dict[str, Callable[[], nn.Module]] = {
    "layer_norm_output": lambda: Between(nn.Tanh(), OfPixels(nn.LayerNorm(4)), nn.SiLU(), RowNorm(), nn.SiLU()),
    "group_norm_output": lambda: Between(
        nn.Tanh(), nn.GroupNorm(2, 4, affine=False), nn.SiLU(), with_fixed_weight(nn.GroupNorm(2, 4)), nn.SiLU()
    ),
    "batch_norm_output": lambda: Between(
        nn.Tanh(),
        nn.BatchNorm2d(4, affine=False),
        nn.SiLU(),
        nn.InstanceNorm2d(4),
        with_fixed_weight(nn.BatchNorm2d(4)),
        nn.SiLU(),
    ),
    "rms_norm_input": lambda: Between(nn.Flatten(2), RowNorm(nn.functional.rms_norm), nn.Tanh(), RMSNorm(4), nn.SiLU()),
    "rms_norm_output": lambda: Between(
        nn.Flatten(2), RowNorm(nn.functional.rms_norm), nn.Tanh(), RMSNorm(4), nn.SiLU(), OfPixels(nn.RMSNorm(4)), nn.SiLU()
    ),
    "chain": lambda: Between(Residual(8), channels=8),
    "chain_accurate": lambda: Between(nn.GroupNorm(4, 8), nn.SiLU(), nn.Tanh(), RowNorm(), nn.SiLU(), nn.Tanh(), channels=8),
    "cat_activation": lambda: Between(Dense(4), nn.Conv2d(20, 4, 1)),
    "cat_parts": lambda: Between(Dense(4), nn.Conv2d(20, 4, 1)),
    "chunked_cross_entropy": lambda: Between(CrossEntropy()),
    "batch_norm_statistics": lambda: Between(
        nn.Tanh(), nn.BatchNorm2d(4), nn.SiLU(), nn.BatchNorm2d(4, affine=False), nn.SiLU()
    ),
    "batch_norm_slices": lambda: Between(nn.Tanh(), nn.BatchNorm2d(4), nn.SiLU(), nn.BatchNorm2d(4, affine=False), nn.ReLU()),
    "convolution_parts": lambda: Between(Upsampled(8), nn.Tanh(), Upsampled(8, 1, bias=False), channels=8),
    "convolution_transposed": lambda: Between(nn.Conv2d(4, 6, 5, 2, 1), nn.Conv2d(6, 6, 5, padding=1)),
    "convolution_slices": lambda: Between(nn.Conv2d(4, 6, 5, padding=2), nn.Tanh(), nn.Conv2d(6, 3, 5, padding=2, bias=False)),
    "elu_output": lambda: Between(nn.ELU(0.7), nn.SELU(), nn.CELU(1.5)),
    "embedding_rows": lambda: Between(TiedHead(), channels=16),
    "relu_bits": lambda: Between(nn.ReLU()),
    "relu_input": lambda: Between(nn.ReLU()),
    "relu_pooled": lambda: Between(
        nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.AdaptiveMaxPool2d((2, 3)), nn.Conv2d(4, 4, 1)
    ),
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
