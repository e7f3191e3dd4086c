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

from bnfold.verify.lockstep import Tape, floats
from bnfold.verify.oracle import lift, names_read

# Half of the channels right: the same value in the same units.
MOST = 0.5

# The suspects that a tensor is computed from, and whether their units may have been taken back.
Origins = Mapping[int, bool]


@dataclass(slots=True)
class Suspects:
    """The suspects of one walk, each by its number among the sites.

    Attributes:
        tape: The reference.
        found: All of them, in order.
        local: Those of a weight of which most channels agree.
        proved: Those of which most channels agree, that nothing can have taken back.
    """

    tape: Tape
    found: list[int] = field(default_factory=list)
    local: set[int] = field(default_factory=set)
    proved: set[int] = field(default_factory=set)
    _near: set[int] = field(default_factory=set)
    _origins: dict[str, Origins] = field(default_factory=dict)

    def inherited(self, node: Any, values: Mapping[str, Any], fixed: set[str]) -> Origins:
        """The suspects that ``node`` computes from."""
        before = [self._origins[n] for n in names_read(node.onnx_node) if n in self._origins]
        if not before:
            return {}
        changed = node.need_context() or any(
            self._is_changed(name, values.get(name)) for name in node.input if name in fixed
        )
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
        self, name: str, origins: Origins, index: int, agreeing: float, *, weighted: bool
    ) -> None:
        """The tensor ``name``, of which a share of the channels agrees, is a suspect itself."""
        self.found.append(index)
        if agreeing >= MOST:
            self._near.add(index)
            self.local.update({index} if weighted else ())
        self._origins[name] = {**origins, index: False}

    def agrees(self, origins: Origins) -> None:
        """What is computed from suspects agrees."""
        self.proved |= self._near.intersection(i for i, passed in origins.items() if not passed)

    def reach(self, names: Iterable[str]) -> bool:
        """Whether one of the tensors is computed from a suspect that nothing took back."""
        return not self._origins.keys().isdisjoint(names)
