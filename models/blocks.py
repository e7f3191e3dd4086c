"""The pieces that several nets share."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn


class Residual(nn.Module):
    """``body(x) + shortcut(x)``, then an activation if there is one.

    Args:
        body: The long way.
        shortcut: The short one; the input itself when not given.
        activation: What follows the sum.
    """

    def __init__(
        self,
        body: nn.Module,
        shortcut: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.activation(self.body(x) + self.shortcut(x))
        return total


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """A bias-free Conv2d, padded to keep the size but for its stride, and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs)))


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """``conv_bn`` with a Relu behind it."""
    unit = conv_bn(inputs, outputs, kernel, **options)
    unit.add_module("relu", nn.ReLU())
    return unit


def classifier(channels: int, classes: int = 10) -> nn.Sequential:
    """Global average pooling and a Linear."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
