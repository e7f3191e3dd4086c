"""Runs a model on the execution provider that was asked for, or says that it can't.

Never a quiet CPU run: the provider must be available, must come first in the session, and any
other than the CPU may not hand nodes back to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from bnfold.errors import InconclusiveError, InvalidModelError, ProviderError, UsageError
from bnfold.verify.models import TWO_GIGABYTES, nbytes

PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nvtensorrtrtx": "NvTensorRTRTXExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "dml": "DmlExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "dnnl": "DnnlExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "acl": "ACLExecutionProvider",
    "cann": "CANNExecutionProvider",
    "vitisai": "VitisAIExecutionProvider",
}
CPU = PROVIDERS["cpu"]
_OPTIONS: Mapping[str, Mapping[str, str]] = {
    # TF32 keeps 10 bits of the mantissa, and the default search picks another algorithm each run.
    PROVIDERS["cuda"]: {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
}


class OrtRunner:
    """One ONNX Runtime session.

    Args:
        model: A proto with its weights, or a path; above 2 GB it must be a path.
        provider: A short name (``cpu``, ``cuda``) or a full one (``CUDAExecutionProvider``).
        threads: Threads within an operator; ONNX Runtime's default where None.

    Raises:
        ProviderError: ONNX Runtime or the provider is missing, or would not run the model alone.
        InvalidModelError: ONNX Runtime refuses the model.
        UsageError: The provider's name means nothing, or a proto is above 2 GB.
    """

    def __init__(
        self, model: onnx.ModelProto | Path, provider: str = CPU, threads: int | None = None
    ) -> None:
        self.provider = full_name(provider)
        ort = import_onnxruntime()
        _require_available(ort, self.provider)
        self._session = _session(ort, _source(model), self.provider, threads, _file(model))
        listed = self._session.get_providers()
        if listed[:1] != [self.provider]:
            raise ProviderError(
                f"{self.provider} was asked for, but ONNX Runtime chose {', '.join(listed)}",
                todo="run `bnfold doctor` to see what is missing",
            )
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Computes every output, by name.

        Args:
            feeds: One array per graph input, of its type and shape.

        Raises:
            InconclusiveError: ONNX Runtime could not run the model on these inputs.
        """
        try:
            outputs = self._session.run(None, {name: _fed(a) for name, a in feeds.items()})
        except Exception as error:
            raise InconclusiveError(
                f"ONNX Runtime can't run the model on {self.provider}: {_words(error)}"
            ) from error
        return dict(zip(self._names, outputs, strict=True))


def full_name(provider: str) -> str:
    """The full name of an execution provider, from a short or a full one."""
    if provider.endswith("ExecutionProvider"):
        return provider
    short = provider.lower().replace("-", "").replace("_", "")
    if short not in PROVIDERS:
        raise UsageError(
            f"there is no execution provider '{provider}'",
            todo=f"use one of {', '.join(PROVIDERS)}",
        )
    return PROVIDERS[short]


def import_onnxruntime() -> Any:
    """ONNX Runtime, which is no dependency of the core.

    Raises:
        ProviderError: It is not installed, or can't be loaded.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ProviderError(
            "checking needs ONNX Runtime, which is not installed",
            todo="pip install 'bnfold[cpu]'",
        ) from error
    except ImportError as error:
        raise ProviderError(
            f"ONNX Runtime can't be loaded: {error}", todo="pip install 'bnfold[cpu]'"
        ) from error
    return onnxruntime


def _require_available(ort: Any, provider: str) -> None:
    available = ort.get_available_providers()
    if provider not in available:
        gpu = provider in (PROVIDERS["cuda"], PROVIDERS["tensorrt"])
        raise ProviderError(
            f"{provider} was asked for, but this ONNX Runtime {ort.__version__} "
            f"has only {', '.join(available)}",
            todo="pip install 'bnfold[gpu]' in place of 'bnfold[cpu]'"
            if gpu
            else f"install a build of ONNX Runtime with {provider}",
        )


def _session(ort: Any, source: Any, provider: str, threads: int | None, file: str) -> Any:
    options = ort.SessionOptions()
    # Off, or ORT folds the reference's BatchNorm for us and the test proves nothing.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if provider != CPU:
        # A node that the provider can't run is then an error, in place of a run on the CPU.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        _preload(ort, provider)
    try:
        return ort.InferenceSession(
            source, options, providers=[(provider, dict(_OPTIONS.get(provider, {})))]
        )
    except Exception as error:
        raise _refusal(error, provider, file) from error


def _preload(ort: Any, provider: str) -> None:
    if provider in (PROVIDERS["cuda"], PROVIDERS["tensorrt"]) and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()


def _refusal(error: Exception, provider: str, file: str) -> Exception:
    words = _words(error)
    if provider != CPU:
        return ProviderError(
            f"{provider} can't run this model alone: {words}", file=file,
            todo="check on the provider that will run it, or with --provider cpu",
        )  # fmt: skip
    if type(error).__name__ == "NotImplemented":
        return InconclusiveError(f"ONNX Runtime has no kernel on {provider}: {words}", file=file)
    return InvalidModelError(f"ONNX Runtime refuses the model: {words}", file=file)


def _source(model: onnx.ModelProto | Path) -> str | bytes:
    if isinstance(model, Path):
        return str(model)
    if nbytes(model) > TWO_GIGABYTES:
        raise UsageError("a model above 2 GB can't be run from memory", todo="pass it as a path")
    content: bytes = model.SerializeToString()
    return content


def _file(model: onnx.ModelProto | Path) -> str:
    return str(model) if isinstance(model, Path) else ""


def _fed(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array) if array.ndim else array


def _words(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
