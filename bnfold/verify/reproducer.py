"""A folder from which a mismatch can be seen again with onnx and onnxruntime alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bnfold.errors import WriteError
from bnfold.verify.models import TWO_GIGABYTES, nbytes
from bnfold.verify.samples import Feeds

SCRIPT = '''"""Shows how far two models are from what the first says in float64.

    pip install onnx onnxruntime numpy
    python reproduce.py

{said}
"""

import pathlib

import numpy as np
import onnx
import onnxruntime as ort

HERE = pathlib.Path(__file__).parent
PROVIDERS = {providers!r}
# Off, or the runtime folds the reference's BatchNorm itself, and nothing is shown.
options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def arrays(name):
    """One mapping of names to arrays for each sample."""
    stored = np.load(HERE / name)
    samples = {{}}
    for key in stored.files:
        sample, _, tensor = key.partition("/")
        samples.setdefault(int(sample), {{}})[tensor] = stored[key]
    return [samples[i] for i in sorted(samples)]


def error(got, wanted):
    """The norm of the difference over the norm of what is wanted."""
    apart = np.linalg.norm(got.astype(np.float64) - wanted.astype(np.float64))
    return apart / max(np.linalg.norm(wanted.astype(np.float64)), 1e-300)


inputs, oracle = arrays("inputs.npz"), arrays("oracle.npz")
for provider in PROVIDERS:
    print(provider)
    for name in ("reference.onnx", "candidate.onnx"):
        onnx.checker.check_model(str(HERE / name))
        session = ort.InferenceSession(str(HERE / name), options, providers=[provider])
        for output in session.get_outputs():
            errors = []
            for feeds, wanted in zip(inputs, oracle):
                got = session.run([output.name], feeds)[0]
                if output.name in wanted and got.shape == wanted[output.name].shape:
                    errors.append(error(got, wanted[output.name]))
            print(f"  {{name}}: output {{output.name!r}}: errors",
                  " ".join(f"{{e:.2g}}" for e in errors))
'''


def write_reproducer(
    folder: Path, reference: onnx.ModelProto, candidate: onnx.ModelProto,
    feeds: Sequence[Feeds], oracle: Sequence[Mapping[str, Any]], providers: Sequence[str],
    said: str,
) -> None:  # fmt: skip
    """Writes both models, the inputs, what the reference says in float64, and a script.

    Args:
        folder: Where; made if it is not there, and what is there under the same names replaced.
        reference: The unfolded model, with its weights.
        candidate: The folded one.
        feeds: One mapping of input names to arrays for each sample.
        oracle: Likewise of outputs; samples or outputs that are not known are left out.
        providers: The providers' full names.
        said: What the check said.

    Raises:
        WriteError: It can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _save(reference, folder / "reference.onnx")
        _save(candidate, folder / "candidate.onnx")
        _save_arrays(folder / "inputs.npz", feeds)
        _save_arrays(folder / "oracle.npz", oracle)
        text = SCRIPT.format(said=_quoted(said), providers=list(providers))
        (folder / "reproduce.py").write_text(text, encoding="utf-8")
    except OSError as error:
        raise WriteError(
            f"the reproducer can't be written: {error.strerror or error}", file=str(folder),
            todo="choose another place with --reproducer DIR",
        ) from error  # fmt: skip


def _quoted(said: str) -> str:
    """What was said, so that it can stand in a docstring whatever a model calls its nodes."""
    return ascii(said)[1:-1].replace('"', "'").replace("\\'", "'")


def _save(model: onnx.ModelProto, path: Path) -> None:
    large = nbytes(model) > TWO_GIGABYTES // 2
    copy = model
    if large:  # saving moves the weights out of the model that is saved
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
    onnx.save(copy, path, save_as_external_data=large, location=f"{path.name}.data")


def _save_arrays(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    arrays = {
        f"{index}/{name}": _storable(value)
        for index, sample in enumerate(samples)
        for name, value in sample.items()
        if isinstance(value, np.ndarray)
    }
    np.savez_compressed(path, **arrays)


def _storable(value: Any) -> Any:
    # numpy's files know no bfloat16 or float8; strings of any length are not objects.
    if value.dtype.kind == "V" or value.dtype.name.startswith(("bfloat", "float8", "float4")):
        return value.astype(np.float32)
    return value.astype(str) if value.dtype.kind == "O" else value
