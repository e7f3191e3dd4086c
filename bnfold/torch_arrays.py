"""Tensors as numpy arrays and back, whatever their type, device and memory format."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from bnfold.layout import Array

_NUMPY: dict[torch.dtype, DTypeLike] = {
    torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
}  # fmt: skip


def numpy_type(dtype: torch.dtype) -> DTypeLike:
    """The numpy type of a float type."""
    return _NUMPY[dtype]


def as_array(tensor: Tensor) -> Array:
    """The numbers of ``tensor`` in their own type; shares memory where it can."""
    here = tensor.detach().cpu()
    if here.dtype is torch.bfloat16:
        bits: Array = here.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return bits
    array: Array = here.numpy()
    return array


def as_tensor(array: Array, like: Tensor) -> Tensor:
    """``array`` as a tensor on the device of ``like``, in its memory format if the shape is its."""
    if array.dtype == ml_dtypes.bfloat16:
        flat = torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    else:
        flat = torch.from_numpy(np.ascontiguousarray(array))
    if flat.shape != like.shape or like.is_contiguous():
        return flat.to(like.device)
    made = torch.empty_like(like, dtype=flat.dtype, memory_format=torch.preserve_format)
    return made.detach().copy_(flat)
