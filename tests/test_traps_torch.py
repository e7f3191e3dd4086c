"""The traps that torch's fusers fall into, in every kind of model: nothing folds that must not.

All nets are in float64, so that what a fold may change is far below what a wrong one changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bnfold
from tests.torch_nets import (
    BARE,
    GRAPH,
    MODULE,
    PROGRAM,
    TRACED,
    decomposed,
    error,
    exported,
    folded,
    lively,
    made,
    one_thread,
    outputs,
    random,
    tensors_in,
    verdicts,
)

IMAGE = (2, 3, 6, 6)
single = pytest.fixture(autouse=True, scope="module")(one_thread)
CORE = "a program in core ATen"
IN_CODE = {MODULE: "BNF023", TRACED: "BNF023"}
CLOSE = 1e-9
ANY = "any"
"""Whether it folds is not the point: a kind of model that can hold another tensor does."""

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A net and what becomes of its steps.

    Attributes:
        build: The net, before its numbers are drawn.
        verdict: How each step folds, or the code of why it stays; in alphabetical order.
        other: The same for kinds of models that know less, or can hold less.
        inputs: Shapes of the inputs.
        more: Shapes of other inputs that the net takes.
        positive: Whether all gammas are.
        bugs: Kinds in which it is known to go wrong, and how.
    """

    build: Callable[[], nn.Module]
    verdict: str
    other: Mapping[str, str] = field(default_factory=dict)
    inputs: Shapes = (IMAGE,)
    more: tuple[Shapes, ...] = ()
    positive: bool = False
    bugs: Mapping[str, str] = field(default_factory=dict)

    def net(self) -> Any:
        return lively(self.build(), positive=self.positive)

    def feeds(self) -> list[Tensor]:
        return [random(*shape, seed=k + 1) for k, shape in enumerate(self.inputs)]


def conv(inputs: int = 3, channels: int = 3, size: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, channels, size, **options)


def norm(channels: int = 3, **options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **options)


def line(channels: int = 4) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels)


def free(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def net(run: Callable[..., Any], **held: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A function that makes a net anew."""
    return lambda: made(run, **{name: make() for name, make in held.items()})


# ---- 1. the channel axis moves between the linear operator and the BatchNorm ----


def moved(between: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """Every size is 4: shapes alone say nothing."""
    return net(lambda self, x: self.bn(between(self.fc(x))), fc=lambda: nn.Linear(4, 4), bn=line)


CUBE = ((4, 4, 4),)
# Without inputs the rank of what goes into a Linear is unknown.
BLIND = {TRACED: "BNF018", BARE: "BNF018"}
TAKEN_APART = {CORE: "BNF016"}  # a Linear of more axes is a reshape and a product
RANK = {TRACED: "BNF016", BARE: "BNF016"}  # the order of three axes says that there are three
MOVED = {
    "transpose": Row(moved(lambda x: x.transpose(1, 2)), "backward", BLIND, CUBE, (((2, 4, 4),),)),
    "permute and back": Row(
        moved(lambda x: x.permute(0, 2, 1).permute(2, 1, 0)), "backward", RANK, CUBE
    ),
    "reshape and permute": Row(
        moved(lambda x: x.reshape(16, 2, 2).reshape(4, 4, 4).permute(1, 2, 0)),
        "backward",
        BLIND,
        CUBE,
    ),
    "flatten": Row(moved(lambda x: x.flatten(0, 1)), "backward", BLIND, CUBE),
    "nothing": Row(moved(lambda x: x), "BNF006", TAKEN_APART, CUBE),
    "reshape": Row(moved(lambda x: x.reshape(4, 4, 4)), "BNF016", BLIND, CUBE),
    "the other two": Row(moved(lambda x: x.permute(1, 0, 2)), "BNF016", RANK, CUBE),
    "twice": Row(moved(lambda x: x.transpose(1, 2).transpose(1, 2)), "BNF016", BLIND, CUBE),
    "mixed lines": Row(
        moved(lambda x: x.reshape(2, 32).t().reshape(4, 4, 4)), "BNF016", BLIND, CUBE
    ),
}

# ---- 2. a constant along another axis than the channels ----


def scaled(*shape: int) -> Callable[[], nn.Module]:
    return net(
        lambda self, x: self.conv(x) * self.k, conv=lambda: conv(3, 4), k=lambda: free(*shape)
    )


FOUR = ((4, 3, 4, 4),)
CONSTANTS = {
    **{
        f"along {shape}": Row(scaled(*shape), "BNF006", {}, FOUR)
        for shape in ((4,), (4, 1), (4, 1, 1, 1))
    },
    **{
        f"for all {shape}": Row(scaled(*shape), "backward", IN_CODE, FOUR)
        for shape in ((4, 1, 1), (1, 4, 1, 1), (1, 1, 1), (1,), ())
    },
    "raises the rank": Row(scaled(1, 1, 1, 1, 1), "", {}, FOUR),
    "along the batch of lines": Row(
        net(
            lambda self, x: self.conv(x) * self.k,
            conv=lambda: nn.Conv1d(3, 4, 1),
            k=lambda: free(4, 1, 1),
        ),
        "BNF006",
        {},
        ((4, 3, 5),),
    ),
    "broadcasts what it scales": Row(
        net(
            lambda self, x: self.conv(x) * self.k, conv=lambda: conv(3, 1), k=lambda: free(3, 1, 1)
        ),
        "",
    ),
    "broadcasts what it shifts": Row(
        net(
            lambda self, x: self.conv(x) + self.k, conv=lambda: conv(3, 1), k=lambda: free(3, 1, 1)
        ),
        "",
    ),
    "divided": Row(
        net(
            lambda self, x: (1 - self.conv(x)) / self.k.view(3, 1, 1), conv=conv, k=lambda: free(3)
        ),
        "backward backward",
        {MODULE: "BNF023 BNF023", TRACED: "BNF023 BNF023"},
    ),
    "divides": Row(
        net(lambda self, x: self.k.view(3, 1, 1) / self.conv(x), conv=conv, k=lambda: free(3)), ""
    ),
    "subtracted twice over": Row(
        net(
            lambda self, x: torch.sub(self.k.view(3, 1, 1), self.conv(x), alpha=2),
            conv=conv,
            k=lambda: free(3),
        ),
        "backward",
        IN_CODE,
    ),
    "negated": Row(
        net(lambda self, x: -(self.k.view(3, 1, 1) - self.conv(x)), conv=conv, k=lambda: free(3)),
        "backward backward",
        {MODULE: "BNF023 BNF023", TRACED: "BNF023 BNF023"},
    ),
    "rounded down": Row(
        net(lambda self, x: torch.div(self.conv(x), 2, rounding_mode="floor"), conv=conv), ""
    ),
}

# ---- 3, 17. one BatchNorm that can't fold, between others that can ----


class AlwaysTraining(nn.BatchNorm2d):
    """Evaluation mode of the model does not reach it."""

    def train(self, mode: bool = True) -> AlwaysTraining:
        del mode
        return super().train(True)


def among(bad: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(conv(), norm(), nn.ReLU(), conv(), bad(), conv(), norm())


AMONG = "BNF001 backward backward"
BAD = {
    "no running statistics": Row(among(lambda: norm(track_running_stats=False)), AMONG),
    "normalises by the batch in code": Row(
        net(
            lambda self, x: self.b(
                self.c(functional.batch_norm(x, self.mean, self.var, training=True))
            ),
            b=norm,
            c=conv,
            mean=lambda: random(3),
            var=lambda: random(3).abs(),
        ),
        "BNF001 backward",
    ),
    "no momentum": Row(lambda: nn.Sequential(conv(), norm(momentum=None)), "backward"),
    "no parameters": Row(lambda: nn.Sequential(conv(), norm(affine=False)), "backward"),
    "of the instance": Row(among(lambda: nn.InstanceNorm2d(3, affine=True)), "backward backward"),
    "of the instance, by running statistics": Row(
        among(lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True)),
        "backward backward joined",
        {CORE: "BNF016 backward backward"},
    ),
}

# ---- 9. who else reads a weight, or what the conv makes ----


def tied(run: Callable[..., Any], tie: Callable[[Any], None]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = made(run, c=conv(), c2=conv(), b=norm(), b2=norm())
        tie(model)
        return model

    return make


def chain(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.b2(self.c2(self.b(self.c(x))))
    return y


def share(*names: str) -> Callable[[Any], None]:
    """All of these names are the first one's parameter."""

    def tie(self: nn.Module) -> None:
        for name in names[1:]:
            path, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(path), attribute, self.get_parameter(names[0]))

    return tie


TWO = ((2, 3, 4, 4), (2, 3, 6, 6))
SHARED = {
    "conv read twice": Row(
        net(lambda self, x: (lambda y: self.b(y) + y)(self.c(x)), c=conv, b=norm),
        "joined",
        {MODULE: "BNF018", TRACED: "BNF018"},
    ),
    "conv given back": Row(
        net(lambda self, x: (lambda y: (self.b(y), y))(self.c(x)), c=conv, b=norm), "BNF018"
    ),
    "conv called again": Row(
        net(lambda self, x, y: (self.b(self.c(x)), self.c(y)), c=conv, b=norm), "BNF005", {}, TWO
    ),
    "two norms of one conv": Row(
        net(lambda self, x, y: (self.b(self.c(x)), self.b2(self.c(y))), c=conv, b=norm, b2=norm),
        "BNF005 BNF024",
        {PROGRAM: "BNF020 around"},
        TWO,
        positive=True,
    ),
    "one norm of one conv": Row(
        net(lambda self, x, y: (self.b(self.c(x)), self.b(self.c(y))), c=conv, b=norm),
        "backward backward",
        {},
        TWO,
        positive=True,
    ),
    "one norm of two convs": Row(
        net(lambda self, x, y: (self.b(self.c(x)), self.b(self.c2(y))), c=conv, c2=conv, b=norm),
        "backward backward",
        {},
        TWO,
    ),
    "one norm before two convs": Row(
        net(lambda self, x, y: (self.c(self.b(x)), self.c2(self.b(y))), c=conv, c2=conv, b=norm),
        "forward forward",
        {},
        TWO,
    ),
    "a norm that one site needs": Row(
        net(lambda self, x, y: (self.b(self.c(x)), self.b(y)), c=conv, b=norm),
        "BNF018 backward",
        {MODULE: "BNF018 BNF024", TRACED: "BNF018 BNF024"},
        TWO,
    ),
    "one weight": Row(tied(chain, share("c.weight", "c2.weight")), "BNF016 BNF016"),
    "one weight, positive": Row(
        tied(chain, share("c.weight", "c2.weight")), "BNF020 around", positive=True
    ),
    "one bias": Row(tied(chain, share("c.bias", "c2.bias")), ANY),
    "a bias is that of a norm": Row(tied(chain, share("c.bias", "b.bias", "b2.weight")), ANY),
    "a bias is that of a norm that stays": Row(
        tied(
            lambda self, x: self.b2(functional.hardswish(self.b(self.c(x)))),
            share("c.bias", "b2.bias"),
        ),
        ANY,
    ),
    "a weight that is given back": Row(
        net(lambda self, x: (self.b(self.c(x)), self.c.weight), c=conv, b=norm), "BNF005"
    ),
    "a weight that is also scaled": Row(
        net(lambda self, x: (self.b(self.c(x)), self.c.weight * 2), c=conv, b=norm), "BNF005"
    ),
    "a bias that code reads": Row(
        net(lambda self, x: (self.b(self.c(x)), self.c.bias.sum() * 1.0), c=conv, b=norm),
        "backward",
        dict.fromkeys((MODULE, TRACED, GRAPH, BARE), "BNF005"),
    ),
    "a gamma that code reads": Row(
        net(lambda self, x: self.b(self.c(x)) * self.b.weight.view(3, 1, 1), c=conv, b=norm),
        "backward backward",
        {MODULE: "BNF023 BNF023", TRACED: "BNF023 BNF023"},
    ),
}

# ---- 10, 11. biases ----


def added(*shape: int) -> Callable[[], nn.Module]:
    return net(
        lambda self, x: self.b(torch.addmm(self.k, x, self.w)),
        k=lambda: free(*shape),
        w=lambda: free(4, 4),
        b=line,
    )


PAIR = ((5, 3),)
NO_BIAS = {MODULE: "BNF011", TRACED: "BNF011"}
BIASES = {
    "alpha and beta": Row(
        net(
            lambda self, x: self.b(torch.addmm(self.k, x, self.w, beta=0.5, alpha=-2)),
            k=lambda: free(4),
            w=lambda: free(3, 4),
            b=line,
        ),
        "backward",
        NO_BIAS,
        PAIR,
        (((2, 3),),),
    ),
    "of one number": Row(
        net(
            lambda self, x: self.b(torch.addmm(self.k, x, self.w)),
            k=lambda: free(1),
            w=lambda: free(3, 4),
            b=line,
        ),
        "backward",
        {},
        PAIR,
        (((2, 3),),),
    ),
    "of two axes": Row(added(4, 4), "BNF011", {}, ((4, 4),)),
    "of two axes, along the rows": Row(added(4, 1), "BNF011", {}, ((4, 4),)),
    "an Add": Row(
        net(
            lambda self, x: self.b(x @ self.w + self.k),
            k=lambda: free(4),
            w=lambda: free(3, 4),
            b=line,
        ),
        "backward",
        {TRACED: "BNF006", BARE: "BNF006"},
        PAIR,
        (((2, 3),),),
    ),
    "an Add along the rows": Row(
        net(
            lambda self, x: self.b(x @ self.w + self.k),
            k=lambda: free(4, 1),
            w=lambda: free(4, 4),
            b=line,
        ),
        "BNF006 BNF016",
        dict.fromkeys((MODULE, TRACED, BARE), "BNF006 BNF018"),
        ((4, 4),),
    ),
    "none, twice in one module": Row(
        net(
            lambda self, x: self.b2(
                functional.conv2d(self.b(functional.conv2d(x, self.w)), self.v)
            ),
            w=lambda: free(3, 3, 1, 1),
            v=lambda: free(3, 3, 1, 1),
            bias=lambda: free(3),
            b=norm,
            b2=norm,
        ),
        "backward joined",
        {MODULE: "BNF012 BNF012", TRACED: "BNF012 BNF012"},
    ),
    "none, in two modules alike": Row(
        lambda: nn.Sequential(
            nn.Sequential(conv(bias=False), norm(), nn.ReLU()),
            nn.Sequential(conv(bias=False), norm()),
        ),
        "backward backward",
    ),
    "of a weight that comes first": Row(
        net(lambda self, x: self.b(self.w @ x), w=lambda: free(4, 4), b=line),
        "backward",
        {MODULE: "BNF012", TRACED: "BNF018", BARE: "BNF018"},
        ((2, 4, 4),),
    ),
    "of a weight that is computed": Row(
        net(
            lambda self, x: self.b(
                functional.conv2d(x, self.w - self.w.mean((1, 2, 3), keepdim=True))
            ),
            w=lambda: free(4, 3, 1, 1),
            b=lambda: norm(4),
        ),
        "backward",
        {MODULE: "BNF003", TRACED: "BNF003"},
    ),
}

# ---- 12, 15. transposed convolutions, padding, signs ----


def deconv(inputs: int = 4, channels: int = 6, size: int = 3, **options: Any) -> nn.Module:
    return nn.ConvTranspose2d(inputs, channels, size, stride=2, groups=2, **options)


GRID = ((2, 4, 5, 5),)


def before(make: Callable[[], nn.Module], channels: int = 3) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(norm(channels), make())


BORDERS = {
    "after a grouped transposed convolution": Row(
        lambda: nn.Sequential(deconv(output_padding=1), norm(6)),
        "backward",
        {},
        GRID,
        (((1, 4, 3, 4),),),
    ),
    "times a constant after it": Row(
        net(
            lambda self, x: self.c(x) * self.k,
            c=lambda: deconv(bias=False),
            k=lambda: free(6, 1, 1),
        ),
        "backward",
        IN_CODE,
        GRID,
    ),
    "before it": Row(before(deconv, 4), "BNF010", {}, GRID, positive=True),
    "before it, with output padding": Row(
        before(lambda: deconv(size=2, output_padding=1), 4), "BNF010", {}, GRID, positive=True
    ),
    "before padding": Row(before(lambda: conv(3, 4, 3, padding=1)), "BNF010"),
    "before padding of a 1x1": Row(before(lambda: conv(3, 4, 1, padding=1)), "BNF010"),
    "before padding by name": Row(before(lambda: conv(3, 4, 3, padding="same")), "BNF010"),
    "before none by name": Row(before(lambda: conv(3, 4, 3, padding="valid")), "forward"),
    "before none": Row(before(lambda: conv(3, 4, 3)), "forward"),
    "before circular padding": Row(
        before(lambda: conv(3, 4, 3, padding=1, padding_mode="circular")),
        "forward",
        {CORE: "BNF018"},
    ),
    "before a reflection": Row(
        before(lambda: nn.Sequential(nn.ReflectionPad2d((0, 1, 1, 0)), conv(3, 4, 2))), "forward"
    ),
    "before zeros on two sides": Row(
        net(
            lambda self, x: self.c(functional.pad(self.b(x), (0, 1, 0, 1))),
            c=lambda: conv(3, 4, 2),
            b=norm,
        ),
        "BNF017",
    ),
    "after a convolution that pads": Row(
        lambda: nn.Sequential(conv(3, 4, 3, padding="same"), norm(4)), "backward"
    ),
    "a sign between rectifiers": Row(
        lambda: nn.Sequential(conv(), nn.ReLU(), norm(), nn.ReLU(), conv()), "BNF017"
    ),
    "a sign before a maximum": Row(
        lambda: nn.Sequential(norm(), nn.MaxPool2d(2), conv()), "BNF016"
    ),
    "no sign before a maximum": Row(
        lambda: nn.Sequential(norm(), nn.MaxPool2d(2), conv()), "forward", positive=True
    ),
}

# ---- 13. Linear -> BatchNorm1d ----

LINEAR = {
    "of rank 2": Row(
        lambda: nn.Sequential(nn.Linear(3, 4), line()),
        "backward",
        {TRACED: "BNF006", BARE: "BNF006"},
        PAIR,
        (((2, 3),),),
    ),
    "of rank 3, as many lines as channels": Row(
        lambda: nn.Sequential(nn.Linear(3, 4), line()), "BNF006", TAKEN_APART, ((2, 4, 3),)
    ),
    "of rank 3, of other sizes": Row(
        lambda: nn.Sequential(nn.Linear(3, 5), line()), "BNF006", TAKEN_APART, ((2, 4, 3),)
    ),
    "of rank 4": Row(
        lambda: nn.Sequential(nn.Linear(4, 4), norm(4)), "BNF006", TAKEN_APART, ((2, 4, 4, 4),)
    ),
    "of an input without a batch": Row(
        lambda: nn.Sequential(nn.Conv1d(3, 4, 1), line()),
        "BNF006",
        # Convolutions are taken to read batches where no inputs are given.
        {TRACED: "backward", BARE: "backward", CORE: "BNF016"},
        ((3, 4),),
        bugs=dict.fromkeys((TRACED, BARE), "without inputs a convolution is taken to read batches"),
    ),
    "weight as it is transposed": Row(
        net(
            lambda self, x: self.b(functional.linear(x, self.w.t(), self.k)),
            w=lambda: free(4, 4),
            k=lambda: free(4),
            b=line,
        ),
        "backward",
        {TRACED: "BNF006", BARE: "BNF006"},
        ((2, 4),),
    ),
    "before a Flatten": Row(
        lambda: nn.Sequential(norm(), nn.Flatten(), nn.Linear(108, 3)),
        "forward",
        {TRACED: "BNF016", BARE: "BNF016"},
        more=(((1, 3, 6, 6),),),
    ),
}

# ---- in-place operations ----


def grown(self: Any, x: Tensor) -> Any:
    y = self.b(self.c(x))
    y += x
    return y


def shifted_in_place(self: Any, x: Tensor) -> Any:
    y = self.c(x)
    z = self.b(y)
    z += 1.5
    return z + y


def seen_through(self: Any, x: Tensor) -> Any:
    y = self.c(x)
    y.view(2, 3, 36).relu_()
    return self.b(y)


def rectified(self: Any, x: Tensor) -> Any:
    stream = self.c(x)
    return self.c2(self.r(self.b(stream))) + stream


def rectified_in_code(self: Any, x: Tensor) -> Any:
    stream = self.c(x)
    return self.c2(functional.relu(self.b(stream), inplace=True)) + stream


IN_PLACE = {
    "added to": Row(net(grown, c=conv, b=norm), "joined", {MODULE: "backward", TRACED: "backward"}),
    "shifted while the other name is read": Row(
        net(shifted_in_place, c=conv, b=norm),
        "joined joined",
        {MODULE: "BNF018 BNF023", TRACED: "BNF018 BNF023"},
    ),
    "through a view": Row(net(seen_through, c=conv, b=norm), "BNF018", {CORE: "BNF017"}),
    "by a module, on a residual stream": Row(
        net(rectified, c=conv, c2=conv, b=norm, r=lambda: nn.ReLU(inplace=True)),
        "around",
        positive=True,
    ),
    "in code, on a residual stream": Row(
        net(rectified_in_code, c=conv, c2=conv, b=norm),
        "around",
        {MODULE: "BNF022", TRACED: "BNF022"},
        positive=True,
    ),
}

# ---- everything else that goes wrong elsewhere ----


class FrozenNorm(nn.Module):
    """As torchvision has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for k, name in enumerate(("weight", "bias", "running_mean", "running_var")):
            self.register_buffer(name, random(channels, seed=k).abs() - int(k < 3))

    def forward(self, x: Tensor) -> Any:
        names = ("weight", "bias", "running_mean", "running_var")
        w, b, mean, var = (getattr(self, name).reshape(1, -1, 1, 1) for name in names)
        scale = w * (var + self.eps).rsqrt()
        return x * scale + (b - mean * scale)


def normalised(run: Callable[..., Any]) -> Callable[[], nn.Module]:
    return net(run, c=conv, mean=lambda: random(3), var=lambda: random(3, seed=7).abs(),
               w=lambda: free(3))  # fmt: skip


OTHERS = {
    "frozen": Row(lambda: nn.Sequential(conv(3, 4, 3), FrozenNorm(4)), "backward backward"),
    "batch_norm in code": Row(
        normalised(lambda self, x: functional.batch_norm(self.c(x), self.mean, self.var)),
        "backward",
        IN_CODE,
    ),
    "batch_norm with a scale alone": Row(
        normalised(
            lambda self, x: functional.batch_norm(
                input=self.c(x),
                running_var=self.var,
                running_mean=self.mean,
                weight=self.w,
                eps=0.1,
            )
        ),
        "backward",
        IN_CODE,
    ),
    "through Concat into a conv": Row(
        net(
            lambda self, x: self.d(self.b(torch.cat([self.c(x), x], 1))),
            c=conv,
            d=lambda: conv(6, 2),
            b=lambda: norm(6),
        ),
        "forward",
    ),
    "through a mean into Linear": Row(
        net(lambda self, x: self.f(self.b(x).mean((2, 3))), f=lambda: nn.Linear(3, 3), b=norm),
        "forward",
    ),
    "a sum of two convs": Row(
        net(lambda self, x: self.b(self.c(x) + self.d(x)), c=conv, d=conv, b=norm),
        "backward",
        positive=True,
    ),
    "one after the other": Row(
        lambda: nn.Sequential(norm(), norm(affine=False), nn.Hardswish()),
        "BNF018 merged",
        {CORE: "BNF017 BNF018 BNF018 merged"},
    ),
    "a layer scale": Row(
        net(lambda self, x: x + self.g.view(3, 1, 1) * self.c(x), c=conv, g=lambda: free(3)),
        "joined",
        IN_CODE,
    ),
    "three dimensions": Row(
        lambda: nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4)),
        "backward",
        {},
        ((2, 3, 2, 3, 4),),
    ),
    "one dimension": Row(
        lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 2), nn.BatchNorm1d(4)),
        "backward",
        {},
        ((2, 3, 5),),
    ),
}

TABLES = {
    "moved": MOVED,
    "constant": CONSTANTS,
    "bad": BAD,
    "shared": SHARED,
    "bias": BIASES,
    "border": BORDERS,
    "linear": LINEAR,
    "in place": IN_PLACE,
    "other": OTHERS,
}
ROWS = {f"{table}: {name}": row for table, rows in TABLES.items() for name, row in rows.items()}


# ---- each by itself ----

EACH = (MODULE, TRACED, GRAPH, BARE)
WHOLE = (PROGRAM, CORE)


def test_rows_speak_of_kinds_that_there_are() -> None:
    assert all({*row.bugs, *row.other} <= {*EACH, *WHOLE} for row in ROWS.values())


def cases(kinds: Iterable[str]) -> list[Any]:
    found = []
    for name, row in ROWS.items():
        for kind in kinds:
            marks = [pytest.mark.xfail(reason=row.bugs[kind])] if kind in row.bugs else []
            found.append(pytest.param(name, kind, marks=marks, id=f"{name} ({kind})"))
    return found


def is_as_expected(row: Row, kind: str, found: Iterable[str]) -> bool:
    known = row.other.get(PROGRAM, row.verdict) if kind == CORE else row.verdict
    expected = row.other.get(kind, known)
    return expected in (ANY, " ".join(sorted(found)))


@pytest.mark.parametrize(("name", "kind"), cases(EACH))
def test_a_fold_says_the_same_or_stays_for_its_reason(name: str, kind: str) -> None:
    row = ROWS[name]
    model, feeds = row.net(), row.feeds()
    expected = outputs(model, feeds)
    result = folded(kind, model, feeds)
    assert error(expected, outputs(result.model, feeds)) < CLOSE
    found = verdicts(result.report)
    assert is_as_expected(row, kind, found.values()), found
    for shapes in row.more:
        others = [random(*shape, seed=9) for shape in shapes]
        assert error(outputs(model, others), outputs(result.model, others)) < CLOSE


# ---- programs: all nets in one, because torch takes long to begin ----


class Together(nn.Module):
    """All nets, each on inputs of its own, with its outputs under its name."""

    def __init__(self, rows: Mapping[str, Row]) -> None:
        super().__init__()
        self.counts = {name: len(row.inputs) for name, row in rows.items()}
        self.nets = nn.ModuleList(row.net() for row in rows.values())

    def forward(self, *inputs: Tensor) -> dict[str, Any]:
        rest = iter(inputs)
        return {
            name: model(*(next(rest) for _ in range(self.counts[name])))
            for name, model in zip(self.counts, self.nets, strict=True)
        }


@cache
def program(kind: str) -> Any:
    rows = {name: row for name, row in ROWS.items() if kind not in row.bugs}
    feeds = [value for row in rows.values() for value in row.feeds()]
    if kind == CORE and rows.keys() == program(PROGRAM)[0].keys():
        return rows, feeds, decomposed(program(PROGRAM)[2])
    whole = exported(Together(rows), feeds)
    return rows, feeds, whole if kind == PROGRAM else decomposed(whole)


@cache
def run(kind: str, level: str) -> tuple[Any, Any, Mapping[str, list[str]]]:
    """The outputs of all nets, those of the folded ones, and the verdicts, by net."""
    rows, feeds, whole = program(kind)
    result = bnfold.fold(whole, level=level)
    names = [*rows]
    found: dict[str, list[str]] = {name: [] for name in names}
    for label, verdict in verdicts(result.report).items():
        found[names[int(label.split(".")[1])]].append(verdict)
    with torch.no_grad():
        return Together(rows)(*feeds), result.model.module()(*feeds), found


@pytest.mark.parametrize(("name", "kind"), cases(WHOLE))
def test_in_a_program_it_says_the_same_or_stays_for_its_reason(name: str, kind: str) -> None:
    row = ROWS[name]
    expected, given, found = run(kind, "max")
    assert error([*tensors_in(expected[name])], [*tensors_in(given[name])]) < CLOSE
    assert is_as_expected(row, kind, found[name]), found[name]


@pytest.mark.parametrize(("name", "kind"), cases(WHOLE))
def test_level_local_says_the_same_and_folds_no_more(name: str, kind: str) -> None:
    expected, given, found = run(kind, "local")
    assert error([*tensors_in(expected[name])], [*tensors_in(given[name])]) < CLOSE
    kept, also = (
        sum(verdict.startswith("BNF") for verdict in each[name])
        for each in (found, run(kind, "max")[2])
    )
    assert kept >= also
