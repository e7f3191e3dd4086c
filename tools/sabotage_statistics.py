"""Wrong statistics: an affine step of the unfolded model is changed, so that any tool folds wrong.

``y = scale * x + shift`` with ``scale = gamma / sqrt(var + eps)``, ``shift = beta - scale * mean``.
A fold that forgets gamma is a right fold of the model whose gamma is one: so any tool's fold can be
sabotaged, however far it carries the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx
from numpy.random import Generator
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from tools.sabotage_graph import (
    F64,
    Draft,
    Linear,
    NoSiteError,
    attribute,
    label,
    pick,
)

SMALL = 1 << 16  # what holds more numbers is a weight, and none of a step's parameters
IMAGE = (1, -1, 1, 1)  # the shape in which a Mul or an Add of images holds its constant
USUAL, OTHER = 1e-5, 1e-3  # the epsilons that are taken for one another


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a BatchNormalization knows, each ``(C,)``."""

    gamma: F64
    beta: F64
    mean: F64
    variance: F64
    epsilon: float


@dataclass(frozen=True, slots=True)
class Step:
    """An affine step: a BatchNormalization, or a Mul by a constant and the Add behind it.

    Attributes:
        draft: The model it is in.
        node: The BatchNormalization, or the Mul.
        add: The Add behind the Mul.
        scale: ``(C,)``.
        shift: ``(C,)``.
        known: The statistics, of a BatchNormalization.
    """

    draft: Draft
    node: onnx.NodeProto
    scale: F64
    shift: F64
    known: Statistics | None = None
    add: onnx.NodeProto | None = None

    @classmethod
    def all_of(cls, draft: Draft) -> list[Step]:
        """The steps whose parameters are constant."""
        constants = _constants(draft)
        norms = (
            cls._norm(draft, node, constants)
            for node in draft.graph.node
            if node.op_type == "BatchNormalization" and all(n in constants for n in node.input[1:])
        )
        return [*norms, *cls._pairs(draft, constants)]

    @classmethod
    def _norm(cls, draft: Draft, node: onnx.NodeProto, constants: Mapping[str, F64]) -> Step:
        gamma, beta, mean, variance = (constants[name] for name in node.input[1:5])
        epsilon = attribute(node, "epsilon", USUAL)
        scale = gamma / np.sqrt(variance + epsilon)
        known = Statistics(gamma, beta, mean, variance, epsilon)
        return cls(draft, node, scale, beta - scale * mean, known)

    @classmethod
    def _pairs(cls, draft: Draft, constants: Mapping[str, F64]) -> Iterator[Step]:
        makers = draft.makers()
        for add in draft.graph.node:
            node = makers.get(add.input[0]) if add.op_type == "Add" else None
            if node is None or node.op_type != "Mul" or node.input[0] in constants:
                continue
            scale, shift = constants.get(node.input[1]), constants.get(add.input[1])
            if scale is not None and shift is not None and scale.size == shift.size > 1:
                yield cls(draft, node, scale.ravel(), shift.ravel(), add=add)

    def set(self, scale: F64 | None = None, shift: F64 | None = None) -> None:
        """Stores another scale or shift."""
        scale = self.scale if scale is None else scale
        shift = self.shift if shift is None else shift
        if self.add is None:
            one = np.ones_like(scale)
            self._store(self.node, scale, shift, 0 * one, one - self.statistics().epsilon)
        else:
            self._store(self.node, scale.reshape(IMAGE))
            self._store(self.add, shift.reshape(IMAGE))

    def restate(self, **other: F64 | float) -> None:
        """Stores what the step would be with other statistics.

        Raises:
            NoSiteError: It is no BatchNormalization.
        """
        known = self.statistics()
        held = {name: getattr(known, name) for name in Statistics.__slots__} | other
        scale = held["gamma"] / np.sqrt(held["variance"] + held["epsilon"])
        self.set(scale, held["beta"] - scale * held["mean"])

    def statistics(self) -> Statistics:
        """What is known of a BatchNormalization.

        Raises:
            NoSiteError: It is none.
        """
        if self.known is None:
            raise NoSiteError("no statistics")
        return self.known

    def linear(self) -> Linear:
        """The operator right before the step.

        Raises:
            NoSiteError: There is none with a weight.
        """
        for linear in self.draft.linears():
            if linear.node.output[0] == self.node.input[0]:
                return linear
        raise NoSiteError("no linear operator before it")

    def _store(self, node: onnx.NodeProto, *arrays: F64) -> None:
        for place, array in enumerate(arrays, start=1):
            name = f"{node.output[0]}.sabotaged.{place}"
            self.draft.store(name, array)
            node.input[place] = name


def _constants(draft: Draft) -> dict[str, F64]:
    """Small floats that are computed from initializers alone, in float64."""
    held = {t.name: numpy_helper.to_array(t) for t in draft.graph.initializer
            if np.prod(t.dims) <= SMALL}  # fmt: skip
    for node in draft.graph.node:
        if node.op_type in ("If", "Loop", "Scan") or not all(n in held for n in node.input if n):
            continue
        feed = {name: held[name] for name in node.input if name}
        found = ReferenceEvaluator(_alone(node, draft)).run(None, feed)
        held |= dict(zip(node.output, found, strict=True))
    return {n: v.astype(np.float64) for n, v in held.items() if v.dtype.kind == "f"}


def _alone(node: onnx.NodeProto, draft: Draft) -> onnx.ModelProto:
    def named(names: list[str]) -> list[onnx.ValueInfoProto]:
        return [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name]

    graph = onnx.helper.make_graph([node], "alone", named([*node.input]), named([*node.output]))
    return onnx.helper.make_model(graph, opset_imports=draft.model.opset_import)


# ---- the defects ----


def _epsilon_forgotten(step: Step, _: Generator) -> str:
    step.restate(epsilon=0.0)
    return ""


def _epsilon_of_another(step: Step, _: Generator) -> str:
    epsilon = USUAL if step.statistics().epsilon > USUAL * 2 else OTHER
    step.restate(epsilon=epsilon)
    return f", epsilon {epsilon:g}"


def _epsilon_outside(step: Step, _: Generator) -> str:
    known = step.statistics()
    step.restate(variance=(np.sqrt(known.variance) + known.epsilon) ** 2, epsilon=0.0)
    return ""


def _no_root(step: Step, _: Generator) -> str:
    known = step.statistics()
    step.restate(variance=(known.variance + known.epsilon) ** 2, epsilon=0.0)
    return ""


def _gamma_forgotten(step: Step, _: Generator) -> str:
    if step.known is None:
        step.set(scale=np.ones_like(step.scale))
    else:
        step.restate(gamma=np.ones_like(step.scale))
    return ""


def _mean_forgotten(step: Step, _: Generator) -> str:
    step.restate(mean=np.zeros_like(step.scale))
    return ""


def _beta_forgotten(step: Step, _: Generator) -> str:
    if step.known is None:
        step.set(shift=np.zeros_like(step.shift))
    else:
        step.restate(beta=np.zeros_like(step.shift))
    return ""


def _of_another_layer(step: Step, rng: Generator) -> str:
    others = [s for s in Step.all_of(step.draft)
              if s.node is not step.node and s.scale.shape == step.scale.shape]  # fmt: skip
    other = pick(rng, others)
    step.set(other.scale, other.shift)
    return f", statistics of {label(other.node)}"


def _folded_twice(step: Step, _: Generator) -> str:
    step.set(step.scale**2, step.scale * step.shift + step.shift)
    return ""


def _weight_stale(step: Step, _: Generator) -> str:
    """``W x + (scale b + shift)``: the bias is folded, the weight is not."""
    linear = step.linear()
    if linear.bias:
        bias = step.draft.array(linear.bias).reshape(-1)
        step.set(np.ones_like(step.scale), (step.scale - 1) * bias + step.shift)
    else:
        step.set(scale=np.ones_like(step.scale))
    return ""


def _bias_stale(step: Step, _: Generator) -> str:
    """``scale W x + b``: the weight is folded, the bias is not."""
    linear = step.linear()
    bias = step.draft.array(linear.bias).reshape(-1) if linear.bias else np.zeros(1)
    step.set(shift=(1 - step.scale) * bias)
    return ""


def _wrong_axis(step: Step, _: Generator) -> str:
    """The scale goes along the weight's input channels."""
    linear = step.linear()
    turned = np.moveaxis(step.draft.array(linear.weight), linear.in_axis, -1)
    if turned.shape[-1] != step.scale.size:
        raise NoSiteError("as many input as output channels are needed")
    step.draft.store(linear.weight, np.moveaxis(turned * step.scale, -1, linear.in_axis))
    shift = step.shift
    if linear.bias:
        shift = shift + (step.scale - 1) * step.draft.array(linear.bias).reshape(-1)
    step.set(np.ones_like(step.scale), shift)
    return ""


STATISTICS: Mapping[str, Callable[[Step, Generator], str]] = MappingProxyType(
    {
        "epsilon-forgotten": _epsilon_forgotten,
        "epsilon-1e-3-for-1e-5": _epsilon_of_another,
        "epsilon-outside-the-root": _epsilon_outside,
        "variance-without-root": _no_root,
        "gamma-forgotten": _gamma_forgotten,
        "mean-forgotten": _mean_forgotten,
        "beta-forgotten": _beta_forgotten,
        "statistics-of-another-layer": _of_another_layer,
        "folded-twice": _folded_twice,
        "weight-stale": _weight_stale,
        "bias-stale": _bias_stale,
        "wrong-axis": _wrong_axis,
    }
)
