"""Channel graphs at random: a seed, a size, and what kind of numbers and facts to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from bnfold.affine import F64, AffineMap
from bnfold.channel_graph import Anchor, Bias, Form, ValueId, Weight
from tests.channel_graphs import Builder, Net


@dataclass(frozen=True, slots=True)
class Taste:
    """What to draw.

    ``nice``: few distinct rational maps, so that coincidences happen, and no zero or tiny scale.
    ``odd``: also facts that forbid a fold (shared, dynamic or missing weights, closed steps,
    steps without an axis or along another one), and sizes that are symbols or unknown.
    ``products``: also products of which either factor could be the gate.
    ``undone``: also steps that undo others.
    """

    nice: bool
    odd: bool
    steps: int
    negative: float = 0.15
    products: bool = True
    undone: bool = True


def random_net(seed: int, size: int, taste: Taste) -> Net:
    """A net of about ``size`` operators."""
    rng = np.random.default_rng(seed)
    draw = Draw(Builder(rng), rng, taste)
    for _ in range(rng.integers(1, 3)):
        value = draw.net.input(int(rng.integers(1, 4)), int(rng.integers(1, 4)))
        draw.fresh(value if rng.random() < 0.3 else draw.net.linear(value, draw.channels()))
    while len(draw.net.operators) < size:
        draw.one()
    draw.finish()
    made = draw.net.done()
    return disguised(made, rng) if taste.odd else made


def disguised(net: Net, rng: np.random.Generator) -> Net:
    """The same net with less known about it: symbols for sizes, or no shape at all."""
    mode = rng.integers(4)
    if mode < 2:
        return net
    values = []
    for value in net.graph.values:
        assert value.shape is not None
        named = ("N", value.shape[1], f"P{value.shape[2]}")
        hidden = mode == 3 and rng.random() < 0.4
        values.append(replace(value, shape=None if hidden else named))
    return replace(net, graph=replace(net.graph, values=tuple(values)))


def nets(taste: Taste, most: int = 12) -> st.SearchStrategy[Net]:
    """Nets of up to ``most`` operators and the linear ones that close their ends."""
    seeds = st.integers(0, 2**48)
    return st.builds(random_net, seeds, st.sampled_from(range(2, most + 1)), st.just(taste))


class Draw:
    """One net in the making."""

    def __init__(self, net: Builder, rng: np.random.Generator, taste: Taste) -> None:
        self.net, self.rng, self.taste = net, rng, taste
        self.live: list[ValueId] = []
        self.maps: list[AffineMap] = []
        self.turned = bool(taste.odd and rng.random() < 0.5)

    def fresh(self, *values: ValueId) -> None:
        """Values that may be read from now on; some are captured."""
        self.live += values
        for value in values:
            if self.rng.random() < 0.03:
                seen = (Anchor.CAPTURED, Anchor.HOOK, Anchor.CHANGED)[self.rng.integers(3)]
                self.net.anchors.setdefault(value, seen)

    def channels(self) -> int:
        return int(self.rng.integers(1, 5))

    def value(self) -> ValueId:
        """Mostly one that was written lately."""
        back = int(min(self.rng.geometric(0.5), len(self.live)))
        return self.live[-back]

    def alike(self, x: ValueId) -> ValueId:
        """A value of the same shape as ``x``; made by a linear operator if there is no other."""
        shape = self.net.shapes[x]
        same = [v for v in self.live if v != x and self.net.shapes[v] == shape]
        if same and self.rng.random() < 0.7:
            return int(self.rng.choice(same))
        if self.rng.random() < 0.1:
            return x
        source = [v for v in self.live if self.net.shapes[v][2] == shape[2]]
        return self.net.linear(int(self.rng.choice(source)), shape[1])

    def one(self) -> None:
        """One more operator, or a few that belong together."""
        if len(self.maps) < self.taste.steps and self.rng.random() < 0.4:
            return self.fresh(self.step(self.value()))
        kinds = ORDINARY + (ODD if self.taste.odd else ()) + (TURNED if self.turned else ())
        x = self.value()
        made = kinds[self.rng.integers(len(kinds))](self, x)
        if made is not None:
            self.fresh(*(made if isinstance(made, tuple) else (made,)))
        return None

    def finish(self) -> None:
        """Most ends are read by a linear operator: an output of the graph forbids so much."""
        read = {v for op in self.net.operators for v in op.inputs}
        for value in [v for v in self.net.shapes if v not in read]:
            if self.rng.random() < 0.75:
                self.net.linear(value, self.channels())

    # ---- steps ----

    def step(self, x: ValueId) -> ValueId:
        shape, odd = self.net.shapes[x], self.taste.odd and self.rng.random() < 0.25
        axis = 1 if not odd else (None, 2)[self.turned]
        taken = self.map(1 if axis is None else shape[axis])
        pure = taken.is_scaling or taken.is_shifting
        form = Form.EITHER if pure and self.rng.random() < 0.7 else Form.BOTH
        self.maps.append(taken)
        return self.net.step(x, taken, form, axis)

    def map(self, channels: int) -> AffineMap:
        """A map that is no identity; at times one that was there, or undoes one."""
        known = [m for m in self.maps if m.channels == channels]
        if known and self.rng.random() < 0.35:
            again = known[self.rng.integers(len(known))]
            undo = self.taste.undone and self.rng.random() < 0.4
            undo = undo and bool((np.abs(again.scale) > 0.1).all())
            return again.inverse() if undo else again
        while True:
            taken = self.fresh_map(channels)
            if not taken.is_identity:
                return taken

    def fresh_map(self, channels: int) -> AffineMap:
        kind = self.rng.integers(3)
        scale, shift = self.scales(channels), self.shifts(channels)
        both = AffineMap.of(scale, shift)
        taken = (both, AffineMap.scaling(scale), AffineMap.shifting(shift))[kind]
        return taken.expand(channels)

    def scales(self, channels: int) -> F64:
        signs = np.where(self.rng.random(channels) < self.taste.negative, -1.0, 1.0)
        if self.taste.nice:
            return np.asarray(signs * self.rng.choice([1.0, 2.0, 0.5, 3.0], channels))
        usual = self.rng.uniform(0.3, 3.0, channels)
        special = self.rng.choice([1.0, 1e-3, 1e-6, 0.0], channels)
        chosen = np.where(self.rng.random(channels) < 0.12, special, usual)
        return np.asarray(signs * chosen)

    def shifts(self, channels: int) -> F64:
        if self.taste.nice:
            return self.rng.choice([0.0, 1.0, -2.0], channels)
        return np.where(self.rng.random(channels) < 0.2, 0.0, self.rng.normal(size=channels))


Made = ValueId | tuple[ValueId, ...] | None
Kind = Callable[[Draw, ValueId], Made]


def _split(draw: Draw, x: ValueId) -> Made:
    size = draw.net.shapes[x][1]
    return draw.net.split(x, int(draw.rng.integers(1, size))) if size > 1 else None


def _gather(draw: Draw, x: ValueId) -> Made:
    size = draw.net.shapes[x][1]
    return draw.net.gather(x, draw.rng.integers(0, size, draw.channels()).tolist())


def _concat(draw: Draw, x: ValueId) -> Made:
    other = [v for v in draw.live if draw.net.shapes[v][2] == draw.net.shapes[x][2]]
    y = int(draw.rng.choice(other))
    size = draw.net.shapes[x][1] + draw.net.shapes[y][1]
    return draw.net.concat(x, y) if size <= 5 else None


def _sum(draw: Draw, x: ValueId) -> Made:
    signs = draw.rng.choice([1, 1, 1, -1], 2).tolist()
    return draw.net.sum(x, draw.alike(x), signs=signs)


def _sum_of_pooled(draw: Draw, x: ValueId) -> Made:
    return draw.net.sum(x, draw.net.global_average(draw.alike(x)))


def _residual(draw: Draw, x: ValueId) -> Made:
    inner = draw.net.relu(draw.step(x)) if len(draw.maps) < draw.taste.steps else draw.net.relu(x)
    return draw.net.sum(x, draw.net.linear(inner, draw.net.shapes[x][1]))


def _gate(draw: Draw, x: ValueId) -> Made:
    pooled = draw.net.global_average(x)
    gate = draw.net.opaque(draw.net.linear(pooled, draw.net.shapes[x][1]))
    return draw.net.product(x, gate)


def _product(draw: Draw, x: ValueId) -> Made:
    """Two factors of which either could be the gate, or only one of them if so asked."""
    return draw.net.product(x, draw.alike(x)) if draw.taste.products else _gate(draw, x)


def _divide(draw: Draw, x: ValueId) -> Made:
    """By another value: of x / x no front end may say that it lets the units of x through."""
    by = draw.alike(x)
    return draw.net.divide(x, by) if by != x else draw.net.opaque(x)


def _flatten(draw: Draw, x: ValueId) -> Made:
    size = draw.net.shapes[x][1] * draw.net.shapes[x][2]
    return draw.net.flatten(x) if size <= 8 else None


def _shared(draw: Draw, x: ValueId) -> Made:
    """Two readers of one weight."""
    out = draw.channels()
    storage = f"shared{len(draw.net.operators)}"
    return tuple(draw.net.linear(v, out, storage=storage) for v in (x, draw.alike(x)))


def _closed(draw: Draw, x: ValueId) -> Made:
    taken = draw.map(draw.net.shapes[x][1])
    facts: Sequence[dict[str, object]] = (
        {"training_mode": True}, {}, {"map": taken, "unproved": "which axis it is"},
        {"map": taken, "stays": "some code"}, {"map": taken, "stays": "some code"},
    )  # fmt: skip
    return draw.net.closed_step(x, taken, **facts[int(draw.rng.integers(len(facts)))])


def _integers(draw: Draw) -> Weight:
    return Weight(f"w{len(draw.net.operators)}", "INT8", ())


ORDINARY: tuple[Kind, ...] = (
    lambda d, x: d.net.linear(x, d.channels()),
    lambda d, x: d.net.linear(x, d.channels()),
    lambda d, x: d.net.linear(x, d.channels()),
    lambda d, x: d.net.padded(x, d.channels()),
    lambda d, x: d.net.padded(x, d.channels()),
    lambda d, x: d.net.relu(x),
    lambda d, x: d.net.relu(x),
    lambda d, x: d.net.identity(x),
    lambda d, x: d.net.max_pool(x),
    lambda d, x: d.net.average_pool(x),
    lambda d, x: d.net.global_average(x),
    lambda d, x: d.net.pad(x) if d.net.shapes[x][2] < 4 else None,
    lambda d, x: d.net.pad_channels(x) if d.net.shapes[x][1] < 4 else None,
    lambda d, x: d.net.maximum(x, d.alike(x)),
    _divide,
    lambda d, x: d.net.reduce_sum(x),
    _product,
    lambda d, x: d.net.opaque(x),
    lambda d, x: d.net.norm(x),
    _split, _gather, _concat, _concat, _sum, _sum, _sum_of_pooled, _residual, _residual, _gate,
    _flatten,
)  # fmt: skip

ODD: tuple[Kind, ...] = (
    lambda d, x: d.net.linear(x, d.channels(), bias=Bias.DYNAMIC),
    lambda d, x: d.net.linear(x, d.channels(), bias=Bias.OPERATOR),
    lambda d, x: d.net.linear(x, d.channels(), bias=Bias.NOWHERE),
    lambda d, x: d.net.linear(x, d.channels(), weight=None),
    lambda d, x: d.net.linear(x, d.channels(), weight=_integers(d)),
    _shared, _closed,
)  # fmt: skip

# Not beside steps without an axis: which axis they would take a map along is not stated.
TURNED: tuple[Kind, ...] = (
    lambda d, x: d.net.linear(x, d.channels(), axis=2),
    lambda d, x: d.net.transpose(x),
    lambda d, x: d.net.transpose(x),
)
