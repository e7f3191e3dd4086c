"""Random weights and hard statistics: a fresh BatchNorm is the identity and hides most bugs.

Every BatchNorm gets gammas of which some are negative, one is tiny and one is zero, a random mean,
a variance spread over two octaves either way, and an epsilon that differs from its neighbours'.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

EPSILONS = (1e-5, 1e-3, 1e-2, 1e-4)
TINY = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """What a normalisation layer knows, each a float32 ``(C,)``."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    variance: Tensor


class PerChannel(nn.Module):
    """A layer of ours that scales and shifts channels and takes drawn statistics.

    Args:
        channels: ``C``, the size of axis 1 of what it reads.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.eps = EPSILONS[0]

    def take(self, drawn: Statistics) -> None:
        """Store ``drawn`` in the layer's own form."""
        raise NotImplementedError


def draw(channels: int, source: Generator, *, positive: bool = False) -> Statistics:
    """Statistics for ``channels`` (at least 4) channels.

    Args:
        channels: How many.
        source: Where the random numbers come from.
        positive: Keep every gamma in 0.5 .. 1.5, as a net needs whose scales pass a Relu.
    """
    gamma = _uniform(channels, 0.5, 1.5, source)
    if not positive:
        picked = torch.randperm(channels, generator=source)
        gamma[picked[: channels // 4]] *= -1
        gamma[picked[-1]] = TINY
        gamma[picked[-2]] = 0
    return Statistics(
        gamma,
        beta=_normal(channels, 0.5, source),
        mean=_normal(channels, 0.5, source),
        variance=2 ** _uniform(channels, -2, 2, source),
    )


@torch.no_grad()
def randomize(net: nn.Module, seed: int, *, positive: bool = False) -> nn.Module:
    """Fill ``net`` with the weights and statistics of ``seed``, in place, and return it.

    Args:
        net: Any module; weights keep a signal's size about the same from layer to layer.
        seed: The same seed gives the same net; torch's own random state is left alone.
        positive: Passed on to ``draw``.
    """
    source = Generator().manual_seed(seed)
    epsilons = cycle(EPSILONS)
    for module in net.modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            _draw_weights(module, source)
        elif isinstance(module, (_BatchNorm, PerChannel)):
            module.eps = next(epsilons)
            _take(module, draw(_channels(module), source, positive=positive))
    return net


def _channels(module: _BatchNorm | PerChannel) -> int:
    return module.channels if isinstance(module, PerChannel) else module.num_features


def _take(module: _BatchNorm | PerChannel, drawn: Statistics) -> None:
    if isinstance(module, PerChannel):
        return module.take(drawn)
    held: list[tuple[Any, Tensor]] = [
        (module.running_mean, drawn.mean),
        (module.running_var, drawn.variance),
    ]
    if module.affine:
        held += [(module.weight, drawn.gamma), (module.bias, drawn.beta)]
    for tensor, values in held:
        tensor.copy_(values)
    return None


def _draw_weights(module: _ConvNd | nn.Linear, source: Generator) -> None:
    fan_in = module.weight[0].numel()
    if isinstance(module, _ConvTransposeNd):
        steps = torch.tensor(module.stride).prod().item()
        fan_in = int(module.weight[:, 0].numel() // module.groups // steps)
    # 1.5 lies between what a layer needs with a Relu behind it (2) and without one (1).
    module.weight.normal_(0, (1.5 / fan_in) ** 0.5, generator=source)
    if module.bias is not None:
        module.bias.normal_(0, 0.2, generator=source)


def _uniform(count: int, low: float, high: float, source: Generator) -> Tensor:
    return torch.empty(count).uniform_(low, high, generator=source)


def _normal(count: int, deviation: float, source: Generator) -> Tensor:
    return torch.empty(count).normal_(0, deviation, generator=source)
