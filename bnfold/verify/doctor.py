"""What there is to check models with on this machine, and what to install for the rest.

Looks and tries, and never raises because something is absent: what is absent is what it reports.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping

import bnfold
from bnfold.errors import BnfoldError, ProviderError
from bnfold.verify.cuda_libraries import cuda_libraries
from bnfold.verify.diagnosis import Diagnosis, Problem, Tried
from bnfold.verify.environment import installed_version
from bnfold.verify.machine import Gpu, cores, cpu_name, memory, nvidia_devices, torch_found
from bnfold.verify.providers import (
    CPU,
    CUDA,
    PROVIDERS,
    TENSORRT,
    flavours,
    import_onnxruntime,
    install_hint,
    runtime_name,
)
from bnfold.verify.result import ProviderRun
from bnfold.verify.tf32 import OVERRIDE

# Those that can be installed from the package index on each system, beside the CPU.
_OFFERED: Mapping[str, tuple[str, ...]] = {
    "Linux": ("cuda", "tensorrt", "openvino", "migraphx"),
    "Windows": ("cuda", "tensorrt", "openvino", "dml"),
    "Darwin": ("coreml",),
}
_NOT_TRIED = ("AzureExecutionProvider",)  # it runs nothing here, but calls a server
_TOOLS = {"torch": "bnfold[torch]", "onnxsim": "bnfold[simplify]"}


def diagnose() -> Diagnosis:
    """Looks at the machine and tries every provider."""
    runtime, tried, broken = _runtime()
    oracle_error = _oracle_error()
    devices = nvidia_devices()
    problems = (
        *broken,
        *_doubled(),
        *(Problem(f"{t.provider} {t.said}", t.todo) for t in tried if _hinders(t)),
        *_idle(devices, tried),
        *([Problem(f"the oracle does not work: {oracle_error}", "pip install -U onnx")]
          if oracle_error else []),
    )  # fmt: skip
    return Diagnosis(
        bnfold.__version__, platform.python_version(), platform.platform(), cpu_name(), cores(),
        memory(), flavours(), runtime, tried, devices, cuda_libraries(), torch_found(),
        f"onnx {installed_version('onnx')}", oracle_error, _packages(), _environment(), problems,
    )  # fmt: skip


def _runtime() -> tuple[str, tuple[Tried, ...], tuple[Problem, ...]]:
    """The runtime, its providers, and why it can't be used at all."""
    try:
        ort = import_onnxruntime()
        available = list(ort.get_available_providers())
    except ProviderError as error:
        missing = tuple(_missing(name) for name in (CPU, *_offered()))
        return "", missing, (Problem(error.met, error.todo),)
    except Exception as error:  # a folder that two flavours wrote to may hold anything
        return "", (), (Problem(f"ONNX Runtime is broken: {_said(error)}", install_hint(CPU)),)
    here = [_tried(provider) for provider in available if provider not in _NOT_TRIED]
    absent = [_missing(provider) for provider in _offered() if provider not in available]
    return runtime_name(ort), (*here, *absent), ()


def _tried(provider: str) -> Tried:
    import numpy as np
    from onnx import parser

    from bnfold.verify.runner import OrtRunner

    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> '
        "one_node (float[8, 8] x) => (float[8, 8] y) { y = MatMul(x, x) }"
    )
    try:
        runner = OrtRunner(model, provider)
        runner.run({"x": np.eye(8, dtype=np.float32)})
        run = runner.certificate()
    except BnfoldError as error:
        return Tried(provider, "broken", _reason(error, provider), error.todo)
    except Exception as error:
        return Tried(provider, "broken", _said(error), install_hint(provider))
    return Tried(provider, "works", ", ".join(_facts(run)))


def _facts(run: ProviderRun) -> Iterator[str]:
    if run.device:
        yield run.device
    if run.tf32:
        yield f"TF32 {run.tf32}"
    if run.tf32_error is not None:
        yield f"a product of float32 is {run.tf32_error:.0e} of its size off"


def _reason(error: BnfoldError, provider: str) -> str:
    return error.met.removeprefix(f"{provider} was asked for, but ")


def _missing(provider: str) -> Tried:
    return Tried(provider, "missing", todo=install_hint(provider))


def _offered() -> tuple[str, ...]:
    return tuple(PROVIDERS[name] for name in _OFFERED.get(platform.system(), ()))


def _doubled() -> tuple[Problem, ...]:
    found = flavours()
    if len(found) < 2:
        return ()
    # Each flavour runs on the CPU too, so the one for another device is the one to keep.
    kept = next(name for name in reversed(found) if name != "onnxruntime")
    extras = "[cuda,cudnn]" if kept == "onnxruntime-gpu" else ""
    return (
        Problem(
            f"{' and '.join(found)} share one folder, so what is imported is a mixture",
            f"pip uninstall -y {' '.join(found)}, then pip install '{kept}{extras}' alone",
        ),
    )


def _hinders(tried: Tried) -> bool:
    """TensorRT is built into every runtime for CUDA, and its libraries are often not wanted."""
    return tried.state == "broken" and tried.provider != TENSORRT


def _idle(devices: tuple[Gpu, ...], tried: tuple[Tried, ...]) -> tuple[Problem, ...]:
    """A device that nothing here can use."""
    if devices and not any(t.provider == CUDA and t.state != "missing" for t in tried):
        return (Problem(f"{devices[0].name} is there, but not {CUDA}", install_hint(CUDA)),)
    return ()


def _oracle_error() -> str:
    try:
        import numpy as np
        from onnx import parser

        from bnfold.verify.oracle import Oracle

        net = parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 17]> g (float[1, 1, 3, 3] x) => (float[1, 1, 2, 2]'
            " y) <float[1, 1, 2, 2] w = {1, 2, 3, 4}> { y = Conv(x, w) }"
        )
        ramp = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
        y = Oracle(net).run({"x": ramp})["y"]
        right = [27.0, 37.0, 57.0, 67.0]
        return "" if y.ravel().tolist() == right else f"a Conv gave {y.ravel().tolist()}"
    except Exception as error:
        return _said(error)


def _packages() -> dict[str, str]:
    return {
        name: installed_version(name) for name in ("onnx", "onnx-ir", "numpy", "ml_dtypes", *_TOOLS)
    }


def _environment() -> dict[str, str]:
    names = (OVERRIDE, "CUDA_VISIBLE_DEVICES", "ORT_CUDA_UNAVAILABLE", "LD_LIBRARY_PATH")
    return {name: os.environ[name] for name in names if name in os.environ}


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
