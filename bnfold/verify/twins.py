"""Tensors of a candidate that agree with nothing, computed thrice more with other roundings.

What runs with constants that are off by a few ``u`` at random differ by is what rounding explains,
through any operator, however ill-conditioned. A tensor gets twins where it first disagrees with the
reference, and what is computed from it has them too, up to one that agrees.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bnfold.verify.bounds import F64, channel_axis, norms
from bnfold.verify.lockstep import floats
from bnfold.verify.oracle import compute, lift, names_read

DRAWS = 3
# Of each constant on its own, and of a channel as a whole: a tool that folds in the stored type
# rounds the scale three times before it multiplies.
EACH, TOGETHER = 2.0, 1.5
# So many times what the twins are off by; there are only three of them.
LIMIT = 4.0
# Their constants are no weights: they say how large the output is.
SIZES = frozenset({"Resize", "Upsample", "Range"})


class Twins:
    """The twins of one walk.

    Args:
        unit: Half an ulp, relative, of the type that weights are stored in.
        fixed: The candidate's constants, by name.
    """

    def __init__(self, unit: float, fixed: set[str]) -> None:
        self._unit, self._fixed = unit, fixed
        self._rngs = [np.random.default_rng([0, draw]) for draw in range(DRAWS)]
        self._values: dict[str, list[Any]] = {}

    def reach(self, node: Any) -> bool:
        """Whether ``node`` reads a tensor that has twins."""
        return any(name in self._values for name in names_read(node.onnx_node))

    def noise(self, node: Any, name: str, values: Mapping[str, Any]) -> F64:
        """How far rounding moves each channel of ``name``, an output of ``node``; times `LIMIT`."""
        value = values[name]
        axis = channel_axis(node.onnx_node.op_type, value.ndim)
        apart = [norms(np.nan_to_num(t - value, nan=0.0, posinf=0.0, neginf=0.0), axis)
                 for t in self.of(node, values)[name] if np.shape(t) == value.shape]  # fmt: skip
        if len(apart) < DRAWS:
            return np.zeros(1)  # nothing is known, so nothing is allowed
        widest: F64 = np.maximum.reduce(apart)
        # By chance all twins may be near on a channel of few elements: not on all of them.
        usual = float(np.sqrt(np.square(widest).mean()))
        return LIMIT * np.maximum(widest, usual)

    def of(self, node: Any, values: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The twins of each output of ``node``."""
        made = [self._once(node, values, draw) for draw in range(DRAWS)]
        return {name: [one.get(name) for one in made] for name in node.output if name}

    def keep(self, node: Any, name: str, values: Mapping[str, Any]) -> None:
        """``name`` disagrees, so that what is computed from it has twins."""
        if floats(values.get(name)) is not None:
            self._values[name] = self.of(node, values)[name]

    def tidy(self, values: Mapping[str, Any]) -> None:
        """Lets go of the twins of tensors that nobody reads any more."""
        for name in [name for name in self._values if name not in values]:
            del self._values[name]

    def _once(self, node: Any, values: Mapping[str, Any], draw: int) -> dict[str, Any]:
        rng = self._rngs[draw]
        inner = dict(values)
        inner |= {name: twins[draw] for name, twins in self._values.items() if name in values}
        if node.onnx_node.op_type not in SIZES:
            inner |= {name: self._shaken(rng, inner[name]) for name in node.input
                      if name in self._fixed and name in inner}  # fmt: skip
        outputs = compute(node, inner)
        rounded = any(a.type == a.FLOAT for a in node.onnx_node.attribute) or any(
            name in self._fixed and floats(lift(values.get(name))) is not None
            for name in node.input
        )  # fmt: skip
        return {
            name: self._together(rng, node, lift(value)) if rounded else lift(value)
            for name, value in zip(node.output, outputs, strict=False)
            if name
        }

    def _shaken(self, rng: np.random.Generator, value: Any) -> Any:
        wide = lift(value)
        if floats(wide) is None:
            return value
        return wide * (1 + EACH * self._unit * rng.uniform(-1, 1, wide.shape))

    def _together(self, rng: np.random.Generator, node: Any, value: Any) -> Any:
        if floats(value) is None:
            return value
        axis = channel_axis(node.onnx_node.op_type, value.ndim)
        shape = [n if i == axis else 1 for i, n in enumerate(value.shape)]
        return value * (1 + TOGETHER * self._unit * rng.choice([-1.0, 1.0], shape))
