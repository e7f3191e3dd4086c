"""The trained net: a residual net for 8x8 grey digits, about 72,000 weights.

The first Conv has no padding, so that the input's normalisation can go into it; blocks keep their
size, or halve it and project the shortcut; one is depthwise; the head's Linear has a BatchNorm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.blocks import Residual, conv_bn, conv_bn_relu


class Standardize(nn.Module):
    """``(x - mean) / deviation``, the same for every pixel.

    Args:
        mean: Of the pixels of the training images.
        deviation: Their standard deviation.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("deviation", torch.tensor(deviation))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


def digits_net(mean: float, deviation: float) -> nn.Module:
    """The bare net: ``(N, 1, 8, 8)`` in 0 .. 1 to ten logits ``(N, 10)``."""
    return nn.Sequential(
        Standardize(mean, deviation),
        nn.Conv2d(1, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(_basic(16, 16), activation=nn.ReLU()),
        Residual(_basic(16, 32, stride=2), conv_bn(16, 32, 1, stride=2), nn.ReLU()),
        Residual(_separable(32, 32), activation=nn.ReLU()),
        Residual(_basic(32, 48, stride=2), conv_bn(32, 48, 1, stride=2), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 64, bias=False),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _basic(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(conv_bn_relu(inputs, outputs, stride=stride), conv_bn(outputs, outputs))


def _separable(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(conv_bn_relu(inputs, inputs, groups=inputs), conv_bn(inputs, outputs, 1))
