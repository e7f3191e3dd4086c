"""bn(linear(x)) over tokens: the channels are the last axis, and BatchNorm wants them second.

So the tokens of all samples are laid out as one batch for the BatchNorm, and put back after it.
Source: Graham et al. 2021, LeViT (arXiv:2104.01136).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from models.blocks import Residual, conv_bn


class LinearNorm(nn.Module):
    """A Linear without bias over tokens ``(N, T, C)``, and its BatchNorm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        restored: Tensor = self.norm(x.flatten(0, 1)).reshape_as(x)
        return restored


class Attention(nn.Module):
    """Attention with a learned bias per pair of tokens; values are wider than keys.

    Args:
        channels: ``C`` of the tokens ``(N, T, C)``.
        tokens: ``T``.
        heads: How many heads.
        key: Channels of a query and of a key; a value has twice as many.
    """

    def __init__(self, channels: int, tokens: int, heads: int, key: int) -> None:
        super().__init__()
        self.heads, self.key = heads, key
        self.qkv = LinearNorm(channels, heads * 4 * key)
        self.project = nn.Sequential(nn.Hardswish(), LinearNorm(heads * 2 * key, channels))
        source = Generator().manual_seed(tokens)
        self.bias = nn.Parameter(torch.empty(heads, tokens, tokens).normal_(generator=source))

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, _ = x.shape
        joined = self.qkv(x).view(samples, tokens, self.heads, 4 * self.key)
        queries, keys, values = joined.split([self.key, self.key, 2 * self.key], dim=3)
        scores = queries.permute(0, 2, 1, 3) @ keys.permute(0, 2, 3, 1) * self.key**-0.5
        mixed = (scores + self.bias).softmax(-1) @ values.permute(0, 2, 1, 3)
        projected: Tensor = self.project(mixed.transpose(1, 2).reshape(samples, tokens, -1))
        return projected


class Tokens(nn.Module):
    """An image ``(N, C, H, W)`` as tokens ``(N, H * W, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class MeanToken(nn.Module):
    """The mean over the tokens, ``(N, T, C)`` to ``(N, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def levit() -> nn.Module:
    """Strided Convs to 16 tokens, one block of attention and feed-forward, BatchNorm and Linear."""
    feed_forward = nn.Sequential(LinearNorm(32, 64), nn.Hardswish(), LinearNorm(64, 32))
    return nn.Sequential(
        *conv_bn(3, 16, stride=2),
        nn.Hardswish(),
        *conv_bn(16, 32, stride=2),
        nn.Hardswish(),
        *conv_bn(32, 32, stride=2),
        Tokens(),
        Residual(Attention(32, tokens=16, heads=2, key=8)),
        Residual(feed_forward),
        MeanToken(),
        nn.BatchNorm1d(32),
        nn.Linear(32, 10),
    )
