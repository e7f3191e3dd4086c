"""Fold BatchNorm and every other per-channel affine step into Conv and Linear weights.

result = bnfold.fold(model)                      # .model of the same kind, .report
report = bnfold.explain(model)                   # the same plan, nothing changed
bnfold.optimize("in.onnx", "out.onnx")           # file to file, checked
bnfold.check("in.onnx", "out.onnx").raise_for_status()
bnfold.bench("in.onnx", "out.onnx")               # latency side by side

Models are ONNX (a path, a ModelProto, an onnx_ir.Model, a torch.onnx.ONNXProgram) or torch (an
nn.Module, an fx.GraphModule, an ExportedProgram). `FoldAffineSteps` is a pass of onnx-ir,
`rewrite_constants` gives an ExportedProgram other parameters.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnfold.api import bench, check, explain, fold, optimize
    from bnfold.onnx_pass import FoldAffineSteps
    from bnfold.torch_program import rewrite_constants

__version__ = "0.1.0"
__all__ = [
    "FoldAffineSteps", "__version__", "bench", "check", "explain", "fold", "optimize",
    "rewrite_constants",
]  # fmt: skip

# Loaded on first use, so that `bnfold --help` does not wait for onnx, nor ONNX for torch.
_HOMES = {
    "FoldAffineSteps": "bnfold.onnx_pass", "rewrite_constants": "bnfold.torch_program",
    **dict.fromkeys(("bench", "check", "explain", "fold", "optimize"), "bnfold.api"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bnfold' has no attribute '{name}'")
