"""Small nets with builders, and one that is really trained: for tests, benchmarks and the demo.

A plain folder of the repository, never shipped. Its names are loaded when they are asked for, so
that ``python -m models.demo`` runs where torch is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.export import export_onnx
    from models.registry import NETS, Net, build

__all__ = ["NETS", "Net", "build", "export_onnx"]

_HOMES = {
    "NETS": "models.registry",
    "Net": "models.registry",
    "build": "models.registry",
    "export_onnx": "models.export",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'models' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
