"""Nets of blocks in training form, as their authors write them, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.torch_nets import made

_CONVS: tuple[Any, ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def conv_norm(ins: int, outs: int, kernel: int, rank: int = 2, **given: Any) -> nn.Sequential:
    """A convolution that keeps sizes, without a bias, and its normalisation."""
    padding = (kernel - 1) * int(given.get("dilation", 1)) // 2
    conv = _CONVS[rank](ins, outs, kernel, padding=padding, bias=False, **given)
    return nn.Sequential(conv, _NORMS[rank](outs))


class RepVgg(nn.Module):
    """k x k + 1 x 1 + identity, each with a normalisation."""

    def __init__(self, ins: int, outs: int, rank: int = 2, **given: Any) -> None:
        super().__init__()
        points = {k: v for k, v in given.items() if k != "dilation"}
        self.conv = conv_norm(ins, outs, 3, rank, **given)
        self.point = conv_norm(ins, outs, 1, rank, **points)
        keeps = ins == outs and given.get("stride", 1) == 1
        self.identity = _NORMS[rank](outs) if keeps else None
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) + self.point(x)
        if self.identity is not None:
            y += self.identity(x)
        made: Tensor = self.act(y)
        return made


class MobileOne(nn.Module):
    """Branches in a list, a scale, a skip, squeeze-and-excite behind them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            conv_norm(channels, channels, 3, groups=channels) for _ in range(3)
        )
        self.scale = conv_norm(channels, channels, 1, groups=channels)
        self.skip = nn.BatchNorm2d(channels)
        self.se = Gate(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Any = 0
        for branch in self.branches:
            out += branch(x)
        out = out + self.scale(x) + self.skip(x)
        made: Tensor = self.act(self.se(out))
        return made


class Gate(nn.Module):
    """Squeeze-and-excite."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class RepMixer(nn.Module):
    """x + scale * (mixer(x) - norm(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mixer = conv_norm(channels, channels, 3, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.scale * (self.mixer(x) - self.norm(x))
        return made


class RepGhost(nn.Module):
    """A convolution with its activation, and a cheap one beside what it gives."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.primary = nn.Sequential(*conv_norm(ins, outs, 1), nn.ReLU(inplace=True))
        self.cheap = conv_norm(outs, outs, 3, groups=outs)
        self.fusion = nn.Sequential(nn.BatchNorm2d(outs))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary(x)
        x2 = self.cheap(x1)
        for norm in self.fusion:
            x2 = x2 + norm(x1)
        made: Tensor = self.relu(x2)
        return made


class RepVitDepthwise(nn.Module):
    """norm(conv(x) + point(x) + x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv_norm(channels, channels, 3, groups=channels)
        self.point = nn.Conv2d(channels, channels, 1, groups=channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.norm(self.conv(x) + self.point(x) + x)
        return made


class Averaged(nn.Module):
    """The mean of two classifiers."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)
        self.head = nn.Sequential(nn.BatchNorm1d(ins), nn.Linear(ins, outs))
        self.distilled = nn.Sequential(nn.BatchNorm1d(ins), nn.Linear(ins, outs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        x1, x2 = self.head(x), self.distilled(x)
        made: Tensor = (x1 + x2) / 2
        return made


class Functional(nn.Module):
    """Branches that are written in code, with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, 3, 3))
        self.point = nn.Parameter(torch.ones(4, 3, 1, 1))
        self.bias = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        near = functional.conv2d(x, self.weight, stride=2, padding=1)
        return near + functional.conv2d(x, self.point, self.bias, 2)


def _linear_pair(self: Any, x: Tensor) -> Tensor:
    made: Tensor = self.second(self.first(x))
    return made


def _averaged(self: Any, x: Tensor) -> Tensor:
    made: Tensor = self.conv(x) - self.pool(x)
    return made


def _padded(self: Any, x: Tensor) -> Tensor:
    made: Tensor = self.conv(self.pad(x))
    return made


class Net(nn.Module):
    """Blocks in a model: one alone would be the root, which keeps its class."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


@dataclass(frozen=True, slots=True)
class Case:
    """A net, its input, and what is left of it.

    Attributes:
        build: Gives the net.
        shape: Of its input.
        joints: How many merges are made.
        layers: Convolutions and linear layers that are left.
        classes: The classes of the stages afterwards, of a module.
        sized: Whether sizes have to be known: without example inputs nothing is done.
        views: Whether its program in core ATen has other shapes in between.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    joints: int
    layers: int
    classes: Sequence[type[nn.Module]] = ()
    sized: bool = False
    views: bool = False


_IMAGE, _IMAGES = (2, 3, 8, 8), (2, 8, 6, 6)

CASES = {
    "repvgg": Case(lambda: Net(RepVgg(3, 8), RepVgg(8, 8), RepVgg(8, 6, stride=2)), _IMAGE, 3, 3,
                   [nn.Sequential] * 3),
    "repvgg, groups": Case(lambda: Net(RepVgg(8, 8, groups=4)), _IMAGES, 1, 1, [nn.Sequential]),
    "repvgg, signals": Case(lambda: Net(RepVgg(3, 3, rank=1)), (2, 3, 9), 1, 1, [nn.Sequential]),
    "repvgg, volumes": Case(lambda: Net(RepVgg(3, 3, rank=3)), (2, 3, 4, 5, 3), 1, 1,
                            [nn.Sequential]),
    "repvgg, dilated": Case(lambda: Net(RepVgg(3, 3, dilation=2)), _IMAGE, 1, 1, [nn.Sequential]),
    "mobileone": Case(lambda: Net(MobileOne(8), MobileOne(8)), _IMAGES, 2, 4, [nn.Sequential] * 2),
    "repmixer": Case(lambda: Net(RepMixer(8)), _IMAGES, 1, 1, [nn.Conv2d]),
    "repghost": Case(lambda: Net(RepGhost(3, 8)), _IMAGE, 1, 2, [nn.Sequential]),
    "repvit": Case(lambda: Net(RepVitDepthwise(8), nn.Conv2d(8, 16, 3)), _IMAGES, 1, 2,
                   [nn.Conv2d, nn.Conv2d]),
    "two heads": Case(lambda: Net(Averaged(8, 5)), (3, 8), 1, 1, [nn.Linear], sized=True),
    "code": Case(lambda: Net(Functional()), _IMAGE, 1, 1, [nn.Conv2d]),
    "layers": Case(lambda: Net(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3)), _IMAGE, 1, 1,
                   [nn.Identity, nn.Conv2d]),
    "layers in a block": Case(
        lambda: Net(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1)),
        _IMAGE, 1, 1, [nn.Sequential, nn.Identity]),
    "linear, linear": Case(
        lambda: Net(made(_linear_pair, first=nn.Linear(6, 7), second=nn.Linear(7, 5, bias=False))),
        (2, 3, 6), 1, 1, views=True),
    "average beside": Case(lambda: Net(made(_averaged, conv=nn.Conv2d(8, 8, 3, padding=1),
                                            pool=nn.AvgPool2d(3, 1, 1))), _IMAGES, 1, 1,
                           [nn.Conv2d]),
    "zeros, convolution": Case(
        lambda: Net(made(_padded, pad=nn.ZeroPad2d(1), conv=nn.Conv2d(3, 4, 3))), _IMAGE, 1, 1,
        sized=True),
    "same": Case(lambda: Net(nn.Conv2d(3, 4, 1, bias=False),
                             nn.Conv2d(4, 4, 3, padding="same")), _IMAGE, 1, 1),
}  # fmt: skip
