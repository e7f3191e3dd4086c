"""The reference folded once more, to be held against a candidate that bnfold may have made.

Whether it did is told by names and shapes alone: a folded model has the tensors, operators and
constants that folding its reference gives, and no others. Weights are computed when asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from bnfold.errors import BnfoldError
from bnfold.folding import LEFTOVERS, LEVELS, FoldRefusedError, Options
from bnfold.onnx_commit import Committed, commit
from bnfold.onnx_model import Planned, plan_model
from bnfold.onnx_shapes import Inferred
from bnfold.planning import Kept, Units
from bnfold.verify.expected import Expected, Held

Signature = tuple[str, tuple[str, ...], tuple[str, ...]]


def expected_fold(
    model: ir.Model, shapes: Inferred, options: Options, refused: Mapping[int, Kept] | None = None
) -> Expected:
    """What ``bnfold`` makes of ``model``, which is changed in memory.

    Args:
        model: The unfolded model.
        shapes: What shape inference found for its main graph.
        options: How it was folded.
        refused: Steps that turned out not to fold.
    """
    return _expected(plan_model(model, shapes, options, refused or {}), model)[0]


def recognised(
    read: Callable[[], tuple[ir.Model, Inferred]], candidate: onnx.ModelProto
) -> Expected | None:
    """What ``bnfold`` makes of a reference, if ``candidate`` has the form of just that.

    Args:
        read: Reads the reference anew, with its inferred shapes.
        candidate: The model of unknown origin.
    """
    wanted = sorted(_proto_signatures(candidate.graph))
    for level in LEVELS:
        for leftover in LEFTOVERS:
            model, shapes = read()
            try:
                planned = plan_model(model, shapes, Options(level, leftover=leftover), {})
                expected, made = _expected(planned, model)
            except (BnfoldError, FoldRefusedError):
                return None
            if planned.plan.changes and made == wanted:
                return expected
            if leftover == "keep" and _normalisations(made) <= _normalisations(wanted):
                break  # what stays is written as it was
    return None


def _normalisations(signatures: list[Signature]) -> int:
    return sum(op_type == "BatchNormalization" for op_type, _, _ in signatures)


def _expected(planned: Planned, model: ir.Model) -> tuple[Expected, list[Signature]]:
    names = {_name(value) for value in planned.described.values}
    values = planned.described.values  # those that are new are in no other units
    units = {_name(values[v]): u for v, u in planned.plan.units.items() if v < len(values)}
    done = commit(planned.described, planned.plan, lazy=True)
    held = {
        name: _held(done.renamed.get(name, name), units)
        for name in (_name(value) for node in model.graph for value in node.outputs)
        if done.renamed.get(name, name) in names
    }
    return Expected(lambda: _weights(done), held), sorted(_signatures(model.graph))


def _name(value: ir.Value) -> str:
    return value.name or ""


def _held(name: str, units: Mapping[str, Units]) -> Held:
    found = units.get(name)
    if found is None:
        return Held(name)
    return Held(name, found.axes, found.map.scale, found.map.shift)


def _weights(done: Committed) -> dict[str, NDArray[Any]]:
    return {
        value.name: np.asarray(value.const_value.numpy())
        for value in dict.fromkeys(v for w in done.written for v in (w, *_beside(w)))
        if value.name and value.const_value is not None
    }


def _beside(value: ir.Value) -> Iterator[ir.Value]:
    """What stands for numbers only together with ``value``: integers, scale and zero point."""
    for node in (use.node for use in value.uses()):
        if node.op_type == "DequantizeLinear":
            yield from (read for read in node.inputs if read is not None)


# ---- what a graph looks like, weights left out ----


def _signatures(graph: ir.Graph) -> Iterator[Signature]:
    for node in graph:
        inputs = tuple("" if value is None else _name(value) for value in node.inputs)
        yield node.op_type, inputs, tuple(_name(value) for value in node.outputs)
    for name, value in graph.initializers.items():
        tensor = value.const_value
        yield "", (name,), () if tensor is None else tuple(str(n) for n in tensor.shape.numpy())


def _proto_signatures(graph: onnx.GraphProto) -> Iterator[Signature]:
    for node in graph.node:
        yield node.op_type, tuple(node.input), tuple(node.output)
    for tensor in graph.initializer:
        yield "", (tensor.name,), tuple(str(n) for n in tensor.dims)
