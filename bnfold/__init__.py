"""Fold BatchNorm and every other per-channel affine step into Conv and Linear weights.

result = bnfold.fold(model)                      # .model of the same kind, .report
report = bnfold.explain(model)                   # the same plan, nothing changed
bnfold.optimize("in.onnx", "out.onnx")           # file to file, checked
bnfold.check("in.onnx", "out.onnx").raise_for_status()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnfold.api import check, explain, fold, optimize

__version__ = "0.1.0"
__all__ = ["__version__", "check", "explain", "fold", "optimize"]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `bnfold --help` does not wait for onnx.
    if name in ("check", "explain", "fold", "optimize"):
        from bnfold import api

        return getattr(api, name)
    raise AttributeError(f"module 'bnfold' has no attribute '{name}'")
