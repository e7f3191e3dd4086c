"""The trained net: a residual net for 8x8 grey digits, about 61,000 weights.

The first Conv has no padding, so that the input's normalisation can go into it; blocks keep their
size, or halve it and project the shortcut; one is depthwise; the head's Linear has a BatchNorm.
"""

from __future__ import annotations

from collections import OrderedDict

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
    to_half, to_quarter = conv_bn(16, 32, 1, stride=2), conv_bn(32, 48, 1, stride=2)
    return nn.Sequential(
        OrderedDict(
            standardize=Standardize(mean, deviation),
            stem=_stem(16),
            plain=Residual(_basic(16, 16), activation=nn.ReLU()),
            halve=Residual(_basic(16, 32, stride=2), to_half, nn.ReLU()),
            separable=Residual(_separable(32), activation=nn.ReLU()),
            quarter=Residual(_basic(32, 48, stride=2), to_quarter, nn.ReLU()),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=_head(48, 64),
        )
    )


def _stem(outputs: int) -> nn.Sequential:
    conv = nn.Conv2d(1, outputs, 3, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs), relu=nn.ReLU()))


def _basic(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    first, second = conv_bn_relu(inputs, outputs, stride=stride), conv_bn(outputs, outputs)
    return nn.Sequential(OrderedDict(first=first, second=second))


def _separable(channels: int) -> nn.Sequential:
    depthwise = conv_bn_relu(channels, channels, groups=channels)
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=conv_bn(channels, channels, 1)))


def _head(inputs: int, hidden: int) -> nn.Sequential:
    linear, norm = nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden)
    logits = nn.Linear(hidden, 10)
    return nn.Sequential(OrderedDict(linear=linear, norm=norm, relu=nn.ReLU(), logits=logits))
