"""What an operator of ATen computes, in the words of `bnfold.verify.bounds`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnfold.verify.bounds import LINEAR, Operation

Given = Mapping[str, Any]
Fixed = Callable[[Any], bool]

# Beyond this, numbers stand for infinity: what masks put there.
HUGE = 2.0**100
# Below the smallest normal number rounding is as coarse as there.
TINY = 2.0**-126

_CONVOLUTIONS = ("convolution", "_convolution", "convolution_overrideable")
# Operators with a weight.
WEIGHTED = frozenset({*_CONVOLUTIONS, "addmm", "mm", "bmm", "linear"})
_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_no_update",
          "batch_norm", "cudnn_batch_norm", "miopen_batch_norm")  # fmt: skip


def arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What an operator is called with, by the names in its schema."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def operator_name(func: Any) -> str:
    """``convolution`` of ``aten.convolution.default``."""
    return str(func).split(".")[1]


def operation(name: str, given: Given, fixed: Fixed) -> Operation:
    """The operator ``name`` with the values of its inputs.

    Args:
        name: As `operator_name` gives it.
        given: As `arguments` gives it.
        fixed: Whether a value is a constant of the model.
    """
    kind, inputs, attributes = _described(name, given)
    constant = [isinstance(value, Tensor) and fixed(value) for value in inputs]
    if kind in LINEAR:
        # What varies is added as it is: it has nothing to round.
        inputs = [v if i < 2 or constant[i] else None for i, v in enumerate(inputs)]
    arrays = [_array(v, c) for v, c in zip(inputs, constant, strict=True)]
    return Operation(kind, arrays, constant, attributes)


def _described(name: str, given: Given) -> tuple[str, list[Any], dict[str, Any]]:
    """The kind of operator, its inputs and its attributes."""
    if name in _CONVOLUTIONS:
        kind = "ConvTranspose" if given.get("transposed") else "Conv"
        inputs = [given["input"], given["weight"], given.get("bias")]
        return kind, inputs, {"group": given.get("groups", 1)}
    if name == "addmm":
        weights = {key: float(given.get(key, 1)) for key in ("alpha", "beta")}
        return "Gemm", [given["mat1"], given["mat2"], given["self"]], weights
    if name == "mm":
        return "Gemm", [given["self"], given["mat2"]], {}
    if name == "bmm":
        return "MatMul", [given["self"], given["mat2"]], {}
    if name == "linear":
        return "MatMul", [given["input"], given["weight"].transpose(0, -1)], {}
    if name in _NORMS:
        held = ("input", "weight", "bias", "running_mean", "running_var")
        epsilon = given.get("eps", given.get("epsilon", 1e-5))
        return "BatchNormalization", _filled([given.get(key) for key in held]), {"epsilon": epsilon}
    return name, _aligned([*tensors(given).values()]), {}


def tensors(given: Given) -> dict[str, Tensor]:
    """The tensors among the arguments, and in lists among them, by name."""
    found: dict[str, Tensor] = {}
    for name, value in given.items():
        entries = {name: value}
        if isinstance(value, list | tuple):
            entries = {f"{name}[{i}]": entry for i, entry in enumerate(value)}
        found |= {n: v for n, v in entries.items() if isinstance(v, Tensor)}
    return found


def _aligned(values: list[Tensor]) -> list[Any]:
    """Tensors of one rank, since torch aligns axes at the end."""
    rank = max((value.dim() for value in values), default=0)
    return [value.reshape((1,) * (rank - value.dim()) + tuple(value.shape)) for value in values]


def _filled(inputs: list[Any]) -> list[Any]:
    """A norm without a scale or a shift has 1 and 0."""
    x, scale, shift, mean, variance = inputs
    known = next((v for v in (scale, mean, variance) if v is not None), None)
    if known is None:
        return inputs
    scale = torch.ones_like(known) if scale is None else scale
    shift = torch.zeros_like(known) if shift is None else shift
    return [x, scale, shift, mean, variance]


def _array(value: Any, constant: bool) -> NDArray[Any] | None:
    if not isinstance(value, Tensor):
        return None
    array: NDArray[Any] = value.detach().resolve_conj().numpy()
    return _rounded_part(array) if constant and array.dtype == np.float64 else array


def _rounded_part(array: NDArray[Any]) -> NDArray[Any]:
    """The numbers by whose size rounding goes."""
    tiny = np.abs(array) < TINY
    array = np.where(tiny, np.copysign(TINY, array), array) if tiny.any() else array
    plain = np.abs(array) < HUGE
    return array if plain.all() else np.where(plain, array, 0.0)
