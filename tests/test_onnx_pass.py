"""In pipelines around ONNX: what torch exports, folded; and fold as a pass of onnx-ir."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.passes import common
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.onnx import TrainingMode

import bnfold
from bnfold.errors import InvalidModelError, UsageError
from bnfold.folding import UNSHARE_BYTES
from bnfold.onnx_pass import FoldAffineSteps
from models import build
from tests import nets, onnx_nets, solver_nets

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
BN = "BatchNormalization"

# What to tell which exporter; the second of each leaves every BatchNorm in the model.
CAPTURED: dict[str, dict[str, Any]] = {"captured": {}, "captured, as it is": {"optimize": False}}
TRACED: dict[str, dict[str, Any]] = {
    "traced": {},
    "traced, as it is": {"training": TrainingMode.PRESERVE, "do_constant_folding": False},
}
EXPORTS = (*CAPTURED, *TRACED)
AS_IT_IS = [kind for kind in EXPORTS if kind.endswith("as it is")]
CASES = [
    *((net, kind) for net in ("levit", "unet") for kind in EXPORTS),
    *(("resnet", kind) for kind in TRACED),
]

# What torch says of itself while it exports.
NOISE = (
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    (DeprecationWarning, "You are using the legacy TorchScript-based ONNX export"),
    (DeprecationWarning, "The feature will be removed. Please remove usage of this function"),
)


@contextmanager
def quiet_export() -> Iterator[None]:
    with warnings.catch_warnings():
        for category, message in NOISE:
            warnings.filterwarnings("ignore", message, category)
        yield


def captured(net: str, path: Path | None = None, **options: Any) -> Any:
    """What the exporter built on ``torch.export`` returns."""
    module, example = build(net)
    with quiet_export():
        return torch.onnx.export(
            module, (example,), path, dynamo=True, verbose=False,
            input_names=["image"], output_names=["scores"],
            dynamic_shapes=({0: torch.export.Dim("batch")},), **options,
        )  # fmt: skip


def traced(net: str, **options: Any) -> onnx.ModelProto:
    """What the tracing exporter writes."""
    module, example = build(net)
    file: Any = io.BytesIO()  # which torch takes here, whatever its signature says
    with quiet_export():
        torch.onnx.export(
            module, (example,), file, dynamo=False, opset_version=17,
            input_names=["image"], output_names=["scores"],
            dynamic_axes={name: {0: "batch"} for name in ("image", "scores")}, **options,
        )  # fmt: skip
    return onnx.load_from_string(file.getvalue())


@functools.cache
def exported(net: str, kind: str) -> Any:
    """The net ``net`` by the exporter and options ``kind``; nobody may change it."""
    if kind in CAPTURED:
        return captured(net, **CAPTURED[kind])
    return traced(net, **TRACED[kind])


@functools.cache
def folded(net: str, kind: str) -> Any:
    return bnfold.fold(exported(net, kind))


def proto(model: Any) -> onnx.ModelProto:
    if isinstance(model, onnx.ModelProto):
        return model
    found = ir.to_proto(model if isinstance(model, ir.Model) else model.model)
    assert isinstance(found, onnx.ModelProto)
    return found


def spelled(model: Any) -> bytes:
    return bytes(proto(model).SerializeToString(deterministic=True))


def content(model: onnx.ModelProto) -> tuple[list[bytes], dict[str, bytes]]:
    """Nodes and weights, wherever these are stored."""
    nodes = [node.SerializeToString(deterministic=True) for node in model.graph.node]
    arrays = {t.name: onnx.numpy_helper.to_array(t).tobytes() for t in model.graph.initializer}
    return nodes, arrays


def runtime(model: onnx.ModelProto, image: torch.Tensor) -> torch.Tensor:
    """The output on ONNX Runtime, which is not to fold anything itself."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(["scores"], {"image": image.numpy()})[0])


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


def names(model: Any) -> set[str]:
    return {tensor.name for tensor in proto(model).graph.initializer}


# ---- what torch.onnx.export makes ----


@pytest.mark.parametrize(("net", "kind"), CASES)
def test_a_folded_export_says_what_torch_says(net: str, kind: str) -> None:
    model = proto(folded(net, kind).model)
    onnx.checker.check_model(model, full_check=True)
    nets.assert_nothing_dangles(model)
    module, example = build(net)
    wide = copy.deepcopy(module).double()
    image = torch.cat([example, -2 * example[:1]])  # the batch is dynamic
    with torch.no_grad():
        expected = wide(image.double())
    assert error(runtime(model, image), expected) < 1e-4


@pytest.mark.parametrize(("net", "kind"), CASES)
def test_inputs_and_outputs_stay_and_no_batch_norm_does(net: str, kind: str) -> None:
    before, after = proto(exported(net, kind)), proto(folded(net, kind).model)
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert [value.name for value in after.graph.input] == ["image"]
    assert BN not in nets.operators(after)
    norms = sum(isinstance(part, NORMS) for part in build(net)[0].modules())
    if kind in AS_IT_IS:
        assert nets.operators(before)[BN] == norms > 0


@pytest.mark.parametrize(("net", "kind"), CASES)
def test_parameters_keep_the_users_names(net: str, kind: str) -> None:
    module, _ = build(net)
    gone = {f"{path}." for path, part in module.named_modules() if isinstance(part, NORMS)}
    users = {name for name in module.state_dict() if not name.startswith(tuple(gone))}
    after = names(folded(net, kind).model)
    found = users & names(exported(net, kind))
    # A weight that is stored transposed is another tensor, and says so.
    assert {name for name in found if name not in after and f"{name}_folded" not in after} == set()
    if kind in AS_IT_IS:
        assert users <= found
        biases = {name.removesuffix("weight") + "bias" for name in users}
        assert after <= users | biases | {f"{name}_folded" for name in users}
        assert {name for name in users if module.state_dict()[name].ndim == 4} <= after


def test_initializers_that_a_caller_may_override_are_folded_on_trust_alone() -> None:
    model = traced("unet", **TRACED["traced, as it is"], keep_initializers_as_inputs=True)
    assert not bnfold.fold(model).report.folded
    result = bnfold.fold(model, trust_initializers=True)
    assert not result.report.kept
    pass_ = FoldAffineSteps(trust_initializers=True)
    assert spelled(pass_(ir.from_proto(model)).model) == spelled(ir.from_proto(result.model))


# ---- torch.onnx.ONNXProgram ----


@pytest.fixture
def program() -> Any:
    """A program of its own: its session and its model may be changed."""
    result = copy.copy(exported("unet", "captured, as it is"))
    result.model = result.model.clone()
    return result


def test_a_program_comes_back_as_a_program_and_stays_as_it_was(program: Any) -> None:
    _, image = build("unet")
    model, before = program.model, spelled(program)
    expected = program(image)[0]  # now it holds a session of the unfolded model
    session = program._inference_session
    result = bnfold.fold(program)
    assert type(result.model) is type(program) is torch.onnx.ONNXProgram
    assert result.model is not program
    assert program.model is model
    assert program._inference_session is session
    assert spelled(program) == before
    assert BN in nets.operators(proto(program))
    assert result.model.exported_program is program.exported_program is not None
    assert error(result.model(image)[0], expected.double()) < 1e-5
    assert result.model._inference_session is not session
    result.model.release()
    assert program._inference_session is session


def test_a_folded_program_can_do_what_a_program_can(program: Any, tmp_path: Path) -> None:
    _, image = build("unet")
    result = bnfold.fold(program).model
    expected = result(image)[0].double()
    result.save(tmp_path / "one.onnx")
    result.save(tmp_path / "two.onnx", external_data=True)
    for path in (tmp_path / "one.onnx", tmp_path / "two.onnx"):
        assert content(onnx.load(path)) == content(result.model_proto)
    assert torch.equal(result.compute_values(["scores"], (image,))[0].double(), expected)
    result.optimize()
    result.release()
    assert error(result(image)[0], expected) < 1e-5


def test_a_program_is_explained_and_checked(program: Any) -> None:
    before = spelled(program)
    report, result = bnfold.explain(program), bnfold.fold(program)
    assert report.folded
    assert report.steps == result.report.steps
    assert spelled(program) == before
    bnfold.check(program, result.model).raise_for_status()


def test_a_subclass_is_a_program_and_a_namesake_is_none(program: Any) -> None:
    class Special(torch.onnx.ONNXProgram):
        pass

    class ONNXProgram:
        model = program.model

    special = Special(program.model, None)
    assert type(bnfold.fold(special).model) is Special
    namesake: Any = ONNXProgram()
    with pytest.raises(UsageError, match="ONNXProgram can't be folded; give a path"):
        bnfold.fold(namesake)


def test_a_program_without_weights_is_folded_once_it_has_them() -> None:
    torch.manual_seed(0)
    real = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    with FakeTensorMode():
        net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
        image = torch.randn(2, 3, 8, 8)
    with quiet_export():
        found = torch.onnx.export(net, (image,), dynamo=True, verbose=False, optimize=False)
    assert found is not None
    for call in (bnfold.fold, bnfold.explain):
        with pytest.raises(UsageError, match=r"node '0.weight': .* call apply_weights"):
            call(found)
    weights = {name: value for name, value in real.state_dict().items() if value.ndim}
    found.apply_weights(weights)
    result = bnfold.fold(found)
    image = torch.randn(2, 3, 8, 8)
    assert result.report.folded
    assert error(result.model(image)[0], real(image).detach().double()) < 1e-5


def test_a_written_export_is_folded_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    program = captured("mlp", path, optimize=False)
    assert path.with_name("net.onnx.data").exists()  # the weights, as that exporter does it
    result = bnfold.fold(path)
    assert result.report.folded
    assert content(proto(result.model)) == content(bnfold.fold(program.model_proto).model)


# ---- the pass ----


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {}, "local": {"level": "local"}, "unshare": {"unshare": True},
}  # fmt: skip


def given(seed: int) -> ir.Model:
    return ir.from_proto(onnx_nets.random_net(seed, 12).proto)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(8))
def test_the_pass_does_what_fold_does_once(seed: int, options: str) -> None:
    model, pass_ = given(seed), FoldAffineSteps(**OPTIONS[options])
    before, expected = spelled(model), bnfold.fold(given(seed), **OPTIONS[options])
    first = pass_(model)
    assert first.model is model
    assert pass_.report == expected.report
    assert spelled(model) == spelled(expected.model)
    assert first.modified == (spelled(model) != before) == bool(expected.report.folded)
    second = pass_(model)
    assert not second.modified
    assert spelled(model) == spelled(expected.model)


class Counting(ir.passes.InPlacePass):
    """Counts how often it is run."""

    runs = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.runs += 1
        return ir.passes.PassResult(model, modified=False)


@pytest.mark.parametrize(("early_stop", "runs"), [(True, 2), (False, 5)])
def test_a_manager_of_passes_comes_to_its_end(early_stop: bool, runs: int) -> None:
    model, counting = proto(exported("levit", "traced, as it is")), Counting()
    manager = ir.passes.PassManager(
        [FoldAffineSteps(), common.RemoveUnusedNodesPass(), counting],
        steps=5, early_stop=early_stop,
    )  # fmt: skip
    result = manager(ir.from_proto(model))
    assert result.modified
    assert counting.runs == runs
    assert BN not in nets.operators(proto(result.model))
    assert nets.difference(model, proto(result.model)) < 1e-6


def test_the_pass_stands_among_others_in_a_sequence() -> None:
    model = ir.from_proto(exported("resnet", "traced, as it is"))
    fold = FoldAffineSteps()
    passes = ir.passes.Sequential(
        common.IdentityEliminationPass(), fold, common.DeduplicateInitializersPass(),
        common.ClearMetadataAndDocStringPass(), common.CheckerPass(full_check=True),
    )  # fmt: skip
    result = passes(model)
    assert result.modified
    assert passes.in_place
    assert result.model is model
    assert fold.report is not None
    assert len(fold.report.folded) == 10
    assert nets.difference(proto(exported("resnet", "traced")), proto(model)) < 1e-5


def test_a_functional_pass_leaves_the_given_model_alone() -> None:
    model = ir.from_proto(exported("unet", "traced, as it is"))
    before = spelled(model)
    result = ir.passes.functionalize(FoldAffineSteps())(model)
    assert result.modified
    assert spelled(model) == before
    assert spelled(result.model) == spelled(bnfold.fold(model).model)


def test_metadata_stays_on_what_stays() -> None:
    model = exported("unet", "captured, as it is").model.clone()
    model.doc_string, model.graph.doc_string = "of the model", "of the graph"
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    for number, part in enumerate([model, model.graph, *model.graph, *values]):
        part.metadata_props["number"] = part.meta["number"] = str(number)
    kept = [(p, dict(p.metadata_props), dict(p.meta)) for p in (model, model.graph, *values)]
    kept += [(node, dict(node.metadata_props), dict(node.meta)) for node in model.graph]
    assert FoldAffineSteps()(model).modified
    assert (model.doc_string, model.graph.doc_string) == ("of the model", "of the graph")
    for part, props, meta in kept:
        assert (dict(part.metadata_props), dict(part.meta)) == (props, meta)
    assert "pkg.torch.onnx.stack_trace" in model.graph[0].metadata_props
    ours = {value.name for value in model.graph.initializers.values() if not value.metadata_props}
    assert ours
    assert all(name.endswith(".bias") for name in ours)  # a new bias comes from no line of code


TIED = "c = Conv(x, w1) d = Conv(x, w1) [s] n = Mul(c, k) [t] m = Mul(d, up) y = Max(n, m)"


@pytest.mark.parametrize(
    ("unshare", "stay"), [(False, {"t"}), (10, {"t"}), (64, set()), (True, set())]
)
def test_what_is_unshared_is_bounded_as_in_fold(unshare: bool | int, stay: set[str]) -> None:
    model = solver_nets.net(TIED, "float[A,4,C,D] x", "float[A,B,C,D] y")
    assert nets.constant(model, "w1").nbytes == 64
    pass_ = FoldAffineSteps(unshare=unshare)
    pass_(ir.from_proto(model))
    assert pass_.report is not None
    assert {step.name for step in pass_.report.kept} == stay
    assert pass_.report == bnfold.fold(ir.from_proto(model), unshare=unshare).report


def test_true_is_the_same_limit_as_in_fold() -> None:
    assert repr(FoldAffineSteps(unshare=True)) == repr(FoldAffineSteps(unshare=UNSHARE_BYTES))
    assert repr(FoldAffineSteps(unshare=True)) != repr(FoldAffineSteps(unshare=1))


def test_a_level_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="there is no level 'most'"):
        FoldAffineSteps(level="most")


def test_a_model_that_means_nothing_is_refused_and_left_alone() -> None:
    rng = np.random.default_rng(0)
    constants = nets.batch_norm(rng, "n", 4) | {"w": nets.weight(rng, 4, 3, 1, 1)}
    constants["n_v"][2] = -3
    text = f"g (float[2,3,4,4] x) => (float[2,4,4,4] y) {{ c = Conv(x, w) y = {BN}(c, n_g, n_b, n_m, n_v) }}"  # noqa: E501
    model, fold = ir.from_proto(nets.model(text, constants)), FoldAffineSteps()
    fold(given(0))
    assert fold.report is not None
    before = spelled(model)
    with pytest.raises(ir.passes.PassError) as caught:
        ir.passes.Sequential(fold)(model)
    assert isinstance(caught.value.__cause__, InvalidModelError)
    assert spelled(model) == before
    assert fold.report is None  # that of the other model would mislead
