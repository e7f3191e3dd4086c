"""Whatever is joined in a random linear model, it says the same in float64 and costs no more."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bnfold
from bnfold.verify.oracle import Oracle
from tests import nets
from tests.linear_regions import random_regions, shape_of_input

TOLERANCE = 1e-10  # of the largest value; what cancels may lose a few of sixteen digits

often = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**48)
sizes = st.sampled_from(range(3, 15))


@often
@given(seeds, sizes)
def test_what_is_joined_says_the_same(seed: int, size: int) -> None:
    proto = random_regions(seed, size)
    after = bnfold.fold(proto).model
    onnx.checker.check_model(after, full_check=True)
    nets.assert_nothing_dangles(after)
    x = np.random.default_rng(seed).normal(size=shape_of_input(proto, seed))
    expected, found = (Oracle(model).run({"x": x}) for model in (proto, after))
    assert list(expected) == list(found)
    for name, values in expected.items():
        scale = max(1.0, float(np.abs(values).max()))
        np.testing.assert_allclose(found[name], values, rtol=0, atol=TOLERANCE * scale)


@often
@given(seeds, sizes)
def test_what_is_joined_has_no_more_operators_or_weights(seed: int, size: int) -> None:
    proto = random_regions(seed, size)
    before, after = cost_of(proto), cost_of(bnfold.fold(proto).model)
    assert all(b >= a for b, a in zip(astuple(before), astuple(after), strict=True))


def test_these_models_are_joined_and_folded() -> None:
    """Or the tests above would say nothing."""
    reports = [bnfold.fold(random_regions(seed, 8)).report for seed in range(60)]
    joints = [joint for report in reports for joint in report.joints]
    assert len(joints) > 40
    assert {joint.kind for joint in joints} == {"parallel", "serial"}
    assert {joint.op_type for joint in joints} == {"Conv", "Gemm", "MatMul"}
    assert {kept.code for report in reports for kept in report.apart} >= {"BNF027", "BNF028"}


@dataclass(frozen=True, slots=True)
class Cost:
    """What may not grow: operators, linear ones, and the weights of these and of steps.

    An operator may gain a bias, and a step that is a scalar may take over one of many channels:
    biases are not counted, and scalars as if they had all channels.
    """

    nodes: int
    linear: int
    weights: int


def cost_of(proto: onnx.ModelProto) -> Cost:
    linear = [n for n in proto.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    stored = {t.name: int(np.prod(t.dims)) for t in proto.graph.initializer}
    biases = {n.input[2] for n in linear if len(n.input) > 2}
    made = {n.output[0] for n in linear if n.op_type == "MatMul"}
    biases |= {v for n in proto.graph.node if n.op_type == "Add" and made & set(n.input)
               for v in n.input}  # fmt: skip
    most = max(stored.values(), default=1)
    weights = sum(size if size > 1 else most for k, size in stored.items() if k not in biases)
    return Cost(len(proto.graph.node), len(linear), weights)
