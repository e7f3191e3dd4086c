"""The neutral vocabulary: what a front end states about a graph, and nothing else.

Every activation ``v`` may be stored in other units as ``u``, with ``v = s * u + t`` per channel.
The operators here say which units they can live with; the passes decide. A front end states
facts only (who reads what, what is constant, what pads, what is in training mode); tensors are
lent by name and read when a fold needs them.

Values are numbered; an operator names the values it reads and writes. Axes are those of the
activation, counted from the front, or from the back (negative) where the rank is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, Flag

import numpy as np
from numpy.typing import NDArray

from bnfold.affine import AffineMap

Dim = int | str | None
"""One dimension: its size, its symbol, or None when nothing is known."""

ValueId = int


@dataclass(frozen=True, slots=True)
class Value:
    """An activation. ``shape`` is None when the rank is unknown."""

    name: str
    shape: tuple[Dim, ...] | None
    dtype: str


class Anchor(Enum):
    """Why a value has to stay in true units: somebody outside the graph's own operators reads it.

    The text completes "the tensor ...".
    """

    INPUT = "is an input of the graph"
    OUTPUT = "is an output of the graph"
    CAPTURED = "is captured by a subgraph"
    HOOK = "is seen by a hook"
    CHANGED = "is changed in place while others still read it"


class Bias(Enum):
    """Where a linear operator would put a shift."""

    BUILT_IN = "an input of the operator, or an Add that already follows it"
    OPERATOR = "an Add that has yet to be made"
    DYNAMIC = "taken: it is computed at run time"
    NOWHERE = "nowhere: what calls the operator has no place for a bias"


class Leftover(Enum):
    """As what other operators a step that stays can be written."""

    AFFINE = "affine"
    """A multiplication, an addition, or one behind the other."""
    DEPTHWISE = "depthwise"
    """A convolution of 1x1 with a group for each channel."""


class Form(Enum):
    """What one operator of an affine step can express."""

    BOTH = "a scale and a shift at once"
    EITHER = "a scale or a shift"


class Side(Flag):
    """Sides of a linear operator: along whose channels something varies."""

    NONE = 0
    INPUT = 1
    OUTPUT = 2
    BOTH = 3


@dataclass(frozen=True, slots=True)
class Weight:
    """The constant of a linear operator, by the name of its storage.

    ``readers`` are the names of all operators that read the same storage, under whatever name.
    ``view`` says how this operator reads it (transposed, reshaped ...): two that read one storage
    hold the same numbers in the same places only if their views are equal. What it is multiplied by
    can vary along the channels of one entry of ``varies`` (integers have scales along one axis) and
    is one number along those of the other sides.
    """

    storage: str
    dtype: str
    readers: tuple[str, ...]
    nbytes: int = 0
    view: str = ""
    varies: tuple[Side, ...] = (Side.BOTH,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """Anything that reads and writes values; ``name`` is what reports print."""

    name: str
    op_type: str
    inputs: tuple[ValueId, ...]
    outputs: tuple[ValueId, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """Channels of one value that are channels of another.

    Entry ``source_index[i]`` along the axes ``source`` of the one (in row-major order of the axes
    as they are listed) is entry ``target_index[i]`` along the axes ``target`` of the other. Without
    an index all entries are meant, in order.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    source_index: NDArray[np.int64] | None = None
    target_index: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """How channels go from the value ``source`` to the value ``target``.

    Without ``links`` both have one shape and go axis by axis. Along an axis that is in no link
    (one that is pooled over, or broadcast along) the units of a value have to be the same.
    """

    source: ValueId
    target: ValueId
    links: tuple[Link, ...] | None = None


@dataclass(frozen=True, slots=True)
class Taps:
    """Which positions a linear operator reads along one spatial axis.

    Output position ``o`` reads positions ``stride * o + first + step * k`` of the input for ``k``
    in ``range(count)``, and zeros beyond its border. From an input of ``size`` positions it makes
    ``(size + slack) // stride + 1`` of them.
    """

    count: int
    first: int
    step: int
    stride: int
    slack: int

    @classmethod
    def of(
        cls, kernel: int, stride: int = 1, dilation: int = 1, begin: int = 0, end: int = 0
    ) -> Taps:
        """Those of a convolution that pads ``begin`` and ``end`` zeros."""
        extent = (kernel - 1) * dilation + 1
        return cls(kernel, -begin, dilation if kernel > 1 else 1, stride, begin + end - extent)

    @property
    def last(self) -> int:
        """The furthest position that the first output reads."""
        return self.first + (self.count - 1) * self.step

    @property
    def begin(self) -> int:
        """How many zeros are padded in before the input; negative where it begins further in."""
        return -self.first

    @property
    def end(self) -> int:
        """How many zeros are padded in behind the input; negative where its end is not read."""
        return self.slack + self.last + 1


POINT = Taps.of(1)
"""Each position for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(Operator):
    """``y = W x + bias`` along channels: Conv, ConvTranspose, Gemm, MatMul by a constant.

    ``inputs[0]`` is the activation. ``weight`` is None when it is computed at run time.
    ``shift_barrier`` says why a shift of the input does not reach every position of the output
    alike (zeros are padded in, sums are incomplete); empty when it does.
    ``taps`` are those of each spatial axis, where that is all that there is to say of the operator:
    they are None for ConvTranspose, for weights with batches, and where they are not known.
    ``biased`` is False where there is no bias, or one of zeros.
    """

    in_axis: int
    out_axis: int
    in_channels: int
    out_channels: int
    weight: Weight | None
    bias: Bias
    shift_barrier: str = ""
    groups: int = 1
    taps: tuple[Taps, ...] | None = None
    biased: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine(Operator):
    """``y = a * x + b`` per channel: a step that may vanish.

    ``axis`` is None when the map is the same everywhere. ``map`` is None when a parameter is
    not constant. ``unproved`` says what about the channel axis could not be proved, if anything.
    ``stays`` names the code that the step is written in, if that can't be changed.
    ``alternatives`` are the operators that the graph could hold in its place, of the type of its
    input: none where the step is one cheap operator already.
    """

    axis: int | None
    map: AffineMap | None
    form: Form
    training_mode: bool = False
    unproved: str = ""
    stays: str = ""
    alternatives: frozenset[Leftover] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantStep(Operator):
    """An affine step over constants only; it can be evaluated away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm(Operator):
    """``y = scale * core(x) + shift``, the core in true units: LayerNormalization and its kin.

    What follows on ``axis`` of the output can go into its own scale and shift, which are
    ``weight`` and ``bias``. ``inputs[0]`` is the activation.
    """

    axis: int
    channels: int
    weight: Weight | None
    bias: Bias


class Sign(Enum):
    """Which scales a tie lets through."""

    ANY = "any"
    POSITIVE = "positive"


class ShiftRule(Enum):
    """Which shifts a tie lets through."""

    EQUAL = "equal on both sides"
    ZERO = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie(Operator):
    """All values on its routes carry the same scale: Identity, Relu, pooling, Concat, Reshape.

    ``routes`` say which channels of which input are which channels of which output; without any,
    every input has the shape of ``outputs[0]``, channel by channel. An input or output on no route
    is in true units, and so is a channel of an output that no route reaches. With a ``fill`` the
    operator adds entries that hold this constant (Pad): where all channels have one scale and one
    shift it can hold another constant, else no shift passes, and no scale unless it is 0.
    With ``taps`` each channel is the mean of what they read: an average of the same number of
    positions everywhere, or a Pad by zeros (of one position). With ``joins`` all that it does is to
    put its inputs one after the other along this axis, where the size of each is known (Concat).
    """

    sign: Sign
    shift: ShiftRule
    routes: tuple[Route, ...] = ()
    fill: float | None = None
    taps: tuple[Taps, ...] | None = None
    joins: int | None = None

    @property
    def free(self) -> bool:
        """Whether units pass unchanged and unconditionally, as through Identity."""
        alike = not self.routes and len(self.inputs) == 1
        return alike and self.sign is Sign.ANY and self.shift is ShiftRule.EQUAL

    @property
    def paths(self) -> tuple[Route, ...]:
        """The routes, stated or by default."""
        return self.routes or tuple(Route(v, self.outputs[0]) for v in self.inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum(Operator):
    """``y = sum of signs[i] * x[i]``: scales equal on all, shifts bound by one equation.

    ``signs[i]`` is 1 or -1, or n where n positions of the input are added up (ReduceSum).
    """

    signs: tuple[int, ...]
    routes: tuple[Route, ...] = ()

    @property
    def paths(self) -> tuple[Route, ...]:
        """One route for each input, stated or by default."""
        return self.routes or tuple(Route(v, self.outputs[0]) for v in self.inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Product(Operator):
    """``y = x1 x2``, element by element or as matrices: linear in each of its two inputs.

    One of the two (the planner chooses) carries its scale to the output, along its route; the
    other one, the gate, is in true units. No shift passes. Both routes lead to ``outputs[0]``.
    """

    routes: tuple[Route, Route]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opaque(Operator):
    """An operator that takes and gives true units: everything unknown."""


@dataclass(frozen=True, slots=True)
class ChannelGraph:
    """All operators of a model, its subgraphs and its functions, over one numbering of values.

    ``symmetric`` says that convolutions can only pad as many zeros before an axis as behind it,
    ``stackable`` that operators whose outputs are concatenated can be written as one, and
    ``regroupable`` that operands can be left out of sums. ``asked`` are values that somebody reads
    who is none of the operators: who asks for their sizes at run time.
    """

    values: tuple[Value, ...]
    operators: tuple[Operator, ...]
    anchors: Mapping[ValueId, Anchor] = field(default_factory=dict)
    symmetric: bool = False
    stackable: bool = False
    regroupable: bool = False
    asked: frozenset[ValueId] = frozenset()
