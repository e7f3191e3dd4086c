"""Random ONNX models, folded: they stay valid, say the same, and get smaller.

Every model is in float64 and runs in float64, on inputs of two batch sizes. Only what the oracle
can't run is left out (GlobalLpPool, Upsample by other factors than 2).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import bnfold
from bnfold.report.model import Report
from bnfold.verify.oracle import Oracle
from tests import nets
from tests.onnx_maker import Net
from tests.onnx_nets import random_net

# One scale of 1e-6 may cost six of the sixteen digits; there is at most one in a net.
TOLERANCE = 1e-9
SMALLEST = 1e-4

NETS = st.builds(random_net, seed=st.integers(0, 2**32 - 1), pieces=st.integers(1, 24))
OPTIONS: dict[str, dict[str, Any]] = {
    "max": {"level": "max"},
    "unshare": {"level": "max", "unshare": True},
    "local": {"level": "local"},
}

every = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
often = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
seldom = settings(often, max_examples=60)


def difference(before: onnx.ModelProto, after: onnx.ModelProto, net: Net) -> float:
    """The largest error of any output of both runs, relative to that output.

    What is smaller than `SMALLEST` may be nothing but the rounding of what cancels.
    """
    oracles = Oracle(before), Oracle(after)
    worst = 0.0
    for run in (0, 1):
        left, right = (oracle.run(net.feeds(run)) for oracle in oracles)
        assert list(left) == list(right)
        for name, expected in left.items():
            assert expected.shape == right[name].shape
            scale = max(float(np.linalg.norm(expected)), SMALLEST)
            worst = max(worst, float(np.linalg.norm(right[name] - expected)) / scale)
    return worst


def declared(proto: onnx.ModelProto) -> list[bytes]:
    """Inputs and outputs with their names and types, in order."""
    values = [*proto.graph.input, *proto.graph.output]
    return [value.SerializeToString(deterministic=True) for value in values]


def fold(net: Net, options: dict[str, Any]) -> tuple[onnx.ModelProto, Report]:
    result = bnfold.fold(net.proto, **options)
    return result.model, result.report


def with_inner_values(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, which also gives what is inside; it need not be valid."""
    wide = onnx.ModelProto()
    wide.CopyFrom(proto)
    known = {value.name for value in wide.graph.output}
    inner = [name for node in wide.graph.node for name in node.output if name not in known]
    wide.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in inner if name
    )
    return wide


def elements_written(net: Net, proto: onnx.ModelProto) -> int:
    """How many numbers the operators write in one run, constants left aside."""
    wide = Oracle(with_inner_values(proto)).run(net.feeds(0))
    live = {value.name for value in proto.graph.input}
    total = 0
    for node in proto.graph.node:
        if live.intersection(node.input) or node.op_type == "If":
            live.update(node.output)
            total += sum(np.size(wide[name]) for name in node.output if name)
    return total


@every
@often
@given(net=NETS)
def test_a_folded_model_says_the_same(options: dict[str, Any], net: Net) -> None:
    folded, _ = fold(net, options)
    assert difference(net.proto, folded, net) <= TOLERANCE


@every
@often
@given(net=NETS)
def test_a_folded_model_is_valid_and_keeps_its_interface(options: dict[str, Any], net: Net) -> None:
    before = net.proto.SerializeToString()
    folded, _ = fold(net, options)
    assert net.proto.SerializeToString() == before
    onnx.checker.check_model(folded, full_check=True)
    assert declared(folded) == declared(net.proto)
    nets.assert_nothing_dangles(folded)


@every
@seldom
@given(net=NETS)
def test_no_operator_and_no_traffic_is_added(options: dict[str, Any], net: Net) -> None:
    folded, _ = fold(net, options)
    assert len(nets.nodes(folded)) <= len(nets.nodes(net.proto))
    assert elements_written(net, folded) <= elements_written(net, net.proto)


@every
@seldom
@given(net=NETS)
def test_every_step_is_folded_or_has_a_code(options: dict[str, Any], net: Net) -> None:
    _, report = fold(net, options)
    for step in report.steps:
        if step.verdict == "folded":
            assert step.how
        else:
            assert step.verdict == "kept"
            assert step.code.startswith("BNF")
            assert step.sentence


def says_more_when_folded_again(net: Net, options: dict[str, Any]) -> bool:
    once, _ = fold(net, options)
    twice = bnfold.fold(once, **options).model
    assert len(nets.nodes(twice)) <= len(nets.nodes(once))
    assert difference(net.proto, twice, net) <= TOLERANCE
    return not nets.same(once, twice)


@seldom
@given(net=NETS)
def test_folding_twice_between_neighbours_changes_nothing_more(net: Net) -> None:
    assert not says_more_when_folded_again(net, OPTIONS["local"])


def test_folding_twice_at_level_max_finds_next_to_nothing_more() -> None:
    """Chains of steps with a scale of 0 may need a second run; hardly anything else does."""
    count = 300
    more = [s for s in range(count) if says_more_when_folded_again(numbered(s), OPTIONS["max"])]
    assert len(more) <= 0.03 * count, more


def numbered(seed: int) -> Net:
    return random_net(seed, 1 + seed % 24)


def test_the_models_hold_every_kind_of_step_and_many_of_them_fold() -> None:
    """Or the tests above would say nothing."""
    met: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    for seed in range(200):
        net = numbered(seed)
        met.update(nets.operators(net.proto))
        verdicts.update(step.verdict for step in fold(net, OPTIONS["max"])[1].steps)
    assert {"BatchNormalization", "Mul", "Add", "Sub", "Div", "Neg", "Conv", "MatMul"} <= set(met)
    assert verdicts["folded"] > 200
    assert verdicts["kept"] > 100


def spoiled(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """``proto`` with one bias off by 1e-6 of itself; None where no Conv has one that is not 0."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    biases = [n.input[2] for n in copy.graph.node if n.op_type == "Conv" and len(n.input) > 2]
    for tensor in copy.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.name in biases and values.any():
            tensor.CopyFrom(numpy_helper.from_array(values * (1 + 1e-6), tensor.name))
            return copy
    return None


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_a_bias_that_is_off_by_a_millionth_is_noticed(channels: int) -> None:
    rng = np.random.default_rng(channels)
    shape = channels, 4, 4
    net = Net(
        nets.model(
            f"g (double[N,{channels},4,4] x) => (double[N,{channels},4,4] y)"
            "{ c = Conv(x, w) r = BatchNormalization(c, n_g, n_b, n_m, n_v) y = LeakyRelu(r) }",
            {
                "w": nets.weight(rng, channels, channels, 1, 1, dtype=np.float64),
                **nets.batch_norm(rng, "n", channels, np.float64),
            },
        ),
        {"x": ((2, *shape), (3, *shape))},
        seed=0,
    )
    folded, _ = fold(net, OPTIONS["max"])
    wrong = spoiled(folded)
    assert wrong is not None
    assert difference(net.proto, folded, net) <= TOLERANCE
    assert difference(net.proto, wrong, net) > 10 * TOLERANCE


def test_a_model_that_writes_more_is_noticed() -> None:
    """The count that nothing may add to does count."""
    net = random_net(3, 8)
    longer = onnx.ModelProto()
    longer.CopyFrom(net.proto)
    last = longer.graph.output[0].name
    longer.graph.node.add(op_type="Neg", input=[last], output=["more"])
    assert elements_written(net, longer) > elements_written(net, net.proto)
