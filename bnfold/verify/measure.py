"""What the judges judge: errors against the oracle, decisions, and faults that need no numbers.

Arrays of three runs in (the float64 oracle of the unfolded model, the unfolded model on the
runtime, the folded one there), plain numbers out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfold.verify.judge import (
    F64,
    Decisions,
    Gates,
    Measured,
    OutputVerdict,
    Settled,
    Verdict,
    constant_output,
    judge_errors,
)

Arrays = Sequence[NDArray[Any]]

TOP = 5
# Times the unfolded model's own largest error: a margin that a right fold can't take away.
CLEAR = 8.0


def judge_output(
    name: str, oracle: Arrays, unfolded: Arrays, folded: Arrays, *, unit: float,
    jitter: float = 0.0, gates: Gates | None = None,
) -> OutputVerdict:  # fmt: skip
    """Measures one output over all samples and judges it; arguments as for `measure_output`."""
    measured = measure_output(name, oracle, unfolded, folded, unit=unit, jitter=jitter)
    return judge_errors(measured, gates)


def measure_output(
    name: str, oracle: Arrays, unfolded: Arrays, folded: Arrays, *, unit: float, jitter: float = 0.0
) -> Measured:
    """Measures one output over all samples.

    Args:
        name: The output's name.
        oracle: What the unfolded model says in float64, an array of any shape per sample.
        unfolded: What the unfolded model says on the runtime.
        folded: What the folded model says on the runtime.
        unit: Half an ulp, relative, of the coarsest float type in the model.
        jitter: Relative distance of two runs of the unfolded model, or of two right folds.
    """
    dtype = str(getattr(unfolded[0], "dtype", "")) if unfolded else ""
    settled = _settled(name, oracle, unfolded, folded)
    if settled is not None:
        return Measured(name, dtype, unit, jitter, settled=settled)
    wide = [_finite_parts(*arrays) for arrays in zip(oracle, unfolded, folded, strict=True)]
    size = max(float(np.abs(y).max(initial=0.0)) for y, _, _ in wide)
    if size == 0.0:
        # All zeros: a folded model that says anything else is wrong, one that agrees shows nothing.
        off = max(float(np.linalg.norm(f)) for _, _, f in wide)
        zero = _constant(name) if off == 0.0 else _fail(name, "is not zero, as the oracle's is")
        return Measured(name, dtype, unit, jitter, settled=zero)
    return Measured(
        name, dtype, unit, jitter,
        e_fold=tuple(_error(f, y, size) for y, _, f in wide),
        e_unfold=tuple(_error(u, y, size) for y, u, _ in wide),
        varies=not is_constant(oracle, unit),
        hull=upper_hull(*_differences(wide)),
        decisions=_decisions(oracle, unfolded, folded, unit, jitter),
    )  # fmt: skip


# ---- what needs no numbers ----


def _settled(name: str, oracle: Arrays, unfolded: Arrays, folded: Arrays) -> Settled | None:
    if len(oracle) < 2:
        return Settled(Verdict.INCONCLUSIVE, f"output '{name}' has only one sample")
    if not all(isinstance(a, np.ndarray) for a in (*oracle, *unfolded, *folded)):
        return Settled(Verdict.INCONCLUSIVE, f"output '{name}' is not a tensor")
    for sample, (reference, candidate) in enumerate(zip(unfolded, folded, strict=True)):
        if reference.dtype != candidate.dtype:
            return _fail(name, f"is {candidate.dtype}, not {reference.dtype}")
        if reference.dtype.kind in "fV" and reference.shape != candidate.shape:
            return _fail(
                name, f"has shape {candidate.shape}, not {reference.shape}, on sample {sample}"
            )
    if unfolded[0].dtype.kind not in "fV":
        return _exact(name, oracle, unfolded, folded)
    return _finite_fault(name, oracle, unfolded, folded)


def _exact(name: str, oracle: Arrays, unfolded: Arrays, folded: Arrays) -> Settled:
    """Integers, booleans and strings agree with the unfolded model's exactly.

    Where the oracle itself disagrees with the unfolded runtime the decision hangs on rounding:
    if the models differ on such samples only, and not on all, nothing is shown either way.
    """
    differ = [i for i, (u, f) in enumerate(zip(unfolded, folded, strict=True)) if not _same(u, f)]
    if differ:
        unsure = {
            i for i, (y, u) in enumerate(zip(oracle, unfolded, strict=True)) if not _same(y, u)
        }
        if unsure.issuperset(differ) and len(differ) < len(unfolded):
            return Settled(
                Verdict.INCONCLUSIVE,
                f"output '{name}' differs on samples {differ}, where rounding decides it",
            )
        return _fail(name, f"differs from the unfolded model's on samples {differ}")
    pairs = list(_alike(unfolded))
    if pairs and all(_same(one, other) for one, other in pairs):
        return _constant(name)
    return Settled(Verdict.PASS, f"output '{name}' agrees exactly")


def _finite_fault(name: str, oracle: Arrays, unfolded: Arrays, folded: Arrays) -> Settled | None:
    """Non-finite values must be of one kind in one place; a NaN shows nothing even so."""
    blind = False
    for sample, (y, u, f) in enumerate(zip(oracle, unfolded, folded, strict=True)):
        if y.shape != u.shape:
            return Settled(
                Verdict.INCONCLUSIVE,
                f"output '{name}': the oracle's shape is {y.shape}, the runtime's {u.shape}",
            )
        kinds = [_kinds(a) for a in (y, u, f)]
        if bool(((kinds[2] != 0) & (kinds[2] != kinds[1])).any()):
            return _fail(name, f"is not finite on sample {sample} where the unfolded model's is")
        if bool(((kinds[2] != kinds[1]) & (kinds[0] != 0)).any()):
            return _fail(name, f"is finite on sample {sample} where the oracle's is not")
        blind |= bool((kinds[0] != kinds[1]).any() or (kinds[1] == 3).any())
        blind |= bool(u.size and (kinds[1] != 0).all())
    if not blind:
        return None
    return Settled(
        Verdict.INCONCLUSIVE,
        f"output '{name}': the unfolded model's is not finite, or the oracle's is not there",
    )


def _kinds(array: NDArray[Any]) -> NDArray[np.int8]:
    """0 where finite, 1 at +inf, 2 at -inf, 3 at NaN."""
    wide = array.astype(np.float64)
    return (
        np.isposinf(wide).astype(np.int8) + 2 * np.isneginf(wide).astype(np.int8)
        + 3 * np.isnan(wide).astype(np.int8)
    )  # fmt: skip


def _same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return one.shape == other.shape and bool(np.array_equal(one, other))


def _constant(name: str) -> Settled:
    said = constant_output(name)
    return Settled(said.verdict, said.message, constant=True)


def _fail(name: str, met: str) -> Settled:
    return Settled(Verdict.FAIL, f"output '{name}' {met}")


# ---- errors ----


def _finite_parts(y: NDArray[Any], u: NDArray[Any], f: NDArray[Any]) -> tuple[F64, F64, F64]:
    finite = np.isfinite(y.astype(np.float64))
    return tuple(a.astype(np.float64)[finite] for a in (y, u, f))  # type: ignore[return-value]


def _error(array: F64, oracle: F64, size: float) -> float:
    """Relative to the oracle's norm, or to its largest number of any sample where it is zero."""
    # Scaled, or the squares of large numbers overflow.
    peak = float(np.abs(oracle).max(initial=0.0)) or size
    whole = float(np.linalg.norm(oracle / peak)) or size / peak
    return float(np.linalg.norm((array - oracle) / peak)) / whole


def is_constant(oracle: Sequence[F64], unit: float) -> bool:
    """Whether an output is the same for all samples of a shape, as far as ``unit`` can tell.

    Of an output whose shape is never the same twice it can't be told.
    """
    pairs = list(_alike(oracle))
    return bool(pairs) and all(
        float(np.linalg.norm(one - other)) <= 4 * unit * float(np.linalg.norm(other))
        for one, other in pairs
    )


def _alike(arrays: Sequence[NDArray[Any]]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Each array with the first of its shape before it."""
    firsts: dict[tuple[int, ...], NDArray[Any]] = {}
    for array in arrays:
        if array.shape in firsts:
            yield array, firsts[array.shape]
        else:
            firsts[array.shape] = array


def _differences(wide: Sequence[tuple[F64, F64, F64]]) -> tuple[F64, F64]:
    """``|y_unfold|`` and ``|y_fold - y_unfold|`` of all elements of all samples."""
    sizes = np.concatenate([np.abs(u).ravel() for _, u, _ in wide])
    return sizes, np.concatenate([np.abs(f - u).ravel() for _, u, f in wide])


def upper_hull(sizes: F64, differences: F64) -> tuple[tuple[float, float], ...]:
    """The points at which ``differences - rtol * sizes`` is largest for some ``rtol >= 0``.

    Args:
        sizes: Abscissae, none negative.
        differences: Ordinates of the same length.
    """
    if not sizes.size:
        return ()
    peak = float(differences.max())
    right = (float(sizes[differences == peak].min()), peak)
    low = float(sizes.min())
    left = (low, float(differences[sizes == low].max()))
    if left[0] >= right[0]:
        return (right,)
    return (left, *_between(sizes, differences, left, right), right)


def _between(
    sizes: F64, differences: F64, left: tuple[float, float], right: tuple[float, float]
) -> Iterator[tuple[float, float]]:
    """The hull's points above the line from ``left`` to ``right``, from left to right."""
    slope = (right[1] - left[1]) / (right[0] - left[0])
    above = differences - left[1] - slope * (sizes - left[0])
    # Points on the line, but for rounding, add nothing.
    kept = above > 1e-12 * max(right[1], abs(left[1]))
    if not kept.any():
        return
    sizes, differences, above = sizes[kept], differences[kept], above[kept]
    top = int(np.argmax(above))
    middle = (float(sizes[top]), float(differences[top]))
    yield from _between(sizes, differences, left, middle) if middle[0] > left[0] else ()
    yield middle
    yield from _between(sizes, differences, middle, right) if middle[0] < right[0] else ()


# ---- decisions ----


def _decisions(
    oracle: Arrays, unfolded: Arrays, folded: Arrays, unit: float, jitter: float
) -> Decisions | None:
    counts = [
        _sample_decisions(_rows(y), _rows(u), _rows(f), unit, jitter)
        for y, u, f in zip(oracle, unfolded, folded, strict=True)
        if _decides(y)
    ]
    if not counts:
        return None
    return Decisions(*(sum(column) for column in zip(*counts, strict=True)))


def _decides(array: NDArray[Any]) -> bool:
    """A row of one number, or of numbers that are not all there, decides nothing."""
    return array.ndim >= 2 and array.size > 0 and _rows(array).shape[1] >= 2


def _rows(array: NDArray[Any]) -> F64:
    """One row for each decision: along axis 1 of an image, along the last axis of all else."""
    rows = np.moveaxis(array, 1, -1) if array.ndim >= 4 else array
    return rows.reshape(-1, rows.shape[-1]).astype(np.float64)


def _sample_decisions(
    y: F64, u: F64, f: F64, unit: float, jitter: float
) -> tuple[int, int, int, int, int]:
    finite = np.isfinite(y).all(axis=1) & np.isfinite(u).all(axis=1) & np.isfinite(f).all(axis=1)
    y, u, f = y[finite], u[finite], f[finite]
    if not y.size:
        return 0, 0, 0, 0, 0
    needed = CLEAR * (float(np.abs(u - y).max()) + 4 * unit * float(np.abs(y).max()))
    needed += CLEAR * jitter * float(np.linalg.norm(y))
    clear = _margin(y, 1) > needed
    flipped = clear & (y.argmax(axis=1) != f.argmax(axis=1))
    if y.shape[1] <= TOP:
        return len(y), int(clear.sum()), int(flipped.sum()), 0, 0
    clear_top = _margin(y, TOP) > needed
    flipped_top = clear_top & (_top(y) != _top(f)).any(axis=1)
    return (
        len(y), int(clear.sum()), int(flipped.sum()), int(clear_top.sum()), int(flipped_top.sum()),
    )  # fmt: skip


def _margin(rows: F64, count: int) -> F64:
    """How far the ``count`` largest of each row are above the rest."""
    ordered = np.partition(rows, (-count - 1, -count), axis=1)
    margin: F64 = ordered[:, -count] - ordered[:, -count - 1]
    return margin


def _top(rows: F64) -> NDArray[np.intp]:
    return np.sort(np.argpartition(rows, -TOP, axis=1)[:, -TOP:], axis=1)
