"""What a check was made with, by name and version."""

from __future__ import annotations

import platform
from importlib import metadata

from bnfold.verify.machine import cpu_name
from bnfold.verify.providers import flavours

_PACKAGES = ("bnfold", "onnx", "numpy", "torch")


def environment() -> dict[str, str]:
    """Versions of what computes, and the machine."""
    found = {name: version for name in _PACKAGES if (version := installed_version(name))}
    machine = {"python": platform.python_version(), "platform": platform.platform()}
    return found | flavours() | machine | {"cpu": cpu_name()}


def installed_version(package: str) -> str:
    """The version of an installed package; empty where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
