"""Inputs that are drawn: seeded, valid, and not all alike.

Floats follow the model's running statistics where these are known, otherwise they are standard
normal. Integers are valid where they are looked up. The first samples are ordinary; of the last
ones, with enough samples, one is large, one tiny, and one even (the same value all over a channel).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfold.errors import UsageError
from bnfold.verify.dtypes import Dtype, family, integer_bounds, largest
from bnfold.verify.samples import SAMPLES, Samples
from bnfold.verify.sizes import Pair, sized
from bnfold.verify.statistics import InputStatistics
from bnfold.verify.subject import Feeds, TensorSpec

F64 = NDArray[np.float64]

EXTREMES = ("large", "tiny", "even")
LARGE, TINY = 8.0, 1e-3
# Times the large sample's factor where a float16 lies in the model: its range ends at 65504.
LARGE_IN_HALF = 2.0


@dataclass(frozen=True, slots=True)
class Limit:
    """Which values an input may take.

    Attributes:
        low: The smallest integer.
        high: One more than the largest.
        counts: An axis of another input, by name and number, whose entries the input counts: its
            values are 1 up to the size of that axis.
        boxes: Where positive, pairs of corners between 0 and this; on a last axis of 4 floats.
    """

    low: int = 0
    high: int = 2
    counts: tuple[str, int] | None = None
    boxes: float = 0.0


@dataclass(frozen=True, slots=True)
class Source:
    """What samples are drawn from.

    Attributes:
        specs: The inputs.
        limits: What is known of their values, by name.
        statistics: What is known of the distribution of float inputs, by name.
        sizes: Two sizes for some of the symbols, in place of the usual ones.
        large: The large sample's factor.
        extremes: Which extremes there may be, in order.
    """

    specs: tuple[TensorSpec, ...]
    limits: Mapping[str, Limit]
    statistics: Mapping[str, InputStatistics]
    sizes: Mapping[str, Pair]
    large: float = LARGE
    extremes: tuple[str, ...] = EXTREMES


def synthetic(
    specs: Sequence[TensorSpec], samples: int = SAMPLES, seed: int = 0, *,
    limits: Mapping[str, Limit] | None = None,
    statistics: Mapping[str, InputStatistics] | None = None,
    sizes: Mapping[str, Pair] | None = None,
    large: float = LARGE, extremes: Sequence[str] = EXTREMES,
) -> Samples:  # fmt: skip
    """Draws samples for a model's inputs.

    From four samples on, the second half of them has the second of the two sizes that each open
    axis gets (see `bnfold.verify.sizes`). Of ``n`` samples the last ``(n - 1) // 2``, at most
    three, are extremes: large, tiny, even.

    Args:
        specs: The inputs that must be fed.
        samples: How many.
        seed: Recorded in the result; the same seed gives the same samples.
        limits: What values inputs may take, by name; without, integers are 0 or 1, those of
            uint8 images 0 .. 255.
        statistics: How float inputs are distributed, by name; without, standard normal.
        sizes: Two sizes for each of these symbols, in place of the usual ones.
        large: The large sample's factor; smaller where the model's types would overflow.
        extremes: Which extremes there may be, in order.

    Raises:
        UsageError: An input is no tensor of known rank, or of a type that can't be drawn.
    """
    source = Source(
        tuple(specs), limits or {}, statistics or {}, sizes or {}, large, tuple(extremes)
    )
    return _drawn(source, samples, seed, second_sizes=True, extremes=True)


def _drawn(
    source: Source, samples: int, seed: int, *, second_sizes: bool, extremes: bool
) -> Samples:
    shapes = (sized(source.specs, source.sizes), sized(source.specs, source.sizes, second=True))
    both = second_sizes and samples >= 4 and shapes[0] != shapes[1]
    second = tuple(both and i >= (samples + 1) // 2 for i in range(samples))
    kinds = {spec.name: _kind(source, spec) for spec in source.specs}
    floats = set(kinds.values()) & {"normal", "running statistics"}
    roles = _roles(samples, source.extremes if extremes and floats else ())
    feeds = tuple(
        _feed(source, shapes[second[i]], roles[i], np.random.default_rng([seed, i]))
        for i in range(samples)
    )
    redraw = partial(_drawn, source, samples, seed)
    return Samples(feeds, seed, kinds, roles, second, redraw)


def _roles(samples: int, extremes: Sequence[str]) -> tuple[str, ...]:
    last = tuple(extremes)[: max(0, (samples - 1) // 2)]
    return ("ordinary",) * (samples - len(last)) + last


def _kind(source: Source, spec: TensorSpec) -> str:
    assert spec.dtype is not None  # `sized` has refused it
    what = family(spec.dtype)
    limit = _limit(source, spec)
    if what == "integer":
        return "bits" if (limit.low, limit.high, limit.counts) == (0, 2, None) else "integers"
    if what == "bool":
        return "bits"
    if what in ("float", "complex"):
        if limit.boxes:
            return "boxes"
        return "running statistics" if spec.name in source.statistics else "normal"
    raise UsageError(
        f"no synthetic input can be drawn for type {'string' if what == 'string' else spec.dtype}",
        node=spec.name, todo="pass your own inputs",
    )  # fmt: skip


def _limit(source: Source, spec: TensorSpec) -> Limit:
    if spec.name in source.limits:
        return source.limits[spec.name]
    pixels = spec.dtype == np.uint8 and len(spec.shape or ()) > 2
    return Limit(0, 256) if pixels else Limit()


def _feed(
    source: Source, shapes: Mapping[str, tuple[int, ...]], role: str, rng: np.random.Generator
) -> Feeds:
    feed: dict[str, NDArray[Any]] = {}
    for spec in source.specs:
        assert spec.dtype is not None
        shape, limit = shapes[spec.name], _limit(source, spec)
        if limit.counts is not None:
            other, axis = limit.counts
            limit = Limit(1, shapes[other][axis] + 1)
        if limit.boxes:
            feed[spec.name] = _boxes(rng, shape, limit.boxes).astype(spec.dtype)
        elif family(spec.dtype) in ("integer", "bool"):
            feed[spec.name] = _integers(rng, spec.dtype, shape, limit)
        else:
            known = source.statistics.get(spec.name)
            feed[spec.name] = _floats(rng, spec.dtype, shape, known, role, source.large)
    return feed


# ---- values ----


def _integers(
    rng: np.random.Generator, dtype: Dtype, shape: tuple[int, ...], limit: Limit
) -> NDArray[Any]:
    is_bool = family(dtype) == "bool"
    low, high = (0, 1) if is_bool else integer_bounds(dtype)
    low, high = max(low, limit.low), min(high, limit.high - 1)
    bits = (low, high) == (0, 1)
    # A single integer is often a size or a count, and zero would empty the graph.
    low = min(1, high) if low == 0 and not shape and not is_bool else low
    drawn = np.asarray(rng.integers(low, high + 1, shape, dtype=np.int64))
    if bits and drawn.size and len(shape) > 1:
        drawn[..., 0] = 1  # a mask that hides everything makes a softmax over nothing
    return drawn.astype(dtype)


def _boxes(rng: np.random.Generator, shape: tuple[int, ...], extent: float) -> F64:
    """Two corners each, the second one below and to the right of the first."""
    values = rng.uniform(0.0, extent, shape)
    if not shape or shape[-1] < 4:
        return values
    corners = np.sort(values[..., -4:].reshape(*shape[:-1], 2, 2), axis=-2)
    values[..., -4:] = corners.reshape(*shape[:-1], 4)
    if shape[-1] == 5:
        values[..., 0] = 0.0  # MaxRoiPool's first column is the image's number
    return values


def _floats(
    rng: np.random.Generator, dtype: Dtype, shape: tuple[int, ...],
    statistics: InputStatistics | None, role: str, large: float,
) -> NDArray[Any]:  # fmt: skip
    even = role == "even"
    if statistics is not None:
        drawn = statistics.draw(rng, shape, even=even)
    else:
        drawn = _normal(rng, shape, even=even)
    if family(dtype) == "complex":
        return (drawn + 1j * _normal(rng, shape, even=even)).astype(dtype)
    peak = largest(dtype)
    factor = {"large": min(large, LARGE_IN_HALF) if peak < 1e6 else large, "tiny": TINY}
    drawn = np.clip(drawn * factor.get(role, 1.0), -peak, peak)
    if np.isnan(np.asarray(-1.0).astype(dtype)):
        drawn = np.abs(drawn)  # a type of scales: powers of two, no sign
    return drawn.astype(dtype)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], *, even: bool) -> F64:
    if not even or len(shape) < 2:
        return np.asarray(rng.standard_normal(shape))
    # One value for each sample and channel; of a row of features, one for each row.
    kept = 2 if len(shape) > 2 else 1
    values = rng.standard_normal((*shape[:kept], *(1,) * (len(shape) - kept)))
    return np.broadcast_to(values, shape).copy()
