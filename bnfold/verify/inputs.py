"""The user's own inputs, in every form that one has them in, as samples.

A sample is one array per input, already rounded to the type that the runtime takes, so that the
oracle and the runtime see the same numbers. NaN is refused: the models agree on it whatever they
do. Infinities are fed, since masks are made of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bnfold.errors import UsageError
from bnfold.verify.dtypes import FAMILIES, family, integer_bounds
from bnfold.verify.input_files import TODO, read_sets
from bnfold.verify.samples import GIVEN, Samples
from bnfold.verify.sizes import is_open
from bnfold.verify.subject import Feeds, Size, TensorSpec


def user_samples(specs: Sequence[TensorSpec], inputs: Any) -> Samples:
    """Takes the user's inputs for a model.

    Args:
        specs: The model's inputs, in order.
        inputs: A path or a sequence of paths (see `input_files.read_sets`); a mapping of input
            names to arrays or a sequence of them; a tuple of arrays or tensors, one per input, or
            a sequence of tuples; for a model of one input also an array or a list of arrays.
            An array has the input's shape (one sample), a leading axis more (one sample per
            entry), or several times the input's first axis (one sample per part; per row where
            that axis is open). Where that gives inputs different numbers of samples, all are taken
            whole if they have the inputs' shapes.

    Returns:
        The samples, one after another, floats rounded to the types of the inputs.

    Raises:
        UsageError: A name, type, shape or file is not the model's, a value is NaN, or a value
            does not fit its input's type.
    """
    for spec in specs:
        if spec.kind != "tensor" or spec.dtype is None:
            raise UsageError(
                f"this input is a {spec.kind if spec.kind != 'tensor' else 'tensor of no type'}, "
                "which can't be fed", node=spec.name, todo="check a model whose inputs are tensors",
            )  # fmt: skip
    feeds = tuple(chain.from_iterable(_split(specs, arrays) for arrays in _sets(specs, inputs)))
    if not feeds:
        raise UsageError("there are no samples in the inputs", todo=TODO)
    _refuse_nan(feeds)
    kinds = {spec.name: GIVEN for spec in specs}
    count = len(feeds)
    return Samples(feeds, None, kinds, (GIVEN,) * count, (False,) * count)


# ---- forms ----


def _sets(specs: Sequence[TensorSpec], inputs: Any) -> Iterable[Mapping[str, Any]]:
    """Arrays by input name, for each set of inputs that is given."""
    if isinstance(inputs, str | os.PathLike | Mapping | tuple) or _is_array(inputs):
        return _one(specs, inputs, "the inputs are")
    if not isinstance(inputs, Iterable):
        raise UsageError(f"a {type(inputs).__name__} is no set of inputs", todo=TODO)
    return chain.from_iterable(_one(specs, given, "a sample is") for given in inputs)


def _one(specs: Sequence[TensorSpec], given: Any, what: str) -> Iterable[Mapping[str, Any]]:
    if isinstance(given, str | os.PathLike):
        return read_sets(Path(given), specs)
    if isinstance(given, Mapping):
        return [given]
    if isinstance(given, tuple) and given and all(isinstance(p, str | os.PathLike) for p in given):
        return chain.from_iterable(read_sets(Path(path), specs) for path in given)
    if _is_array(given):
        given = (given,)
    if not isinstance(given, tuple | list):
        raise UsageError(f"{what} a {type(given).__name__}, not a mapping", todo=TODO)
    if len(given) != len(specs):
        raise UsageError(
            f"{what} {len(given)} array(s) by order, and the model has {len(specs)} inputs",
            todo=f"the model's inputs are {', '.join(spec.name for spec in specs)}",
        )
    return [{spec.name: array for spec, array in zip(specs, given, strict=True)}]


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) or _is_tensor(value)


def _is_tensor(value: Any) -> bool:
    """A torch tensor, known by its methods: who has one has loaded torch."""
    return hasattr(value, "detach") and hasattr(value, "cpu")


def _array(value: Any) -> NDArray[Any]:
    if not _is_tensor(value):
        return np.asarray(value)
    value = value.detach().cpu()
    name = str(value.dtype).removeprefix("torch.")
    if hasattr(ml_dtypes, name):  # numpy itself has no such type
        return np.asarray(value.float().numpy()).astype(getattr(ml_dtypes, name))
    return np.asarray(value.resolve_conj().numpy() if value.is_complex() else value.numpy())


# ---- from arrays to samples ----


def _split(specs: Sequence[TensorSpec], given: Mapping[str, Any]) -> tuple[Feeds, ...]:
    names = {spec.name for spec in specs}
    for name in sorted(names ^ set(given), key=str):
        met = "is not given" if name in names else "is no input of the model"
        raise UsageError(
            f"input '{name}' {met}", todo=f"the model's inputs are {', '.join(sorted(names))}"
        )
    arrays = {spec.name: _typed(spec, _array(given[spec.name])) for spec in specs}
    parts = {spec.name: _parts(spec, arrays[spec.name]) for spec in specs}
    counts = {name: len(part) for name, part in parts.items()}
    if len(set(counts.values())) > 1 or _tied(specs):
        if all(_fits(spec.shape, arrays[spec.name].shape) for spec in specs):
            return (arrays,)
        if len(set(counts.values())) > 1:
            raise UsageError(f"the inputs have different numbers of samples: {counts}")
    count = next(iter(counts.values()), 0)
    return tuple({name: part[i] for name, part in parts.items()} for i in range(count))


def _tied(specs: Sequence[TensorSpec]) -> bool:
    """Whether the symbol of some first axis stands elsewhere too, so that it is no batch."""
    first = {spec.shape[0] for spec in specs if spec.shape}
    rest = {size for spec in specs for size in (spec.shape or ())[1:]}
    return any(isinstance(size, str) for size in first & rest)


def _parts(spec: TensorSpec, array: NDArray[Any]) -> list[NDArray[Any]]:
    """One array per sample."""
    wanted = spec.shape
    if wanted is None or (not wanted and not array.ndim):
        return [array]
    if array.ndim == len(wanted) + 1 and _fits(wanted, array.shape[1:]):
        # By slices, for an entry of a vector would be no array.
        return [array[i, ...] for i in range(len(array))]
    if array.ndim and array.ndim == len(wanted) and _fits(wanted[1:], array.shape[1:]):
        first = wanted[0]
        step = 1 if is_open(first) or not isinstance(first, int) else first
        if array.shape[0] and array.shape[0] % step == 0:
            return [array[i : i + step] for i in range(0, array.shape[0], step)]
    raise UsageError(
        f"the array for input '{spec.name}' has shape {list(array.shape)}, "
        f"not {[size if size else '?' for size in wanted]}"
    )


def _fits(wanted: Sequence[Size] | None, met: Sequence[int]) -> bool:
    return wanted is None or (
        len(wanted) == len(met)
        and all(is_open(w) or w == m for w, m in zip(wanted, met, strict=True))
    )


# ---- types and values ----


def _typed(spec: TensorSpec, array: NDArray[Any]) -> NDArray[Any]:
    """The array in the input's type; only floats may lose digits on the way."""
    assert spec.dtype is not None
    met, wanted = family(array.dtype), family(spec.dtype)
    if met == wanted == "string":
        return _strings(spec, array)
    known = met in FAMILIES and wanted in FAMILIES
    if not known or FAMILIES.index(met) > FAMILIES.index(wanted):
        raise UsageError(f"the array for input '{spec.name}' is {array.dtype}, not {spec.dtype}")
    with np.errstate(all="ignore"):
        cast = array.astype(spec.dtype)
    _refuse_overflow(spec, array, cast)
    return cast


def _strings(spec: TensorSpec, array: NDArray[Any]) -> NDArray[Any]:
    words = [w.decode() if isinstance(w, bytes) else w for w in array.ravel().tolist()]
    for word in words:
        if not isinstance(word, str):
            raise UsageError(
                f"the array for input '{spec.name}' holds a {type(word).__name__}, not a string"
            )
    made = np.empty(array.shape, dtype=object)
    made[...] = np.array(words, dtype=object).reshape(array.shape)
    return made


def _refuse_overflow(spec: TensorSpec, array: NDArray[Any], cast: NDArray[Any]) -> None:
    if family(cast.dtype) == "integer":
        low, high = integer_bounds(cast.dtype)
        wide = array.astype(np.int64) if array.dtype.kind in "bV" else array
        lost = (wide < low) | (wide > high)
    elif family(cast.dtype) == "float":
        wide = array.astype(np.float64)
        lost = np.isfinite(wide) & ~np.isfinite(cast.astype(np.float64))
    else:
        return
    if lost.any():
        at = tuple(int(i) for i in np.argwhere(lost)[0])
        raise UsageError(
            f"the array for input '{spec.name}' holds {array[at]} at {list(at)}, "
            f"which does not fit {spec.dtype}"
        )


def _refuse_nan(feeds: Sequence[Feeds]) -> None:
    for sample, feed in enumerate(feeds):
        for name, array in feed.items():
            if family(array.dtype) not in ("float", "complex"):
                continue
            bad = np.isnan(array.astype(np.complex128 if array.dtype.kind == "c" else np.float64))
            if bad.any():
                at = [int(i) for i in np.argwhere(bad)[0]]
                raise UsageError(
                    f"input '{name}' is NaN at {at} of sample {sample}, and any two models agree "
                    "on NaN", todo="give inputs without NaN",
                )  # fmt: skip
