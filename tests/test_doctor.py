"""The doctor says what is there, what is not and what to do, whatever is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from bnfold.errors import ProviderError
from bnfold.report.doctor_text import render_doctor
from bnfold.verify import cuda_libraries, doctor, machine, runner
from bnfold.verify.diagnosis import Diagnosis, Problem, Tried
from bnfold.verify.doctor import diagnose
from bnfold.verify.machine import Gpu, TorchFound
from bnfold.verify.providers import CPU, CUDA, PROVIDERS, TENSORRT

H200 = Gpu("NVIDIA H200", "143771 MiB", "9.0", "580.1")


@pytest.fixture(scope="module")
def here() -> Diagnosis:
    return diagnose()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Asks torch in a process of its own only where that is what is tested."""
    if "here" not in request.fixturenames:
        monkeypatch.setattr(doctor, "torch_found", lambda: TorchFound("2.13.0"))


def states(found: Diagnosis) -> dict[str, str]:
    return {tried.provider: tried.state for tried in found.providers}


def test_this_machine_can_check(here: Diagnosis) -> None:
    assert here.healthy
    assert states(here)[CPU] == "works"
    assert here.runtime == f"onnxruntime {onnxruntime.__version__}"
    assert here.oracle_error == ""
    assert here.torch is not None and here.torch.version.startswith("2.")
    assert here.cores >= 1 and here.cpu


def test_the_diagnosis_is_plain_data(here: Diagnosis) -> None:
    stored = json.loads(json.dumps(here.to_dict()))
    assert stored["healthy"] is True
    assert stored["providers"][0]["provider"] in PROVIDERS.values()
    assert stored["packages"]["onnx"]


def test_it_fits_on_a_screen(here: Diagnosis) -> None:
    lines = render_doctor(here, width=100).splitlines()
    assert 12 <= len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert "nothing stands in the way" in lines[-1]
    assert render_doctor(here, color=True, width=100).count("\x1b[0m") >= 5


def test_without_onnxruntime_every_provider_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = diagnose()
    assert set(states(found).values()) == {"missing"}
    assert (found.runtime, found.healthy) == ("", False)
    text = render_doctor(found)
    assert "ONNX Runtime: none" in text
    assert "-> pip install 'bnfold[cpu]'" in text


def test_a_runtime_of_two_flavours_that_breaks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        return SimpleNamespace()  # what is left of a module when its files are taken away

    monkeypatch.setattr(doctor, "import_onnxruntime", broken)
    monkeypatch.setattr(
        doctor, "flavours", lambda: {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"}
    )
    found = diagnose()
    assert [problem.met for problem in found.problems] == [
        "ONNX Runtime is broken: AttributeError: 'types.SimpleNamespace' object has no attribute "
        "'get_available_providers'",
        "onnxruntime and onnxruntime-gpu share one folder, so what is imported is a mixture",
    ]
    assert found.problems[1].todo == (
        "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install "
        "'onnxruntime-gpu[cuda,cudnn]' alone"
    )


def refusing(*providers: str) -> Any:
    class Refusing(runner.OrtRunner):
        def __init__(self, model: Any, provider: str = CPU, *rest: Any) -> None:
            if provider in providers:
                raise ProviderError(
                    f"{provider} was asked for, but did not start: libcublasLt.so.13: no such file",
                    todo="pip install that",
                )
            super().__init__(model, provider, *rest)

    return Refusing


@pytest.mark.parametrize(("provider", "healthy"), [(CUDA, False), (TENSORRT, True)])
def test_a_provider_that_does_not_start_is_broken_in_the_runtimes_words(
    monkeypatch: pytest.MonkeyPatch, provider: str, healthy: bool
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider, CPU])
    monkeypatch.setattr(runner, "OrtRunner", refusing(provider))
    found = diagnose()
    assert states(found)[provider] == "broken"
    assert states(found)[CPU] == "works"
    assert found.healthy is healthy  # TensorRT's libraries are extra, and need not be wanted
    assert "did not start: libcublasLt.so.13: no such file" in render_doctor(found)


def test_a_crash_of_a_provider_is_told_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> Any:
        raise OSError("boom\nand more")

    monkeypatch.setattr(runner, "OrtRunner", crash)
    assert diagnose().problems[0] == Problem(f"{CPU} OSError: boom", "pip install onnxruntime")


def test_a_device_that_nothing_uses_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "nvidia_devices", lambda: (H200,))
    found = diagnose()
    assert [p.met for p in found.problems] == [f"NVIDIA H200 is there, but not {CUDA}"]
    assert "onnxruntime-gpu[cuda,cudnn]" in found.problems[0].todo
    assert "NVIDIA H200, 143771 MiB, 9.0, driver 580.1" in render_doctor(found)


def test_an_oracle_that_is_wrong_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from bnfold.verify import oracle

    class Wrong:
        def __init__(self, _: Any) -> None: ...

        def run(self, _: Any) -> dict[str, Any]:
            return {"y": np.zeros((1, 1, 2, 2))}

    monkeypatch.setattr(oracle, "Oracle", Wrong)
    found = diagnose()
    assert found.oracle_error == "a Conv gave [0.0, 0.0, 0.0, 0.0]"
    assert not found.healthy


def test_every_state_and_problem_is_in_the_text(here: Diagnosis) -> None:
    found = replace(
        here,
        providers=(Tried(CUDA, "works", "NVIDIA H200, TF32 off"), Tried(TENSORRT, "broken", "why"),
                   Tried(CPU, "missing", todo="do this")),
        torch=None, devices=(H200,), problems=(Problem("bad\x1b[2J", "mend it"),),
        environment={"NVIDIA_TF32_OVERRIDE": "1"},
    )  # fmt: skip
    text = render_doctor(found)
    for line in ("  works    CUDA: NVIDIA H200, TF32 off", "  broken   Tensorrt: why",
                 "  missing  CPU: do this", "  NVIDIA_TF32_OVERRIDE=1", "    -> mend it",
                 "  bad\\x1b[2J", "pip install 'bnfold[torch]'"):  # fmt: skip
        assert line in text
    assert "\x1b" not in text


# ---- the machine ----


def test_nvidia_smi_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "NVIDIA H200, 143771 MiB, 9.0, 580.1\nNVIDIA H200, 143771 MiB, 9.0, 580.1\nodd\n"
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/nvidia-smi")
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, rows, "")
    )
    machine.nvidia_devices.cache_clear()
    try:
        assert machine.nvidia_devices() == (H200, H200)
        assert machine.nvidia_device() == "NVIDIA H200"
    finally:
        machine.nvidia_devices.cache_clear()


@pytest.mark.parametrize("error", [OSError("no"), subprocess.TimeoutExpired("nvidia-smi", 20)])
def test_a_driver_that_does_not_answer_has_no_devices(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(shutil, "which", lambda _: "/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", fail)
    machine.nvidia_devices.cache_clear()
    try:
        assert machine.nvidia_devices() == ()
    finally:
        machine.nvidia_devices.cache_clear()


@pytest.mark.parametrize(
    ("out", "err", "found"),
    [
        (
            'noise\n{"version": "2.11", "cuda": "13.0", "cudnn": "9", "devices": ["A"]}', "",
            TorchFound("2.11", "13.0", "9", ("A",)),
        ),
        ("", "Traceback\nImportError: libcudart", TorchFound(error="ImportError: libcudart")),
        ("", "", TorchFound(error="it says nothing")),
    ],
)  # fmt: skip
def test_torch_is_asked_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, out: str, err: str, found: TorchFound
) -> None:
    done = subprocess.CompletedProcess([], 0, out, err)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert machine.torch_found() == found


def test_libraries_are_found_as_packages_before_files(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = [
        SimpleNamespace(metadata={"Name": name}, version=version)
        for name, version in (("nvidia-cudnn-cu13", "9.28"), ("nvidia_cublas", "13.1"), ("x", "1"))
    ]
    monkeypatch.setattr(cuda_libraries, "distributions", lambda: installed)
    monkeypatch.setattr(
        cuda_libraries, "_loadable", lambda file, _: "libcuda.so.1" if file == "libcuda.so" else ""
    )
    found = {library.name: library.found for library in cuda_libraries.cuda_libraries()}
    assert found["cuDNN"] == "nvidia-cudnn-cu13 9.28"
    assert found["cuBLAS"] == "nvidia-cublas 13.1"
    assert found["driver"] == "libcuda.so.1"
    assert found["TensorRT"] == found["cuFFT"] == ""


def test_the_doctor_loads_no_torch() -> None:
    code = "import sys, bnfold.verify.doctor as d; d.diagnose(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
