"""How long planning alone takes, on channel graphs of many operators.

    python -m tools.planning [--operators N] [--channels C] [--repeat N]

Four kinds of network: pre- and post-activation residual blocks, RepVGG blocks, and blocks in which
nothing can fold. Medians; the time of a loaded machine says little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from bnfold.affine import AffineMap
from bnfold.channel_graph import (
    Affine,
    Anchor,
    Bias,
    ChannelGraph,
    Form,
    Linear,
    Opaque,
    Operator,
    ShiftRule,
    Sign,
    Sum,
    Tie,
    Value,
    Weight,
)
from bnfold.passes import plan_max

ValueId = int


class Net:
    """A channel graph being built, one operator after the other."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.values = [Value("v0", (1, channels, 8, 8), "FLOAT")]
        self.operators: list[Operator] = []
        self._rng = np.random.default_rng(0)

    def _new(self) -> ValueId:
        name = f"v{len(self.values)}"
        self.values.append(Value(name, (1, self.channels, 8, 8), "FLOAT"))
        return len(self.values) - 1

    def conv(self, x: ValueId) -> ValueId:
        """A convolution with padding."""
        y, name = self._new(), f"conv{len(self.operators)}"
        self.operators.append(Linear(
            name=name, op_type="Conv", inputs=(x,), outputs=(y,), in_axis=1, out_axis=1,
            in_channels=self.channels, out_channels=self.channels,
            weight=Weight(f"w{name}", "FLOAT", (name,)), bias=Bias.BUILT_IN,
            shift_barrier="it pads with zeros",
        ))  # fmt: skip
        return y

    def norm(self, x: ValueId) -> ValueId:
        """A BatchNormalization with a positive scale."""
        y = self._new()
        scale, shift = (
            self._rng.uniform(0.5, 1.5, self.channels),
            self._rng.normal(size=self.channels),
        )
        self.operators.append(Affine(
            name=f"bn{len(self.operators)}", op_type="BatchNormalization", inputs=(x,),
            outputs=(y,), axis=1, map=AffineMap.of(scale, shift), form=Form.BOTH,
        ))  # fmt: skip
        return y

    def relu(self, x: ValueId) -> ValueId:
        """A Relu."""
        y = self._new()
        self.operators.append(Tie(
            name=f"relu{len(self.operators)}", op_type="Relu", inputs=(x,), outputs=(y,),
            sign=Sign.POSITIVE, shift=ShiftRule.ZERO,
        ))  # fmt: skip
        return y

    def add(self, *x: ValueId) -> ValueId:
        """A residual sum."""
        y = self._new()
        self.operators.append(Sum(
            name=f"add{len(self.operators)}", op_type="Add", inputs=x, outputs=(y,),
            signs=(1,) * len(x),
        ))  # fmt: skip
        return y

    def sigmoid(self, x: ValueId) -> ValueId:
        """Something that takes and gives true units."""
        y = self._new()
        name = f"sigmoid{len(self.operators)}"
        self.operators.append(Opaque(name=name, op_type="Sigmoid", inputs=(x,), outputs=(y,)))
        return y

    def graph(self, output: ValueId) -> ChannelGraph:
        """All of it."""
        ends = {0: Anchor.INPUT, output: Anchor.OUTPUT}
        return ChannelGraph(tuple(self.values), tuple(self.operators), ends)


KINDS: dict[str, Callable[[Net, ValueId], ValueId]] = {
    "pre-activation": lambda n, x: n.add(x, n.conv(n.relu(n.norm(n.conv(n.relu(n.norm(x))))))),
    "post-activation": lambda n, x: n.relu(n.add(x, n.norm(n.conv(n.relu(n.norm(n.conv(x))))))),
    "RepVGG": lambda n, x: n.relu(
        n.add(n.add(n.norm(n.conv(x)), n.norm(n.conv(x))), n.norm(x))
    ),
    "nothing folds": lambda n, x: n.norm(
        n.sigmoid(n.conv(n.add(x, n.norm(n.sigmoid(n.conv(x))))))
    ),
}  # fmt: skip


def build(kind: str, operators: int, channels: int) -> ChannelGraph:
    """A network of at least ``operators`` operators."""
    net = Net(channels)
    x = net.conv(0)
    while len(net.operators) < operators - 1:
        x = KINDS[kind](net, x)
    return net.graph(net.conv(x))


def main() -> int:
    """Plan each kind and print its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--operators", type=int, default=10_000)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    for kind in KINDS:
        graph = build(kind, options.operators, options.channels)
        seconds = []
        for _ in range(options.repeat):
            start = time.perf_counter()
            plan = plan_max(graph)
            seconds.append(time.perf_counter() - start)
        counts = f"{len(graph.operators):6} operators {len(plan.folds):5} fold"
        rest = f"{len(plan.kept):5} stay {statistics.median(seconds):6.2f} s"
        print(f"{kind:16} {counts} {rest}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
