"""Image nets: ResNet, MobileNet, pre-activation ResNet and U-Net, each in small."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.blocks import Residual, classifier, conv_bn, conv_bn_relu


def resnet() -> nn.Module:
    """A ResNet: plain, strided and grouped blocks; shortcuts by 1x1 Conv, and by pooling first.

    Source: He et al. 2015 (arXiv:1512.03385); the pooled shortcut is ResNet-D's
    (arXiv:1812.01187), the grouped block ResNeXt's (arXiv:1611.05431).
    """
    pooled = nn.Sequential(nn.AvgPool2d(2), *conv_bn(32, 64, 1))
    bottleneck = nn.Sequential(
        conv_bn_relu(32, 32, 1), conv_bn_relu(32, 32, groups=4, stride=2), conv_bn(32, 64, 1)
    )
    return nn.Sequential(
        conv_bn_relu(3, 16, 7, stride=2),
        nn.MaxPool2d(3, 2, 1),
        Residual(_basic(16, 16), activation=nn.ReLU()),
        Residual(_basic(16, 32, stride=2), conv_bn(16, 32, 1, stride=2), nn.ReLU()),
        Residual(bottleneck, pooled, nn.ReLU()),
        classifier(64),
    )


def _basic(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(conv_bn_relu(inputs, outputs, stride=stride), conv_bn(outputs, outputs))


class SqueezeExcite(nn.Module):
    """Multiplies each channel by a gate computed from the channels' means.

    Source: Hu et al. 2017 (arXiv:1709.01507).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 4
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, inner, 1),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = x * self.gate(x)
        return gated


def mobilenet() -> nn.Module:
    """Inverted residuals with depthwise Convs, Relu6 and Hardswish, and one squeeze-and-excite.

    Source: Sandler et al. 2018 (arXiv:1801.04381), Howard et al. 2019 (arXiv:1905.02244).
    """
    return nn.Sequential(
        *conv_bn(3, 8, stride=2),
        nn.Hardswish(),
        Residual(_inverted(8, 8, nn.ReLU6())),
        _inverted(8, 16, nn.ReLU6(), stride=2),
        Residual(_inverted(16, 16, nn.Hardswish(), SqueezeExcite(64))),
        *conv_bn(16, 64, 1),
        nn.Hardswish(),
        classifier(64),
    )


def _inverted(
    inputs: int,
    outputs: int,
    activation: nn.Module,
    excite: nn.Module | None = None,
    stride: int = 1,
) -> nn.Sequential:
    wide = 4 * inputs
    return nn.Sequential(
        *conv_bn(inputs, wide, 1),
        activation,
        *conv_bn(wide, wide, groups=wide, stride=stride),
        activation,
        excite or nn.Identity(),
        *conv_bn(wide, outputs, 1),
    )


class PreActivation(nn.Module):
    """BatchNorm and Relu before each Conv; where the size changes, the shortcut is projected.

    Source: He et al. 2016 (arXiv:1603.05027).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Sequential(
            nn.BatchNorm2d(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        )
        changes = stride != 1 or inputs != outputs
        self.project = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.first(x)
        shortcut = x if self.project is None else self.project(active)
        total: Tensor = shortcut + self.second(self.conv(active))
        return total


def preactivation() -> nn.Module:
    """A ResNet whose BatchNorms stand before the Relus and the Convs."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1),
        PreActivation(16, 16),
        PreActivation(16, 32, stride=2),
        PreActivation(32, 32),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        classifier(32),
    )


class UNet(nn.Module):
    """Down twice and up again, with a skip at each size; the ways up are ConvTransposes.

    Source: Ronneberger et al. 2015 (arXiv:1505.04597). One way up is grouped and has a bias, the
    other has padding and an output padding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Sequential(conv_bn_relu(3, 8), conv_bn_relu(8, 8))
        self.middle = nn.Sequential(nn.MaxPool2d(2), conv_bn_relu(8, 16))
        self.bottom = nn.Sequential(nn.MaxPool2d(2), conv_bn_relu(16, 32))
        self.up_grouped = nn.Sequential(
            nn.ConvTranspose2d(32, 16, 2, 2, groups=4), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.merge_middle = conv_bn_relu(32, 16)
        self.up_padded = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1, bias=False), nn.BatchNorm2d(8)
        )
        self.merge_top = nn.Sequential(conv_bn_relu(16, 8), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        top = self.top(x)
        middle = self.middle(top)
        up = self.up_grouped(self.bottom(middle))
        middle = self.merge_middle(torch.cat([up, middle], 1))
        mask: Tensor = self.merge_top(torch.cat([self.up_padded(middle), top], 1))
        return mask
