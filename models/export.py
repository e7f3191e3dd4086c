"""Nets as ONNX files, with every BatchNormalization still in them.

Both of torch's exporters fold Conv and BatchNorm while they export; here both are told not to.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.onnx import TrainingMode

from models.registry import build

# The dynamo exporter writes this version and converts down from it, which can fail.
_DYNAMO_OPSET = 18


def export_onnx(name: str, path: str | Path, *, dynamo: bool = False, opset: int = 17) -> Path:
    """Write the net ``name`` to ``path``, with a dynamic batch, input "input", output "output".

    Args:
        name: A key of ``NETS`` or ``BRANCHED``.
        path: Where to; the file holds the weights too.
        dynamo: Use the exporter built on ``torch.export`` rather than the tracing one.
        opset: Version of the standard operators; with ``dynamo`` at least 18.

    Returns:
        ``path``.

    Raises:
        KeyError: ``name`` is in neither.

    "video" does not run when exported with ``dynamo``: that exporter gives a bias-free Conv3d a
    bias of shape ``(M, 2)`` (microsoft/onnxscript#2931).
    """
    module, example = build(name)
    if dynamo:
        _export_captured(module, example, Path(path), max(opset, _DYNAMO_OPSET))
    else:
        export_traced(module, example, Path(path), opset=opset)
    return Path(path)


def export_traced(
    module: nn.Module,
    example: Tensor,
    path: Path,
    *,
    names: tuple[str, str] = ("input", "output"),
    opset: int = 17,
) -> None:
    """Write ``module`` by the tracing exporter.

    Args:
        module: In eval mode; it is kept in the mode it is in, or its BatchNorms would be folded.
        example: An input; its axis 0 becomes the dynamic dimension "batch".
        path: Where to.
        names: Of the one input and the one output.
        opset: Version of the standard operators.
    """
    with _silence():
        torch.onnx.export(
            module,
            (example,),
            path,
            dynamo=False,
            verbose=False,
            training=TrainingMode.PRESERVE,
            do_constant_folding=False,
            opset_version=opset,
            input_names=names[:1],
            output_names=names[1:],
            dynamic_axes={name: {0: "batch"} for name in names},
        )


def _export_captured(module: nn.Module, example: Tensor, path: Path, opset: int) -> None:
    with _silence():
        torch.onnx.export(
            module,
            (example,),
            path,
            dynamo=True,
            verbose=False,
            optimize=False,
            external_data=False,
            opset_version=opset,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Both exporters warn of their own deprecations, which no caller here can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
