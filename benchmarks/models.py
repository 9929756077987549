"""The models that fxmem is measured on: one small function each, which makes the module and the inputs of a training step.

Weights and inputs are random and the same in every process. Shapes are those of the published runs; tests make them smaller.
"""

from __future__ import annotations

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
    return MODELS[name](**sizes).to(device)


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


MODELS: dict[str, Callable[..., Example]] = {
    maker.__name__: maker
    for maker in (hf_resnet50, gpt2, unet2d, resnet50, googlenet, vgg16, mobilenet_v2, densenet121, vit_b_16)
}


def _torchvision(name: str, **options: Any) -> nn.Module:
    return load_torchvision().models.get_model(name, **options).train()


def _images(batch: int, size: int) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)
