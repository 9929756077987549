"""The models that fxmem is measured on: one small function each, which makes the module and the inputs of a training step.

Weights and inputs are random and the same in every process. Shapes are those of the published runs; tests make them smaller.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from fxmem.torchvision_models import load_torchvision


@dataclass(frozen=True)
class Example:
    """A module in training mode and what it is called with.

    blocks: class names of the submodules that a user would put under torch.utils.checkpoint one by one; empty where the
        model brings a switch for that itself.
    """

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()

    def to(self, device: str) -> Example:
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (self.args, self.kwargs))
        return Example(self.module.to(device), args, kwargs, self.blocks)


def build(name: str, device: str = "cpu", **sizes: int) -> Example:
    """The example of that name on `device`; `sizes` are the function's own (batch, size, ...)."""
    torch.manual_seed(0)
    return EXAMPLES[name](**sizes).to(device)


def hf_resnet50(batch: int = 8, size: int = 224) -> Example:
    load_torchvision()
    from transformers import ResNetConfig, ResNetForImageClassification

    module = ResNetForImageClassification(ResNetConfig()).train()
    return Example(module, (_images(batch, size),), blocks=("ResNetBottleNeckLayer",))


def gpt2(batch: int = 2, length: int = 512, layers: int = 12) -> Example:
    """Dropout 0.1 in attention, residuals and embeddings; the loss is computed inside."""
    load_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel

    module = GPT2LMHeadModel(GPT2Config(n_layer=layers, use_cache=False)).train()
    ids = torch.randint(module.config.vocab_size, (batch, length))
    return Example(module, (), {"input_ids": ids, "labels": ids})


def gpt2_loss(batch: int = 2, length: int = 512, layers: int = 12) -> Example:
    """`gpt2` that returns the loss alone, as training needs it, so that nobody asks for the logits."""
    whole = gpt2(batch, length, layers)
    return Example(_LossAlone(whole.module), (), whole.kwargs)


class _LossAlone(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels):
        return self.model(input_ids=input_ids, labels=labels).loss


def unet2d(batch: int = 4, size: int = 64) -> Example:
    load_torchvision()
    from diffusers import UNet2DModel

    module = UNet2DModel(
        sample_size=size,
        block_out_channels=(64, 128, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    return Example(module.train(), (_images(batch, size), torch.randint(1000, (batch,))))


def resnet50(batch: int = 8, size: int = 224) -> Example:
    return Example(_torchvision("resnet50"), (_images(batch, size),), blocks=("Bottleneck",))


def googlenet(batch: int = 8, size: int = 224) -> Example:
    """With its two auxiliary classifiers: three outputs in a named tuple."""
    module = _torchvision("googlenet", aux_logits=True, init_weights=True)
    return Example(module, (_images(batch, size),), blocks=("Inception",))


def vgg16(batch: int = 8, size: int = 224) -> Example:
    """No blocks of its own: the Sequential of its features is what is cut."""
    return Example(_torchvision("vgg16"), (_images(batch, size),), blocks=("Sequential",))


def mobilenet_v2(batch: int = 8, size: int = 224) -> Example:
    return Example(_torchvision("mobilenet_v2"), (_images(batch, size),), blocks=("InvertedResidual",))


def densenet121(batch: int = 8, size: int = 224) -> Example:
    return Example(_torchvision("densenet121"), (_images(batch, size),))


def vit_b_16(batch: int = 8, size: int = 224) -> Example:
    return Example(_torchvision("vit_b_16", image_size=size), (_images(batch, size),), blocks=("EncoderBlock",))


def swin_t(batch: int = 16, size: int = 224) -> Example:
    return Example(_torchvision("swin_t"), (_images(batch, size),), blocks=("SwinTransformerBlock",))


def unet(batch: int = 11, height: int = 416, width: int = 608) -> Example:
    """Ronneberger et al. 2015 with padded convolutions, batch norm and bilinear upsampling."""
    return Example(UNet(), (torch.randn(batch, 3, height, width),), blocks=("_TwoConvolutions",))


def lstm_cells(batch: int = 256, steps: int = 64, width: int = 512) -> Example:
    """An LSTM unrolled over its steps, in plain cells."""
    return Example(UnrolledLSTM(width, steps), (torch.randn(batch, steps, width),))


def cifar_resnet(batch: int = 128, depth: int = 164) -> Example:
    """He et al. 2016 (arXiv 1603.05027) for images of 32 x 32: depth = 9 n + 2, in three stages of n bottlenecks."""
    return Example(CifarResNet((depth - 2) // 9), (_images(batch, 32),), blocks=("_Bottleneck",))


class CifarResNet(nn.Sequential):
    """Bottlenecks that normalize before they convolve."""

    def __init__(self, blocks: int, classes: int = 10):
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
        now = 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for k in range(blocks):
                layers.append(_Bottleneck(now, width, stride if k == 0 else 1))
                now = 4 * width
        head = (nn.BatchNorm2d(now), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(now, classes))
        super().__init__(*layers, *head)


class _Bottleneck(nn.Module):
    def __init__(self, source: int, width: int, stride: int):
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(source), nn.ReLU())
        self.rest = nn.Sequential(
            nn.Conv2d(source, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False),
        )  # fmt: skip
        self.shortcut = nn.Conv2d(source, 4 * width, 1, stride, bias=False) if source != 4 * width else None

    def forward(self, x):
        y = self.first(x)
        return self.rest(y) + (x if self.shortcut is None else self.shortcut(y))


class UNet(nn.Module):
    """Four levels down and up again, with a skip at each."""

    def __init__(self, channels: tuple[int, ...] = (64, 128, 256, 512, 512), classes: int = 2):
        super().__init__()
        skips, now = channels[:-1], channels[-1]
        self.stem = _TwoConvolutions(3, channels[0])
        self.down = nn.ModuleList(_TwoConvolutions(a, b) for a, b in itertools.pairwise(channels))
        self.pool, self.grow = nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.up = nn.ModuleList()
        for skip in reversed(skips):
            self.up.append(_TwoConvolutions(now + skip, now := max(skip // 2, channels[0])))
        self.head = nn.Conv2d(channels[0], classes, 1)

    def forward(self, x):
        levels = [self.stem(x)]
        for block in self.down:
            levels.append(block(self.pool(levels[-1])))
        x = levels.pop()
        for block in self.up:
            x = block(torch.cat([levels.pop(), self.grow(x)], 1))
        return self.head(x)


class _TwoConvolutions(nn.Sequential):
    def __init__(self, source: int, target: int):
        super().__init__(
            nn.Conv2d(source, target, 3, padding=1), nn.BatchNorm2d(target), nn.ReLU(inplace=True),
            nn.Conv2d(target, target, 3, padding=1), nn.BatchNorm2d(target), nn.ReLU(inplace=True),
        )  # fmt: skip


class UnrolledLSTM(nn.Module):
    def __init__(self, width: int, steps: int, classes: int = 10):
        super().__init__()
        self.steps, self.cell, self.head = steps, nn.LSTMCell(width, width), nn.Linear(width, classes)

    def forward(self, x):
        h = c = x.new_zeros(x.shape[0], x.shape[2])
        for t in range(self.steps):
            h, c = self.cell(x[:, t], (h, c))
        return self.head(h)


def on_meta(make: Callable[..., Example], **sizes: int) -> Callable[[], Example]:
    """An example without bytes: shapes alone."""

    def build_it() -> Example:
        with torch.device("meta"):
            return make(**sizes).to("meta")

    return build_it


MODELS: dict[str, Callable[..., Example]] = {
    maker.__name__: maker
    for maker in (hf_resnet50, gpt2, unet2d, resnet50, googlenet, vgg16, mobilenet_v2, densenet121, vit_b_16)
}

EXAMPLES = MODELS | {"unet": functools.partial(unet, batch=1), "gpt2_loss": gpt2_loss}

SOLVER_MODELS: dict[str, Callable[[], Example]] = {  # the first five in MONeT's batches
    "resnet50": on_meta(resnet50, batch=184),
    "googlenet": on_meta(googlenet, batch=320),
    "unet": on_meta(unet),
    "mobilenet_v2": on_meta(mobilenet_v2, batch=272),
    "vgg16": on_meta(vgg16, batch=176),
    "densenet121": on_meta(densenet121, batch=32),
    "vit_b_16": on_meta(vit_b_16, batch=32),
    "swin_t": on_meta(swin_t),
    "gpt2_12": on_meta(gpt2, batch=8),
    "gpt2_48": on_meta(gpt2, batch=8, layers=48),
    "gpt2_96": on_meta(gpt2, batch=8, layers=96),
    "unet2d": on_meta(unet2d),
    "lstm_cells": on_meta(lstm_cells),
}


def _torchvision(name: str, **options: Any) -> nn.Module:
    return load_torchvision().models.get_model(name, **options).train()


def _images(batch: int, size: int) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)
