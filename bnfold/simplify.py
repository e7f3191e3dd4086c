"""onnxsim before bnfold: it removes shape arithmetic and dead ends, and leaves the folds to us.

Its own BatchNorm fusion stays off: it folds in the storage type, where ours is correctly rounded.
Initializers that are also graph inputs stay what they are: a caller may override them.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from bnfold.errors import InvalidModelError, UsageError


def simplify_file(source: Path, target: Path) -> None:
    """Write what onnxsim makes of ``source`` to ``target``.

    Raises:
        UsageError: onnxsim is not installed.
        InvalidModelError: onnxsim can't simplify the model.
    """
    try:
        import onnxsim
    except ImportError as error:
        met = "--simplify needs onnxsim, which is not installed"
        raise UsageError(met, todo="pip install 'bnfold[simplify]'") from error
    model = onnx.load(source)
    inputs = {value.name for value in model.graph.input}
    overridable = model.ir_version >= 4 and any(t.name in inputs for t in model.graph.initializer)
    try:
        simple, _ = onnxsim.simplify(
            model, skip_fuse_bn=True, initializers_as_constants=not overridable
        )
    except Exception as error:
        todo = "leave --simplify out"
        met = f"onnxsim can't simplify it: {error}"
        raise InvalidModelError(met, file=str(source), todo=todo) from error
    large = simple.ByteSize() >= 1 << 31
    onnx.save(simple, target, save_as_external_data=large, location=f"{target.name}.data")
