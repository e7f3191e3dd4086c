"""A tensor inside both models to judge by, where their outputs prove nothing.

A model whose outputs do not depend on its input (all weights alike, a saturated softmax) agrees
with anything. Where both models call the same value by the same name, the deepest tensor that does
change from sample to sample is judged in the outputs' place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from bnfold.verify.measure import is_constant
from bnfold.verify.models import LoadedModel
from bnfold.verify.oracle import Oracle

_CLEARLY = 1e-3  # relative; far above what rounding does to one sample


def all_constant(outputs: Sequence[Mapping[str, Any]], unit: float) -> bool:
    """Whether every output is the same for every sample."""
    return all(
        isinstance(value, np.ndarray)
        and value.dtype.kind == "f"
        and is_constant([sample[name] for sample in outputs], unit)
        for name, value in outputs[0].items()
    )


def deepest_varying(
    unfolded: LoadedModel, folded: LoadedModel, feeds: Sequence[Mapping[str, Any]]
) -> str | None:
    """The last tensor of that name in both models that differs between the first two samples."""
    shared = {name for node in folded.proto.graph.node for name in node.output if name}
    ends = {value.name for value in unfolded.proto.graph.output}
    made = [n for node in unfolded.proto.graph.node for n in node.output if n in shared - ends]
    if not made or len(feeds) < 2:
        return None
    oracle = Oracle(_with_outputs(unfolded.proto, made))
    one, other = (oracle.run(feed) for feed in feeds[:2])
    varying = [name for name in made if _differs(one[name], other[name])]
    return varying[-1] if varying else None


def _differs(one: Any, other: Any) -> bool:
    if not isinstance(one, np.ndarray) or one.dtype.kind != "f" or not np.isfinite(one).all():
        return False
    apart, size = float(np.linalg.norm(one - other)), float(np.linalg.norm(one))
    return apart > _CLEARLY * size


def probed(model: LoadedModel, name: str) -> LoadedModel:
    """``model`` with its tensor ``name`` as its only output."""
    return LoadedModel(model.name, _with_outputs(model.proto, [name]))


def _with_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    known = {value.name: value for value in proto.graph.value_info}
    del copy.graph.output[:]
    copy.graph.output.extend(known.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    return copy
