"""One ONNX model through the planner: describe, plan, commit; again where a fold did not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from bnfold.channel_graph import ChannelGraph
from bnfold.errors import InvalidModelError, UsageError
from bnfold.onnx_commit import commit
from bnfold.onnx_constants import bodies
from bnfold.onnx_describe import Described, describe
from bnfold.onnx_fold import FoldRefusedError
from bnfold.onnx_shapes import Inferred
from bnfold.onnx_sharpen import sharpened
from bnfold.onnx_tensors import constant_of
from bnfold.passes import plan_local, plan_max
from bnfold.planning import Kept, Plan
from bnfold.report.model import Report, Size, steps_of

LEVELS = ("max", "local")


@dataclass(frozen=True, slots=True)
class Options:
    """How to fold.

    Attributes:
        level: ``"max"`` solves for the units of all tensors, ``"local"`` folds between direct
            neighbours.
        trust_initializers: Whether initializers that are also graph inputs are constants.
        unshare_bytes: How many bytes of weights that several operators share may be stored again.
    """

    level: str = "max"
    trust_initializers: bool = False
    unshare_bytes: int = 0

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            known = ", ".join(LEVELS)
            raise UsageError(f"there is no level '{self.level}'", todo=f"choose one of: {known}")

    def plan(self, graph: ChannelGraph, refused: Mapping[int, Kept]) -> Plan:
        """Decide every affine step of ``graph``."""
        if self.level == "local":
            return plan_local(graph, refused)
        return plan_max(graph, refused, unshare_bytes=self.unshare_bytes)


@dataclass(frozen=True, slots=True)
class Planned:
    """A model's facts, what was decided on them, and how large the model is as it stands."""

    described: Described
    plan: Plan
    size: Size

    def report(self, source: str, after: Size | None = None) -> Report:
        """The decisions, for people and programs."""
        steps = steps_of(self.described.graph, self.plan)
        return Report(source, self.plan.level, steps, self.size, after)


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
            return planned, commit(planned.described, planned.plan)
        except FoldRefusedError as fault:
            refused.update(refusals(planned, fault))


def refusals(planned: Planned, fault: FoldRefusedError) -> dict[int, Kept]:
    """The steps that must stay because of what the operator that took them over met."""
    name = planned.described.graph.operators[fault.operator].name
    blamed = {fault.operator}
    for _ in planned.plan.folds:
        more = {fold.step for fold in planned.plan.folds if blamed.intersection(fold.into)}
        if more <= blamed:
            break
        blamed |= more
    folded = {fold.step for fold in planned.plan.folds}
    # A shift may have come a long way; then the nearest step is dropped, and it is tried again.
    nearest = sorted(folded, key=lambda step: abs(step - fault.operator))[:1]
    steps = blamed & folded or set(nearest)
    assert steps, f"no fold is to blame for {name}: {fault.detail}"
    return {step: Kept(step, fault.reason, (name,), fault.detail) for step in steps}


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
