"""The planner's result as data: which steps vanish, what absorbs them, what stays and why.

A plan refers to operators by their index in the channel graph, so that it can be printed,
compared and committed by any front end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from bnfold.affine import AffineMap
from bnfold.channel_graph import Leftover, Taps, ValueId


class How(Enum):
    """In which way a step vanished."""

    BACKWARD = "backward"
    FORWARD = "forward"
    MERGED = "merged"
    AROUND = "around"
    IDENTITY = "identity"
    EVALUATED = "evaluated"
    JOINED = "joined"


class Stored(Enum):
    """In whose units the one tensor that remains of a step's input and output is stored."""

    BEFORE = "the step's input"
    AFTER = "the step's output"


class Reason(Enum):
    """Why a step stays: the closed list. Codes are stable; a code is never used again.

    The text is one sentence with ``{witness}`` for the nodes that stand in the way; ``hint`` is the
    smallest change of the model that would free the step.
    """

    TRAINING_MODE = (
        "BNF001",
        "it normalises by the statistics of the batch (training mode)",
        "export or fold the model in evaluation mode",
    )
    NOT_CONSTANT = (
        "BNF002",
        "its parameters are not constant: {witness} can change them",
        "--trust-initializers takes initializers that are graph inputs as constants",
    )
    WEIGHT_NOT_CONSTANT = (
        "BNF003",
        "the weight of {witness} is not a constant",
        "a constant weight in {witness} would take it",
    )
    WEIGHT_TYPE = (
        "BNF004",
        "the weight of {witness} is stored in a type that can't be scaled",
        "folding before {witness} is quantised would free it",
    )
    SHARED_WEIGHT = (
        "BNF005",
        "the weight is also read by {witness}",
        "a weight of its own would take it: --unshare",
    )
    CHANNEL_AXIS = (
        "BNF006",
        "its channels are not shown to be the channels of {witness}",
        "stating the shapes of the model's inputs may show it",
    )
    OTHER_READER = (
        "BNF007",
        "the tensor next to it is also read by {witness}",
        "level max looks beyond {witness}",
    )
    GRAPH_BOUNDARY = (
        "BNF008",
        "it stands on the boundary of the graph at {witness}",
        "another tensor in the place of {witness} at the boundary would free it",
    )
    CAPTURED = (
        "BNF009",
        "the tensor {witness} is captured by a subgraph",
        "inlining the subgraph that captures {witness} would free it",
    )
    ZERO_PADDING = (
        "BNF010",
        "its shift does not reach every output of {witness} alike",
        "exporting {witness} with padding 0, or a reflect or edge Pad before it, would free it",
    )
    BIAS_NOT_CONSTANT = (
        "BNF011",
        "the bias of {witness} is computed at run time",
        "a constant bias in {witness} would free it",
    )
    EXTRA_OPERATOR = (
        "BNF012",
        "its shift would need an Add of its own after {witness}",
        "a bias in {witness}, of zeros if need be, would take it",
    )
    RANGE = (
        "BNF013",
        "the folded weight leaves the range of its type: {witness}",
        "folding in a wider type and converting afterwards would free it",
    )
    NO_LINEAR_NEIGHBOUR = (
        "BNF014",
        "no constant weight is next to it, only {witness}",
        "level max looks beyond {witness}",
    )
    SIGN = (
        "BNF015",
        "its scale is negative, and {witness} passes only positive ones",
        "a positive scale on that channel would pass {witness}",
    )
    ZERO_SCALE = (
        "BNF016",
        "its scale is 0 or next to 0, and {witness} would have to undo it",
        "removing the dead channels would free it",
    )
    SHIFT = (
        "BNF017",
        "its shift can't pass {witness}",
        "a step without a shift would pass {witness}",
    )
    FENCED = (
        "BNF018",
        "on both sides of it tensors have to keep their units: {witness}",
        "a linear operator with a constant weight between it and one of them would take it",
    )
    OTHER_PATH = (
        "BNF019",
        "another path leads around it, through {witness}",
        "a convolution on that path would take it",
    )
    OTHER_STEP = (
        "BNF020",
        "one tensor can't take the units of this step and of {witness}",
        "keeping {witness} instead would free it",
    )
    HOOK = (
        "BNF021",
        "the tensor {witness} is seen by a hook",
        "removing the hook would free it",
    )
    IN_PLACE = (
        "BNF022",
        "the tensor {witness} is changed in place while others still read it",
        "an operator that is not in place would free it",
    )
    IN_CODE = (
        "BNF023",
        "it is written in the code of {witness}",
        "folding an ExportedProgram or a GraphModule in place of the module would free it",
    )
    SEVERAL_CALLS = (
        "BNF024",
        "one module does it and {witness}, and not all of these can vanish",
        "a module of its own for each would free it",
    )
    NOT_CAPTURED = (
        "BNF025",
        "what happens around it could not be captured: {witness}",
        "giving example inputs, or folding the parts of the model one by one, may free it",
    )
    ROLLED_BACK = (
        "BNF026",
        "its fold was taken back, because the check did not pass with it: {witness}",
        "reporting it as a bug of bnfold, with the reproducer, may free it",
    )
    GROWS = (
        "BNF027",
        "one operator in place of {witness} would have more weights, or more to compute",
        "there is nothing to win",
    )
    BORDER = (
        "BNF028",
        "at the border {witness} can't be one operator",
        "padding 0 there, or no bias and no shift before it, would join them",
    )
    GEOMETRY = (
        "BNF029",
        "the positions that {witness} read do not line up",
        "equal strides, and paddings with one centre, would join them",
    )

    def __init__(self, code: str, sentence: str, hint: str) -> None:
        self.code = code
        self.sentence = sentence
        self.hint = hint

    @property
    def slug(self) -> str:
        """The name for people and options, such as ``zero-padding``."""
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True, slots=True)
class Fold:
    """Step ``step`` vanishes into the operators ``into`` (indices; empty for an identity)."""

    step: int
    how: How
    into: tuple[int, ...]
    stored: Stored


@dataclass(frozen=True, slots=True)
class Kept:
    """Step ``step`` stays for ``reason``; ``witness`` names what stands in the way.

    With ``unchanged`` it also stays as it is written: another form of it was refused.
    """

    step: int
    reason: Reason
    witness: tuple[str, ...]
    detail: str = ""
    unchanged: bool = False

    @property
    def sentence(self) -> str:
        """The reason in one sentence, with its witness."""
        text = self.reason.sentence.format(witness=self._names)
        return f"{text} ({self.detail})" if self.detail else text

    @property
    def hint(self) -> str:
        """The smallest change of the model that would free the step; empty where none is known."""
        return self.reason.hint.format(witness=self._names)

    @property
    def _names(self) -> str:
        return ", ".join(self.witness) or "nothing"


@dataclass(frozen=True, slots=True)
class Absorption:
    """What an operator takes over: ``input`` is applied before it, ``output`` after it.

    Both lie on the operator's own channels; on ``axis`` if a step that has none (a scalar) takes
    over something that varies along one.
    """

    input: AffineMap | None = None
    output: AffineMap | None = None
    axis: int | None = None

    def around(self, own: AffineMap) -> AffineMap:
        """What a step that does ``own`` does with all that it took over."""
        result = own if self.input is None else own.after(self.input)
        return result if self.output is None else self.output.after(result)


@dataclass(frozen=True, slots=True)
class Units:
    """A value is stored as ``u`` where ``v = map(u)``; the map's channels lie on ``axes``.

    Along several axes they are in row-major order. ``map`` is not finite on channels that nobody
    reads back, or whose units are not kept track of.
    """

    axes: tuple[int, ...]
    map: AffineMap

    def inside(self, axes: tuple[int, ...], taken: AffineMap) -> Units:
        """What is stored is stored once more in other units: first ``taken``, then these."""
        if self.axes == axes or 1 in (self.map.channels, taken.channels):
            return Units(axes if taken.channels > 1 else self.axes, self.map.after(taken))
        unknown = AffineMap.of([np.nan], [np.nan])
        return Units((), unknown)


class Joining(Enum):
    """In which way operators become one."""

    PARALLEL = "parallel"
    SERIAL = "serial"
    SIDE_BY_SIDE = "side by side"


@dataclass(frozen=True, slots=True)
class Term:
    """A value that is added to others, or subtracted."""

    value: ValueId
    sign: int


@dataclass(frozen=True, slots=True)
class Left:
    """Operand ``position`` is left out of the sum ``total``."""

    total: int
    position: int


@dataclass(frozen=True, slots=True)
class Cut:
    """``value`` is the channels from ``begin`` to ``end`` of what a merged operator makes."""

    value: ValueId
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Merge:
    """All of ``operators`` become one linear operator from ``source`` to ``target``.

    ``operators`` are in the order of the graph; of these, ``into`` is the one that stays. It reads
    ``taps`` in ``groups`` groups from now on, and ``channels`` of the source. ``through`` is the
    operator that stays between it and ``target``, if there is one: it takes away the axes of
    positions, of which there is one. With ``terms`` the sum of these takes the place of ``target``,
    and the operands in ``left`` go from the sums that they are in; ``total`` is the first sum that
    all of the terms are in. The values in ``restated`` hold something else from then on, and need
    other names.

    Of operators side by side, ``concat`` is what puts their outputs together. If it goes, it is one
    of ``operators``. Else the target is a new value, with a number beyond those of the graph, that
    holds ``parts`` one after the other. ``cuts`` are taken from the target by a copy.
    """

    kind: Joining
    operators: tuple[int, ...]
    into: int
    source: ValueId
    target: ValueId
    channels: int
    groups: int
    taps: tuple[Taps, ...]
    through: int | None = None
    terms: tuple[Term, ...] = ()
    left: tuple[Left, ...] = ()
    total: int | None = None
    restated: tuple[ValueId, ...] = ()
    concat: int | None = None
    parts: tuple[ValueId, ...] = ()
    cuts: tuple[Cut, ...] = ()

    @property
    def left_out(self) -> dict[int, set[int]]:
        """By sum, the positions of the operands that go from it."""
        found: dict[int, set[int]] = {}
        for place in self.left:
            found.setdefault(place.total, set()).add(place.position)
        return found

    @property
    def gone(self) -> tuple[int, ...]:
        """The operators that are there no longer."""
        stay = (self.into, self.through)
        return tuple(index for index in self.operators if index not in stay)

    @property
    def root(self) -> int:
        """The operator that the merge ends in: it is not made where that one is refused."""
        ends = self.concat if self.total is None else self.total
        return self.operators[-1] if ends is None else ends


@dataclass(frozen=True, slots=True)
class Plan:
    """Every affine step is in exactly one of ``folds`` and ``kept``.

    ``folds`` are in the order in which they were decided, which is the order to make them in:
    each speaks of the tensors that the ones before it left. ``units`` has the values that are
    stored in units other than their own. ``forms`` has the steps that stay and are written as other
    operators.

    ``merges`` come first: an absorption of ``Merge.into`` is one of the merged operator. A step
    that went into one is in ``folds`` too, as joined. ``apart`` are linear operators next to each
    other (by the last one of them) that stay what they are.
    ``concats`` are the inputs that a Concat has from then on, of which some are merged. Values with
    numbers beyond those of the graph are new.
    """

    level: str
    folds: tuple[Fold, ...]
    kept: tuple[Kept, ...]
    absorptions: Mapping[int, Absorption]
    units: Mapping[ValueId, Units] = field(default_factory=dict)
    forms: Mapping[int, Leftover] = field(default_factory=dict)
    merges: tuple[Merge, ...] = ()
    apart: tuple[Kept, ...] = ()
    concats: Mapping[int, tuple[ValueId, ...]] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        """Whether anything is done."""
        return bool(self.folds or self.forms or self.merges)

    @property
    def joined(self) -> frozenset[int]:
        """The operators that are gone because another one does what they did."""
        return frozenset(index for merge in self.merges for index in merge.gone)
