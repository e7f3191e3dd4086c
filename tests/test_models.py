"""The nets are hard cases, their exports keep each BatchNorm, and the trained one is good."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import NETS, build, demo, export_onnx
from models.export import export_traced
from models.frozen import AffineChannel, FrozenBatchNorm, ScaleLayer
from models.statistics import TINY
from models.train_digits import shifted, split_digits

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "models" / "digits_resnet.onnx"
EVERY_NET = pytest.mark.parametrize("name", NETS)

NORMS = {
    "resnet": 10, "mobilenet": 11, "preactivation": 7, "preactivation_positive": 7, "unet": 8,
    "speech": 5, "video": 6, "mlp": 3, "levit": 8, "caffe": 6,
    "frozen_buffers": 0, "frozen_statistics": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small nets only lose time waiting for a second thread on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def norms(module: nn.Module) -> list[_BatchNorm]:
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


def run(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = module(x)
    return y


def run_onnx(model: onnx.ModelProto | Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[np.float32]] = session.run(None, {session.get_inputs()[0].name: x})
    return outputs[0]


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def easy(gamma: Tensor, *, positive: bool) -> str:
    """What is easy about a scale: nothing, where it has each kind of entry that a fold trips on."""
    if positive:
        return "" if bool((gamma > 0).all()) and float(gamma.std()) > 0.1 else "not all positive"
    missing = {
        "negative": not bool((gamma < 0).any()),
        "tiny": not bool((gamma == TINY).any()),
        "zero": not bool((gamma == 0).any()),
    }
    return ", ".join(f"none {what}" for what, is_missing in missing.items() if is_missing)


def fresh(norm: _BatchNorm) -> bool:
    """Whether any of the statistics is still that of a new BatchNorm."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean, norm.running_var
    new = bool((mean == 0).any() or (variance == 1).any())
    return new or (norm.affine and bool((norm.bias == 0).any()))


# ---- the nets ----


def test_the_registry_names_each_net_by_its_own_name() -> None:
    assert {name: net.name for name, net in NETS.items()} == {name: name for name in NORMS}


def test_an_unknown_net_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="alexnet"):
        build("alexnet")


@EVERY_NET
def test_each_net_runs_in_eval_mode_and_its_output_depends_on_its_input(name: str) -> None:
    module, example = build(name)
    assert not any(part.training for part in module.modules())
    assert tuple(example.shape) == NETS[name].example_shape
    y = run(module, example)
    assert bool(y.isfinite().all())
    assert 0.1 < float(y.std()) < 100
    assert float((y[0] - y[1]).std()) > 0.02 * float(y.std())


@EVERY_NET
def test_each_net_is_the_same_every_time_and_leaves_the_random_state_alone(name: str) -> None:
    before = torch.get_rng_state()
    (first, x), (second, same) = build(name), build(name)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, same)
    left, right = first.state_dict(), second.state_dict()
    assert all(torch.equal(left[key], right[key]) for key in left | right)


@EVERY_NET
def test_no_batch_norm_is_fresh_and_none_is_easy(name: str) -> None:
    module, _ = build(name)
    found = norms(module)
    assert len(found) == NORMS[name]
    assert not any(fresh(norm) for norm in found)
    positive = NETS[name].positive
    assert {easy(norm.weight.detach(), positive=positive) for norm in found if norm.affine} <= {""}
    assert len({norm.eps for norm in found}) > 1 or not found


@pytest.mark.parametrize("kind", [ScaleLayer, AffineChannel, FrozenBatchNorm])
def test_no_written_out_norm_is_easy(kind: type[nn.Module]) -> None:
    scales = [
        part.scale if isinstance(part, AffineChannel) else part.weight
        for name in ("caffe", "frozen_buffers", "frozen_statistics")
        for part in build(name)[0].modules()
        if isinstance(part, kind)
    ]
    assert len(scales) == 6
    for scale in scales:
        assert isinstance(scale, Tensor)
        assert bool((scale < 0).any())
        assert bool((scale == 0).any())


def test_a_fresh_batch_norm_would_be_noticed() -> None:
    assert fresh(nn.BatchNorm2d(8))
    assert easy(nn.BatchNorm2d(8).weight, positive=False) == "none negative, none tiny, none zero"


def test_both_frozen_nets_say_the_same() -> None:
    (buffers, x), (statistics, _) = build("frozen_buffers"), build("frozen_statistics")
    torch.testing.assert_close(run(buffers, x), run(statistics, x), rtol=1e-4, atol=1e-4)


# ---- exports ----


@EVERY_NET
def test_the_tracing_exporter_keeps_each_batch_norm_and_says_nothing(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = export_onnx(name, tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", "")
    model = onnx.load(path)
    assert operators(model)["BatchNormalization"] == NORMS[name]
    assert model.opset_import[0].version == 17
    assert_valid_for_any_batch(model, name)


# A second or two each, so only those whose graphs differ most between the two exporters.
@pytest.mark.parametrize("name", ["mlp", "unet", "levit"])
def test_the_dynamo_exporter_keeps_each_batch_norm_and_says_nothing(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = export_onnx(name, tmp_path / "net.onnx", dynamo=True)
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    model = onnx.load(path)
    assert operators(model)["BatchNormalization"] == NORMS[name]
    assert model.opset_import[0].version == 18
    assert_valid_for_any_batch(model, name)


def assert_valid_for_any_batch(model: onnx.ModelProto, name: str) -> None:
    onnx.checker.check_model(model, full_check=True)
    first = [value.type.tensor_type.shape.dim[0] for value in (*model.graph.input,)]
    assert [dim.dim_param for dim in first] == ["batch"]
    module, example = build(name)
    x = torch.cat([example, example[:1].flip(-1)])
    expected = run(module, x).numpy()
    error = np.linalg.norm(run_onnx(model, x.numpy()) - expected) / np.linalg.norm(expected)
    # Two float32 runtimes: some tens of roundings in each output, at 6e-8 apiece.
    assert error < 1e-5


def test_an_export_with_torchs_defaults_would_lose_batch_norms(tmp_path: Path) -> None:
    module, example = build("resnet")
    path = tmp_path / "net.onnx"
    with pytest.warns(DeprecationWarning):
        torch.onnx.export(module, (example,), path, dynamo=False)
    assert operators(onnx.load(path))["BatchNormalization"] < NORMS["resnet"]


def test_input_and_output_take_the_given_names(tmp_path: Path) -> None:
    module, example = build("mlp")
    export_traced(module, example, tmp_path / "net.onnx", names=("image", "logits"))
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["image", "logits"]


# ---- the trained net ----


def test_the_digits_file_is_valid_small_and_keeps_each_batch_norm() -> None:
    assert DIGITS.stat().st_size <= 1_000_000
    model = onnx.load(DIGITS)
    onnx.checker.check_model(model, full_check=True)
    counted = operators(model)
    assert (counted["Conv"], counted["MatMul"], counted["BatchNormalization"]) == (11, 1, 12)
    assert (counted["Sub"], counted["Div"]) == (1, 1)


def test_the_digits_file_has_its_promised_input_and_output() -> None:
    graph = onnx.load(DIGITS).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {"image": ["batch", 1, 8, 8], "logits": ["batch", 10]}


def test_the_digits_file_tells_nothing_of_the_machine_that_made_it() -> None:
    content = DIGITS.read_bytes()
    assert not any(word in content for word in (b".py", b"home", b"root", b"tmp", b"site-packages"))
    model = onnx.load(DIGITS)
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_the_statistics_of_the_digits_file_are_those_of_its_data() -> None:
    model = onnx.load(DIGITS)
    norm = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    mean, variance = (held[name] for name in norm.input[3:])
    read = onnx.helper.make_tensor_value_info(norm.input[0], onnx.TensorProto.FLOAT, None)
    del model.graph.output[:]
    model.graph.output.append(read)
    torch.manual_seed(0)
    # Shifted as in training: black moving in darkens the images.
    images = shifted(torch.from_numpy(demo.held_back()[0]).repeat(8, 1, 1, 1))
    seen = run_onnx(model, images.numpy())
    assert off(mean, variance, seen) < 0.1
    assert off(np.zeros_like(mean), np.ones_like(variance), seen) > 0.3


def off(
    mean: NDArray[np.float32], variance: NDArray[np.float32], seen: NDArray[np.float32]
) -> float:
    """How far statistics ``(C,)`` are from those of ``seen``, in deviations, on the worst channel.

    The running ones remember about ten batches of 64 images, so that some hundredths are chance.
    """
    deviation = seen.std((0, 2, 3))
    shift = np.abs(mean - seen.mean((0, 2, 3))) / deviation
    stretch = np.abs(np.sqrt(variance) / deviation - 1)
    return float(max(shift.max(), stretch.max()))


def test_the_digits_net_reads_at_least_97_percent_of_the_held_back_images() -> None:
    images, labels = demo.held_back()
    assert len(labels) >= 1797 // 5
    assert (demo.predict(DIGITS, images) == labels).mean() >= 0.97
    # And the judge can tell: against labels of other images it finds next to nothing.
    assert (demo.predict(DIGITS, images) == np.roll(labels, 1)).mean() < 0.2


def test_the_held_back_images_are_those_that_training_never_saw() -> None:
    seen, held_back = split_digits()
    with np.load(demo.HOLDOUT) as kept:
        assert kept["images"].dtype == kept["labels"].dtype == np.uint8
        assert np.array_equal(kept["images"], held_back.images)
        assert np.array_equal(kept["labels"], held_back.labels)
    assert len(seen.labels) + len(held_back.labels) == 1797
    assert not {image.tobytes() for image in seen.images} & {
        image.tobytes() for image in held_back.images
    }


def test_shifting_moves_an_image_by_at_most_one_pixel() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 1, 8, 8)
    padded = nn.functional.pad(image, (1, 1, 1, 1))
    allowed = {
        padded[..., i : i + 8, j : j + 8].numpy().tobytes() for i in range(3) for j in range(3)
    }
    moved = {one.numpy().tobytes() for one in shifted(image.expand(200, -1, -1, -1))}
    assert moved == allowed


# ---- the demo ----


def test_the_demo_finds_that_a_model_agrees_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([str(DIGITS), str(DIGITS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("accuracy on 450 held-back digits: before 9")
    assert lines[1:] == ["predicted labels that differ: 0 of 450"]


def test_the_demo_notices_a_bad_fold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(DIGITS)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "head.logits.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.eye(10, dtype=np.float32)[3] * 20, bias.name))
    onnx.save(model, tmp_path / "bad.onnx")
    assert demo.main([str(DIGITS), str(tmp_path / "bad.onnx")]) == 1
    assert "after 1" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"no model"])
def test_the_demo_names_a_file_that_does_not_run(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        demo.main([str(DIGITS), str(tmp_path / "bad.onnx")])
    assert stopped.value.code == 2
    assert "bad.onnx" in capsys.readouterr().err


def test_the_demo_needs_no_torch_no_onnx_and_no_scikit_learn() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, onnx=None, sklearn=None);"
        "from models.demo import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(DIGITS), str(DIGITS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_name_that_models_lacks_is_an_attribute_error() -> None:
    import models

    with pytest.raises(AttributeError, match="no attribute 'nets'"):
        _ = models.nets
