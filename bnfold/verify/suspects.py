"""Tensors of a candidate of unknown origin that disagree, and what becomes of them.

Such a tensor may be wrong, or stored in other units that something behind it takes back. Only an
operator whose constants are not the reference's can do that: if what is computed from the tensor
agrees again with none such in between, and no step of the reference was left out there, a Relu or a
small weight took a fault away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bnfold.verify.bounds import LINEAR
from bnfold.verify.lockstep import ELEMENTWISE, Tape, floats
from bnfold.verify.oracle import lift, names_read

# Half of the channels right: the same value in the same units.
MOST = 0.5
# Nobody stores a tensor in units within a hundredth of the true ones.
CLOSE = 2.0**-7

# The suspects that a tensor is computed from, and whether their units may have been taken back.
Origins = Mapping[int, bool]

# What is made of all of a tensor: through a Split, half of it may be right.
_WHOLE = ELEMENTWISE | LINEAR | {
    "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Flatten", "Reshape",
    "Transpose", "Squeeze", "Unsqueeze", "Concat",
}  # fmt: skip


@dataclass(slots=True)
class Suspects:
    """The suspects of one walk, each by its number among the sites.

    Attributes:
        tape: The reference.
        found: All of them, in order.
        local: Those of a weight, under a name of the reference's, that are right but for a little.
        proved: Those that agree again behind them, though nothing can have taken units back.
    """

    tape: Tape
    found: list[int] = field(default_factory=list)
    local: set[int] = field(default_factory=set)
    proved: set[int] = field(default_factory=set)
    _behind: dict[int, Origins] = field(default_factory=dict)
    _origins: dict[str, Origins] = field(default_factory=dict)

    def inherited(self, node: Any, values: Mapping[str, Any], fixed: set[str]) -> Origins:
        """The suspects that ``node`` computes from."""
        before = [self._origins[n] for n in names_read(node.onnx_node) if n in self._origins]
        if not before:
            return {}
        # Two of them, as those of an Add, may make up for each other.
        changed = len(before) > 1 or node.onnx_node.op_type not in _WHOLE or any(
            self._is_changed(name, values.get(name)) for name in node.input if name in fixed
        )  # fmt: skip
        merged: dict[int, bool] = {}
        for origins in before:
            for index, passed in origins.items():
                merged[index] = passed or changed or merged.get(index, False)
        return merged

    def _is_changed(self, name: str, value: Any) -> bool:
        """Whether a constant of the candidate is none of the reference's."""
        if floats(value) is None or np.array_equal(lift(self.tape.constants.get(name)), value):
            return False
        shape = value.shape
        known = (c for c in self.tape.constants.values() if getattr(c, "shape", None) == shape)
        return not any(np.array_equal(lift(constant), value) for constant in known)

    def reached(self, name: str, origins: Origins) -> None:
        """The tensor ``name``, which nothing is known of, is computed from suspects."""
        if origins:
            self._origins[name] = dict.fromkeys(origins, True)

    def disagrees(
        self, name: str, origins: Origins, index: int, *, agreeing: float, error: float, named: bool
    ) -> None:
        """The tensor ``name`` is a suspect itself.

        Args:
            name: The tensor.
            origins: The suspects that it is computed from.
            index: Its number.
            agreeing: The share of its channels that agree.
            error: How far off it is as a whole.
            named: Whether a weight makes it, under a name of the reference's.
        """
        self.found.append(index)
        if named and (agreeing >= MOST or (error < CLOSE and not origins)):
            self.local.add(index)
        self._behind[index] = origins
        self._origins[name] = {**origins, index: False}

    def agrees(self, origins: Origins) -> None:
        """What is computed from suspects agrees."""
        self.proved.update(index for index, passed in origins.items() if not passed)

    def root(self, index: int, sure: Iterable[int]) -> int:
        """Where what is wrong with a suspect began, if the suspects ``sure`` are surely off."""
        known = set(sure)
        before = (i for i, passed in self._behind[index].items() if not passed or i in known)
        return min(before, default=index)

    def behind(self, names: Iterable[str]) -> set[int]:
        """The suspects that one of the tensors is computed from, with none between that agrees."""
        return {index for name in names for index in self._origins.get(name, ())}
