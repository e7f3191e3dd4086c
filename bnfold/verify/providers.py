"""Execution providers: their names, their options, and what to install where one is missing."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bnfold.errors import ProviderError, UsageError
from bnfold.verify.subject import RunOptions

PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nvtensorrtrtx": "NvTensorRTRTXExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "dml": "DmlExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "dnnl": "DnnlExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "acl": "ACLExecutionProvider",
    "cann": "CANNExecutionProvider",
    "vitisai": "VitisAIExecutionProvider",
}
CPU = PROVIDERS["cpu"]
CUDA = PROVIDERS["cuda"]
TENSORRT = PROVIDERS["tensorrt"]
NVIDIA = (CUDA, TENSORRT, PROVIDERS["nvtensorrtrtx"])

# Distributions that each bring a folder named onnxruntime, so that only one can be there.
FLAVOURS = (
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml",
    "onnxruntime-migraphx",
)  # fmt: skip
_REQUIREMENT: Mapping[str, str] = {
    CPU: "onnxruntime",
    CUDA: "'onnxruntime-gpu[cuda,cudnn]'",
    TENSORRT: "'onnxruntime-gpu[cuda,cudnn]' 'tensorrt-cu13<11'",
    PROVIDERS["openvino"]: "onnxruntime-openvino",
    PROVIDERS["dml"]: "onnxruntime-directml",
    PROVIDERS["migraphx"]: "onnxruntime-migraphx",
    PROVIDERS["coreml"]: "onnxruntime",
}
_WHERE: Mapping[str, str] = {PROVIDERS["dml"]: " (on Windows)", PROVIDERS["coreml"]: " (on macOS)"}
# The libraries that a provider's own library needs, by the beginning of their names.
_LIBRARIES: Mapping[str, str] = {
    "libcuda.so": "install the NVIDIA driver, or run on a machine with an NVIDIA device",
    "libnvinfer": "pip install 'tensorrt-cu13<11'",
    "libnvonnxparser": "pip install 'tensorrt-cu13<11'",
    "libcu": "pip install 'onnxruntime-gpu[cuda,cudnn]'",
    "libmigraphx": "install AMD's ROCm with MIGraphX",
    "libamdhip": "install AMD's ROCm with MIGraphX",
    "libnvrtc": "pip install 'onnxruntime-gpu[cuda,cudnn]'",
}


def full_name(provider: str) -> str:
    """The full name of an execution provider, from a short or a full one.

    Raises:
        UsageError: It is neither.
    """
    if provider.endswith("ExecutionProvider"):
        return provider
    short = provider.lower().replace("-", "").replace("_", "")
    if short not in PROVIDERS:
        raise UsageError(
            f"there is no execution provider '{provider}'",
            todo=f"use one of {', '.join(PROVIDERS)}",
        )
    return PROVIDERS[short]


def options_for(provider: str, options: RunOptions) -> dict[str, str]:
    """The provider's options that make it compute as exactly as it can, or as fast."""
    if provider == CUDA and options.optimise:
        return {"use_tf32": str(int(options.tf32))}
    if provider == CUDA:
        # TF32 keeps 10 bits, and the default search picks another algorithm each run.
        return {"use_tf32": str(int(options.tf32)), "cudnn_conv_algo_search": "HEURISTIC"}
    if provider == PROVIDERS["openvino"]:
        return {"precision": "ACCURACY"}  # its GPUs compute in float16 otherwise
    return {}  # TensorRT has no option for TF32, and the others none for their precision


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
            f"ONNX Runtime can't be loaded: {error}",
            todo=_reinstall(CPU) or "pip install 'bnfold[cpu]'",
        ) from error
    return onnxruntime


def runtime_name(ort: Any) -> str:
    """The flavour of ONNX Runtime and its version; older ones do not say which they are."""
    return f"{getattr(ort, 'package_name', '') or 'onnxruntime'} {ort.__version__}"


def require_available(ort: Any, provider: str) -> None:
    """Refuses a provider that this ONNX Runtime was built without.

    Raises:
        ProviderError: It was; names those that are there and the pip line that mends it.
    """
    available = ort.get_available_providers()
    if provider in available:
        return
    met = (
        f"{provider} was asked for, but this ONNX Runtime {ort.__version__} "
        f"has only {', '.join(available)}"
    )
    if len(found := flavours()) > 1:
        met += f"; {' and '.join(found)} are installed at once and share one folder"
    raise ProviderError(met, todo=install_hint(provider))


def flavours() -> dict[str, str]:
    """The installed distributions of ONNX Runtime, with their versions."""
    found = {}
    for name in FLAVOURS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def install_hint(provider: str) -> str:
    """The line that brings an ONNX Runtime with the provider, in place of what is installed."""
    if provider not in _REQUIREMENT:
        return f"install a build of ONNX Runtime with {provider}"
    return (_reinstall(provider) or f"pip install {_REQUIREMENT[provider]}") + _WHERE.get(
        provider, ""
    )


def library_hint(reason: str) -> str:
    """What to install, from the runtime's own words about why the provider did not start."""
    for begin, todo in _LIBRARIES.items():
        if f" {begin}" in f" {reason}":
            return todo
    return "run `bnfold doctor` to see what is missing"


def _reinstall(provider: str) -> str:
    """Of what is installed only this one's own flavour may stay; empty where nothing is."""
    wanted = _REQUIREMENT[provider]
    flavour = wanted.strip("'").partition("[")[0].partition(" ")[0]
    found = flavours()
    if not found or list(found) == [flavour]:
        return ""
    # All of them: to remove one of two takes files of the other away.
    return f"pip uninstall -y {' '.join(found)} && pip install {wanted}"
