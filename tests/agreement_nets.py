"""Nets that both front ends are given: every structure that both can express, each in small.

They are captured all at once, since torch and its exporter take long to begin: `Together` holds
them side by side, each on an input of its own, with weights of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from models.blocks import Residual
from models.frozen import AffineChannel, FrozenBatchNorm
from models.images import SqueezeExcite
from models.levit import LinearNorm
from models.registry import NETS, build
from models.statistics import PerChannel, Statistics, draw, randomize
from tests.torch_merge_nets import MobileOne, RepGhost, RepMixer, RepVgg

MODULE, PROGRAM, CORE, FX, ONNX = "module", "program", "core", "fx", "onnx"
FORMS = (MODULE, PROGRAM, CORE, FX, ONNX)


@dataclass(frozen=True, slots=True)
class Case:
    """A net, and where one side states more or decides otherwise.

    Attributes:
        build: Gives the module; its statistics are drawn afterwards, unless it is ``settled``.
        shape: Of its input, with the batch.
        positive: Draw only positive gammas.
        differs: What a form has that the program has not: by step the verdict, "" for no step.
        why: It differs.
        dynamic: Its program is exported for any size of the batch.
        fixed: Its ONNX file is for one size of the batch.
        finish: What is done to the module last.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 3, 6, 6)
    positive: bool = False
    differs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    why: str = ""
    settled: bool = False
    dynamic: bool = False
    fixed: bool = False
    finish: Callable[[nn.Module], None] = lambda _: None


# ---- steps as modules of their own ----


class Step(PerChannel):
    """An affine step by a constant ``(C, 1, ...)``.

    Args:
        does: What to do with ``x`` and the constant.
        channels: ``C``.
        trailing: How many axes stand behind the channels.
        scales: Whether the constant is drawn as gammas are, else as betas are.
    """

    constant: Tensor

    def __init__(
        self,
        does: Callable[[Tensor, Tensor], Tensor],
        channels: int,
        trailing: int,
        *,
        scales: bool = False,
    ) -> None:
        super().__init__(channels)
        self.does, self.scales = does, scales
        self.register_buffer("constant", torch.ones(channels, *[1] * trailing))

    def take(self, drawn: Statistics) -> None:
        values = drawn.gamma if self.scales else drawn.beta
        self.constant.copy_(values.reshape(self.constant.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.does(x, self.constant)


def mul(channels: int = 4, trailing: int = 2) -> Step:
    return Step(lambda x, c: x * c, channels, trailing, scales=True)


def add(channels: int = 4, trailing: int = 2) -> Step:
    return Step(lambda x, c: x + c, channels, trailing)


def sub(channels: int = 4, trailing: int = 2) -> Step:
    return Step(lambda x, c: x - c, channels, trailing)


def rsub(channels: int = 4, trailing: int = 2) -> Step:
    return Step(lambda x, c: c - x, channels, trailing)


def div(channels: int = 4, trailing: int = 2) -> Step:
    return Step(lambda x, c: x / c, channels, trailing)


def neg() -> nn.Module:
    return Do(lambda x: -x)


class Do(nn.Module):
    """Code without tensors of its own."""

    def __init__(self, does: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.does = does

    def forward(self, x: Tensor) -> Any:
        return self.does(x)


class Number(nn.Module):
    """A single number that raises the rank of what it meets."""

    number: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("number", torch.full((1, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.number


class Joined(nn.Module):
    """What several parts make of one input, joined."""

    def __init__(self, join: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.parts, self.join = nn.ModuleList(parts), join

    def forward(self, x: Tensor) -> Any:
        return self.join(*(part(x) for part in self.parts))


class Halves(Joined):
    """Each of two parts is given half of the channels."""

    def forward(self, x: Tensor) -> Any:
        one, two = x.chunk(2, 1)
        return self.join(self.parts[0](one), self.parts[1](two))


class Twice(nn.Module):
    """One module called at two sites, with two others between and behind."""

    def __init__(self, shared: nn.Module, between: nn.Module, behind: nn.Module) -> None:
        super().__init__()
        self.shared, self.between, self.behind = shared, between, behind

    def forward(self, x: Tensor) -> Tensor:
        behind: Tensor = self.behind(self.shared(self.between(self.shared(x))))
        return behind


class Functional(nn.Module):
    """F.conv2d and F.batch_norm by parameters of one module."""

    mean: Tensor
    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        source = Generator().manual_seed(4)
        drawn = draw(4, source)
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3, generator=source))
        self.offset = nn.Parameter(torch.randn(4, generator=source))
        self.gamma, self.beta = nn.Parameter(drawn.gamma), nn.Parameter(drawn.beta)
        self.register_buffer("mean", drawn.mean)
        self.register_buffer("variance", drawn.variance)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(x, self.kernel, self.offset, stride=2)
        return functional.batch_norm(x, self.mean, self.variance, self.gamma, self.beta, eps=1e-3)


class MatMul(nn.Module):
    """``x @ w``, and perhaps ``+ b``."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        source = Generator().manual_seed(inputs)
        self.w = nn.Parameter(torch.randn(inputs, outputs, generator=source))
        self.b = nn.Parameter(torch.randn(outputs, generator=source)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w if self.b is None else x @ self.w + self.b


class Tied(nn.Module):
    """Two Convs with one weight; a BatchNorm behind one of them only, or behind both."""

    def __init__(self, *, both: bool) -> None:
        super().__init__()
        self.one, self.two = conv(3, 4), conv(3, 4)
        self.two.weight = self.one.weight
        self.first = nn.BatchNorm2d(4)
        self.second = nn.BatchNorm2d(4) if both else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(self.one(x)), self.second(self.two(x))


class Outputs(nn.Module):
    """A Conv whose own output is an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = conv(3, 4), nn.BatchNorm2d(4), conv(4, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        return x, self.last(self.bn(x))


# ---- pieces ----


def seq(*parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(*parts)


def conv(inputs: int = 3, outputs: int = 4, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)


def bn(channels: int = 4, **options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **options)


def trains(module: Any) -> None:
    """Let the second layer normalise by the batch, although all the rest is in eval mode."""
    module[1].train()


def loses_statistics(module: Any) -> None:
    """Let the second layer have no running statistics."""
    module[1].track_running_stats = False
    module[1].running_mean = module[1].running_var = None


def shuffle(groups: int) -> Do:
    """Channel shuffle, as in ShuffleNet."""

    def does(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    return Do(does)


def through(between: nn.Module, **options: Any) -> Callable[[], nn.Module]:
    """Conv, something, BatchNorm."""
    return lambda: seq(conv(3, 4, padding=1), between, bn(**options))


def ahead(between: nn.Module, kernel: int = 3, **options: Any) -> Callable[[], nn.Module]:
    """Something whose output is fixed, BatchNorm, something, Conv."""
    return lambda: seq(nn.Sigmoid(), bn(3), between, conv(3, 4, kernel, **options), nn.Sigmoid())


def head(*parts: nn.Module) -> Callable[[], nn.Module]:
    return lambda: seq(*parts)


# What a form has otherwise than the program, with why.
Differs = Mapping[str, Mapping[str, str]]
LINEAR_IN_CORE = "core ATen writes a Linear on tokens as a view, a product and a view"
HARD_IN_CORE = "core ATen writes Hardswish and Hardsigmoid with an Add and a Div"
PRELU_IN_CORE = "core ATen writes PReLU as a choice and a Mul"
BUFFERS_IN_FX = (
    "fx computes with buffers while it traces, in float32: other digits are in the graph"
)
IN_CODE = "it is written in code, which a module keeps"

FLAT, CLIP = (3, 6), (2, 3, 4, 4, 4)

LINEAR: Mapping[str, Case] = {
    "conv_bn": Case(lambda: seq(conv(padding=1), bn()), dynamic=True),
    "conv_bn_without_bias": Case(lambda: seq(conv(bias=False), bn(), nn.ReLU())),
    "conv_grouped": Case(lambda: seq(conv(4, 8, groups=2), bn(8)), (2, 4, 6, 6)),
    "conv_depthwise": Case(lambda: seq(conv(4, 8, groups=4, stride=2), bn(8)), (2, 4, 6, 6)),
    "conv_dilated": Case(lambda: seq(conv(dilation=2, padding=2, bias=False), bn())),
    "conv_reflecting": Case(lambda: seq(bn(3), conv(padding=1, padding_mode="reflect"), bn())),
    "conv_same": Case(lambda: seq(conv(padding="same"), bn())),
    "conv_1d": Case(lambda: seq(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (2, 3, 8)),
    "conv_3d": Case(lambda: seq(nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4)), CLIP),
    "transposed": Case(lambda: seq(nn.ConvTranspose2d(3, 4, 2, 2), bn())),
    "transposed_grouped": Case(
        lambda: seq(nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=False), bn(6)), (2, 4, 5, 5)
    ),
    "transposed_output_padding": Case(
        lambda: seq(bn(3), nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1), bn())
    ),
    "transposed_behind": Case(
        lambda: seq(nn.Sigmoid(), bn(4), nn.ConvTranspose2d(4, 6, 2, 2, groups=2)), (2, 4, 5, 5)
    ),
    "transposed_1d": Case(
        lambda: seq(nn.ConvTranspose1d(4, 4, 3, 2), nn.BatchNorm1d(4)), (2, 4, 8)
    ),
    "transposed_3d": Case(lambda: seq(nn.ConvTranspose3d(3, 4, 2), nn.BatchNorm3d(4)), CLIP),
    "linear": Case(lambda: seq(nn.Linear(6, 4), nn.BatchNorm1d(4)), FLAT),
    "linear_without_bias": Case(lambda: seq(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)), FLAT),
    "linear_other_axis": Case(
        lambda: seq(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)),
        (2, 4, 6),
        why=LINEAR_IN_CORE,
        differs={CORE: {"1": "BNF016"}},
    ),
    "linear_behind": Case(lambda: seq(nn.BatchNorm1d(6), nn.Linear(6, 4)), FLAT),
    "linear_rank_3": Case(
        lambda: seq(nn.Linear(6, 4), mul(4, 0), add(4, 0)),
        (2, 5, 6),
        why=LINEAR_IN_CORE,
        differs={CORE: {"2": "BNF018"}},
        dynamic=True,
    ),
    "matmul": Case(lambda: seq(MatMul(6, 4, False), mul(4, 0)), (2, 5, 6)),
    "matmul_add": Case(lambda: seq(MatMul(6, 4, True), nn.BatchNorm1d(4)), FLAT),
    "functional": Case(Functional, why=IN_CODE, differs={MODULE: {"": "BNF023"}}),
}

STEPS: Mapping[str, Case] = {
    "mul": Case(lambda: seq(conv(), mul())),
    "add": Case(lambda: seq(conv(), add())),
    "sub": Case(lambda: seq(conv(), sub())),
    "rsub": Case(lambda: seq(conv(), rsub())),
    "div": Case(lambda: seq(conv(), div())),
    "neg": Case(lambda: seq(conv(), neg())),
    "chain": Case(lambda: seq(conv(), mul(), bn(), sub(), neg(), div(), rsub(), add())),
    "chain_of_nobody": Case(
        lambda: seq(nn.Sigmoid(), bn(), mul(), add(), nn.Sigmoid()), (2, 4, 5, 5)
    ),
    "number": Case(lambda: seq(conv(), Do(lambda x: 2 - (x - 0.5) * 3 / 7), bn())),
    "number_of_higher_rank": Case(lambda: seq(nn.Linear(6, 4), Number()), FLAT),
    "wrong_axis": Case(lambda: seq(conv(), mul(4, 0), bn()), (2, 3, 6, 6)),
    "wrong_axis_height": Case(lambda: seq(conv(), add(4, 1), bn()), (2, 3, 6, 6)),
    "enlarges": Case(lambda: seq(conv(3, 1), mul(4), conv(4, 3, 1))),
    "frozen": Case(lambda: seq(conv(), FrozenBatchNorm(4)), why=BUFFERS_IN_FX, differs={FX: {}}),
    "frozen_scale": Case(lambda: seq(conv(), AffineChannel(4))),
    "layer_scale": Case(
        lambda: Residual(seq(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6), mul(6, 0))),
        (2, 5, 6),
    ),
    "layer_norm": Case(lambda: seq(nn.LayerNorm(6), mul(6, 0), add(6, 0)), (2, 5, 6)),
    "layer_norm_linear": Case(
        lambda: seq(nn.LayerNorm(6), mul(6, 0), nn.Linear(6, 4)),
        (2, 5, 6),
        why=LINEAR_IN_CORE,
        differs={CORE: {"1": "backward 0"}},
    ),
    "group_norm": Case(
        lambda: seq(nn.GroupNorm(2, 4), mul(), bn()),
        (2, 4, 5, 5),
        why="ONNX 17 writes GroupNorm as InstanceNormalization, Mul, Add",
        differs={ONNX: {"0": "merged 2", "0#2": "merged 2", "2": "BNF016"}},
    ),
    "instance_norm": Case(
        lambda: seq(conv(), nn.InstanceNorm2d(4), bn()),
        why="core ATen writes it as a BatchNorm of a reshaped tensor; ONNX names its ones itself",
        differs={CORE: {"2": "BNF018"}, ONNX: {}},
    ),
    "two_norms": Case(lambda: seq(conv(), bn(), bn())),
    "without_affine": Case(lambda: seq(conv(), bn(affine=False))),
    "without_momentum": Case(lambda: seq(conv(), bn(momentum=None))),
    "without_statistics": Case(
        lambda: seq(conv(), bn(), conv(4, 4)), fixed=True, finish=loses_statistics
    ),
    "in_training": Case(
        lambda: seq(conv(), bn(), conv(4, 4, 1), bn()),
        why="the exporter runs the net, so that the statistics in the file moved on",
        differs={ONNX: {}},
        finish=trains,
    ),
    "on_the_input": Case(lambda: seq(bn(3), nn.ReLU(), conv())),
    "at_the_output": Case(lambda: seq(nn.Sigmoid(), bn(3))),
}

WAYS: Mapping[str, Case] = {
    "ahead": Case(ahead(nn.Identity())),
    "ahead_padded": Case(ahead(nn.Identity(), padding=1)),
    "ahead_grouped": Case(lambda: seq(nn.Sigmoid(), bn(), conv(4, 8, groups=2)), (2, 4, 5, 5)),
    "ahead_depthwise": Case(lambda: seq(nn.Sigmoid(), bn(), conv(4, 4, groups=4)), (2, 4, 5, 5)),
    "ahead_flattened": Case(
        lambda: seq(nn.Sigmoid(), bn(), nn.Flatten(), nn.Linear(36, 5)), (2, 4, 3, 3)
    ),
    "ahead_pooled": Case(ahead(nn.AvgPool2d(2), 1)),
    "ahead_reflected": Case(ahead(nn.ReflectionPad2d(1))),
    "ahead_zeros": Case(
        ahead(nn.ZeroPad2d((1, 0, 1, 0))),
        differs={ONNX: {"1": "BNF010"}},
        why="only in ONNX a convolution can pad one side",
    ),
    "ahead_relu": Case(ahead(nn.ReLU()), positive=True),
    "ahead_relu_of_all_signs": Case(ahead(nn.ReLU())),
    "preactivation": Case(lambda: seq(conv(), bn(), nn.ReLU(), conv(4, 4))),
    "relu_between": Case(lambda: seq(conv(), nn.ReLU(), bn(), conv(4, 4)), positive=True),
    "relu_in_place": Case(lambda: seq(conv(), bn(), nn.ReLU(inplace=True), conv(4, 4), bn())),
    "leaky_relu": Case(through(nn.LeakyReLU(0.1)), positive=True),
    "prelu": Case(
        through(nn.PReLU(4)),
        positive=True,
        why=PRELU_IN_CORE,
        differs={CORE: {"1": "BNF019", "2": "BNF018"}},
    ),
    "dropout": Case(through(nn.Dropout(0.2))),
    "max_pool": Case(through(nn.MaxPool2d(2)), positive=True),
    "max_pool_of_all_signs": Case(through(nn.MaxPool2d(2))),
    "average_pool": Case(through(nn.AvgPool2d(3, 1))),
    "average_pool_padded": Case(through(nn.AvgPool2d(3, 1, 1))),
    "average_pool_uncounted": Case(through(nn.AvgPool2d(3, 1, 1, count_include_pad=False))),
    "global_average": Case(lambda: seq(conv(), nn.AdaptiveAvgPool2d(1), bn(), nn.Flatten())),
    "global_max": Case(lambda: seq(conv(), nn.AdaptiveMaxPool2d(1), bn()), positive=True),
    "mean": Case(through(Do(lambda x: x.mean((2, 3), keepdim=True)))),
    "sum": Case(through(Do(lambda x: x.sum((2, 3), keepdim=True)))),
    "largest": Case(through(Do(lambda x: x.amax((2, 3), keepdim=True))), positive=True),
    "nearest": Case(through(nn.Upsample(scale_factor=2))),
    "bilinear": Case(through(nn.Upsample(scale_factor=2, mode="bilinear"))),
    "zeros": Case(through(nn.ZeroPad2d(1))),
    "reflection": Case(through(nn.ReflectionPad2d(1))),
    "replication": Case(through(nn.ReplicationPad2d(1))),
    "pixel_shuffle": Case(lambda: seq(conv(3, 16), nn.PixelShuffle(2), bn(4)), dynamic=True),
    "pixel_unshuffle": Case(lambda: seq(conv(3, 4), nn.PixelUnshuffle(2), bn(16))),
    "channel_shuffle": Case(lambda: seq(conv(3, 8), shuffle(2), bn(8)), dynamic=True),
    "tokens": Case(
        lambda: seq(conv(), Do(lambda x: x.flatten(2).transpose(1, 2)), mul(4, 0), nn.Linear(4, 5)),
        why=LINEAR_IN_CORE,
        differs={CORE: {"2": "backward 0", "3": "BNF017"}},
        dynamic=True,
    ),
    "levit": Case(
        lambda: seq(LinearNorm(6, 8), nn.Hardswish(), LinearNorm(8, 6)),
        (2, 5, 6),
        why=HARD_IN_CORE,
        differs={CORE: {"1": "BNF017", "1#2": "forward 2.linear"}},
        dynamic=True,
    ),
    "channels_last": Case(
        lambda: seq(
            conv(),
            Do(lambda x: x.permute(0, 2, 3, 1)),
            mul(4, 0),
            nn.Linear(4, 5),
            Do(lambda x: x.permute(0, 3, 1, 2)),
            bn(5),
        ),
        why=LINEAR_IN_CORE,
        differs={CORE: {"2": "backward 0", "3": "merged 5", "5": "BNF016"}},
        dynamic=True,
    ),
    "squeezed": Case(
        lambda: seq(nn.Conv1d(3, 4, 8), Do(lambda x: x.squeeze(2)), nn.BatchNorm1d(4)), (2, 3, 8)
    ),
    "unsqueezed": Case(lambda: seq(nn.Linear(6, 4), Do(lambda x: x[:, :, None, None]), bn()), FLAT),
    "halves": Case(
        lambda: seq(conv(3, 8), bn(8), Halves(torch.add, conv(4, 4), conv(4, 4))), dynamic=True
    ),
    "a_slice": Case(lambda: seq(conv(3, 8), Do(lambda x: x[:, 2:6]), bn(4))),
    "reversed": Case(lambda: seq(conv(), Do(lambda x: x.flip(1)), bn())),
}

JOINED: Mapping[str, Case] = {
    "repvgg": Case(lambda: seq(RepVgg(3, 4), RepVgg(4, 4), RepVgg(4, 6, stride=2)), dynamic=True),
    "repvgg_grouped": Case(lambda: seq(RepVgg(4, 4, groups=2)), (2, 4, 6, 6)),
    "mobileone": Case(lambda: seq(MobileOne(4)), (2, 4, 6, 6)),
    "repmixer": Case(lambda: seq(RepMixer(4), nn.ReLU(), conv(4, 4)), (2, 4, 6, 6)),
    "repghost": Case(lambda: seq(RepGhost(3, 4))),
    "average_beside": Case(
        lambda: seq(Joined(torch.sub, conv(3, 3, padding=1), nn.AvgPool2d(3, 1, 1)), bn(3))
    ),
    "one_behind_the_other": Case(lambda: seq(conv(3, 4, 1), bn(), conv(4, 5, 3), bn(5))),
    "residual": Case(lambda: seq(Joined(torch.add, conv(), conv(bias=False)), bn()), dynamic=True),
    "residual_in_place": Case(lambda: seq(Joined(lambda a, b: a.add_(b), conv(), conv()), bn())),
    "residual_positive": Case(
        lambda: seq(
            conv(padding=1),
            Residual(seq(bn(), nn.ReLU(), conv(4, 4, padding=1))),
            bn(),
            nn.ReLU(),
            conv(4, 4),
        ),
        positive=True,
    ),
    "difference": Case(lambda: seq(Joined(torch.sub, conv(), conv()), bn())),
    "sum_of_three": Case(
        lambda: seq(Joined(lambda a, b, c: a + b + c, conv(), conv(), conv()), bn())
    ),
    "with_itself": Case(lambda: seq(conv(), Do(lambda x: x + x), bn())),
    "parallel": Case(
        lambda: Joined(
            lambda a, b, c: a + b + c,
            seq(conv(4, 4, padding=1, bias=False), bn()),
            seq(conv(4, 4, 1, bias=False), bn()),
            bn(),
        ),
        (2, 4, 5, 5),
    ),
    "concat": Case(
        lambda: seq(
            # Of one tensor they would be one convolution, in ONNX.
            Joined(lambda *p: torch.cat(p, 1), conv(3, 4), seq(nn.Tanh(), conv(3, 5))),
            bn(9),
            nn.ReLU(),
            conv(9, 4),
        ),
        dynamic=True,
    ),
    "concat_into_many": Case(
        lambda: seq(
            Joined(lambda *p: torch.cat(p, 1), nn.Sigmoid(), nn.Tanh()),
            bn(6),
            Joined(lambda *p: p, conv(6, 4), conv(6, 5, 1)),
        )
    ),
    "concat_behind": Case(
        lambda: seq(
            Joined(lambda *p: torch.cat(p, 1), seq(nn.Sigmoid(), bn(3)), nn.Tanh()), conv(6, 4)
        )
    ),
    "larger": Case(lambda: seq(Joined(torch.maximum, conv(), conv()), bn()), positive=True),
    "gated": Case(
        lambda: seq(conv(3, 8), SqueezeExcite(8), bn(8)),
        why=HARD_IN_CORE,
        differs={CORE: {"1.gate.4": "backward 1.gate.3", "1.gate.4#2": "BNF018"}},
    ),
    "gate_ahead": Case(
        lambda: seq(conv(3, 8), bn(8), SqueezeExcite(8), conv(8, 4)),
        why=HARD_IN_CORE,
        differs={CORE: {"2.gate.4": "backward 2.gate.3", "2.gate.4#2": "BNF018"}},
    ),
    "glu": Case(lambda: seq(conv(3, 8), bn(8), nn.GLU(1), conv(4, 4))),
    "shared_conv": Case(lambda: Twice(conv(3, 3, padding=1), bn(3), bn(3))),
    "shared_norm": Case(lambda: Twice(bn(3), conv(3, 3), nn.Identity())),
    "shared_both": Case(
        lambda: Twice(seq(conv(3, 3), bn(3)), nn.ReLU(), nn.Identity()), (2, 3, 8, 8)
    ),
    "tied": Case(lambda: Tied(both=False)),
    "tied_both": Case(lambda: Tied(both=True)),
    "two_readers": Case(lambda: seq(conv(), Joined(lambda a, b: (a, b), bn(), conv(4, 4)))),
    "outputs": Case(Outputs),
    "attention": Case(
        lambda: seq(
            nn.LayerNorm(6),
            mul(6, 0),
            Joined(
                lambda q, k, v: (q @ k.transpose(1, 2)).softmax(-1) @ v,
                nn.Linear(6, 4),
                nn.Linear(6, 4),
                nn.Linear(6, 5),
            ),
            add(5, 0),
        ),
        (2, 5, 6),
        why=LINEAR_IN_CORE,
        differs={CORE: {"1": "backward 0"}},
    ),
}


def of_models(name: str) -> Case:
    return Case(
        lambda: build(name)[0], NETS[name].example_shape, settled=True,
        differs=MODELS_DIFFER.get(name, {}), why=MODELS_WHY.get(name, ""),
    )  # fmt: skip


MODELS_DIFFER: Mapping[str, Differs] = {
    "frozen_statistics": {FX: {}},
    "mlp": {CORE: {"7": "BNF019"}},
    "mobilenet": {CORE: {
        "2": "BNF017", "2#2": "around 3.body.0 3.body.7 4.0",
        "5.body.2": "BNF017", "5.body.2#2": "forward 5.body.3",
        "5.body.5": "BNF017", "5.body.5#2": "forward 5.body.6.gate.1 5.body.7",
        "5.body.6.gate.4": "backward 5.body.6.gate.3", "5.body.6.gate.4#2": "BNF018",
        "8": "BNF017", "8#2": "forward 9.2",
    }},
    "levit": {MODULE: {"9.body": "BNF023"}, CORE: {
        "2": "BNF017", "2#2": "forward 3", "5": "BNF017", "5#2": "forward 6",
        "9.body.project.0": "BNF017", "9.body.project.0#2": "forward 9.body.project.1.linear",
        "10.body.1": "BNF017", "10.body.1#2": "forward 10.body.2.linear",
    }},
}  # fmt: skip
MODELS_WHY = {
    "frozen_statistics": BUFFERS_IN_FX,
    "mlp": PRELU_IN_CORE,
    "mobilenet": HARD_IN_CORE,
    "levit": f"{IN_CODE}; {HARD_IN_CORE}",
}

MODELS: Mapping[str, Case] = {f"model_{name}": of_models(name) for name in NETS}

CASES: Mapping[str, Case] = {**LINEAR, **STEPS, **WAYS, **JOINED, **MODELS}


# ---- all of them at once ----


def made(name: str, case: Case) -> nn.Module:
    """The net with hard statistics, in eval mode but for what stays in training mode."""
    module = case.build()
    if case.settled:
        return module.eval()
    seed = zlib.crc32(name.encode())
    randomize(module, seed, positive=case.positive)
    _settle(module, Generator().manual_seed(seed + 1), positive=case.positive)
    module.eval()
    case.finish(module)
    return module


@torch.no_grad()
def _settle(module: nn.Module, source: Generator, *, positive: bool) -> None:
    """Draw what `randomize` does not know."""
    epsilons = cycle((1e-5, 1e-3))
    for inner in module.modules():
        if isinstance(inner, nn.LayerNorm | nn.GroupNorm):
            inner.eps = next(epsilons)
            if inner.weight is not None and inner.bias is not None:
                drawn = draw(inner.weight.numel(), source, positive=positive)
                inner.weight.copy_(drawn.gamma)
                inner.bias.copy_(drawn.beta)
        elif isinstance(inner, nn.PReLU):
            inner.weight.copy_(torch.rand(inner.weight.shape, generator=source) + 0.1)


def example(name: str, case: Case) -> Tensor:
    """An input of the net ``name``."""
    return torch.randn(case.shape, generator=Generator().manual_seed(zlib.crc32(name.encode())))


class Together(nn.Module):
    """Nets side by side, each on an input of its own."""

    def __init__(self, nets: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleDict(nets)

    def forward(self, *inputs: Tensor) -> list[Any]:
        return [net(x) for net, x in zip(self.nets.values(), inputs, strict=True)]
