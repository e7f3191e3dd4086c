"""Modules to capture: the ways in which a forward can be hard to follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Any:
        return functional.relu(self.bn(self.conv(x)))


class Several(nn.Module):
    """A forward that cannot be traced around parts that can."""

    def __init__(self) -> None:
        super().__init__()
        self.one = Block()
        self.layers: Any = nn.ModuleList([Block(), Block()])
        self.by_name: Any = nn.ModuleDict({"last": Block()})
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        if x.sum() > 0:
            x = self.one(x)
        for layer in self.layers:
            x = layer(x)
        return self.bn(self.by_name["last"](x))


class BatchNormAct(nn.BatchNorm2d):
    """A forward of its own: a leaf would hide the activation."""

    def forward(self, x: Tensor) -> Any:
        x = functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps
        )
        return functional.relu(x)


class PlainConv(nn.Conv2d):
    """Only a name."""

    note = "plain"


class OwnConv(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return super()._conv_forward(input, -weight, bias)


class FrozenNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight: Tensor
        self.running_var: Tensor
        self.register_buffer("weight", torch.tensor([0.5, -2.0, 0.0]))
        self.register_buffer("running_var", torch.tensor([1.0, 1e-6, 3.0]))

    def forward(self, x: Tensor) -> Any:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.reshape(1, -1, 1, 1)


class Asserting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Any:
        torch._assert(x.ndim == 4, "four dimensions")  # type: ignore[no-untyped-call]
        assert x.shape[1] == 3
        assert x.shape[1] > 0 and x.dim() == 4, "channels"
        _, _, height, _ = x.shape
        return self.block(x).reshape(-1, 3, height * x.shape[-1])


class Branching(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner if inner is not None else Block()

    def forward(self, x: Tensor) -> Any:
        return -self.inner(x) if x.sum() > 0 else self.inner(x)


class Keeping(nn.Module):
    """Changes itself in every way that a forward has."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.calls = 0
        self.last: Tensor | None = None
        self.seen: list[Tensor] = []
        self.by_name: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        x = self.block(x)
        self.last = x
        self.seen.append(x)
        self.by_name["x"] = x
        self.made = x
        return x


class Takes(nn.Module):
    """Calls the layers of a part one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.whole = Block()

    def forward(self, x: Tensor) -> Any:
        y = self.block.conv(x)
        if x.sum() > 0:
            y = -y
        return self.whole(self.block.bn(y))


class Iterates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.rest = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Any:
        for layer in self.features:
            x = layer(x)
            if x.sum() > 0:
                x = -x
        return self.rest(x)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Any:
        x = self.block.conv(x)
        if skip is not None:
            x = x + skip
        return self.block.bn(x)


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Any:
        raise ValueError("no such thing\nmore")


class Randomly(nn.Module):
    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.block = Block()
        self.draw = draw

    def forward(self, x: Tensor) -> Any:
        return self.block(x) + self.draw()
