"""``||y_fold - y_unf||`` in float64 over what rounding all constants does to either model.

For a candidate whose inner tensors could not all be paired. Both models are run in float64 from one
sample, and again with every stored number off by up to ``k u`` of its size, at random: a right fold
moves the outputs about as far as its own rounding, a wrong one farther.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bnfold.verify.oracle import Oracle, lift
from bnfold.verify.subject import Feeds

DRAWS = 3
ROUNDINGS = 2.0
LIMIT = 4.0


def drifted(reference: Oracle, candidate: Oracle, feeds: Feeds, unit: float) -> bool:
    """Whether an output of ``candidate`` is farther off than rounding explains.

    Args:
        reference: The unfolded model.
        candidate: The folded one.
        feeds: One sample.
        unit: Half an ulp, relative, of the type that weights are stored in.
    """
    right, found = reference.run(feeds), candidate.run(feeds)
    moved = [
        _apart(before, _perturbed(oracle, feeds, unit, seed))
        for oracle, before in ((reference, right), (candidate, found))
        for seed in range(DRAWS)
    ]
    apart = _apart(right, found)
    return any(
        far > LIMIT * max(move.get(name, 0.0) for move in moved) for name, far in apart.items()
    )


def _perturbed(oracle: Oracle, feeds: Feeds, unit: float, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shaken = {name: _shake(rng, lift(value), unit) for name, value in oracle.constants.items()}
    values: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    for node in oracle.walk(feeds, values, shaken):
        if node.onnx_node.op_type == "Constant":
            name = node.output[0]
            values[name] = _shake(rng, values[name], unit)
        outputs |= {name: values[name] for name in node.output if name in oracle.outputs}
    return outputs


def _shake(rng: np.random.Generator, value: Any, unit: float) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype != np.float64:
        return value
    return value * (1 + ROUNDINGS * unit * rng.uniform(-1, 1, value.shape))


def _apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """The relative distance of two runs, for each output of floats."""
    found = {}
    for name, value in one.items():
        twin = other.get(name)
        if not isinstance(value, np.ndarray) or value.dtype != np.float64:
            continue
        if not isinstance(twin, np.ndarray) or twin.shape != value.shape:
            found[name] = np.inf
            continue
        size = float(np.linalg.norm(np.nan_to_num(value)))
        far = float(np.linalg.norm(np.nan_to_num(twin - value)))
        found[name] = far / size if size else (np.inf if far else 0.0)
    return found
