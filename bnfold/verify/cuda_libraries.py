"""CUDA's libraries: as packages of Python, or as files that the loader finds."""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions

# What to call it -> the package that brings it, without the CUDA version, and the file's versions.
_KNOWN: tuple[tuple[str, str, str, tuple[int, ...]], ...] = (
    ("driver", "", "libcuda.so", (1,)),
    ("CUDA runtime", "nvidia-cuda-runtime", "libcudart.so", (13, 12)),
    ("cuBLAS", "nvidia-cublas", "libcublas.so", (13, 12)),
    ("cuDNN", "nvidia-cudnn", "libcudnn.so", (9,)),
    ("cuFFT", "nvidia-cufft", "libcufft.so", (12, 11)),
    ("cuRAND", "nvidia-curand", "libcurand.so", (10,)),
    ("TensorRT", "tensorrt", "libnvinfer.so", (10,)),
)


@dataclass(frozen=True, slots=True)
class Library:
    """One of them.

    Attributes:
        name: What people call it.
        found: The package with its version, or the file's name; empty where it is missing.
    """

    name: str
    found: str


def cuda_libraries() -> tuple[Library, ...]:
    """Each library that the CUDA and TensorRT providers need, packages first."""
    packages = _packages()
    return tuple(
        Library(name, _package(package, packages) or _loadable(file, versions))
        for name, package, file, versions in _KNOWN
    )


def _packages() -> dict[str, str]:
    """Packages of NVIDIA by name without ``-cu13``: the full name and version of each."""
    found = {}
    for distribution in distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name.startswith(("nvidia-", "tensorrt")):
            found[re.sub(r"-cu\d+$", "", name)] = f"{name} {distribution.version}"
    return found


def _package(name: str, packages: dict[str, str]) -> str:
    return packages.get(name, "") if name else ""


@cache
def _loadable(file: str, versions: tuple[int, ...]) -> str:
    if sys.platform != "linux":
        return ""  # names and places differ, and the packages tell enough
    for number in versions:
        try:
            ctypes.CDLL(f"{file}.{number}")
        except OSError:
            continue
        return f"{file}.{number}"
    return ""
