"""x * scale + shift, written out: BatchNorms that never reach the graph under their name.

Three spellings that real model files have: a BatchNorm without gamma and beta followed by a
separate scale layer (Caffe), a scale and a bias worked out in advance (Detectron's AffineChannel),
and statistics turned into a scale in every forward (torchvision's FrozenBatchNorm2d).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.blocks import Residual, classifier
from models.statistics import PerChannel, Statistics


class ScaleLayer(PerChannel):
    """Caffe's Scale: multiplies by a parameter ``(C, 1, 1)`` and adds another."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def take(self, drawn: Statistics) -> None:
        self.weight.copy_(drawn.gamma[:, None, None])
        self.bias.copy_(drawn.beta[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class AffineChannel(PerChannel):
    """Detectron's frozen BatchNorm: scale and bias are buffers ``(1, C, 1, 1)``."""

    scale: Tensor
    bias: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("scale", torch.ones(1, channels, 1, 1))
        self.register_buffer("bias", torch.zeros(1, channels, 1, 1))

    def take(self, drawn: Statistics) -> None:
        scale = drawn.gamma / (drawn.variance + self.eps).sqrt()
        self.scale.copy_(scale[None, :, None, None])
        self.bias.copy_((drawn.beta - drawn.mean * scale)[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.bias


class FrozenBatchNorm(PerChannel):
    """Torchvision's frozen BatchNorm: four buffers ``(C,)``, made a scale in each forward."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def take(self, drawn: Statistics) -> None:
        self.weight.copy_(drawn.gamma)
        self.bias.copy_(drawn.beta)
        self.running_mean.copy_(drawn.mean)
        self.running_var.copy_(drawn.variance)

    def forward(self, x: Tensor) -> Tensor:
        gamma, beta = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        mean = self.running_mean.reshape(1, -1, 1, 1)
        scale = gamma * (self.running_var.reshape(1, -1, 1, 1) + self.eps).rsqrt()
        return x * scale + (beta - mean * scale)


class CaffeNorm(nn.Sequential):
    """A BatchNorm without gamma and beta, then a Scale layer."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels, affine=False), ScaleLayer(channels))


def caffe() -> nn.Module:
    """A small residual net normalised the way of Caffe: BatchNormalization, Mul, Add."""
    return _net(CaffeNorm)


def frozen_buffers() -> nn.Module:
    """The same net with AffineChannels: Mul, Add."""
    return _net(AffineChannel)


def frozen_statistics() -> nn.Module:
    """The same net with FrozenBatchNorms: the scale is computed in the graph."""
    return _net(FrozenBatchNorm)


def _net(norm: type[nn.Module]) -> nn.Module:
    def unit(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(conv, norm(outputs))

    strided = nn.Sequential(unit(16, 32, stride=2), nn.ReLU(), unit(32, 32))
    return nn.Sequential(
        unit(3, 16, stride=2),
        nn.ReLU(),
        Residual(nn.Sequential(unit(16, 16), nn.ReLU(), unit(16, 16)), activation=nn.ReLU()),
        Residual(strided, unit(16, 32, kernel=1, stride=2), nn.ReLU()),
        classifier(32),
    )
