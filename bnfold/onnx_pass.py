"""fold as a pass of onnx-ir, for a pipeline of passes over one model in memory.

onnx_ir.passes.Sequential(FoldAffineSteps(), other_pass)(model)
"""

from __future__ import annotations

import onnx_ir as ir

from bnfold.folding import Options
from bnfold.onnx_model import fold_model, size_of
from bnfold.onnx_shapes import infer_shapes
from bnfold.report.model import Report


class FoldAffineSteps(ir.passes.InPlacePass):
    """Fold every affine step of a model that can be folded, in place.

    The model says afterwards that it was modified only if a step was folded or is written in
    another form; then a further run may find nothing more to do, so that a ``PassManager`` with
    ``early_stop`` comes to its end.
    Names, inputs, outputs, opset and metadata stay as `bnfold.fold` keeps them. If it raises,
    the model is as it was.

    Args:
        level: ``"max"`` folds whatever can be folded, however far; ``"local"`` stays between
            direct neighbours.
        trust_initializers: Take initializers that are also graph inputs as constants.
        unshare: Whether a weight that several operators read may be stored once for each of
            them where that frees a fold: True for as long as no more than 64 MiB are
            stored again; a number is another such limit, in bytes, of each run.
        leftover: How a BatchNormalization that stays is written; as for `bnfold.fold`.
        horizontal: As in `bnfold.fold`.

    Attributes:
        report: What the last run did; None before the first.

    Raises:
        UsageError: There is no such level or form.
        InvalidModelError: On a run, where the model is not valid; a ``Sequential`` wraps it in
            its own ``PassError``.
    """

    def __init__(
        self,
        *,
        level: str = "max",
        trust_initializers: bool = False,
        unshare: bool | int = False,
        leftover: str = "keep",
        horizontal: bool = False,
    ) -> None:
        self._options = Options.of(level, trust_initializers, unshare, leftover, horizontal)
        self.report: Report | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold ``model`` in place."""
        self.report = None  # not that of another model, should this one not be valid
        source = model.graph.name or "model"
        planned, _ = fold_model(model, infer_shapes(model), self._options, source)
        self.report = planned.report(source, size_of(model))
        return ir.passes.PassResult(model, modified=self.report.changed)

    def __repr__(self) -> str:
        options = self._options
        return (
            f"FoldAffineSteps(level={options.level!r}, "
            f"trust_initializers={options.trust_initializers}, unshare={options.unshare_bytes}, "
            f"leftover={options.leftover!r}, horizontal={options.horizontal})"
        )
