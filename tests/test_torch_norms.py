"""A normalisation of torch has a scale and a shift of its own, on the axis that is stated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bnfold.channel_graph import Bias, Norm
from tests.torch_tie_nets import (
    BARE,
    DECOMPOSED,
    EXPORTED,
    FORMS,
    TRACED,
    Row,
    feeds,
    random,
    stated,
    unknown,
)


def with_parameters(module: nn.Module) -> nn.Module:
    for k, parameter in enumerate(module.double().parameters()):
        parameter.data = random(*parameter.shape, seed=k)
    return module.eval()


class Functional(nn.Module):
    """A normalisation by a function, with a weight and a bias of four channels."""

    def __init__(self, run: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.run = run
        self.weight, self.bias = nn.Parameter(random(4)), nn.Parameter(random(4, seed=6))

    def forward(self, x: Tensor) -> Any:
        return self.run(x, self.weight, self.bias)


class Inside(nn.Module):
    """Keeps an fx trace from taking a module of the tests for the root."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


TOKENS, LINE, IMAGE = ((2, 3, 4),), ((2, 4, 5),), ((2, 4, 4, 6),)


def _f(run: Callable[[Tensor, Tensor, Tensor], Any]) -> nn.Module:
    return Inside(Functional(run))


NORMS: Mapping[str, Row] = {
    "LayerNorm": Row(with_parameters(nn.LayerNorm(4)), -1, inputs=TOKENS),
    "layer_norm": Row(_f(lambda x, w, b: F.layer_norm(x, (4,), w, b)), -1, inputs=TOKENS),
    "layer_norm of any batch": Row(
        _f(lambda x, w, b: F.layer_norm(x, (4,), w, b)), -1, inputs=TOKENS, dynamic=((0, 1),)),
    "native_layer_norm": Row(
        _f(lambda x, w, b: torch.native_layer_norm(x, (4,), w, b, 1e-5)[0]), -1, inputs=TOKENS),
    "RMSNorm": Row(with_parameters(nn.RMSNorm(4)), -1, inputs=TOKENS, loses=(DECOMPOSED,)),
    "rms_norm": Row(_f(lambda x, w, b: F.rms_norm(x, (4,), w)), -1, inputs=TOKENS,
                    loses=(DECOMPOSED,)),
    "_fused_rms_norm": Row(
        _f(lambda x, w, b: torch.ops.aten._fused_rms_norm.default(x, [4], w, 1e-5)[0]), -1,
        inputs=TOKENS, loses=(DECOMPOSED,)),
    "GroupNorm": Row(with_parameters(nn.GroupNorm(2, 4)), 1, inputs=IMAGE),
    "group_norm": Row(_f(lambda x, w, b: F.group_norm(x, 2, w, b)), 1, inputs=LINE),
    "InstanceNorm2d": Row(
        with_parameters(nn.InstanceNorm2d(4, affine=True)), 1, inputs=IMAGE, loses=(DECOMPOSED,)),
    "InstanceNorm1d": Row(
        with_parameters(nn.InstanceNorm1d(4, affine=True)), 1, inputs=LINE, loses=(DECOMPOSED,)),
    "instance_norm": Row(
        _f(lambda x, w, b: F.instance_norm(x, weight=w, bias=b)), 1, inputs=IMAGE,
        loses=(DECOMPOSED,)),
}  # fmt: skip


def the_norm(row: Row, form: str) -> Norm:
    (norm,) = [op for op in stated(row, form).operators if isinstance(op, Norm)]
    return norm


@pytest.mark.parametrize("name", NORMS)
def test_own_scale_and_shift_are_what_follows_on_the_axis(name: str) -> None:
    row = NORMS[name]
    assert isinstance(row.run, nn.Module)
    changed = copy.deepcopy(row.run)
    a, b = random(4, seed=7), random(4, seed=8)
    for key, parameter in changed.named_parameters():
        parameter.data = parameter * a if key.endswith("weight") else parameter * a + b
    (x,) = feeds(row)
    before, after = (run(x).detach().movedim(row.free, -1) for run in (row.run, changed))
    shift = 0 if "rms" in name.lower() else b
    np.testing.assert_allclose(after, a * before + shift, rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NORMS)
def test_norm_takes_what_follows_on_its_axis(name: str, form: str) -> None:
    row = NORMS[name]
    if form in row.loses or (form == BARE and name.startswith("Instance")):
        return
    found = stated(row, form)
    norm = the_norm(row, form)
    assert not unknown(found)
    rank = len(row.inputs[0])
    assert (norm.axis % rank, norm.channels) == (row.free % rank, 4)
    assert norm.bias is (Bias.OPERATOR if "rms" in name.lower() else Bias.BUILT_IN)
    assert norm.weight is not None
    assert (norm.weight.dtype, norm.weight.nbytes) == ("DOUBLE", 32)
    assert len(norm.weight.readers) == 1


def bare(run: Callable[..., Any], **more: Any) -> Row:
    return Row(run, -1, **{"inputs": TOKENS, **more})


# The bias, and whether there is a weight that could be written.
BIASES: Mapping[str, tuple[Row, Bias, bool]] = {
    "absent, but possible": (
        Row(_f(lambda x, w, b: F.layer_norm(x, (4,), w)), -1, inputs=TOKENS), Bias.BUILT_IN, True),
    "computed from constants": (
        Row(_f(lambda x, w, b: F.layer_norm(x, (4,), w, b * 2)), -1, inputs=TOKENS),
        Bias.BUILT_IN, True),
    "computed": (
        Row(_f(lambda x, w, b: F.layer_norm(x, (4,), w, x[0, 0])), -1, inputs=TOKENS),
        Bias.DYNAMIC, True),
    "nothing of its own": (bare(lambda x: F.layer_norm(x, (4,))), Bias.BUILT_IN, True),
    "nothing of its own, module": (
        Row(nn.LayerNorm(4, elementwise_affine=False), -1, inputs=TOKENS), Bias.BUILT_IN, True),
    "nothing of its own, groups": (
        bare(lambda x: F.group_norm(x, 2), inputs=IMAGE), Bias.BUILT_IN, True),
    "nothing of its own, space": (
        bare(F.instance_norm, inputs=IMAGE), Bias.BUILT_IN, True),
    "weight computed from constants": (
        Row(_f(lambda x, w, b: F.layer_norm(x, (4,), w * 2, b)), -1, inputs=TOKENS),
        Bias.BUILT_IN, False),
    "weight computed": (
        bare(lambda x, w: F.layer_norm(x, (4,), w), inputs=(*TOKENS, (4,))), Bias.BUILT_IN, False),
    "none": (bare(lambda x: F.rms_norm(x, (4,))), Bias.OPERATOR, True),
}  # fmt: skip


@pytest.mark.parametrize("form", [EXPORTED, TRACED])
@pytest.mark.parametrize("name", BIASES)
def test_norm_says_where_a_shift_would_go(name: str, form: str) -> None:
    row, bias, weighs = BIASES[name]
    norm = the_norm(row, form)
    assert (norm.bias, norm.weight is not None) == (bias, weighs)


NO_NORMS: Mapping[str, Row] = {
    "over two axes": bare(lambda x: F.layer_norm(x, (3, 4))),
    "mean is read": bare(lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5)[:2]),
    "mean alone is read": bare(lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5)[1]),
    "a single image": Row(
        with_parameters(nn.InstanceNorm2d(4, affine=True)), 0, inputs=((4, 4, 6),),
        skips=(EXPORTED,)),
    "integers": bare(lambda x: F.layer_norm(x.to(torch.int64).float(), (4,)), skips=(BARE,)),
}  # fmt: skip


@pytest.mark.parametrize("form", [EXPORTED, TRACED, BARE])
@pytest.mark.parametrize("name", NO_NORMS)
def test_no_norm_is_stated(name: str, form: str) -> None:
    if form in NO_NORMS[name].skips:
        return
    found = [op for op in stated(NO_NORMS[name], form).operators if isinstance(op, Norm)]
    assert not [norm for norm in found if name != "integers" or norm.inputs[0] == 0]


def test_a_weight_is_known_by_its_storage() -> None:
    norms = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(4)).double()
    weight = norms[0].get_parameter("weight")
    norms[1].register_parameter("weight", weight)
    norms[2].register_parameter("weight", nn.Parameter(weight.detach().view(4)))
    row = Row(Inside(norms), -1, inputs=TOKENS)
    for form in (EXPORTED, TRACED):
        found = [op for op in stated(row, form).operators if isinstance(op, Norm)]
        weights = [norm.weight for norm in found]
        assert len({w.storage for w in weights if w is not None}) == 1
