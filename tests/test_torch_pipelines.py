"""A module that was folded goes wherever modules go: exporters, tracers, compilers, files."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, fx, nn

import bnfold
from models import build
from tests import nets
from tests.test_onnx_pass import NORMS, quiet_export
from tests.torch_nets import decomposed, lively, one_thread, random

pytestmark = [
    # torch says of all that is made by torch.jit that it is old.
    pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning"),
    # It copies its own tree specs in a way that it deprecates.
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\):FutureWarning"),
    # It remembers hooks on all modules after they are removed, those of other tests, too.
    pytest.mark.filterwarnings("ignore:Using `torch.compile.* when there are global hooks"),
]
threads = pytest.fixture(autouse=True)(one_thread)

README = (Path(__file__).parent.parent / "README.md").read_text()
BN = "BatchNormalization"


class Residual(nn.Module):
    """Two convolutions, each with a BatchNorm, around which the input goes on."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(x + y)


class Net(nn.Module):
    """A classifier: BatchNorms behind and before convolutions, and between Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.fc1 = nn.Linear(8, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.fc2 = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.conv(self.bn(x)))
        x = torch.relu(self.norm(self.fc1(x.mean([2, 3]))))
        scores: Tensor = self.fc2(x)
        return scores


GAINED = {"blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "fc1"}


def net() -> Net:
    """The net in float32, its gammas of both signs, one of them 0."""
    made: Net = lively(Net()).float()
    return made


def image(batch: int = 2) -> Tensor:
    return random(batch, 3, 16, 16, seed=batch).float()


@cache
def folded(inputs: bool = True) -> Any:
    """The folded net, which nobody may change."""
    return bnfold.fold(net(), image() if inputs else None).model


def distance(got: Any, batch: int = 2) -> float:
    """How far a result is from that of the unfolded net in float64."""
    with torch.no_grad():
        expected = net().double()(image(batch).double())
    return float((torch.as_tensor(got).double() - expected).norm() / expected.norm())


def norms(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, NORMS)]


# ---- folded, then exported to ONNX ----

NAMES: dict[str, Any] = {"input_names": ["image"], "output_names": ["scores"]}


def captured(model: nn.Module, example: Tensor) -> onnx.ModelProto:
    """What the exporter built on ``torch.export`` makes."""
    with quiet_export():
        program = torch.onnx.export(
            model, (example,), dynamo=True, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},), **NAMES,
        )  # fmt: skip
    assert program is not None
    return program.model_proto


def traced(model: nn.Module, example: Tensor) -> onnx.ModelProto:
    """What the tracing exporter makes."""
    file: Any = io.BytesIO()
    axes = {name: {0: "batch"} for name in ("image", "scores")}
    with quiet_export():
        torch.onnx.export(model, (example,), file, dynamo=False, dynamic_axes=axes, **NAMES)
    return onnx.load_from_string(file.getvalue())


EXPORTERS = {"captured": captured, "traced": traced}


@cache
def exported(exporter: str, fold: bool) -> onnx.ModelProto:
    return EXPORTERS[exporter](folded() if fold else net(), image())


def runtime(model: onnx.ModelProto, example: Tensor) -> Tensor:
    """What ONNX Runtime makes of ``example``, without folding anything itself."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["scores"], {"image": example.numpy()})[0])


def initializers(model: onnx.ModelProto) -> dict[str, Any]:
    """All weights; not the numbers that tell sizes and axes."""
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    return {name: array for name, array in tensors.items() if array.dtype == np.float32}


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_an_export_of_the_folded_net_says_what_the_net_said(exporter: str) -> None:
    model = exported(exporter, True)
    onnx.checker.check_model(model, full_check=True)
    assert BN in nets.operators(exported(exporter, False))
    assert BN not in nets.operators(model)
    for batch in (2, 5):
        assert distance(runtime(model, image(batch)), batch) < 1e-4


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_an_export_of_the_folded_net_has_the_users_names(exporter: str) -> None:
    state, found = folded().state_dict(), initializers(exported(exporter, True))
    assert found.keys() == state.keys()
    gained = {f"{path}.bias" for path in GAINED}
    assert found.keys() - net().state_dict().keys() == gained
    for name, array in found.items():
        assert np.array_equal(array, state[name].numpy())


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_an_export_of_the_folded_net_has_the_same_inputs_and_outputs(exporter: str) -> None:
    before, after = exported(exporter, False), exported(exporter, True)
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)


@pytest.mark.parametrize(("kind", "exporter"), [("unet", "traced"), ("levit", "captured")])
def test_an_export_of_a_folded_model_leaves_no_norm(kind: str, exporter: str) -> None:
    module, example = build(kind)
    result = bnfold.fold(module, example)
    assert not norms(result.model)
    model = EXPORTERS[exporter](result.model, example)
    assert BN not in nets.operators(model)
    with torch.no_grad():
        expected = copy.deepcopy(module).double()(example.double())
    got = runtime(model, example).double()
    assert (got - expected).norm() / expected.norm() < 1e-4
    users = {*module.state_dict(), *result.model.state_dict()}
    assert sum(name in users for name in initializers(model)) >= len(norms(module)) / 2


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_nothing_is_left_to_fold_in_an_export_of_the_folded_net(exporter: str) -> None:
    before = initializers(exported(exporter, True))
    result = bnfold.fold(exported(exporter, True))
    assert not any(step.op_type == BN for step in result.report.steps)
    assert not result.report.folded
    assert initializers(result.model).keys() == before.keys()


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_folding_before_the_export_gives_the_weights_of_folding_after_it(exporter: str) -> None:
    after = bnfold.fold(exported(exporter, False)).model
    assert BN not in nets.operators(after)
    assert distance(runtime(after, image())) < 1e-4
    assert distance(runtime(exported(exporter, True), image())) < 1e-4
    assert nets.operators(after)["Conv"] == nets.operators(exported(exporter, True))["Conv"] == 5


# ---- folded, then anything else that takes a module ----


@contextmanager
def forgetting() -> Iterator[None]:
    """What was compiled in here is forgotten at its end."""
    try:
        yield
    finally:
        torch.compiler.reset()


def programmed(model: nn.Module) -> Any:
    """By ``torch.export``, for any batch."""
    dynamic = ({0: torch.export.Dim("batch")},)
    return torch.export.export(model, (image(),), dynamic_shapes=dynamic, strict=False)


def reloaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def reexported(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.export.save(programmed(model), file)
    file.seek(0)
    return torch.export.load(file).module()


def jit_saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    load: Any = torch.jit.load
    return load(file)


def state_of_another(model: nn.Module) -> Any:
    """Another net, folded and given the state of this one."""
    other = bnfold.fold(lively(Net(), seed=9).float(), image()).model
    other.load_state_dict(model.state_dict())
    return other


WAYS: dict[str, Callable[[Any], Any]] = {
    "torch.export": lambda model: programmed(model).module(),
    "torch.export, decomposed": lambda model: decomposed(programmed(model)).module(),
    "torch.export, saved": reexported,
    "torch.jit.trace": lambda model: cast(Any, torch.jit.trace)(model, (image(),)),
    "torch.jit.script": torch.jit.script,
    "torch.jit.script, saved": jit_saved,
    "torch.jit.script, frozen": lambda model: torch.jit.freeze(torch.jit.script(model)),
    "torch.compile": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    "torch.fx": fx.symbolic_trace,
    "deepcopy": copy.deepcopy,
    "torch.save": reloaded,
    "state_dict": state_of_another,
    "DataParallel": nn.DataParallel,
    "double": lambda model: copy.deepcopy(model).double().float(),
    "channels last": lambda model: copy.deepcopy(model).to(memory_format=torch.channels_last),
    "folded again": lambda model: bnfold.fold(model, image()).model,
}


@pytest.mark.parametrize("inputs", [True, False], ids=["captured", "traced"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_folded_module_goes_where_modules_go(way: Callable[[Any], Any], inputs: bool) -> None:
    model = folded(inputs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with forgetting(), torch.no_grad():
        result = way(model)
        for batch in (2, 3):
            assert distance(result(image(batch)), batch) < 1e-5
    assert not norms(result)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("inputs", [True, False], ids=["captured", "traced"])
def test_a_fold_leaves_nothing_behind_in_torch(inputs: bool) -> None:
    def left() -> list[list[int]]:
        held = vars(torch.nn.modules.module).items()
        return [sorted(value) for name, value in held if name.startswith("_global") and value]

    before = left()
    bnfold.fold(net(), image() if inputs else None)
    assert left() == before


@pytest.mark.parametrize("inputs", [True, False], ids=["captured", "traced"])
def test_a_folded_module_has_no_norm_and_the_users_class(inputs: bool) -> None:
    model = folded(inputs)
    assert type(model) is Net
    assert not norms(model)
    assert model.state_dict().keys() - net().state_dict().keys() == {f"{p}.bias" for p in GAINED}
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_a_folded_module_is_no_worse_than_the_unfolded(dtype: Any) -> None:
    before, after = net().to(dtype), copy.deepcopy(folded()).to(dtype)
    assert {value.dtype for value in after.state_dict().values()} == {dtype}
    with torch.no_grad():
        one, other = (distance(model(image().to(dtype))) for model in (before, after))
    assert 1e-5 < other < 2 * one


def test_a_wrapper_is_folded_in_its_place() -> None:
    wrapped = nn.DataParallel(net())
    result = bnfold.fold(wrapped, image()).model
    assert type(result) is nn.DataParallel
    assert not norms(result)
    assert result.module.state_dict().keys() == folded().state_dict().keys()
    with torch.no_grad():
        assert distance(result(image())) < 1e-5


def test_a_folded_module_is_trained_on() -> None:
    model = copy.deepcopy(folded()).train()
    model(image()).sum().backward()
    trained = {name for name, value in model.named_parameters() if value.grad is not None}
    assert trained == model.state_dict().keys()


def test_a_program_of_the_folded_module_holds_what_the_folded_program_holds() -> None:
    first = programmed(folded())
    second = bnfold.fold(programmed(net())).model
    assert first.state_dict.keys() == second.state_dict.keys()
    for name, value in first.state_dict.items():
        assert torch.equal(value, second.state_dict[name])
    with torch.no_grad():
        assert distance(second.module()(image(3)), 3) < 1e-5


# ---- what the README says ----


def snippets(title: str) -> list[str]:
    """The Python of a section of the README."""
    section = README.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_recipes_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = snippets("In an export pipeline")
    assert len(found) == 3
    seen: dict[str, Any] = {"net": net(), "image": image()}
    files: dict[str, bytes] = {}
    with quiet_export():
        for block in found:
            exec(block, seen)
            files |= {path.name: path.read_bytes() for path in tmp_path.glob("*.onnx")}
    assert files.keys() == {"net.onnx", "traced.onnx", "folded.onnx"}
    for name in ("net.onnx", "folded.onnx"):
        model = onnx.load(tmp_path / name)
        assert BN not in nets.operators(model)
        assert distance(one_output(model)) < 1e-4
    assert BN in nets.operators(onnx.load(tmp_path / "traced.onnx"))
    assert not seen["fold"].report.kept
    assert not norms(seen["folded"])
    assert len(norms(seen["net"])) == 6


def one_output(model: onnx.ModelProto) -> Tensor:
    session = ort.InferenceSession(model.SerializeToString(), None, ["CPUExecutionProvider"])
    example = {session.get_inputs()[0].name: image().numpy()}
    return torch.from_numpy(session.run(None, example)[0])
