"""The weights and biases of ONNX operators after a fold: arrays and lazy tensors, no edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from bnfold.affine import (
    F64,
    Layout,
    RangeGuard,
    cast_once,
    out_channels,
    scale_factors,
    scale_rows,
)
from bnfold.folding import (
    FoldRefusedError,
    bias_stays_away,
    refuse_out_of_range,
    scales,
    weight_changes,
)
from bnfold.folding import folded_bias as wide_bias
from bnfold.onnx_evaluate import UncomputableError
from bnfold.onnx_facts import Facts
from bnfold.onnx_linear import LinearSite, bias_value
from bnfold.onnx_tensors import Array, rows_of_file
from bnfold.planning import Absorption, Reason

__all__ = ["FoldRefusedError", "FoldedTensor", "FoldedWeight", "folded_bias", "weight_changes"]

_BLOCK_BYTES = 1 << 20  # of a weight, read and folded at a time


class FoldedWeight:
    """The weight of linear operator ``index`` after the fold, computed when it is asked for.

    Args:
        source: The weight as it is stored, or how to compute it.
        shape: Its shape.
        dtype: The type it is stored in.
        index: The index of the operator in the channel graph.
        layout: Where its channels are.
        taken: What the operator takes over.
    """

    def __init__(
        self,
        source: ir.TensorProtocol | Callable[[], Array],
        shape: tuple[int, ...],
        dtype: ir.DataType,
        index: int,
        layout: Layout,
        taken: Absorption,
    ) -> None:
        self._source, self._shape, self._dtype, self._index = source, shape, dtype, index
        self._layout = layout
        self._taken = taken

    def blocks(self) -> Iterator[Array]:
        """The folded rows, some at a time, in the stored type; valid until the next are asked for.

        Raises:
            FoldRefusedError: The source can't be computed, or, at the end, it did not fit its type.
        """
        a_out, a_in = scales(self._taken)
        factors = scale_factors(self._shape, self._layout, output_scale=a_out, input_scale=a_in)
        guard = RangeGuard(self._shape, self._layout, self._dtype.numpy())
        start, memory = 0, None
        for before in self._rows():
            if memory is None:
                memory = np.empty(before.shape, dtype=before.dtype)
            into = memory[: before.shape[0]]
            after = scale_rows(before, factors, start, self._shape[0], into)
            if after.dtype != self._dtype.numpy():
                after = cast_once(after, self._dtype.numpy())
            guard.see(start, before, after)
            start += before.shape[0]
            yield after
        refuse_out_of_range(guard, self._shape, self._layout, self._index, self._taken)

    def _rows(self) -> Iterator[Array]:
        count = max(1, _BLOCK_BYTES * self._shape[0] // max(1, prod(self._shape) * 4))
        if isinstance(self._source, ir.ExternalTensor):
            yield from rows_of_file(self._source, count)
            return
        try:
            whole = self._source() if callable(self._source) else self._source.numpy()
        except UncomputableError as error:
            raise FoldRefusedError(self._index, Reason.WEIGHT_NOT_CONSTANT, str(error)) from error
        for start in range(0, self._shape[0], count):
            yield whole[start : start + count]

    def array(self) -> Array:
        """The whole folded weight.

        Raises:
            FoldRefusedError: As `blocks`.
        """
        result = np.empty(self._shape, dtype=self._dtype.numpy())
        start = 0
        for block in self.blocks():
            result[start : start + block.shape[0]] = block
            start += block.shape[0]
        return result


class FoldedTensor(ir.LazyTensor):
    """A folded weight as a tensor that is computed while it is written."""

    def __init__(
        self, weight: FoldedWeight, dtype: ir.DataType, shape: tuple[int, ...], name: str | None
    ) -> None:
        def compute() -> ir.TensorProtocol:
            return ir.Tensor(weight.array(), dtype=dtype)

        super().__init__(compute, dtype=dtype, shape=ir.Shape(shape), name=name)
        self._weight = weight

    def blocks(self) -> Iterator[memoryview]:
        """The tensor's bytes, little-endian, a few rows at a time.

        Raises:
            FoldRefusedError: As `FoldedWeight.blocks`.
        """
        for block in self._weight.blocks():
            little = block.astype(block.dtype.newbyteorder("<"), copy=False)
            yield np.ascontiguousarray(little).reshape(-1).view(np.uint8).data

    def tofile(self, file: BinaryIO) -> None:
        """Write the tensor's bytes, holding a few rows of it at a time."""
        for block in self.blocks():
            file.write(block)


def folded_bias(facts: Facts, index: int, site: LinearSite, taken: Absorption) -> Array | None:
    """The bias of linear operator ``index`` after the fold; None when it needs none.

    Shape (M,), or (1, M) and (rows, M) where the given bias has rows of its own.

    Raises:
        FoldRefusedError: It does not fit its type.
    """
    try:
        return _folded_bias(facts, index, site, taken)
    except UncomputableError as error:
        raise FoldRefusedError(index, Reason.WEIGHT_NOT_CONSTANT, str(error)) from error


def _folded_bias(facts: Facts, index: int, site: LinearSite, taken: Absorption) -> Array | None:
    given = bias_value(facts, site)
    if given is None and bias_stays_away(taken):
        return None
    weight = site.node.inputs[site.weight_input]
    assert weight is not None
    channels = out_channels(facts.constants.shape(weight), site.layout)
    before = given_bias(facts, site, given, channels)
    array = None
    if taken.input is not None and not taken.input.is_scaling:
        array = facts.constants.array(weight)
    dtype = facts.constants.dtype(given if given is not None else weight)
    assert dtype is not None
    return wide_bias(before, array, site.layout, index, taken, dtype.numpy(), site.alpha)


def given_bias(facts: Facts, site: LinearSite, given: ir.Value | None, channels: int) -> F64:
    """What ``site`` adds now, shape (M,), or with rows of its own."""
    if given is None or site.beta == 0:
        return np.zeros(channels)
    stored = site.beta * facts.constants.float64(given)
    if site.add is None and stored.ndim == 2 and stored.shape[0] > 1:
        return np.broadcast_to(stored, (stored.shape[0], channels))
    return np.broadcast_to(stored.ravel(), (channels,))
