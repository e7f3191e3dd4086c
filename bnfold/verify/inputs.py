"""What the models are fed: seeded synthetic samples, or the user's own.

A sample is one array per graph input, already rounded to the type that the runtime takes, so that
the oracle and the runtime see the same numbers. The seed is part of the result.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from bnfold.errors import UsageError
from bnfold.verify.models import user_inputs

Feeds = Mapping[str, NDArray[Any]]

SAMPLES = 8
# For an axis of unknown size: a batch, spatial axes, and the length of a sequence of numbers.
BATCH, IMAGE, VOLUME, SEQUENCE = 1, 64, 32, 16


@dataclass(frozen=True, slots=True)
class InputSpec:
    """A graph input: its name, numpy type and shape; a size is a number, a symbol or None."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class Samples:
    """Inputs for several runs.

    Attributes:
        feeds: One mapping of input names to arrays per sample.
        seed: What they were drawn with; None for the user's own.
    """

    feeds: tuple[Feeds, ...]
    seed: int | None = None

    @property
    def distinct(self) -> int:
        """How many samples differ from all others in at least one byte."""
        return len({tuple((k, f[k].tobytes()) for k in sorted(f)) for f in self.feeds})


def input_specs(model: onnx.ModelProto) -> tuple[InputSpec, ...]:
    """The inputs that must be fed, in order.

    Raises:
        UsageError: One is no tensor, or its rank or type is not known.
    """
    return tuple(_spec(value) for value in user_inputs(model))


def _spec(value: onnx.ValueInfoProto) -> InputSpec:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
        raise UsageError(
            "this graph input is no tensor of known rank, so no input can be made for it",
            node=value.name,
        )
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None)
        for dim in tensor.shape.dim
    )
    return InputSpec(value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape)


def synthetic(model: onnx.ModelProto, samples: int = SAMPLES, seed: int = 0) -> Samples:
    """Draws samples for a model's inputs.

    Floats are standard normal. Integers are small and valid: below the size of the table that a
    Gather looks them up in, pixels for uint8 images, otherwise 0 or 1. Sizes that the model leaves
    open are small, and a symbol has one size wherever it stands.

    Args:
        model: The model, whose inputs are looked at.
        samples: How many.
        seed: Recorded in the result; the same seed gives the same samples.
    """
    specs = input_specs(model)
    sizes: dict[str, int] = {}
    shapes = [_sized(spec, sizes) for spec in specs]
    limits = [_limit(model.graph, spec) for spec in specs]
    feeds = []
    for sample in range(samples):
        rng = np.random.default_rng([seed, sample])
        feeds.append(
            {
                spec.name: _draw(rng, spec.dtype, shape, limit)
                for spec, shape, limit in zip(specs, shapes, limits, strict=True)
            }
        )
    return Samples(tuple(feeds), seed)


def _sized(spec: InputSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    shape = []
    for axis, size in enumerate(spec.shape):
        if isinstance(size, int) and size > 0:
            shape.append(size)
        elif isinstance(size, str):
            shape.append(sizes.setdefault(size, _open_size(spec, axis)))
        else:
            shape.append(_open_size(spec, axis))
    return tuple(shape)


def _open_size(spec: InputSpec, axis: int) -> int:
    rank = len(spec.shape)
    if axis == 0:
        return BATCH
    if rank < 4:
        return SEQUENCE if spec.dtype.kind in "iu" or rank < 3 else VOLUME
    return IMAGE if rank == 4 else VOLUME


def _limit(graph: onnx.GraphProto, spec: InputSpec) -> int:
    """One more than the largest integer that may be drawn."""
    if spec.dtype == np.uint8 and len(spec.shape) > 2:
        return 256
    rows = {tensor.name: tensor.dims for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Gather" and node.input[1] == spec.name and node.input[0] in rows:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            return int(rows[node.input[0]][axis])
    return 2


def _draw(
    rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...], limit: int
) -> NDArray[Any]:
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        # A single integer is often a size or a count, and zero would empty the graph.
        return np.asarray(rng.integers(0 if shape else 1, limit, shape), dtype=dtype)
    if dtype.kind in "fV":
        return np.asarray(rng.standard_normal(shape), dtype=np.float64).astype(dtype)
    raise UsageError(f"no synthetic input can be drawn for type {dtype}", todo="pass inputs=")


def user_samples(model: onnx.ModelProto, inputs: Any) -> Samples:
    """Takes the user's inputs for a model.

    Args:
        model: The model whose inputs they are for.
        inputs: An ``.npz`` path, a mapping of input names to arrays, or a sequence of such
            mappings, one per sample. In a path or a mapping an array has the input's shape (one
            sample), a leading axis more (one sample per entry), or several times the input's
            first axis (one sample per part; per row where that axis is open).

    Raises:
        UsageError: A name, type or shape is not the model's.
    """
    specs = input_specs(model)
    if isinstance(inputs, str | os.PathLike):
        inputs = _read_npz(Path(inputs))
    if isinstance(inputs, Mapping):
        return Samples(_split(specs, inputs))
    if not isinstance(inputs, Iterable):
        raise UsageError(f"a {type(inputs).__name__} is no set of inputs", todo=_TODO)
    feeds = [_split(specs, mapping) for mapping in inputs if _is_mapping(mapping)]
    if not feeds:
        raise UsageError("there are no samples in the inputs", todo=_TODO)
    return Samples(tuple(sample for some in feeds for sample in some))


_TODO = "pass an .npz file, a mapping of input names to arrays, or a sequence of mappings"


def _is_mapping(value: Any) -> bool:
    if not isinstance(value, Mapping):
        raise UsageError(f"a sample is a {type(value).__name__}, not a mapping", todo=_TODO)
    return True


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        # Never pickled objects: the file may be anyone's.
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:
        raise UsageError(f"can't be read as inputs: {error}", file=str(path), todo=_TODO) from error


def _split(specs: Sequence[InputSpec], arrays: Mapping[str, Any]) -> tuple[Feeds, ...]:
    names = {spec.name for spec in specs}
    for name in sorted(names ^ set(arrays)):
        met = "is not given" if name in names else "is no input of the model"
        raise UsageError(
            f"input '{name}' {met}", todo=f"the model's inputs are {', '.join(sorted(names))}"
        )
    parts = {spec.name: _parts(spec, np.asarray(arrays[spec.name])) for spec in specs}
    counts = {name: len(part) for name, part in parts.items()}
    if len(set(counts.values())) > 1:
        raise UsageError(f"the inputs have different numbers of samples: {counts}")
    count = next(iter(counts.values()), 0)
    return tuple({name: part[i] for name, part in parts.items()} for i in range(count))


def _parts(spec: InputSpec, array: NDArray[Any]) -> list[NDArray[Any]]:
    """One array per sample, in the input's type."""
    array = _typed(spec, array)
    if array.ndim == len(spec.shape) + 1 and all(_fits(spec.shape, a.shape) for a in array):
        return list(array)
    if array.ndim and array.ndim == len(spec.shape) and _fits(spec.shape[1:], array.shape[1:]):
        first = spec.shape[0]
        step = first if isinstance(first, int) and first > 0 else 1
        if array.shape[0] and array.shape[0] % step == 0:
            return [array[i : i + step] for i in range(0, array.shape[0], step)]
    if array.ndim == 0 and not spec.shape:
        return [array]
    raise UsageError(
        f"the array for input '{spec.name}' has shape {list(array.shape)}, "
        f"not {[size if size else '?' for size in spec.shape]}"
    )


def _typed(spec: InputSpec, array: NDArray[Any]) -> NDArray[Any]:
    floats = array.dtype.kind in "fV" and spec.dtype.kind in "fV"
    if floats or np.can_cast(array.dtype, spec.dtype, "same_kind"):
        return array.astype(spec.dtype)
    raise UsageError(f"the array for input '{spec.name}' is {array.dtype}, not {spec.dtype}")


def _fits(wanted: Sequence[int | str | None], met: Sequence[int]) -> bool:
    return len(wanted) == len(met) and all(
        not isinstance(w, int) or w <= 0 or w == m for w, m in zip(wanted, met, strict=True)
    )
