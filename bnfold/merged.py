"""The numbers of operators that became one: those of all of them, put together in float64.

Which operators these are, and that the one gives the same, is decided in `bnfold.passes.joining`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from bnfold.affine import Layout, cast_once
from bnfold.channel_graph import Affine, ChannelGraph, Linear, Operator, Sum, Taps, Tie, ValueId
from bnfold.folding import checked, refuse_out_of_range
from bnfold.kernels import Kernel, added, stacked
from bnfold.layout import F64, Array
from bnfold.passes.filters import after_one_another, union
from bnfold.planning import Absorption, Joining, Merge
from bnfold.range_guard import RangeGuard

Read = Callable[[int], Kernel]
"""The kernel of the linear operator with that index, as it is stored."""


class MergedTensors(NamedTuple):
    """What the operator that stays holds."""

    weight: Array
    bias: Array


def merged_tensors(
    graph: ChannelGraph, merge: Merge, taken: Absorption, read: Read, layout: Layout,
    dtype: DTypeLike, bias_dtype: DTypeLike,
) -> MergedTensors:  # fmt: skip
    """The weight and the bias of the operator that stays, in the types that they are stored in.

    Args:
        graph: The graph as it was described.
        merge: Which operators become one.
        taken: What the one takes over besides.
        read: Reads the numbers of one of them.
        layout: Where the channels of the merged weight are, with the groups of the merge.
        dtype: The type of the weight.
        bias_dtype: The type of the bias.

    Raises:
        FoldRefusedError: Something does not fit its type.
    """
    kernel = merged_kernel(graph, merge, read)
    whole = kernel if taken.input is None else kernel.of_mapped(taken.input)
    whole = whole if taken.output is None else whole.mapped(taken.output)
    before = kernel.stored(layout)
    if merge.kind is Joining.SERIAL:  # what was stored were the factors, each of its own size
        before = (before != 0).astype(np.float64)
    weight = _fitting(merge.into, before, whole.stored(layout), layout, dtype, taken)
    return MergedTensors(weight, checked(merge.into, whole.bias, bias_dtype, "the bias "))


def merged_kernel(graph: ChannelGraph, merge: Merge, read: Read) -> Kernel:
    """The numbers of all of ``merge``; arguments as in `merged_tensors`."""
    kernels = {merge.source: Kernel.identity(merge.channels, len(merge.taps))}
    for index in merge.operators:
        operator = graph.operators[index]
        if isinstance(operator, Tie) and operator.joins is not None:
            made = _stacked(merge, operator.inputs, kernels)
        else:
            made = _step(operator, index, kernels, read)
        kernels[operator.outputs[0]] = made
    if merge.parts:
        return _stacked(merge, merge.parts, kernels)
    signed = [kernels[term.value].scaled(term.sign) for term in merge.terms]
    whole = added(signed, _united(signed)) if signed else kernels[merge.target]
    return whole.in_groups(merge.groups).reading(merge.taps)


def _stacked(merge: Merge, parts: tuple[ValueId, ...], kernels: Mapping[ValueId, Kernel]) -> Kernel:
    return stacked([kernels[part].reading(merge.taps) for part in parts])


def _step(operator: Operator, index: int, kernels: dict[ValueId, Kernel], read: Read) -> Kernel:
    given = [kernels[value] for value in operator.inputs]
    if isinstance(operator, Sum):
        signed = [k.scaled(sign) for k, sign in zip(given, operator.signs, strict=True)]
        return added(signed, _united(signed))
    if isinstance(operator, Affine):
        assert operator.map is not None
        return given[0].mapped(operator.map)
    if isinstance(operator, Linear):
        return _after(given[0], read(index).on_axes(len(given[0].taps)))
    assert isinstance(operator, Tie)
    if operator.taps is None:
        return given[0]
    return _after(given[0], Kernel.constant(given[0].outs, operator.taps))


def _after(first: Kernel, second: Kernel) -> Kernel:
    taps = tuple(map(after_one_another, first.taps, second.taps))
    return first.then(second, taps)


def _united(kernels: list[Kernel]) -> tuple[Taps, ...]:
    found = tuple(map(union, zip(*(kernel.taps for kernel in kernels), strict=True)))
    assert None not in found
    return tuple(taps for taps in found if taps is not None)


def _fitting(
    index: int, before: F64, wide: F64, layout: Layout, dtype: DTypeLike, taken: Absorption
) -> Array:
    """``wide`` in the stored type; ``before`` is what it was without what is taken over."""
    weight = cast_once(wide, dtype)
    guard = RangeGuard(weight.shape, layout, dtype)
    guard.see(0, before, weight)
    refuse_out_of_range(guard, weight.shape, layout, index, taken)
    return weight
