"""Small models that hold what real ones do: dropout, batch norm, tied weights, skips, recurrences, structured outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


class ConvNet(nn.Module):
    """Convolutions, batch norm in training, relu in place, pooling, dropout."""

    def __init__(self, width: int = 8, blocks: int = 2):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Dropout(0.2)
            )
            for _ in range(blocks)
        )
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.pool(x).mean((2, 3)))


class Block(nn.Module):
    """A transformer block with dropout in and after its attention."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(0.1))

    def forward(self, x):
        batch, length, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = F.dropout(((q @ k.transpose(-2, -1)) / 4).softmax(-1), 0.1, self.training)
        x = x + F.dropout(self.proj((weights @ v).transpose(1, 2).reshape(batch, length, dim)), 0.1, self.training)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Integer inputs, tied embeddings, a loss where labels are given."""

    def __init__(self, vocabulary: int = 50, dim: int = 16, layers: int = 1):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(Block(dim, 4) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, labels=None):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class UNet(nn.Module):
    """Skips from the way down to the way up."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Sequential(
            nn.GroupNorm(2, 2 * width), nn.SiLU(), nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.SiLU()
        )
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.out = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.Sigmoid(), nn.Conv2d(width, 3, 1))

    def forward(self, x):
        skip = torch.tanh(self.down1(x))
        y = self.down2(skip)
        y = y + self.middle(y)
        return self.out(torch.cat([F.interpolate(self.up(y), scale_factor=1.0), skip], 1))


class Recurrent(nn.Module):
    """A gated unit and an LSTM cell, unrolled."""

    def __init__(self, dim: int = 8):
        super().__init__()
        self.gates, self.new, self.lstm, self.head = (
            nn.Linear(4 + dim, dim),
            nn.Linear(4, dim),
            nn.LSTMCell(dim, dim),
            nn.Linear(dim, 3),
        )

    def forward(self, x):
        h = x.new_zeros(x.shape[0], self.lstm.hidden_size)
        hx, cx = h, h
        for step in x.unbind(1):
            gate = torch.sigmoid(self.gates(torch.cat([step, h], 1)))
            h = torch.tanh(self.new(step)) * gate + h * (1 - gate)
            hx, cx = self.lstm(h, (hx, cx))
        return self.head(hx), cx


class TwoHeads(nn.Module):
    """Two outputs; the second head's parameters matter to the second output alone."""

    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.first(h), self.second(h)


@dataclass
class Result:
    """A dataclass output, as a user might define one."""

    logits: torch.Tensor
    hidden: torch.Tensor


torch.export.register_dataclass(Result, serialized_type_name="helpers.models.Result")


class ReturnsDataclass(TwoHeads):
    def forward(self, x):
        return Result(*super().forward(x))


class ReturnsDict(TwoHeads):
    """A nested structure with leaves that are no tensors."""

    def forward(self, x):
        a, b = super().forward(x)
        return {"a": a, "more": [b, None, 3, ("name", a.sum())]}


class NestedInputs(nn.Module):
    """Nested inputs, a keyword-only one, and arguments that are no tensors."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, batch, scale: float = 1.0, mode: str = "sum", *, bias=None):
        h = self.lin(batch["x"]) * batch["more"][0] * scale
        h = h if bias is None else h + bias
        return h.tanh().sum(-1) if mode == "sum" else h.tanh().mean(-1)


class Counter(nn.Module):
    """Buffers moved by hand: a counter, and a running mean whose old value the backward needs."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.ones(8))
        self.register_buffer("scratch", torch.zeros(8), persistent=False)

    def forward(self, x):
        h = self.lin(x)
        self.steps.add_(1)
        out = (h * self.average.clone()).tanh()
        with torch.no_grad():
            self.average.mul_(0.9).add_(0.1 * h.mean(0))
            self.scratch.copy_(h[0])
        return (out * self.average).sum(-1)


class SharedNorm(nn.Module):
    """One batch norm, called twice in a step."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        h = torch.relu(self.norm(self.a(x)))
        return torch.relu(self.norm(self.b(h)))


class ReadsStatistics(nn.Module):
    """Computes with the running statistics that its batch norm has just moved."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer, self.last = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(2):
            x = torch.tanh(self.norm(self.layer(x)) * self.norm.running_var.exp())
        return self.last(torch.tanh(x * self.norm.running_mean))


class SumsIntoZeros(nn.Module):
    """Starts from a constant, which reads no argument, before its first layer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x):
        sums = torch.ones(2, 8).exp()
        return sums.index_add(0, torch.arange(x.shape[0]) % 2, self.layers(x)).tanh()


class LossAndLogits(nn.Module):
    """A loss, and what it is the loss of."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        logits = self.layer(x)
        return {"loss": logits.square().mean(), "logits": logits}
