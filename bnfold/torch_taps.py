"""Which positions torch operations read along their spatial axes, where that can be stated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bnfold.channel_graph import Taps
from bnfold.torch_calls import Call
from bnfold.torch_constants import UncomputableError
from bnfold.torch_facts import Facts


def conv_taps(facts: Facts, call: Call) -> tuple[Taps, ...] | None:
    """Those of a convolution; None where its input may have no batch, or a size is computed."""
    weight, data = facts.shape(call["weight"]), facts.shape(call["input"])
    if weight is None or data is None or call["padding_mode"] not in (None, "zeros"):
        return None
    kernel = whole_numbers(weight[2:], len(weight) - 2)
    if kernel is None or len(data) != len(weight):
        return None
    strides, dilations = (
        whole_numbers(1 if call[name] is None else call[name], len(kernel))
        for name in ("stride", "dilation")
    )
    if strides is None or dilations is None:
        return None
    padding = _padding(call["padding"], kernel, dilations)
    if padding is None:
        return None
    before, after = padding
    return tuple(map(Taps.of, kernel, strides, dilations, before, after))


def _padding(
    stated: Any, kernel: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The zeros before each axis, and those behind it."""
    if stated == "same":
        needed = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
        return tuple(n // 2 for n in needed), tuple(n - n // 2 for n in needed)
    given = 0 if stated in (None, "valid") else stated
    alike = whole_numbers(given, len(kernel))
    return None if alike is None else (alike, alike)


def whole_numbers(value: Any, count: int) -> tuple[int, ...] | None:
    """One number for each of ``count`` axes; None where they are not known."""
    listed = list(value) if isinstance(value, list | tuple) else [value]
    listed = listed * count if len(listed) == 1 else listed
    if len(listed) != count or not all(isinstance(entry, int) for entry in listed):
        return None
    return tuple(int(entry) for entry in listed)


def averaged_taps(call: Call, axes: int) -> tuple[Taps, ...] | None:
    """Those of an average pool that divides by the same number everywhere, else None."""
    kernel = whole_numbers(call["kernel_size"], axes)
    if call["ceil_mode"] or call["divisor_override"] is not None or kernel is None:
        return None
    strides = whole_numbers(call["stride"], axes) if _is_given(call["stride"]) else kernel
    padding = whole_numbers(0 if call["padding"] is None else call["padding"], axes)
    if strides is None or padding is None:
        return None
    if any(padding) and call["count_include_pad"] is False:
        return None
    ones = (1,) * axes
    return tuple(map(Taps.of, kernel, strides, ones, padding, padding))


def _is_given(value: Any) -> bool:
    """Without a stride, or with an empty list, it is the size of the kernel."""
    return value is not None and value not in ([], ())


def bordering_taps(
    rank: int, around: Mapping[int, tuple[object, object]]
) -> tuple[Taps, ...] | None:
    """Those of a padding by zeros of ``around`` by axis, if it pads the axes of positions only."""
    if rank < 3 or any(axis < 2 for axis in around):
        return None
    pairs = [around.get(axis, (0, 0)) for axis in range(2, rank)]
    known = [(b, e) for b, e in pairs if isinstance(b, int) and isinstance(e, int)]
    if len(known) != len(pairs):
        return None
    return tuple(Taps.of(1, begin=before, end=after) for before, after in known)


def is_biased(facts: Facts, bias: Any) -> bool:
    """Whether something is added that may not be 0."""
    if bias is None:
        return False
    if not facts.constants.is_constant(bias):
        return True
    try:
        return bool(facts.constants.float64(bias).any())
    except UncomputableError:
        return True


def whole_matrix(facts: Facts, weight: Any) -> tuple[Taps, ...] | None:
    """No positions, of a weight that is one matrix; None of one that has batches."""
    shape = facts.shape(weight)
    return () if shape is not None and len(shape) == 2 else None
