"""What is stated about element-wise torch operations, sums and products is true."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from bnfold.channel_graph import Product, Sum, Tie
from bnfold.index_maps import along, same_axes
from bnfold.torch_calls import Call
from bnfold.torch_constants import Constants
from bnfold.torch_facts import Facts
from bnfold.torch_moves import MOVES
from bnfold.torch_parts import PARTS
from bnfold.torch_pooling import POOLING
from bnfold.torch_rules import Rule, Way
from bnfold.torch_ties import TABLE, find_tie
from bnfold.torch_walk import walk
from tests import test_torch_norms
from tests.torch_tie_nets import (
    BARE,
    DECOMPOSED,
    EXPORTED,
    FORMS,
    FX,
    IMAGE,
    TRACED,
    TWO,
    A,
    E,
    P,
    Row,
    Z,
    agrees,
    calls,
    holds,
    is_unstated,
    only,
    random,
    stated,
    together,
)

MASK = random(*IMAGE, seed=9) > 0
SLOPES = random(4)
FULL = random(*IMAGE, seed=8)
ZERO = torch.zeros((), dtype=torch.float64)
GATED = (IMAGE, (2, 4, 1, 1))
MASKED = (*TWO, IMAGE)
SYMBOLS = ((0, 2, 3), (0, 2, 3))

TIES: Mapping[str, Row] = {
    "alias": Row(nn.Identity(), 192, skips=(EXPORTED, DECOMPOSED)),
    "detach": Row(lambda x: x.detach(), 192),
    "clone": Row(lambda x: x.clone(), 192),
    "clone in another format": Row(lambda x: x.clone(memory_format=torch.channels_last), 192),
    "contiguous": Row(lambda x: x.contiguous(), 192),
    "positive": Row(torch.positive, 192),
    "to a type": Row(lambda x: x.to(torch.float32), 192, tolerance=1e-6),
    "to a device": Row(lambda x: x.to("cpu"), 192),
    "to another": Row(lambda x, z: x.to(z), 384, inputs=TWO, loses=FX),
    "type_as": Row(lambda x, z: x.type_as(z), 384, inputs=TWO),
    "float": Row(lambda x: x.float(), 192, tolerance=1e-6),
    "half": Row(lambda x: x.half().double(), 192, tolerance=1e-2),
    "type": Row(lambda x: x.type(torch.float32), 192, tolerance=1e-6, loses=FX),
    "data": Row(lambda x: x.data, 192, skips=(EXPORTED, DECOMPOSED)),
    "dropout": Row(lambda x: F.dropout(x, 0.5, False), 192),
    "dropout of none": Row(lambda x: F.dropout(x, 0.0, True), 192, loses=(DECOMPOSED,)),
    "dropout module": Row(nn.Dropout(0.5).eval(), 192),
    "dropout2d": Row(lambda x: F.dropout2d(x, 0.5, False), 192),
    "alpha_dropout": Row(lambda x: F.alpha_dropout(x, 0.5, False), 192),
    "native_dropout": Row(lambda x: torch.native_dropout(x, 0.5, False)[0], 192),
    "cpu": Row(lambda x: x.cpu(), 192),
    "bfloat16": Row(lambda x: x.bfloat16().double(), 192, tolerance=1e-1),
    "dropout1d": Row(lambda x: F.dropout1d(x, 0.5, False), 24, inputs=((2, 4, 3),)),
    "dropout3d": Row(lambda x: F.dropout3d(x, 0.5, False), 192, inputs=((2, 4, 2, 2, 6),)),
    "feature_alpha_dropout": Row(lambda x: F.feature_alpha_dropout(x, 0.5, False), 192),
    "relu": Row(F.relu, 192, P, Z),
    "relu in place": Row(lambda x: F.relu_(x.clone()), 192, P, Z),
    "relu method": Row(lambda x: x.relu(), 192, P, Z),
    "relu module": Row(nn.ReLU(), 192, P, Z),
    "leaky_relu": Row(lambda x: F.leaky_relu(x, -0.3), 192, P, Z),
    "leaky_relu module": Row(nn.LeakyReLU(0.2), 192, P, Z),
    "prelu": Row(lambda x: F.prelu(x, SLOPES), 192, P, Z, loses=(DECOMPOSED,)),
    "prelu module": Row(nn.PReLU(4).double(), 192, P, Z, loses=(DECOMPOSED,)),
    "prelu, by itself": Row(
        lambda x: torch._prelu_kernel(x, SLOPES[:, None, None]), 192, P, Z, loses=(DECOMPOSED,)),
    "absolute": Row(torch.absolute, 192, P, Z),
    "rrelu": Row(lambda x: F.rrelu(x, 0.1, 0.4, training=False), 192, P, Z, skips=(DECOMPOSED,)),
    "abs": Row(abs, 192, P, Z),
    "threshold": Row(lambda x: F.threshold(x, 0.0, 0.0), 192, P, Z, loses=(DECOMPOSED,)),
    "threshold module": Row(nn.Threshold(0.0, 0.0), 192, P, Z, loses=(DECOMPOSED,)),
    "hardtanh from 0": Row(lambda x: F.hardtanh(x, 0.0, float("inf")), 192, P, Z),
    "clamp from 0": Row(lambda x: x.clamp(min=0), 192, P, Z),
    "clamp to 0": Row(lambda x: x.clamp(max=0.0), 192, P, Z),
    "clamp from a constant 0": Row(lambda x: x.clamp(min=ZERO), 192, P, Z, loses=(DECOMPOSED,)),
    "clamp_min": Row(lambda x: x.clamp_min(0.0), 192, P, Z),
    "clamp_max": Row(lambda x: torch.clamp_max(x, 0), 192, P, Z),
    "clip in place": Row(lambda x: x.clone().clip_(min=0), 192, P, Z),
    "clamp nothing": Row(lambda x: x.clamp(-torch.inf, torch.inf), 192),
    "clamp to the largest": Row(lambda x: x.clamp(-1.7976931348623157e308), 192, loses=(BARE,)),
    "tril": Row(torch.tril, 192, A, Z),
    "triu": Row(lambda x: x.triu(1), 192, A, Z),
    "maximum": Row(torch.maximum, 192, P, E, TWO),
    "maximum with 0": Row(lambda x: torch.maximum(x, ZERO), 192, P, Z),
    "maximum of one twice": Row(lambda x: torch.maximum(x, x), 192, P, E),
    "maximum, broadcast": Row(torch.maximum, 4, P, E, (IMAGE, (4, 1, 1))),
    "fmin": Row(torch.fmin, 192, P, E, TWO),
    "fmax": Row(torch.fmax, 192, P, E, TWO),
    "max of two": Row(lambda x, z: torch.max(x, z), 192, P, E, TWO),
    "min of two": Row(lambda x, z: x.min(z), 192, P, E, TWO),
    "max along an axis": Row(lambda x: x.max(3)[0], 32, P, E),
    "where": Row(
        lambda x, z, m: torch.where(m, x, z), 192, A, E, MASKED, {2: MASK}),
    "where with 0": Row(
        lambda x, m: torch.where(m, x, 0.0), 192, A, Z, TWO, {1: MASK}),
    "where, broadcast": Row(
        lambda x, z, m: torch.where(m, x, z), 4, A, E, (IMAGE, (1, 4, 1, 1), (1, 1, 4, 1)),
        {2: random(1, 1, 4, 1) > 0},
    ),
    "where as a method": Row(
        lambda x, z, m: x.where(m, z), 192, A, E, MASKED, {2: MASK}
    ),
    "masked_fill": Row(lambda x, m: x.masked_fill(m, 0), 192, A, Z, TWO, {1: MASK}),
    "masked_fill, broadcast": Row(
        lambda x, m: x.masked_fill(m, 0.0), 24, A, Z, ((1, 1, 4, 6), IMAGE), {1: MASK}
    ),
    "lerp": Row(lambda x, z: torch.lerp(x, z, 0.3), 192, A, E, TWO, loses=(DECOMPOSED,)),
    "lerp by a computed weight": Row(
        torch.lerp, 192, A, E, (IMAGE, IMAGE, IMAGE), loses=(DECOMPOSED,)
    ),
    "mul by a block": Row(lambda x: x * FULL, 192, A, Z),
    "mul by a block that is larger": Row(lambda x: x * FULL, 24, A, Z, ((1, 1, 4, 6),)),
    "mul by a mask": Row(lambda x, m: x * m, 192, A, Z, TWO, {1: MASK}),
    "mul by a size": Row(
        lambda x: x * x.shape[2], 192, A, Z, dynamic=((0, 2),), loses=FX
    ),
    "div": Row(torch.div, 192, A, Z, TWO),
    "divide": Row(torch.divide, 192, A, Z, TWO),
    "true_divide": Row(torch.true_divide, 192, A, Z, TWO),
    "div by a block": Row(lambda x: x / FULL, 192, A, Z),
    "div, broadcast": Row(lambda x, z: x / z, 4, A, Z, ((4, 1, 1), IMAGE)),
    "div of symbols": Row(lambda x, z: x / z, 192, A, Z, TWO, dynamic=SYMBOLS),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TIES)
def test_tie_is_true(name: str, form: str) -> None:
    holds(TIES[name], form)


SUMS: Mapping[str, Row] = {
    "add": Row(torch.add, 192, inputs=TWO),
    "add in place": Row(lambda x, z: x.clone().add_(z), 192, inputs=TWO),
    "add of one twice": Row(lambda x: x + x, 192),
    "add of three": Row(lambda x, z: x + z + x, 192, inputs=TWO),
    "add twice the other": Row(lambda x, z: torch.add(x, z, alpha=2), 192, inputs=TWO),
    "sub": Row(lambda x, z: x - z, 192, inputs=TWO),
    "sub of minus the other": Row(lambda x, z: torch.sub(x, z, alpha=-1), 192, inputs=TWO),
    "rsub": Row(lambda x, z: torch.rsub(x, z, alpha=3), 192, inputs=TWO, loses=(DECOMPOSED,)),
    "add, broadcast": Row(lambda x, z: x + z, 4, inputs=(IMAGE, (4, 1, 1))),
    "add, broadcast both": Row(lambda x, z: x + z, 4, inputs=((2, 4, 1, 6), (1, 4, 4, 1))),
    "add of symbols": Row(lambda x, z: x + z, 192, inputs=TWO, dynamic=SYMBOLS),
    "neg": Row(lambda x: -x, 192),
    "negative": Row(torch.negative, 192),
    "subtract": Row(torch.subtract, 192, inputs=TWO),
    "add behind relu": Row(lambda x, z: F.relu(x) + z, 192, P, Z, TWO),
}  # fmt: skip

QUERY, VALUE = (2, 3, 5, 4), (2, 3, 7, 6)
ATTENTION = (QUERY, (2, 3, 7, 4), VALUE)

# The number of free scales when the first factor is the gate, and when the second one is.
PRODUCTS: Mapping[str, tuple[Row, int]] = {
    "mul": (Row(lambda x, z: x * z, 192, inputs=TWO), 192),
    "multiply": (Row(torch.multiply, 192, inputs=TWO), 192),
    "mul by a gate": (Row(lambda x, z: x * z, 8, inputs=GATED), 192),
    "mul by a gate, symbols": (
        Row(lambda x, z: x * z, 8, inputs=GATED, dynamic=((0, 2, 3), (0,))), 192),
    "matmul": (Row(torch.matmul, 12, inputs=((2, 5, 3), (2, 3, 6)), loses=(DECOMPOSED,)), 10),
    "matmul, broadcast": (Row(
        lambda x, z: x @ z, 6, inputs=((2, 5, 3), (3, 6)), loses=(DECOMPOSED,)), 10),
    "matmul, broadcast both": (Row(
        lambda x, z: x @ z, 18, inputs=((2, 1, 5, 3), (3, 3, 6)), loses=(DECOMPOSED,)), 10),
    "matmul by a vector": (Row(
        torch.matmul, 1, inputs=((2, 5, 3), (3,)), loses=(DECOMPOSED,)), 10),
    "matmul of a vector": (Row(
        torch.matmul, 12, inputs=((3,), (2, 3, 6)), loses=(DECOMPOSED,)), 1),
    "matmul of symbols": (Row(
        torch.matmul, 12, inputs=((2, 5, 3), (2, 3, 6)), dynamic=((0, 1), (0,)),
        loses=(DECOMPOSED,)), 10),
    "bmm": (Row(torch.bmm, 12, inputs=((2, 5, 3), (2, 3, 6))), 10),
    "mm": (Row(torch.mm, 6, inputs=((5, 3), (3, 6))), 5),
    "mv": (Row(torch.mv, 1, inputs=((5, 3), (3,)), loses=(DECOMPOSED,)), 5),
    "dot": (Row(torch.dot, 1, inputs=((3,), (3,)), loses=(DECOMPOSED,)), 1),
    "einsum": (Row(lambda x, z: torch.einsum("bij,bkj->bik", x, z), 12,
                   inputs=((2, 5, 3), (2, 6, 3)), loses=(DECOMPOSED,)), 10),
    "einsum that enlarges": (Row(lambda x, z: torch.einsum("bij,bj->jbi", x, z), 3,
                             inputs=((2, 5, 3), (1, 3)), loses=(DECOMPOSED,)), 30),
}  # fmt: skip

MATRICES: Mapping[str, Row] = {
    "matmul by a constant block": Row(
        lambda x: torch.matmul(x, FULL.transpose(2, 3)), 32, A, Z, loses=(DECOMPOSED,)),
    "einsum by a constant": Row(lambda x: torch.einsum("nchw,nkhw->nkc", x, FULL), 8, A, Z,
                                loses=(DECOMPOSED,)),
    "einsum that moves axes": Row(lambda x: torch.einsum("nchw->nhwc", x), 192,
                                  loses=(DECOMPOSED,)),
    "einsum that adds up": Row(lambda x: torch.einsum("nchw->cn", x), 8, A, Z,
                               loses=(DECOMPOSED,)),
    "attention": Row(F.scaled_dot_product_attention, 36, inputs=ATTENTION, loses=(DECOMPOSED,)),
    "causal attention": Row(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), 36,
        inputs=ATTENTION, loses=(DECOMPOSED,)),
    "attention with a mask": Row(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), 36, A, Z,
        (*ATTENTION, (5, 7)), {3: torch.arange(7) < torch.arange(5)[:, None]},
        loses=(DECOMPOSED,)),
    "attention, one value for all heads": Row(
        F.scaled_dot_product_attention, 12, inputs=(QUERY, (2, 3, 7, 4), (2, 1, 7, 6)),
        loses=(DECOMPOSED,)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SUMS)
def test_sum_is_true(name: str, form: str) -> None:
    holds(SUMS[name], form)
    if form == EXPORTED:
        assert any(isinstance(op, Sum) for op in stated(SUMS[name], form).operators)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_product_is_true_whichever_factor_is_the_gate(name: str, form: str) -> None:
    row, other = PRODUCTS[name]
    counts = (agrees(row, form, gate=0), agrees(row, form, gate=1))
    if form != BARE and form not in row.loses:
        assert isinstance(only(row, form), Product)
        assert counts == (row.free, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MATRICES)
def test_tie_through_matrices_is_true(name: str, form: str) -> None:
    holds(MATRICES[name], form)


LIKE: Mapping[str, Row] = {
    "zeros_like": Row(lambda x, z: x * torch.zeros_like(z), 0, inputs=TWO),
    "ones_like": Row(lambda x, z: x * torch.ones_like(z), 0, inputs=TWO),
    "full_like": Row(lambda x, z: x * torch.full_like(z, 0.5), 0, inputs=TWO),
    "new_zeros": Row(lambda x, z: x * z.new_zeros((2, 4, 4, 6)), 0, inputs=TWO),
    "new_ones": Row(lambda x, z: x * z.new_ones([2, 4, 4, 6]), 0, inputs=TWO),
    "new_full": Row(lambda x, z: x * z.new_full((2, 4, 4, 6), 3.0), 0, inputs=TWO),
}


@pytest.mark.parametrize("form", [EXPORTED, TRACED])
@pytest.mark.parametrize("name", LIKE)
def test_what_asks_for_a_shape_binds_nothing(name: str, form: str) -> None:
    assert agrees(LIKE[name], form, gate=1) == 2 * 192


@pytest.mark.parametrize("name", ["clone", "dropout", "native_dropout", "clamp nothing"])
def test_what_does_nothing_lets_everything_through(name: str) -> None:
    operator = only(TIES[name])
    assert isinstance(operator, Tie)
    assert operator.free


def integers(value: Tensor) -> Tensor:
    return (value * 9).to(torch.int64)


UNSTATED: Mapping[str, Row] = {
    "to integers": Row(lambda x: x.to(torch.int64), 0, loses=FX),
    "from integers": Row(
        lambda x: x.float(), 0, given={0: integers(random(*IMAGE))}, skips=(BARE,)),
    "complex": Row(lambda x: x.to(torch.complex64).real, 0, skips=(DECOMPOSED, *FX)),
    "dropout in training": Row(lambda x: F.dropout(x, 1.0, True), 0, skips=(DECOMPOSED,)),
    "rrelu in training": Row(lambda x: F.rrelu(x, 0.2, 0.2, training=True), 0,
                             skips=(DECOMPOSED,)),
    "clamp to 6": Row(lambda x: x.clamp(0, 6), 0),
    "clamp by a computed bound": Row(
        lambda x, z: torch.clamp(x, min=z), 0, inputs=TWO, skips=(DECOMPOSED,)),
    "relu6": Row(F.relu6, 0),
    "relu6 module": Row(nn.ReLU6(), 0),
    "hardtanh": Row(F.hardtanh, 0),
    "threshold": Row(lambda x: F.threshold(x, 0.0, 1.0), 0, skips=(DECOMPOSED,)),
    "maximum with 1": Row(lambda x: torch.maximum(x, ZERO + 1), 0),
    "maximum with a block": Row(lambda x: torch.maximum(x, FULL), 0),
    "where with 1": Row(lambda x, m: torch.where(m, x, 1.0), 0, inputs=TWO, given={1: MASK}),
    "masked_fill with 1": Row(
        lambda x, m: x.masked_fill(m, 1.0), 0, inputs=TWO, given={1: MASK}),
    "add of a block": Row(lambda x: x + FULL, 0),
    "add half the other": Row(
        lambda x, z: torch.add(x, z, alpha=0.5), 0, inputs=TWO, skips=(DECOMPOSED,)),
    "square": Row(lambda x: x * x, 0),
    "div by itself": Row(lambda x: x / x, 0),
    "div of a constant": Row(lambda x: FULL / x, 0),
    "div of a number": Row(lambda x: 1 / x, 0, skips=(EXPORTED, DECOMPOSED)),
    "floor of div": Row(lambda x, z: torch.div(x, z, rounding_mode="floor"), 0, inputs=TWO),
    "matmul by itself": Row(lambda x: x @ x, 0, inputs=((4, 4),)),
    "einsum of a diagonal": Row(
        lambda x: torch.einsum("ii->i", x), 0, inputs=((4, 4),), skips=(DECOMPOSED,)),
    "attention to itself": Row(
        lambda x: F.scaled_dot_product_attention(x, x, x), 0, skips=(DECOMPOSED,)),
    "gelu": Row(F.gelu, 0), "silu": Row(F.silu, 0, skips=(DECOMPOSED,)),
    "sigmoid": Row(torch.sigmoid, 0),
    "softmax": Row(lambda x: x.softmax(1), 0), "exp": Row(torch.exp, 0),
}  # fmt: skip


ALL = (
    TIES, SUMS, {name: row for name, (row, _) in PRODUCTS.items()}, MATRICES, UNSTATED,
    LIKE, test_torch_norms.NORMS,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def decomposed_together() -> None:
    together(*ALL)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", UNSTATED)
def test_nothing_is_stated_of(name: str, form: str) -> None:
    is_unstated(UNSTATED[name], form)


# ---- calls as they should not be ----


def in_words(op: str) -> list[fx.GraphModule]:
    """Calls that go by the name ``op``: of every overload, each argument a node; and others."""
    packet = getattr(torch.ops.aten, op, None)
    overloads = [] if packet is None else [getattr(packet, name) for name in packet.overloads()]
    targets: list[tuple[object, int]] = [(o, len(o._schema.arguments)) for o in overloads]
    graphs = []
    for target, count in [*targets, (op, 1), (op, 3)]:
        graph = fx.Graph()
        args = tuple(graph.placeholder(f"x{k}") for k in range(count))
        if isinstance(target, str):
            graph.output(graph.call_method(target, args))
        else:
            graph.output(graph.call_function(target, args))  # type: ignore[arg-type]
        graphs.append(fx.GraphModule({}, graph))
    return graphs


@pytest.mark.parametrize("op", sorted(TABLE))
def test_arguments_that_are_computed_are_no_error(op: str) -> None:
    for graph_module in in_words(op):
        walked = walk(graph_module, {})
        facts = Facts(graph_module, walked, Constants(walked, {}, {}))
        for call in walked.calls:
            for some in (call, Call(op, {}, call.node)):
                find_tie(facts, some, lambda node: id(node), lambda _: (), {0: call.node})


def test_another_namespace_is_not_in_the_table() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.prims.abs.default, (graph.placeholder("x"),)))
    module = fx.GraphModule({}, graph)
    walked = walk(module, {})
    facts = Facts(module, walked, Constants(walked, {}, {}))
    (call,) = walked.calls
    assert find_tie(facts, call, lambda _: 0, lambda _: (), {0: call.node}) is None


# ---- the judge can say no ----

WRONG: Mapping[str, tuple[Row, str, Rule]] = {
    "a shift through relu": (TIES["relu"], "relu", lambda asked: asked.tie(P, E, Way())),
    "a sign through relu": (TIES["relu"], "relu", lambda asked: asked.tie(A, Z, Way())),
    "the sign of a sum": (
        SUMS["sub"], "sub", lambda asked: asked.sum((1, 1), Way(), Way(1)),
    ),
    "a shift through a product": (
        PRODUCTS["mul"][0], "mul", lambda asked: asked.tie(A, E, Way()),
    ),
    "an axis that is pooled over": (
        Row(lambda x: x.amax(3, keepdim=True), 0), "amax",
        lambda asked: asked.tie(
            P, E, Way(0, along(4, 3, np.array([2]), np.array([0])))),
    ),
    "batch for channels": (
        Row(lambda x: x.permute(1, 0, 2, 3), 0, inputs=((4, 4, 4, 6),)), "permute",
        lambda asked: asked.tie(A, E, Way()),
    ),
    "an equal shift through a mask of attention": (
        MATRICES["attention with a mask"], "scaled_dot_product_attention",
        lambda asked: asked.tie(A, E, Way(2, same_axes(4, (2,)))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_statement_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, op, rule = WRONG[name]
    monkeypatch.setattr("bnfold.torch_ties.TABLE", {op: rule})
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        agrees(row, EXPORTED)


# Made by random numbers or not at all, on another device, or by torch itself alone.
NO_ROW = {"rand_like", "randn_like", "empty_like", "new_empty", "cuda", "requires_grad",
          "lift_fresh", "lift_fresh_copy"}  # fmt: skip


def test_every_operation_of_the_table_is_tried() -> None:
    rows = [row for table in ALL for row in table.values()]
    tried = {
        call.op for row in rows for form in (EXPORTED, DECOMPOSED, TRACED)
        if form not in row.skips for call in calls(row, form)
    }  # fmt: skip
    elsewhere = {*POOLING, *MOVES, *PARTS, *NO_ROW}
    assert sorted(set(TABLE) - elsewhere - tried) == []
