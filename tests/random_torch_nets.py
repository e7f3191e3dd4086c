"""Random torch modules in float64, written as Python code: what fails can be read and pasted.

``python -m tests.random_torch_nets SECONDS [SEED]`` folds one after the other in all kinds and on
both levels, and prints the code of those that fail.
"""

from __future__ import annotations

import copy
import random
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

import bnfold

T = TypeVar("T")
Shape = tuple[int, ...]
TOLERANCE = 1e-9
SMALLEST = 1e-4
LARGEST = 4000
LEVELS = ("max", "local")


# ---- modules of one's own ----


class Scale(nn.Module):
    """A step in a module, with a tensor of its own."""

    constant: Tensor

    def __init__(self, constant: Tensor, shifts: bool) -> None:
        super().__init__()
        self.register_buffer("constant", constant)
        self.shifts = shifts

    def forward(self, x: Tensor) -> Tensor:
        return x + self.constant if self.shifts else x * self.constant


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with an activation, as timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps
        )
        made: Tensor = self.act(x)
        return made


class Residual(nn.Module):
    """What is inside, and around it the input."""

    def __init__(self, inner: nn.Module, *, in_place: bool) -> None:
        super().__init__()
        self.inner, self.in_place = inner, in_place

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        if self.in_place:
            y += x
            return y
        return x + y


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()
        return gated


# ---- making ----


class ImpossibleError(Exception):
    """A piece does not fit the values there are."""


@dataclass(frozen=True, slots=True)
class Live:
    """A value: its name in the code, its shape with a batch of 2, the axis of its channels."""

    name: str
    shape: Shape
    axis: int = 1

    @property
    def channels(self) -> int:
        return self.shape[self.axis]


@dataclass(slots=True)
class Maker:
    """The module as far as it is made."""

    rng: random.Random
    source: torch.Generator
    lines: list[str] = field(default_factory=list)
    held: dict[str, Any] = field(default_factory=dict)
    pool: list[Live] = field(default_factory=list)
    shared: dict[tuple[str, Shape], tuple[str, Shape]] = field(default_factory=dict)
    calm: bool = False
    digits: int = 6

    def chance(self, p: float = 0.5) -> bool:
        return self.rng.random() < p

    def pick(self, options: Sequence[T]) -> T:
        return options[self.rng.randrange(len(options))]

    def upto(self, highest: int, lowest: int = 1) -> int:
        return self.rng.randint(lowest, highest)

    def live(self, fits: Callable[[Live], bool] = lambda _: True) -> Live:
        """A value of the pool, a recent one rather than an old one."""
        found = [value for value in self.pool if fits(value)]
        if not found:
            raise ImpossibleError
        back = 1
        while back < len(found) and self.chance(0.35):
            back += 1
        return found[-back]

    def image(self) -> Live:
        return self.live(lambda v: len(v.shape) == 4 and v.axis == 1)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.source, dtype=torch.float64)

    def scales(self, size: int) -> Tensor:
        """Some negative, some zero, one tiny; in a calm net none of these."""
        values = 1 + self.draw(size) / 2
        values[values.abs() < 0.2] = 0.7
        if self.calm or self.chance():
            values = values.abs()
        if not self.calm and self.chance(0.25):
            values[self.rng.randrange(size)] = 0
        if self.digits > 3 and self.chance(0.1):
            self.digits -= 6
            values[self.rng.randrange(size)] = 1e-6
        return values

    def hold(self, value: Any, *, learns: bool = True) -> str:
        """A module or a tensor of the net; its name in the code.

        A tensor that ``learns`` may be a parameter, any other one is a buffer.
        """
        kind = "m" if isinstance(value, nn.Module) else "t" if learns else "b"
        name = f"{kind}{len(self.held)}"
        self.held[name] = value
        return f"self.{name}"

    def say(self, expression: str, shape: Shape, axis: int = 1) -> Live:
        """A line of code, whose value is in the pool afterwards."""
        if torch.Size(shape).numel() > LARGEST or 0 in shape:
            raise ImpossibleError
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        value = Live(name, shape, axis)
        self.pool.append(value)
        return value

    def call(self, module: nn.Module, value: Live, axis: int = 1) -> Live:
        """A line that calls a module; at times one that is called already."""
        key = type(module).__name__, value.shape
        if key in self.shared and self.chance(0.15):
            name, shape = self.shared[key]
        else:
            self.settle(module)
            with torch.no_grad():
                shape = tuple(copy.deepcopy(module).eval()(torch.zeros(value.shape).double()).shape)
            name = self.hold(module)
            self.shared[key] = name, shape
        return self.say(f"{name}({value.name})", shape, axis)

    @torch.no_grad()
    def settle(self, module: nn.Module) -> None:
        """Hard statistics, and weights that keep a signal's size about the same."""
        module.double()
        for inner in module.modules():
            if isinstance(inner, nn.modules.batchnorm._NormBase) and inner.running_var is not None:
                assert inner.running_mean is not None
                inner.running_mean.copy_(self.draw(inner.num_features))
                inner.running_var.copy_(2 ** self.draw(inner.num_features))
                inner.eps = self.pick((1e-5, 1e-3))
            if isinstance(inner, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
                if inner.weight is not None and inner.bias is not None:
                    inner.weight.copy_(self.scales(inner.weight.numel()))
                    inner.bias.copy_(self.draw(inner.bias.numel()))
            elif isinstance(inner, nn.modules.conv._ConvNd | nn.Linear):
                inner.weight.copy_(self.draw(*inner.weight.shape) * inner.weight[0].numel() ** -0.5)
                if inner.bias is not None:
                    inner.bias.copy_(self.draw(inner.bias.numel()) / 4)


# ---- pieces ----


def conv(m: Maker) -> None:
    value = m.live(lambda v: len(v.shape) in (3, 4, 5) and v.axis == 1)
    space = len(value.shape) - 2
    kernel = m.upto(min(3, *value.shape[2:]))
    groups = m.pick([g for g in (1, 1, 1, 2, value.channels) if value.channels % g == 0])
    options: dict[str, Any] = {"groups": groups, "bias": m.chance()}
    options["padding"] = m.pick((0, 0, kernel // 2))
    if options["padding"] and m.chance(0.2) and min(value.shape[2:]) > 1:
        options["padding_mode"] = m.pick(("reflect", "replicate"))
    outputs = groups * m.upto(max(1, 6 // groups))
    kinds: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    made = kinds[space - 1](value.channels, outputs, kernel, m.pick((1, 1, 2)), **options)
    if options.get("padding_mode") == "reflect" and space == 3:
        raise ImpossibleError
    after = m.call(made, value)
    if m.chance(0.4):
        _norm(m, after)


def conv_transposed(m: Maker) -> None:
    value = m.live(lambda v: len(v.shape) in (3, 4) and v.axis == 1)
    groups = m.pick([g for g in (1, 1, 2) if value.channels % g == 0])
    stride = m.upto(2)
    kinds: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d)
    made = kinds[len(value.shape) - 3](
        value.channels, groups * m.upto(3), m.upto(3, stride), stride, groups=groups,
        bias=m.chance(), output_padding=m.upto(stride - 1, 0),
    )  # fmt: skip
    after = m.call(made, value)
    if m.chance(0.5):
        _norm(m, after)


def linear(m: Maker) -> None:
    value = m.live(lambda v: v.axis == len(v.shape) - 1 or len(v.shape) == 2)
    made = nn.Linear(value.shape[-1], m.upto(6), bias=m.chance(0.7))
    after = m.call(made, value, len(value.shape) - 1)
    if m.chance(0.4):
        _norm(m, after)


def norm(m: Maker) -> None:
    _norm(m, m.live())


def _norm(m: Maker, value: Live) -> None:
    """On axis 1, wherever the channels are."""
    rank = len(value.shape)
    kinds: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    if rank not in kinds:
        raise ImpossibleError
    kind = m.rng.random()
    if kind < 0.1 and rank == 4:
        m.call(NormAct(value.shape[1]), value)
    elif kind < 0.2:
        mean = m.hold(m.draw(value.shape[1]), learns=False)
        variance = m.hold(m.draw(value.shape[1]).exp(), learns=False)
        gamma, beta = m.hold(m.scales(value.shape[1])), m.hold(m.draw(value.shape[1]))
        given = f"{value.name}, {mean}, {variance}, {gamma}, {beta}"
        m.say(f"functional.batch_norm({given}, training=False, eps=1e-4)", value.shape, value.axis)
    else:
        made = kinds[rank](value.shape[1], affine=m.chance(0.9))
        made.stays_in_training = m.chance(0.03)
        m.call(made, value, value.axis)


def other_norm(m: Maker) -> None:
    if m.chance():
        value = m.live(lambda v: v.axis == len(v.shape) - 1)
        m.call(nn.LayerNorm(value.shape[-1]), value, value.axis)
    else:
        value = m.image()
        m.call(nn.GroupNorm(1, value.channels), value)


def step(m: Maker) -> None:
    value = m.live()
    size = value.channels
    shape = (size, *[1] * (len(value.shape) - value.axis - 1))
    shifts = m.chance()
    constant = (m.draw(size) if shifts else m.scales(size)).reshape(shape)
    kind = m.rng.random()
    if kind < 0.3:
        m.call(Scale(constant, shifts), value, value.axis)
    elif kind < 0.8:
        name = m.hold(constant)
        forms: tuple[str, ...] = ("{v} + {c}", "{v} - {c}", "{c} - {v}", "{c} + {v}")
        forms = forms if shifts else ("{v} * {c}", "{c} * {v}", "torch.mul({v}, {c})")
        m.say(m.pick(forms).format(v=value.name, c=name), value.shape, value.axis)
    else:
        forms = (
            "-{v}",
            "{v} * 0.5",
            "{v} / 3",
            "2 - {v}",
            "{v} + 1.5",
            "torch.add({v}, 1, alpha=2)",
        )
        m.say(m.pick(forms).format(v=value.name), value.shape, value.axis)


def activation(m: Maker) -> None:
    value = m.live()
    kind = m.rng.random()
    if kind < 0.5:
        modules: Any = (nn.ReLU(), nn.ReLU(True), nn.LeakyReLU(0.1), nn.Identity(), nn.Dropout(0.1),
                        nn.Sigmoid(), nn.GELU(), nn.ReLU6(True), nn.Hardswish())  # fmt: skip
        m.call(m.pick(modules), value, value.axis)
    else:
        forms = ("functional.relu({v})", "{v}.relu()", "{v}.clone()", "torch.tanh({v})",
                 "functional.leaky_relu({v}, 0.2)", "{v}.clamp(min=0)", "{v}.contiguous()",
                 "functional.relu({v}, inplace=True)", "{v}.relu_()")  # fmt: skip
        m.say(m.pick(forms).format(v=value.name), value.shape, value.axis)


def pool(m: Maker) -> None:
    value = m.image()
    size = min(value.shape[2:])
    modules: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)]
    if size > 2:
        modules += [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1)]
        modules += [nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.ReflectionPad2d(1)]
    modules += [nn.ZeroPad2d(1), nn.Upsample(scale_factor=2), nn.ConstantPad2d(1, 0.5)]
    m.call(m.pick(modules), value)


def joined(m: Maker) -> None:
    one = m.live()
    two = m.live(lambda v: v.shape == one.shape and v.axis == one.axis)
    forms = ("{a} + {b}", "{a} - {b}", "torch.add({a}, {b}, alpha=2)", "torch.maximum({a}, {b})",
             "{a}.add_({b})", "{a} * {b}.sigmoid()", "torch.where({b} > 0, {a}, {b})",
             "functional.relu({a} + {b})")  # fmt: skip
    m.say(m.pick(forms).format(a=one.name, b=two.name), one.shape, one.axis)


def changed(m: Maker) -> None:
    """In place; who reads it later reads the new numbers."""
    one = m.live(lambda v: v.name != "v0")
    two = m.live(lambda v: v.shape == one.shape)
    constant = m.hold(m.draw(one.channels).reshape(-1, *[1] * (len(one.shape) - one.axis - 1)))
    forms = ("{a} += {b}", "{a} *= 0.5", "{a}.add_({c})", "{a} -= {c}", "{a}.mul_({c})",
             "{a}[:, :1] += 1", "{a}[:1] *= 2", "{a}.neg_()")  # fmt: skip
    m.lines.append(m.pick(forms).format(a=one.name, b=two.name, c=constant))


def concat(m: Maker) -> None:
    one = m.live()
    rest = [one.shape[: one.axis], one.shape[one.axis + 1 :]]
    two = m.live(
        lambda v: v.axis == one.axis and [v.shape[: v.axis], v.shape[v.axis + 1 :]] == rest
    )
    shape = (*rest[0], one.channels + two.channels, *rest[1])
    m.say(f"torch.cat([{one.name}, {two.name}], {one.axis})", shape, one.axis)


def split(m: Maker) -> None:
    value = m.live(lambda v: v.channels > 1)
    at = m.upto(value.channels - 1)
    before, after = value.shape[: value.axis], value.shape[value.axis + 1 :]
    form = m.pick(("split", "narrow", "slice", "index"))
    sizes = [at, value.channels - at]
    if form == "split":
        both = m.say(f"{value.name}.split({sizes}, {value.axis})", value.shape, value.axis)
        m.pool.remove(both)
        for k, size in enumerate(sizes):
            m.say(f"{both.name}[{k}]", (*before, size, *after), value.axis)
    elif form == "narrow":
        m.say(f"{value.name}.narrow({value.axis}, 0, {at})", (*before, at, *after), value.axis)
    elif form == "slice":
        index = ", ".join([":"] * value.axis + [f"{at}:"])
        m.say(f"{value.name}[{index}]", (*before, sizes[1], *after), value.axis)
    else:
        order = list(range(value.channels))
        m.rng.shuffle(order)
        m.say(f"{value.name}.index_select({value.axis}, torch.tensor({order}))", value.shape,
              value.axis)  # fmt: skip


def moved(m: Maker) -> None:
    value = m.live()
    n, *rest = value.shape
    rank, axis, name = len(value.shape), value.axis, value.name
    forms: list[tuple[str, Shape, int]] = []
    if rank == 4 and axis == 1:
        c, h, w = rest
        forms += [(f"{name}.flatten(2).transpose(1, 2)", (n, h * w, c), 2),
                  (f"{name}.permute(0, 2, 3, 1)", (n, h, w, c), 3),
                  (f"{name}.mean((2, 3))", (n, c), 1)]  # fmt: skip
        if h * w <= 16:
            forms.append((f"{name}.flatten(1)", (n, c * h * w), 1))
        if c % 4 == 0:
            forms += [(f"functional.pixel_shuffle({name}, 2)", (n, c // 4, 2 * h, 2 * w), 1)]
        if c % 2 == 0:
            shuffle = f".reshape({name}.shape[0], {c}, {h}, {w})"
            apart = f"{name}.view({name}.shape[0], 2, {c // 2}, {h}, {w}).transpose(1, 2)"
            forms.append((apart + shuffle, value.shape, 1))
    if rank == 4 and axis == 3:
        forms.append((f"{name}.permute(0, 3, 1, 2)", (n, rest[2], rest[0], rest[1]), 1))
    if rank == 3:
        forms.append((f"{name}.transpose(1, 2)", (n, rest[1], rest[0]), 3 - axis))
        forms.append((f"{name}.unsqueeze({4 - axis})",
                      (n, *rest, 1) if axis == 1 else (n, rest[0], 1, rest[1]),
                      1 if axis == 1 else 3))  # fmt: skip
    if rank == 2:
        forms.append((f"{name}[:, :, None, None]", (n, rest[0], 1, 1), 1))
    if not forms:
        raise ImpossibleError
    m.say(*m.pick(forms))


def block(m: Maker) -> None:
    """Layers in a Sequential, perhaps with a way around."""
    value = m.image()
    channels = value.channels
    layers: list[nn.Module] = [
        nn.Conv2d(channels, channels, 3, padding=1, bias=m.chance()), nn.BatchNorm2d(channels),
        nn.ReLU(inplace=m.chance()),
    ]  # fmt: skip
    if m.chance():
        layers = [nn.BatchNorm2d(channels), nn.ReLU(inplace=m.chance()), layers[0]]
    made: nn.Module = nn.Sequential(*layers)
    if m.chance(0.6):
        made = Residual(made, in_place=m.chance(0.3))
    m.call(made, value)
    if m.chance(0.2):
        m.call(Gate(channels), value)


def tied(m: Maker) -> None:
    """Two layers that read one Parameter."""
    value = m.image()
    one, two = (nn.Conv2d(value.channels, value.channels, 1) for _ in range(2))
    m.settle(one)
    m.settle(two)
    two.weight = one.weight
    for made in (one, two):
        after = m.say(f"{m.hold(made)}({value.name})", value.shape)
        if m.chance():
            _norm(m, after)


def functional(m: Maker) -> None:
    """A layer as a function of tensors."""
    value = m.image()
    weight = m.hold(m.draw(3, value.channels, 1, 1))
    bias = m.hold(m.draw(3)) if m.chance() else "None"
    shape = (value.shape[0], 3, *value.shape[2:])
    m.say(f"functional.conv2d({value.name}, {weight}, {bias})", shape)


PIECES = (
    *[conv] * 5, *[norm] * 4, *[step] * 4, *[activation] * 4, *[block] * 3, *[joined] * 3,
    *[moved] * 3, linear, linear, conv_transposed, other_norm, pool, pool, changed, concat, concat,
    split, tied, functional,
)  # fmt: skip


# ---- the whole ----


@dataclass(frozen=True, slots=True)
class Net:
    """A module, the code of its forward, and an example input."""

    module: nn.Module
    code: str
    inputs: tuple[Tensor, ...]
    seen: list[Tensor]


def random_net(seed: int, pieces: int) -> Net:
    """The net of ``seed``, in eval mode but for a BatchNorm here and there."""
    m = Maker(random.Random(seed), torch.Generator().manual_seed(seed))
    m.calm = m.chance()
    _enter(m)
    if m.chance(0.7):
        _extend(m, conv)
    for _ in range(pieces):
        _extend(m, m.pick(PIECES))
    return _finish(m, seed)


def _enter(m: Maker) -> None:
    """Images, mostly; else sequences, clips, tokens or vectors."""
    channels, space = m.upto(6, 2), m.pick((2, 2, 2, 2, 1, 3, 0, -1))
    sizes = [m.upto(3 if space == 3 else 6, 3) for _ in range(abs(space))]
    shape = (2, *sizes, channels) if space < 0 else (2, channels, *sizes)
    m.say("x", shape, len(shape) - 1 if space < 0 else 1)


def _extend(m: Maker, piece: Callable[[Maker], None]) -> None:
    kept = list(m.lines), dict(m.held), list(m.pool), dict(m.shared), m.digits
    try:
        piece(m)
    except ImpossibleError:
        m.lines, m.held, m.pool, m.shared, m.digits = kept


def _finish(m: Maker, seed: int) -> Net:
    body = [*m.lines]
    read = {name for line in body for name in re.findall(r"\bv\d+", line.partition(" = ")[2])}
    ends = [v.name for v in m.pool[1:] if v.name not in read]
    outputs = [v for v in ends if v == ends[-1] or m.chance(0.6)] or [m.pool[-1].name]
    outputs += [m.pick(m.pool).name] if m.chance(0.15) else []
    if m.chance(0.2):  # some of it without gradients
        at = m.upto(len(body))
        inner = [f"    {line}" for line in body[at - 1 :]]
        body = [*body[: at - 1], "with torch.no_grad():", *inner]
    body.append(f"return {', '.join(outputs)}" if len(outputs) > 1 else f"return {outputs[0]}")
    code = "def forward(self, x):\n" + "\n".join(f"    {line}" for line in body)
    module = _module(m, code)
    seen: list[Tensor] = []
    _hook(m, module, seen)
    inputs = (torch.randn(m.pool[0].shape, generator=m.source, dtype=torch.float64),)
    return Net(module, _described(m, seed, code), inputs, seen)


def _module(m: Maker, code: str) -> nn.Module:
    names: dict[str, Any] = {"torch": torch, "functional": nn.functional, "__name__": __name__}
    exec(code, names)  # the point is that it is code
    module: nn.Module = type("Net", (nn.Module,), {"forward": names["forward"]})()
    for name, value in m.held.items():
        if isinstance(value, nn.Module):
            module.add_module(name, value)
        elif name.startswith("t") and m.chance():
            module.register_parameter(name, nn.Parameter(value))
        else:
            module.register_buffer(name, value)
    module.eval()
    for inner in module.modules():
        if getattr(inner, "stays_in_training", False):
            inner.train()
    return module


def _hook(m: Maker, module: nn.Module, seen: list[Tensor]) -> None:
    """At times somebody looks at what a module makes, or changes it."""
    parts = list(module.children())
    if not parts or not m.chance(0.15):
        return
    part = m.pick(parts)
    if m.chance():
        part.register_forward_hook(lambda _m, _a, output: output * 2)
    else:
        part.register_forward_hook(lambda _m, _a, output: seen.append(output.clone()))


def _described(m: Maker, seed: int, code: str) -> str:
    held = [f"self.{k}: {v if isinstance(v, nn.Module) else tuple(v.shape)}"
            for k, v in m.held.items()]  # fmt: skip
    return "\n".join([f"seed {seed}, input {m.pool[0].shape}", *held, code])


# ---- folding in all kinds ----

MODULE, BARE, IN_PLACE, PROGRAM, DYNAMIC, CORE, FX, FX_BARE = (
    "module", "module without inputs", "in place", "program", "dynamic program", "core", "fx",
    "fx without inputs",
)  # fmt: skip
KINDS = (MODULE, BARE, IN_PLACE, PROGRAM, DYNAMIC, CORE, FX, FX_BARE)


def state(module: nn.Module) -> dict[str, bytes]:
    """All tensors, bit for bit."""
    return {k: v.detach().contiguous().numpy().tobytes() for k, v in module.state_dict().items()}


def run(net: Net, model: Any, given: tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs of a copy, and what hooks saw."""
    net.seen.clear()
    with torch.no_grad():
        made = copy.deepcopy(model)(*(x.clone() for x in given))
    return [*(made if isinstance(made, tuple | list) else [made]), *net.seen]


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest error of any output, relative to that output."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    return max(
        float((f - e).norm()) / max(float(e.norm()), SMALLEST)
        for f, e in zip(found, expected, strict=True)
    )


@dataclass(slots=True)
class Trial:
    """One net, given as each kind of model; what is captured is captured once."""

    net: Net
    level: str
    programs: dict[str, Any] = field(default_factory=dict)

    def faults(self, kinds: Sequence[str] = KINDS) -> Iterator[str]:
        """What is wrong, in words."""
        for kind in kinds:
            try:
                fault = self._fault(kind)
            except Exception:
                fault = traceback.format_exc(limit=-4)
            if fault:
                yield f"{kind}, {self.level}: {fault}"

    def _fault(self, kind: str) -> str:
        given = self._given(kind)
        if given is None:
            return ""
        before = state(self.net.module)
        result = self._fold(kind, given)
        if kind != IN_PLACE and state(self.net.module) != before:
            return "the given module was changed"
        if kind == IN_PLACE and result.model is not given:
            return "another object came back"
        return self._differs(kind, result) or self._again(kind, result)

    def _given(self, kind: str) -> Any:
        """The model to fold; None where torch itself can't make it."""
        if kind in (MODULE, BARE):
            return self.net.module
        if kind == IN_PLACE:
            return copy.deepcopy(self.net.module)
        try:
            if kind in (FX, FX_BARE):
                return fx.symbolic_trace(copy.deepcopy(self.net.module))
            if kind not in self.programs:
                self.programs[kind] = self._program(kind)
            return self.programs[kind]
        except Exception:
            return None

    def _program(self, kind: str) -> Any:
        if kind == CORE:
            return self._given(PROGRAM).run_decompositions()
        batch = ({0: torch.export.Dim("batch", min=2)},) if kind == DYNAMIC else None
        module = copy.deepcopy(self.net.module)
        return torch.export.export(module, self.net.inputs, dynamic_shapes=batch, strict=False)

    def _fold(self, kind: str, given: Any) -> bnfold.api.FoldResult:
        if kind in (MODULE, IN_PLACE, FX):
            inplace = kind == IN_PLACE
            return bnfold.fold(given, self.net.inputs, level=self.level, inplace=inplace)
        return bnfold.fold(given, level=self.level)

    def _differs(self, kind: str, result: bnfold.api.FoldResult) -> str:
        expected, found = self.net.module, result.model
        if kind in (PROGRAM, DYNAMIC, CORE):
            expected, found = self._given(kind).module(), found.module()
        elif kind in (FX, FX_BARE):
            expected = self._given(kind)
        for batch in (2, 3) if kind in (MODULE, BARE, DYNAMIC) else (2,):
            given = tuple(torch.cat([x, x * 0.5])[:batch] for x in self.net.inputs)
            try:
                true = run(self.net, expected, given)
            except Exception:
                continue  # a net for one size of the batch
            off = error(run(self.net, found, given), true)
            if not off <= TOLERANCE:
                return f"off by {off:.1e} for a batch of {batch}: {verdicts(result)}"
        return ""

    def _again(self, kind: str, result: bnfold.api.FoldResult) -> str:
        """What a second fold does, and whether the state can be stored and loaded."""
        for step in result.report.steps:
            if not (step.how if step.verdict == "folded" else step.code.startswith("BNF")):
                return f"{step.name} has no verdict"
        if kind == MODULE:
            other = copy.deepcopy(result.model)
            other.load_state_dict(result.model.state_dict(), strict=True)
            if state(other) != state(result.model):
                return "the state can't be stored and loaded"
        return ""


def verdicts(result: bnfold.api.FoldResult) -> str:
    return ", ".join(f"{s.name} {s.how or s.code} {' '.join(s.into)}" for s in result.report.steps)


def faults(net: Net, levels: Sequence[str] = LEVELS, kinds: Sequence[str] = KINDS) -> list[str]:
    """What is wrong with any of the folded nets."""
    found: list[str] = []
    programs: dict[str, Any] = {}
    for level in levels:
        trial = Trial(net, level, programs)
        found += trial.faults(kinds)
        programs = trial.programs
    return found


def main(seconds: float, seed: int) -> None:
    """Fold net after net, and print the ones that fail."""
    torch.set_num_threads(1)
    end, count, failed = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        net = random_net(seed, 1 + seed % 14)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong = faults(net)
        count, failed = count + 1, failed + bool(wrong)
        if wrong:
            print("=" * 100, net.code, *wrong, sep="\n", flush=True)
        seed += 1
    print(f"{count} nets, {failed} failed; the next seed is {seed}")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
