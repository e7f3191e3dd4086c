"""The devices that torch runs on, and settings under which a check means something there.

A product of float32 may be rounded to TF32 or bfloat16 behind the user's back, and cuDNN may take
another algorithm at every run: both are off during a run, and as they were afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bnfold.errors import ProviderError, UsageError
from bnfold.verify.subject import RunOptions

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_DEVICES = {CPU: "cpu", CUDA: "cuda"}
# What a product of float32 is off by in float32, and in TF32: 1e-7 and 3e-4.
TF32_ERROR = 1e-5


def device_of(provider: str) -> torch.device:
    """The device that stands for an execution provider.

    Raises:
        UsageError: Torch has none for it.
        ProviderError: The device is missing.
    """
    if provider not in _DEVICES:
        raise UsageError(
            f"torch models run on {' or '.join(_DEVICES)}, not on {provider}",
            todo="check with --provider cpu or --provider cuda",
        )
    if provider == CUDA and not torch.cuda.is_available():
        raise _missing()
    return torch.device(_DEVICES[provider])


def _missing() -> ProviderError:
    built = torch.version.cuda
    if built is None:
        met = f"this torch {torch.__version__} is built without CUDA"
        todo = (
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        )
    else:
        met = f"torch {torch.__version__} (CUDA {built}) finds no device"
        todo = "see what nvidia-smi says; the driver may be older than CUDA needs"
    return ProviderError(f"{CUDA} was asked for, but {met}", todo=todo)


def provider_of(kind: str) -> str:
    """The provider that a kind of device stands for; the kind itself where there is none."""
    return next((name for name, device in _DEVICES.items() if device == kind), kind)


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return str(torch.backends.cpu.get_cpu_capability())


# ---- settings ----


def _precisions() -> dict[str, Any]:
    """What says how float32 is rounded in products, by name."""
    known: Any = torch.backends
    return {
        "cuda.matmul": known.cuda.matmul, "cudnn.conv": known.cudnn.conv,
        "cudnn.rnn": known.cudnn.rnn, "mkldnn.matmul": known.mkldnn.matmul,
        "mkldnn.conv": known.mkldnn.conv, "mkldnn.rnn": known.mkldnn.rnn,
    }  # fmt: skip


@contextmanager
def settled(device: torch.device, options: RunOptions) -> Iterator[None]:
    """Products as precise as asked for, algorithms the same at every run."""
    wanted: list[tuple[Any, str, Any]] = [
        (torch.backends.cudnn, "benchmark", False),
        (torch.backends.cudnn, "deterministic", True),
    ]
    for name, backend in _precisions().items():
        rounded = options.tf32 and device.type == "cuda" and not name.startswith("mkldnn")
        wanted.append((backend, "fp32_precision", "tf32" if rounded else "ieee"))
    threads = torch.get_num_threads()
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in wanted]
    try:
        for holder, name, value in wanted:
            setattr(holder, name, value)
        torch.set_num_threads(options.threads or threads)
        yield
    finally:
        torch.set_num_threads(threads)
        for holder, name, value in before:
            setattr(holder, name, value)


def options_read_back(device: torch.device) -> dict[str, str]:
    """The settings as torch has them now."""
    of_device = ("mkldnn",) if device.type == "cpu" else ("cuda", "cudnn")
    options = {
        f"{name}.fp32_precision": str(backend.fp32_precision)
        for name, backend in _precisions().items()
        if name.startswith(of_device)
    }
    if device.type == "cuda":
        options["cudnn.benchmark"] = str(torch.backends.cudnn.benchmark)
        options["cudnn.deterministic"] = str(torch.backends.cudnn.deterministic)
    return options


# ---- TF32 ----


def measured_tf32(device: torch.device, allowed: bool) -> tuple[str, float | None]:
    """Whether products of float32 are rounded to TF32, and how far off they are.

    Args:
        device: Where.
        allowed: Whether that was asked for.

    Raises:
        ProviderError: They are, and it was not.
    """
    if device.type != "cuda":
        return "", None
    error = max(_matmul_error(device), _conv_error(device))
    if error > TF32_ERROR and not allowed:
        raise ProviderError(
            f"products of float32 are off by {error:.1g} on {device_name(device)}, though TF32 is"
            " turned off", todo="unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE and NVIDIA_TF32_OVERRIDE",
        )  # fmt: skip
    return "on" if allowed else "off", error


def _matmul_error(device: torch.device) -> float:
    one, other = _drawn(device, 256, 256), _drawn(device, 256, 256)
    return _far(one @ other, one.double() @ other.double())


def _conv_error(device: torch.device) -> float:
    image, kernel = _drawn(device, 2, 64, 16, 16), _drawn(device, 64, 64, 3, 3)
    right = torch.nn.functional.conv2d(image.double(), kernel.double())
    return _far(torch.nn.functional.conv2d(image, kernel), right)


def _drawn(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)


def _far(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())
