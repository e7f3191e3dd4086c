"""The check of merged models: by bnfold, where sums lose terms, and by hand, under other names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import bnfold
from bnfold.verify.judge import Verdict
from models.export import export_traced
from models.registry import BRANCHED, build
from tests import nets

EVERY = pytest.mark.parametrize("name", BRANCHED)


def exported(module: nn.Module, example: Tensor, path: Path) -> Path:
    export_traced(module, example, path)
    return path


def tensors(model: onnx.ModelProto) -> set[str]:
    """What the nodes make."""
    return {name for node in model.graph.node for name in node.output}


# ---- by bnfold ----


@EVERY
def test_a_model_that_was_joined_passes_every_tier(name: str, tmp_path: Path) -> None:
    source = exported(*build(name), tmp_path / "net.onnx")
    result = bnfold.optimize(source, tmp_path / "out.onnx", samples=3)
    assert len(result.report.joints) == {"repvgg": 5, "mobileone": 5, "serial": 5, "sums": 4}[name]
    assert result.check is not None
    assert {tier.verdict for tier in result.check.tiers} == {Verdict.PASS}
    assert result.dropped == ()
    # And where nobody says who made it.
    assert bnfold.check(source, tmp_path / "out.onnx", samples=3).verdict is Verdict.PASS


def test_a_tensor_that_holds_something_else_has_another_name(tmp_path: Path) -> None:
    source = exported(*build("sums"), tmp_path / "net.onnx")
    before, made = tensors(onnx.load(source)), tensors(bnfold.fold(onnx.load(source)).model)
    assert {name.removesuffix("_joined") for name in made} <= before
    assert sum(name.endswith("_joined") for name in made) == 3  # one for each sum with a skip


def test_sums_on_the_way_hold_something_else_too(tmp_path: Path) -> None:
    """Without their first term; the last of them gives what it did, under its name."""
    rng = np.random.default_rng(0)
    weights = {name: nets.weight(rng, 3, 3, 1, 1) for name in ("v", "w")}
    weights |= {"u": nets.weight(rng, 3, 3, 3, 3)}
    lines = [
        "p = Conv <pads = [1, 1, 1, 1]> (x, u)", "a = Relu (x)", "b = Sigmoid (x)",
        "one = Sum (p, a, b)", "c = Tanh (x)", "two = Add (c, one)", "q = Conv (x, w)",
        "three = Add (two, q)", "d = Elu (three)", "y = Conv (d, v)",
    ]  # fmt: skip
    graph = f"g (float[2,3,8,8] x) => (float[2,3,8,8] y) {{ {' '.join(lines)} }}"
    onnx.save(nets.model(graph, weights), tmp_path / "net.onnx")
    result = bnfold.optimize(tmp_path / "net.onnx", tmp_path / "out.onnx", samples=3)
    assert result.check is not None
    assert {tier.verdict for tier in result.check.tiers} == {Verdict.PASS}
    assert tensors(onnx.load(tmp_path / "out.onnx")) == {
        "a", "b", "one_joined", "c", "two_joined", "q_joined", "three", "d", "y",
    }  # fmt: skip


def test_an_exported_program_whose_input_is_called_like_a_builtin_passes() -> None:
    """A copy of it, of which a weight is spoiled, calls that node otherwise than its signature."""
    module, example = build("serial")
    program = torch.export.export(module, (example,))
    assert program.graph_signature.user_inputs == ("input",)
    folded = bnfold.fold(program, example)
    assert folded.report.joints
    said = bnfold.check(program, folded.model, samples=3, tiers="CD")
    assert (said.verdict, len(said.mutations)) == (Verdict.PASS, 1)


# ---- by hand ----


class Plain(nn.Module):
    """A net of single convolutions, whose tensors are called otherwise."""

    def __init__(self, stages: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stages, self.head = nn.ModuleList(stages), head

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = torch.relu(stage(x))
        y: Tensor = self.head(x)
        return y


@torch.no_grad()
def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift, in the type that the statistics are stored in."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


@torch.no_grad()
def kernel(branch: nn.Module, like: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """A branch as a kernel of the size of that of ``like``, and its bias."""
    if isinstance(branch, nn.BatchNorm2d):
        scale, shift = affine(branch)
        made = torch.zeros_like(like.weight)
        rows = torch.arange(len(made))
        middle = [size // 2 for size in like.kernel_size]
        made[rows, rows % made.shape[1], middle[0], middle[1]] = scale
        return made, shift
    conv, norm = branch.get_submodule("conv"), branch.get_submodule("norm")
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    scale, shift = affine(norm)
    margin = (like.kernel_size[0] - conv.kernel_size[0]) // 2
    return nn.functional.pad(conv.weight * scale.reshape(-1, 1, 1, 1), [margin] * 4), shift


@torch.no_grad()
def reparameterised(branches: list[nn.Module]) -> nn.Conv2d:
    """The sum of the branches as one convolution."""
    like = branches[0].get_submodule("conv")
    assert isinstance(like, nn.Conv2d)
    made = nn.Conv2d(like.in_channels, like.out_channels, 3, padding=1,
                     stride=like.stride[0], groups=like.groups)  # fmt: skip
    found = [kernel(branch, like) for branch in branches]
    made.weight.copy_(torch.stack([weight for weight, _ in found]).sum(0))
    assert made.bias is not None
    made.bias.copy_(torch.stack([shift for _, shift in found]).sum(0))
    return made


Change = Callable[[list[nn.Conv2d], list[list[nn.Module]]], None]


def by_hand(net: nn.Module, change: Change | None = None) -> nn.Module:
    """What RepVGG's own code makes of its training form, after ``change``."""
    *blocks, head = net.children()
    branches = [[*block.get_submodule("branches").children()] for block in blocks]
    stages = [reparameterised(each) for each in branches]
    if change is not None:
        with torch.no_grad():
            change(stages, branches)
    return Plain([*stages], head).eval()


def _tap_shifted(stages: list[nn.Conv2d], _: list[list[nn.Module]]) -> None:
    stages[1].weight.copy_(stages[1].weight.roll(1, -1))


def _corner(stages: list[nn.Conv2d], branches: list[list[nn.Module]]) -> None:
    pointwise, _ = kernel(branches[2][1], stages[2])
    stages[2].weight += pointwise.roll((-1, -1), (-2, -1)) - pointwise


def _no_identity(stages: list[nn.Conv2d], branches: list[list[nn.Module]]) -> None:
    weight, shift = kernel(branches[3][2], stages[3])
    stages[3].weight -= weight
    assert stages[3].bias is not None
    stages[3].bias -= shift


def _no_epsilon(stages: list[nn.Conv2d], branches: list[list[nn.Module]]) -> None:
    norm = branches[1][0].get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d)
    before, _ = kernel(branches[1][0], stages[1])
    kept, norm.eps = norm.eps, 0.0
    after, _ = kernel(branches[1][0], stages[1])
    norm.eps = kept
    stages[1].weight += after - before


def _channel_moved(stages: list[nn.Conv2d], branches: list[list[nn.Module]]) -> None:
    identity, _ = kernel(branches[4][2], stages[4])
    stages[4].weight += identity.roll(1, 0) - identity


def _one_bias(stages: list[nn.Conv2d], branches: list[list[nn.Module]]) -> None:
    assert stages[0].bias is not None
    stages[0].bias -= kernel(branches[0][1], stages[0])[1]


DEFECTS: dict[str, Change] = {
    "a tap is shifted by one": _tap_shifted,
    "the 1x1 stands in the corner": _corner,
    "the identity is forgotten": _no_identity,
    "an epsilon is forgotten": _no_epsilon,
    "the identity of a group is of another channel": _channel_moved,
    "the bias of a branch is left out": _one_bias,
}


@pytest.fixture(scope="module")
def training_form(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Path]:
    folder = tmp_path_factory.mktemp("repvgg")
    net, example = build("repvgg")
    return net, example, exported(net, example, folder / "training.onnx")


def test_a_net_that_was_reparameterised_by_hand_passes(
    training_form: tuple[nn.Module, Tensor, Path], tmp_path: Path
) -> None:
    net, example, reference = training_form
    candidate = exported(by_hand(net), example, tmp_path / "plain.onnx")
    plain = onnx.load(candidate)
    assert sum(node.op_type == "Conv" for node in plain.graph.node) == 5
    assert tensors(plain) & tensors(onnx.load(reference)) == {"output"}
    assert bnfold.check(reference, candidate, samples=4).verdict is Verdict.PASS


@pytest.mark.parametrize("change", DEFECTS.values(), ids=DEFECTS)
def test_a_net_that_was_reparameterised_wrongly_fails(
    training_form: tuple[nn.Module, Tensor, Path], tmp_path: Path, change: Change
) -> None:
    net, example, reference = training_form
    candidate = exported(by_hand(net, change), example, tmp_path / "plain.onnx")
    said = bnfold.check(reference, candidate, samples=4)
    assert said.verdict is Verdict.FAIL
    failed = {tier.tier for tier in said.tiers if tier.verdict is Verdict.FAIL}
    assert {"B", "C"} <= failed
