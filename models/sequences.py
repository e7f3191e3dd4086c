"""Nets without image planes: speech over time, video over space and time, and an MLP."""

from __future__ import annotations

from typing import Any

from torch import nn

from models.blocks import Residual


def speech() -> nn.Module:
    """Features ``(N, 40, T)`` to log-probabilities: strided, separable and dilated Conv1d.

    Source: the shape of QuartzNet, Kriman et al. 2019 (arXiv:1910.10261).
    """
    separable = nn.Sequential(*_separable(32, 32, 11), nn.ReLU(), *_separable(32, 32, 11))
    shortcut = nn.Sequential(nn.Conv1d(32, 32, 1, bias=False), nn.BatchNorm1d(32))
    return nn.Sequential(
        *_separable(40, 32, 5, stride=2),
        nn.ReLU(),
        Residual(separable, shortcut, nn.ReLU()),
        nn.Conv1d(32, 48, 5, padding=4, dilation=2, groups=2),
        nn.BatchNorm1d(48),
        nn.ReLU(),
        nn.Conv1d(48, 29, 1),
        nn.LogSoftmax(1),
    )


def _separable(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(inputs, inputs, kernel, stride, kernel // 2, groups=inputs, bias=False),
        nn.Conv1d(inputs, outputs, 1, bias=False),
        nn.BatchNorm1d(outputs),
    )


def video() -> nn.Module:
    """Clips ``(N, 3, T, H, W)``: full, space-then-time and depthwise Conv3d.

    Source: the shapes of R(2+1)D, Tran et al. 2018 (arXiv:1711.11248).
    """
    factored = nn.Sequential(
        *_conv3d(8, 12, (1, 3, 3)), nn.ReLU(), *_conv3d(12, 8, (3, 1, 1)), nn.ReLU()
    )
    depthwise = nn.Sequential(*_conv3d(8, 8, (3, 3, 3), stride=2, groups=8), *_conv3d(8, 16))
    shortcut = nn.Sequential(*_conv3d(8, 16, stride=2))
    return nn.Sequential(
        *_conv3d(3, 8, (3, 5, 5), stride=(1, 2, 2)),
        nn.ReLU(),
        nn.MaxPool3d((1, 2, 2)),
        Residual(factored),
        Residual(depthwise, shortcut, nn.ReLU()),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def _conv3d(
    inputs: int, outputs: int, kernel: tuple[int, int, int] = (1, 1, 1), **options: Any
) -> nn.Sequential:
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    conv = nn.Conv3d(inputs, outputs, kernel, padding=padding, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm3d(outputs))


def mlp() -> nn.Module:
    """Linears with BatchNorm before, behind, and behind a Dropout; one Linear has no bias."""
    return nn.Sequential(
        nn.BatchNorm1d(20),
        nn.Linear(20, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 48, bias=False),
        nn.Dropout(0.3),
        nn.BatchNorm1d(48),
        nn.PReLU(48),
        nn.Linear(48, 10),
    )
