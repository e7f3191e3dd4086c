"""One ONNX model through the planner: describe, plan, commit; again where a fold did not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from bnfold.errors import InvalidModelError
from bnfold.folding import FoldRefusedError, Options, refusals
from bnfold.onnx_commit import commit
from bnfold.onnx_constants import bodies
from bnfold.onnx_describe import Described, describe
from bnfold.onnx_shapes import Inferred
from bnfold.onnx_sharpen import sharpened
from bnfold.onnx_tensors import constant_of
from bnfold.planning import Kept, Plan
from bnfold.report.model import Report, Size, apart_of, joints_of, steps_of


@dataclass(frozen=True, slots=True)
class Planned:
    """A model's facts, what was decided on them, and how large the model is as it stands."""

    described: Described
    plan: Plan
    size: Size

    def report(self, source: str, after: Size | None = None) -> Report:
        """The decisions, for people and programs."""
        graph, plan = self.described.graph, self.plan
        return Report(source, plan.level, steps_of(graph, plan), self.size, after,
                      joints=joints_of(graph, plan), apart=apart_of(graph, plan))  # fmt: skip


def plan_model(
    model: ir.Model,
    inferred: Inferred,
    options: Options,
    refused: Mapping[int, Kept],
    source: str = "",
) -> Planned:
    """Decide every affine step of ``model``; nothing of it is changed.

    Args:
        model: The model.
        inferred: What shape inference found for its main graph.
        options: How to fold.
        refused: Steps that turned out, when they were computed, not to fold.
        source: The file to name in an error.

    Raises:
        InvalidModelError: Something in the model means nothing.
    """
    try:
        described = describe(model, inferred, trust_initializers=options.trust_initializers)
        plan = options.plan(described.graph, refused)
        sharper = sharpened(model, inferred) if plan.kept else inferred
        if sharper is not inferred:  # a shape that nothing stated may be what keeps a step
            described = describe(model, sharper, trust_initializers=options.trust_initializers)
            plan = options.plan(described.graph, refused)
    except InvalidModelError as error:
        raise error.at(source) from error
    return Planned(described, plan, size_of(model))


def fold_model(
    model: ir.Model, inferred: Inferred, options: Options, source: str = ""
) -> tuple[Planned, tuple[ir.Value, ...]]:
    """Fold ``model`` in place, all weights computed; returns the plan and the changed constants.

    Args:
        model: The model.
        inferred: What shape inference found for its main graph.
        options: How to fold.
        source: The file to name in an error.

    Raises:
        InvalidModelError: Something in the model means nothing.
    """
    refused: dict[int, Kept] = {}
    while True:
        planned = plan_model(model, inferred, options, refused, source)
        try:
            return planned, commit(planned.described, planned.plan).written
        except FoldRefusedError as fault:
            refused.update(refusals(planned.described.graph, planned.plan, fault))


def size_of(model: ir.Model) -> Size:
    """How large ``model`` is; weights are not read."""
    operators: Counter[str] = Counter()
    parameters = parameter_bytes = 0
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    while graphs:
        graph = graphs.pop()
        tensors = [value.const_value for value in graph.initializers.values()]
        for node in graph:
            operators[node.op_type] += 1
            graphs.extend(bodies(node))
            tensors.extend([constant_of(node)] if node.op_type == "Constant" else [])
        for tensor in tensors:
            parameters += 0 if tensor is None else int(tensor.size)
            parameter_bytes += 0 if tensor is None else int(tensor.nbytes)
    return Size(dict(operators), parameters, parameter_bytes)
