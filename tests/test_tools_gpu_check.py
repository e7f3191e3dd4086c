"""`tools.gpu_check` runs every model in every mode that the machine has a device for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import bnfold
from bnfold.errors import InconclusiveError, ProviderError
from bnfold.verify.diagnosis import Diagnosis, Tried
from bnfold.verify.doctor import diagnose
from bnfold.verify.judge import Figures, Verdict
from bnfold.verify.machine import Gpu, TorchFound
from bnfold.verify.providers import CPU, CUDA, TENSORRT
from bnfold.verify.result import CheckResult, OutputResult, ProviderRun, TierResult
from tests.verify_nets import UNFOLDED, net, statistics
from tools import gpu_check
from tools.half import to_half

FOUND = diagnose()
WITH_GPU = replace(
    FOUND,
    runtime="onnxruntime-gpu 1.31.1",
    providers=(Tried(CUDA, "works"), Tried(TENSORRT, "broken", "no libnvinfer", "pip install it")),
    devices=(Gpu("NVIDIA H200", "143771 MiB", "9.0", "580.1"),),
    torch=TorchFound("2.11.0", "13.0", "91900", ("NVIDIA H200",)),
)


def result(verdict: Verdict = Verdict.PASS) -> CheckResult:
    figures = Figures(2e-7, 1e-7, 3e-8, 2.0, 1.9, 2.0)
    tier = TierResult("C", CUDA, verdict, "the error is 7 times as large",
                      (OutputResult("y", verdict, "m", figures),), caught=1e-6)  # fmt: skip
    run = ProviderRun(CUDA, "onnxruntime 1", ran={CUDA: 40, CPU: 2}, elsewhere=("s (Shape)",) * 2,
                      tf32="off", tf32_error=2e-7)  # fmt: skip
    return CheckResult("r", "c", (tier,), 8, 0, runs=(run,))


def rehearsed(
    monkeypatch: pytest.MonkeyPatch, found: Diagnosis, *answers: Any
) -> list[tuple[str, str]]:
    """Replaces what runs models; tells which ran in which mode."""
    ran: list[tuple[str, str]] = []
    given = iter(answers)

    def answer(model: str | Path, mode: gpu_check.Mode, samples: int) -> CheckResult:
        ran.append((Path(model).stem, mode.name))
        said = next(given, result())
        if isinstance(said, Exception):
            raise said
        assert isinstance(said, CheckResult)
        return said

    monkeypatch.setattr(gpu_check, "diagnose", lambda: found)
    monkeypatch.setattr(gpu_check, "check_onnx", answer)
    monkeypatch.setattr(gpu_check, "check_net", answer)
    return ran


def test_a_machine_without_a_gpu_is_told_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = Tried(CUDA, "missing", todo="pip install that")
    found = replace(FOUND, providers=(absent,), devices=(), torch=TorchFound("2.13.0+cpu"))
    rehearsed(monkeypatch, found)
    assert gpu_check.main([]) == ProviderError.exit_code
    said = capsys.readouterr()
    assert said.out == ""
    assert "ONNX Runtime has no CUDAExecutionProvider: pip install that" in said.err
    assert "torch (2.13.0+cpu) has no device" in said.err


def test_with_cuda_every_mode_is_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = rehearsed(monkeypatch, WITH_GPU)
    out = tmp_path / "table.md"
    assert gpu_check.main(["--nets", "mlp", "--out", str(out)]) == 0
    onnx_modes = ["fp32", "fp32, TF32 allowed", "fp16"]
    torch_modes = ["torch fp32", "torch fp32, TF32 allowed", "torch fp16", "torch bf16"]
    assert ran == [
        *(("mlp", mode) for mode in onnx_modes),
        *(("digits_resnet", mode) for mode in onnx_modes),
        *(("mlp", mode) for mode in torch_modes),
    ]
    table = out.read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    assert "NVIDIA H200, driver 580.1, onnxruntime-gpu 1.31.1, torch 2.11.0 (CUDA 13.0)" in table
    assert (
        "| mlp | fp32 | pass | 2.0e-07 | 1.0e-07 | 3.0e-08 | 2.0e-07 | 40 | 2 | 1.0e-06 |" in table
    )


def test_tensorrt_is_run_where_it_works() -> None:
    names = [mode.name for mode in gpu_check.modes_of_onnx(CUDA, [CUDA, TENSORRT])]
    assert names == ["fp32", "fp32, TF32 allowed", "fp16", "TensorRT, TF32 allowed"]


def test_where_only_torch_has_the_device_the_table_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = rehearsed(monkeypatch, replace(WITH_GPU, providers=()))
    assert gpu_check.main(["--nets", "mlp"]) == 0
    assert {mode for _, mode in ran} == {mode.name for mode in gpu_check.modes_of_torch(CUDA)}
    assert "Not run: ONNX Runtime has no CUDAExecutionProvider" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "code", "note"),
    [
        (result(Verdict.FAIL), 1, "fp32: the error is 7 times"),
        (result(Verdict.INCONCLUSIVE), 3, "fp32: the error is 7 times"),
        (InconclusiveError("no kernel"), 3, "fp32: no kernel"),
        (ProviderError("nodes ran on the CPU"), 4, "fp32: nodes ran on the CPU"),
        (RuntimeError("device lost\nand more"), 70, "fp32: RuntimeError: device lost and more"),
    ],
    ids=str,
)
def test_what_does_not_pass_is_noted_and_the_others_are_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    answer: Any, code: int, note: str,
) -> None:  # fmt: skip
    ran = rehearsed(monkeypatch, FOUND, answer)
    assert gpu_check.main(["--provider", "cpu", "--nets", ""]) == code
    assert len(ran) == 2
    assert f"- digits_resnet, {note}" in capsys.readouterr().out


def test_float16_is_float16_throughout() -> None:
    model = net(UNFOLDED, statistics())
    half = to_half(model)
    onnx.checker.check_model(half, full_check=True)
    kinds = {t.data_type for t in half.graph.initializer}
    assert kinds == {onnx.TensorProto.FLOAT16}
    session = onnxruntime.InferenceSession(half.SerializeToString())
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float16)
    (y,) = session.run(None, {"x": x})
    (right,) = onnxruntime.InferenceSession(model.SerializeToString()).run(
        None, {"x": x.astype(np.float32)}
    )
    assert y.dtype == np.float16
    assert np.linalg.norm(y - right) < 0.02 * np.linalg.norm(right)
    assert model.graph.initializer[0].data_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_the_nets_of_16_bits_have_something_to_fold(name: str, tmp_path: Path) -> None:
    _, fp16 = gpu_check.modes_of_onnx(CPU, [])
    model = to_half(onnx.load(gpu_check.exported(name, fp16, tmp_path)))
    assert bnfold.fold(model).report.folded


def test_integers_stay_integers() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 3] x) => (int64[2] s) '
        "<int64[1] one = {1}> { c = Cast <to = 1> (x) t = Shape(c) k = Constant <value = int64[2] "
        "{1, 1}> () s = Mul(t, k) }"
    )
    half = to_half(model)
    onnx.checker.check_model(half, full_check=True)
    assert half.graph.node[0].attribute[0].i == onnx.TensorProto.FLOAT16
    assert half.graph.initializer[0].data_type == onnx.TensorProto.INT64


def test_models_of_a_folder_are_checked_on_the_cpu_for_real(tmp_path: Path) -> None:
    onnx.save(net(UNFOLDED, statistics()), tmp_path / "small.onnx")
    (path,) = gpu_check.given([tmp_path])
    (fp32, _) = gpu_check.modes_of_onnx(CPU, [])
    row = gpu_check.run("small", fp32, lambda: gpu_check.check_onnx(path, fp32, 8))
    assert row.cells()[:3] == ("small", "fp32", "pass")
    assert row.cells()[7] == "6"  # Conv, Relu, Conv, Relu, Flatten, Gemm
    assert row.note == ""


def test_a_module_is_checked_on_the_cpu_for_real() -> None:
    (fp32, *_) = gpu_check.modes_of_torch(CPU)
    row = gpu_check.run("mlp", fp32, lambda: gpu_check.check_net("mlp", fp32, 8))
    assert row.cells()[:3] == ("mlp", "torch fp32", "pass"), row.note
