"""Right folds, by bnfold and by other tools.

Not needed by the test suite: pip install onnxruntime onnxsim onnxslim.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx

import bnfold

# Gives the folded model; what it raises is shown as "could not".
Tool = Callable[[onnx.ModelProto], onnx.ModelProto]


@dataclass(frozen=True, slots=True)
class TorchFold:
    """A fold of a torch module, exported by the tracing exporter.

    Attributes:
        fold: Takes a module in eval mode and an example input.
        by_exporter: Whether the exporter is left to fold, as it does by default.
    """

    fold: Callable[[Any, Any], Any]
    by_exporter: bool = False

    def export(self, net: str) -> onnx.ModelProto:
        """The net ``net`` of ``models`` folded and exported."""
        from models.registry import build

        module, example = build(net)
        folded = self.fold(module, example)
        with tempfile.TemporaryDirectory(prefix="bnfold-sabotage-") as folder:
            path = Path(folder) / "folded.onnx"
            self._write(folded, example, path)
            return onnx.load(path)

    def _write(self, module: Any, example: Any, path: Path) -> None:
        from models.export import export_traced

        if not self.by_exporter:
            export_traced(module, example, path)
            return
        import warnings

        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module, (example,), path, dynamo=False, opset_version=17, input_names=["input"],
                output_names=["output"],
                dynamic_axes={name: {0: "batch"} for name in ("input", "output")},
            )  # fmt: skip


# ---- tools on ONNX ----


def by_bnfold(model: onnx.ModelProto) -> onnx.ModelProto:
    """Level max."""
    folded: onnx.ModelProto = bnfold.fold(model).model
    return folded


def _by_bnfold_local(model: onnx.ModelProto) -> onnx.ModelProto:
    folded: onnx.ModelProto = bnfold.fold(model, level="local").model
    return folded


def _by_onnxsim(model: onnx.ModelProto) -> onnx.ModelProto:
    """With its defaults."""
    import onnxsim

    simple: onnx.ModelProto = onnxsim.simplify(copy.deepcopy(model))[0]
    return simple


def _by_onnxslim(model: onnx.ModelProto) -> onnx.ModelProto:
    # By name: it has no types, and is not among what the tests need.
    slim: onnx.ModelProto = import_module("onnxslim").slim(copy.deepcopy(model))
    return slim


def _by_onnxruntime_basic(model: onnx.ModelProto) -> onnx.ModelProto:
    """Offline, basic."""
    return _by_onnxruntime(model, "ORT_ENABLE_BASIC")


def _by_onnxruntime_extended(model: onnx.ModelProto) -> onnx.ModelProto:
    return _by_onnxruntime(model, "ORT_ENABLE_EXTENDED")


def _by_onnxruntime(model: onnx.ModelProto, level: str) -> onnx.ModelProto:
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="bnfold-sabotage-") as folder:
        target = Path(folder) / "out.onnx"
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 4
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(target)


TOOLS: Mapping[str, Tool] = MappingProxyType(
    {
        "bnfold": by_bnfold,
        "bnfold-local": _by_bnfold_local,
        "onnxsim": _by_onnxsim,
        "onnxslim": _by_onnxslim,
        "onnxruntime-basic": _by_onnxruntime_basic,
        "onnxruntime-extended": _by_onnxruntime_extended,
        "onnxsim-then-bnfold": lambda model: by_bnfold(_by_onnxsim(model)),
        "bnfold-then-onnxslim": lambda model: _by_onnxslim(by_bnfold(model)),
    }
)


# ---- tools on torch ----


def _fuse(module: Any, _: Any) -> Any:
    from torch.fx.experimental.optimization import fuse

    return fuse(module)


def _torch_bnfold(module: Any, example: Any) -> Any:
    return bnfold.fold(module, example).model


TORCH: Mapping[str, TorchFold] = MappingProxyType(
    {
        "torch-fuse": TorchFold(_fuse),
        "torch-exporter": TorchFold(lambda module, _: module, by_exporter=True),
        "torch-bnfold": TorchFold(_torch_bnfold),
    }
)
