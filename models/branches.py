"""Nets that are linear in more places than they need to be, as such blocks are trained.

Sources: RepVGG (arXiv:2101.03697), MobileOne (arXiv:2206.04040), FastViT (arXiv:2303.14189).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.blocks import Residual, classifier, conv_bn


class Branches(nn.Module):
    """The sum of what several branches make of one input, then an activation.

    Args:
        branches: The branches, added up in this order.
        activation: What follows the sum; nothing when not given.
    """

    def __init__(self, branches: Iterable[nn.Module], activation: nn.Module | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.branches
        total = first(x)
        for branch in others:
            total = total + branch(x)
        made: Tensor = self.activation(total)
        return made


class Scaled(nn.Module):
    """``x + scale * body(x)``, with a scale for each channel."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body = body
        self.scale = nn.Parameter(torch.linspace(-0.6, 0.9, channels).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = x + self.scale * self.body(x)
        return total


class Difference(nn.Module):
    """``mixer(x) - norm(x)``."""

    def __init__(self, mixer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.mixer, self.norm = mixer, norm

    def forward(self, x: Tensor) -> Tensor:
        difference: Tensor = self.mixer(x) - self.norm(x)
        return difference


class Between(nn.Module):
    """``(linear(x) + skip) + other(x)``: a term that is not linear stands between two that are."""

    def __init__(self, linear: nn.Module, skip: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.linear, self.skip, self.other = linear, skip, other

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = (self.linear(x) + self.skip(x)) + self.other(x)
        return total


# ---- branches ----


def _repvgg_block(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Module:
    """3x3, 1x1 and, where shapes allow it, the input itself, each with a BatchNorm."""
    branches: list[nn.Module] = [
        conv_bn(inputs, outputs, kernel, stride=stride, groups=groups) for kernel in (3, 1)
    ]
    if inputs == outputs and stride == 1:
        branches.append(nn.BatchNorm2d(inputs))
    return Branches(branches, nn.ReLU())


def repvgg() -> nn.Module:
    """Five blocks, two of them with stride 2 and one in groups."""
    return nn.Sequential(
        _repvgg_block(3, 8, stride=2),
        _repvgg_block(8, 8),
        _repvgg_block(8, 16, stride=2),
        _repvgg_block(16, 16),
        _repvgg_block(16, 16, groups=4),
        classifier(16),
    )


def _mobileone_block(channels: int, kernel: int = 3, activation: bool = True) -> nn.Module:
    """Depthwise: two kernels of one size, a 1x1 and the input itself."""
    sizes = (kernel, kernel, 1)
    branches: list[nn.Module] = [conv_bn(channels, channels, k, groups=channels) for k in sizes]
    branches.append(nn.BatchNorm2d(channels))
    return Branches(branches, nn.ReLU() if activation else None)


def _pointwise_block(inputs: int, outputs: int) -> nn.Module:
    return Branches([conv_bn(inputs, outputs, 1) for _ in range(2)], nn.ReLU())


def _mixer(channels: int) -> nn.Module:
    """``x + scale * (mixer(x) - norm(x))``, all of it linear."""
    mixer = _mobileone_block(channels, activation=False)
    return Scaled(Difference(mixer, nn.BatchNorm2d(channels)), channels)


def _large_kernel(channels: int) -> nn.Module:
    """Depthwise 7x7 and 3x3, with a stride."""
    sizes = (7, 3)
    return Branches(conv_bn(channels, channels, k, stride=2, groups=channels) for k in sizes)


def mobileone() -> nn.Module:
    """Depthwise blocks of many branches, mixers and a large kernel, with 1x1 between."""
    return nn.Sequential(
        *conv_bn(3, 8, stride=2),
        nn.ReLU(),
        _mobileone_block(8),
        _pointwise_block(8, 16),
        _mixer(16),
        nn.Conv2d(16, 16, 1),
        nn.Hardswish(),
        _large_kernel(16),
        nn.GELU(),
        _mixer(16),
        nn.ReLU(),
        classifier(16),
    )


# ---- one after the other ----


def serial() -> nn.Module:
    """1x1 and 3x3 in both orders, a Pad, a Conv before a flattening, two Linears.

    And two that have to stay apart: the second one pads with zeros what the first one shifts.
    """
    return nn.Sequential(
        *(*conv_bn(3, 8, 1), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU()),
        *(nn.Conv2d(12, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1), nn.ReLU()),
        *(nn.ZeroPad2d((2, 1, 1, 2)), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish()),
        *(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 16, 1), nn.Flatten(), nn.Linear(16, 16)),
        *(nn.ReLU(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, 10)),
    )


# ---- other terms between ----


def sums() -> nn.Module:
    """Sums in which terms that are not linear stand between those that are, and one with a mean."""

    def skip(channels: int) -> nn.Module:
        return nn.Sequential(nn.ReLU(), *conv_bn(channels, channels))

    averaged = nn.Sequential(*conv_bn(3, 8, 1), nn.AvgPool2d(3, stride=2))
    return nn.Sequential(
        Branches([nn.Conv2d(3, 8, 3, stride=2), averaged]),
        Between(conv_bn(8, 8), skip(8), nn.BatchNorm2d(8)),
        nn.ReLU(),
        Between(conv_bn(8, 8, 1), skip(8), conv_bn(8, 8)),
        nn.Hardswish(),
        Residual(Between(nn.Conv2d(8, 8, 3, padding=1), skip(8), conv_bn(8, 8, 1))),
        nn.ReLU(),
        classifier(8),
    )
