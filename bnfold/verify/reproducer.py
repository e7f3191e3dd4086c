"""A folder from which a mismatch can be seen again with onnx and onnxruntime alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import onnx

from bnfold.errors import WriteError
from bnfold.verify.models import TWO_GIGABYTES, nbytes
from bnfold.verify.providers import CPU, NVIDIA, options_for
from bnfold.verify.subject import Feeds, RunOptions

WIDTH = 96
_AS_EVER = RunOptions()

SCRIPT = '''"""Shows how far two models are from what the first says in float64.

    pip install {packages}
    python reproduce.py

{said}
"""

import pathlib

import numpy as np
import onnx
import onnxruntime as ort

HERE = pathlib.Path(__file__).parent
# Providers and their options: they compute as exactly as they can.
PROVIDERS = {providers}
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


def run(model, provider, settings, samples):
    """The model's outputs, sample by sample."""
    session = ort.InferenceSession(model, options, providers=[(provider, settings)])
    if session.get_providers()[0] != provider:
        raise SystemExit(f"{{provider}} did not start")
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(names, sample))) for sample in samples]


def error(got, wanted):
    """The norm of the difference over the norm of what is wanted."""
    if got.shape != wanted.shape:
        return float("inf")
    if got.dtype.kind not in "fiub":
        return float((got != wanted).any())
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    return np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-300)


def show(model, outputs, wanted):
    for name in wanted[0]:
        if isinstance(outputs[0][name], np.ndarray):
            errors = " ".join(f"{{error(y[name], w[name]):.2g}}" for y, w in zip(outputs, wanted))
            print(f"  {{model}}: output {{name!r}}: errors {{errors}}")


if PROVIDERS.keys() & {{"CUDAExecutionProvider", "TensorrtExecutionProvider"}}:
    ort.preload_dlls()
samples, oracle = arrays("inputs.npz"), arrays("oracle.npz")
reference, candidate = (str(HERE / name) for name in ("reference.onnx", "candidate.onnx"))
for model in (reference, candidate):
    onnx.checker.check_model(model)
for provider, settings in PROVIDERS.items():
    print(provider)
    if provider not in ort.get_available_providers():
        print("  is not there")
        continue
    before = run(reference, provider, settings, samples)
    after = run(candidate, provider, settings, samples)
    if oracle:
        show("reference.onnx", before, oracle)
    else:
        print("  what the reference says in float64 is not known; against what it says here:")
    show("candidate.onnx", after, oracle or before)
'''


def write_reproducer(
    folder: Path, reference: onnx.ModelProto, candidate: onnx.ModelProto,
    feeds: Sequence[Feeds], oracle: Sequence[Mapping[str, Any]], providers: Sequence[str],
    said: str, options: RunOptions = _AS_EVER,
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
        options: How they ran the models.

    Raises:
        WriteError: It can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _save(reference, folder / "reference.onnx")
        _save(candidate, folder / "candidate.onnx")
        _save_arrays(folder / "inputs.npz", feeds)
        _save_arrays(folder / "oracle.npz", oracle)
        (folder / "reproduce.py").write_text(_script(said, providers, options), encoding="utf-8")
    except OSError as error:
        raise WriteError(
            f"the reproducer can't be written: {error.strerror or error}", file=str(folder),
            todo="choose another place with --reproducer DIR",
        ) from error  # fmt: skip


def _script(said: str, providers: Sequence[str], options: RunOptions) -> str:
    return SCRIPT.format(
        said="\n".join(wrap(_quoted(said), WIDTH, break_long_words=False)),
        packages=_packages(providers),
        providers={name: options_for(name, options) for name in providers},
    )


def _packages(providers: Sequence[str]) -> str:
    if any(name in NVIDIA for name in providers):
        return "onnx numpy 'onnxruntime-gpu[cuda,cudnn]'"
    others = [name for name in providers if name != CPU]
    runtime = f"and a build of ONNX Runtime with {', '.join(others)}" if others else "onnxruntime"
    return f"onnx numpy {runtime}"


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
