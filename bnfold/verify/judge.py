"""``e = ||y - y*|| / ||y*||``, and a fold may not make the runtime's own error twice as large.

``y*`` is the float64 oracle of the unfolded model. For each sample the fold's error ``e_fold`` is
held against ``level = max(e_unfold, jitter, 4u)``: what the unfolded model itself gets wrong on the
same runtime, how far two runs of it lie apart, and four roundings. Tier C fails

- when the geometric mean of ``e_fold / level`` is above 2, by more than two standard errors, or
- when one ``e_fold`` is above 4 times both its own level and the usual one (the second largest
  ``e_unfold``; with the largest, one ill sample would hide a fault in the rest).

No tolerance is fixed: a net whose own error is 10 % raises no alarm, and a bias off by 1e-5 in a
good net is caught. The standard error and the usual level matter where chance has its say: with one
number per output e_unfold is near zero on some samples, and in a net near chaos (LeViT on noise)
both errors vary from sample to sample by factors of ten thousand. Elsewhere the ratios hardly vary,
and they change nothing.

Arrays in, verdicts out; nothing here runs a model.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Arrays = Sequence[NDArray[Any]]

MEAN_LIMIT = 2.0
WORST_LIMIT = 4.0
STANDARD_ERRORS = 2.0
# From so many samples on, the largest error of the unfolded model is not taken for the usual one.
MANY = 8
# Above this the runtime's own error is as large as what it computes: nothing can be told.
NO_SIGNAL = 0.5


class Verdict(enum.Enum):
    """What a judge says."""

    PASS = "pass"
    INCONCLUSIVE = "inconclusive"
    FAIL = "fail"

    @property
    def exit_code(self) -> int:
        """The exit code of the command line."""
        return {Verdict.PASS: 0, Verdict.FAIL: 1, Verdict.INCONCLUSIVE: 3}[self]


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst one speaks: fail, then inconclusive, then pass; inconclusive where none is."""
    found = set(verdicts)
    for verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS):
        if verdict in found:
            return verdict
    return Verdict.INCONCLUSIVE


@dataclass(frozen=True, slots=True)
class Figures:
    """Errors of one output.

    Attributes:
        e_fold: Geometric mean over the samples of the folded model's relative error.
        e_unfold: The same of the unfolded model's.
        jitter: Relative distance of two runs of the unfolded model.
        mean_ratio: Geometric mean of ``e_fold / level``.
        sure_ratio: The same less two standard errors; above 2 it fails.
        worst_ratio: The largest ``e_fold`` over its level or the usual one; above 4 it fails.
    """

    e_fold: float
    e_unfold: float
    jitter: float
    mean_ratio: float
    sure_ratio: float
    worst_ratio: float


@dataclass(frozen=True, slots=True)
class OutputVerdict:
    """The verdict on one output.

    Attributes:
        output: Its name.
        verdict: Pass, fail or inconclusive.
        message: Why, in one sentence.
        figures: The errors, where there were floats to compare.
        constant: It is the same for every sample, so that agreeing on it proves nothing.
    """

    output: str
    verdict: Verdict
    message: str
    figures: Figures | None = None
    constant: bool = False


def judge_output(
    name: str, oracle: Arrays, unfolded: Arrays, folded: Arrays, *, unit: float, jitter: float = 0.0
) -> OutputVerdict:
    """Judges one output over all samples.

    Args:
        name: The output's name.
        oracle: What the unfolded model says in float64, an array of any shape per sample.
        unfolded: What the unfolded model says on the runtime.
        folded: What the folded model says on the runtime.
        unit: Half an ulp, relative, of the coarsest float type in the model.
        jitter: Relative distance of two runs of the unfolded model.
    """
    if len(oracle) < 2:
        return OutputVerdict(name, Verdict.INCONCLUSIVE, f"output '{name}' has only one sample")
    if not all(isinstance(a, np.ndarray) for a in (*oracle, *unfolded, *folded)):
        return OutputVerdict(name, Verdict.INCONCLUSIVE, f"output '{name}' is not a tensor")
    for sample, (reference, candidate) in enumerate(zip(unfolded, folded, strict=True)):
        if reference.dtype != candidate.dtype:
            return _fail(name, f"is {candidate.dtype}, not {reference.dtype}")
        if reference.dtype.kind in "fV" and reference.shape != candidate.shape:
            return _fail(
                name, f"has shape {candidate.shape}, not {reference.shape}, on sample {sample}"
            )
    if unfolded[0].dtype.kind not in "fV":
        return judge_exact(name, oracle, unfolded, folded)
    return judge_floats(name, oracle, unfolded, folded, unit=unit, jitter=jitter)


def judge_exact(name: str, oracle: Arrays, unfolded: Arrays, folded: Arrays) -> OutputVerdict:
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
            return OutputVerdict(
                name, Verdict.INCONCLUSIVE,
                f"output '{name}' differs on samples {differ}, where rounding decides it",
            )  # fmt: skip
        return _fail(name, f"differs from the unfolded model's on samples {differ}")
    if all(_same(unfolded[0], other) for other in unfolded[1:]):
        return _constant(name)
    return OutputVerdict(name, Verdict.PASS, f"output '{name}' agrees exactly")


def judge_floats(
    name: str, oracle: Arrays, unfolded: Arrays, folded: Arrays, *, unit: float, jitter: float
) -> OutputVerdict:
    """The relative errors against the oracle, as the module says."""
    fault = _finite_fault(name, oracle, unfolded, folded)
    if fault is not None:
        return fault
    wide = [_finite_parts(*arrays) for arrays in zip(oracle, unfolded, folded, strict=True)]
    size = max(float(np.linalg.norm(y)) for y, _, _ in wide)
    if size == 0.0:
        # All zeros: a folded model that says anything else is wrong, one that agrees shows nothing.
        off = max(float(np.linalg.norm(f)) for _, _, f in wide)
        return _constant(name) if off == 0.0 else _fail(name, "is not zero, as the oracle's is")
    e_unfold = np.array([_error(u, y, size) for y, u, _ in wide])
    e_fold = np.array([_error(f, y, size) for y, _, f in wide])
    verdict = _compare(name, e_fold, e_unfold, unit, jitter)
    if verdict.verdict is Verdict.PASS and is_constant([y for y, _, _ in wide], unit):
        return _constant(name, verdict.figures)
    return verdict


def _compare(name: str, e_fold: F64, e_unfold: F64, unit: float, jitter: float) -> OutputVerdict:
    level = np.maximum(e_unfold, max(jitter, 4 * unit))
    usual = float(np.sort(e_unfold)[-2 if len(e_unfold) >= MANY else -1])
    ratios = _logs(e_fold / level)
    doubt = STANDARD_ERRORS * float(ratios.std(ddof=1)) / len(ratios) ** 0.5
    figures = Figures(
        e_fold=float(np.exp(_logs(e_fold).mean())),
        e_unfold=float(np.exp(_logs(e_unfold).mean())),
        jitter=jitter,
        mean_ratio=float(np.exp(ratios.mean())),
        sure_ratio=float(np.exp(ratios.mean() - doubt)),
        worst_ratio=float((e_fold / np.maximum(level, usual)).max()),
    )
    said = (
        f"its error is {figures.e_fold:.2g} after folding and {figures.e_unfold:.2g} before "
        f"({figures.mean_ratio:.3g} times what rounding explains, "
        f"{figures.worst_ratio:.3g} on the worst sample)"
    )
    if figures.sure_ratio > MEAN_LIMIT or figures.worst_ratio > WORST_LIMIT:
        return OutputVerdict(name, Verdict.FAIL, f"output '{name}': {said}", figures)
    if max(usual, jitter) > NO_SIGNAL:
        return OutputVerdict(
            name, Verdict.INCONCLUSIVE,
            f"output '{name}': the unfolded model's own error on this runtime is "
            f"{max(usual, jitter):.2g} of its output, so nothing can be told", figures,
        )  # fmt: skip
    return OutputVerdict(name, Verdict.PASS, f"output '{name}': {said}", figures)


def _finite_fault(
    name: str, oracle: Arrays, unfolded: Arrays, folded: Arrays
) -> OutputVerdict | None:
    """Non-finite values must be of one kind in one place; a NaN shows nothing even so."""
    blind = False
    for sample, (y, u, f) in enumerate(zip(oracle, unfolded, folded, strict=True)):
        if y.shape != u.shape:
            return OutputVerdict(
                name, Verdict.INCONCLUSIVE,
                f"output '{name}': the oracle's shape is {y.shape}, the runtime's {u.shape}",
            )  # fmt: skip
        kinds = [_kinds(a) for a in (y, u, f)]
        if bool(((kinds[2] != 0) & (kinds[2] != kinds[1])).any()):
            return _fail(name, f"is not finite on sample {sample} where the unfolded model's is")
        if bool(((kinds[2] != kinds[1]) & (kinds[0] != 0)).any()):
            return _fail(name, f"is finite on sample {sample} where the oracle's is not")
        blind |= bool((kinds[0] != kinds[1]).any() or (kinds[1] == 3).any())
        blind |= bool(u.size and (kinds[1] != 0).all())
    if blind:
        return OutputVerdict(
            name, Verdict.INCONCLUSIVE,
            f"output '{name}': the unfolded model's is not finite, or the oracle's is not there",
        )  # fmt: skip
    return None


def _kinds(array: NDArray[Any]) -> NDArray[np.int8]:
    """0 where finite, 1 at +inf, 2 at -inf, 3 at NaN."""
    wide = array.astype(np.float64)
    return (
        np.isposinf(wide).astype(np.int8) + 2 * np.isneginf(wide).astype(np.int8)
        + 3 * np.isnan(wide).astype(np.int8)
    )  # fmt: skip


def _finite_parts(y: NDArray[Any], u: NDArray[Any], f: NDArray[Any]) -> tuple[F64, F64, F64]:
    finite = np.isfinite(y.astype(np.float64))
    return tuple(a.astype(np.float64)[finite] for a in (y, u, f))  # type: ignore[return-value]


def _error(array: F64, oracle: F64, size: float) -> float:
    """Relative to the oracle's norm, or to the largest of any sample where it is zero."""
    return float(np.linalg.norm(array - oracle)) / (float(np.linalg.norm(oracle)) or size)


def _logs(values: F64) -> F64:
    # An error of exactly zero would make the mean zero whatever the others are.
    logs: F64 = np.log(np.maximum(values, 2.0**-80))
    return logs


def is_constant(oracle: Sequence[F64], unit: float) -> bool:
    """Whether an output is the same for every sample, as far as ``unit`` can tell."""
    first = oracle[0]
    return all(
        y.shape == first.shape
        and float(np.linalg.norm(y - first)) <= 4 * unit * float(np.linalg.norm(first))
        for y in oracle[1:]
    )


def _same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return one.shape == other.shape and bool(np.array_equal(one, other))


def _constant(name: str, figures: Figures | None = None) -> OutputVerdict:
    return OutputVerdict(
        name, Verdict.INCONCLUSIVE,
        f"output '{name}' is the same for every sample, so agreeing on it proves nothing",
        figures, constant=True,
    )  # fmt: skip


def _fail(name: str, met: str) -> OutputVerdict:
    return OutputVerdict(name, Verdict.FAIL, f"output '{name}' {met}")


def judge_outputs(verdicts: Sequence[OutputVerdict]) -> OutputVerdict:
    """The one that speaks for all: the worst, except that a constant output needs no second.

    An output that never changes (anchors, a class list) proves nothing, but takes nothing away
    from the proof that another output gives.
    """
    telling = [v for v in verdicts if not v.constant] or list(verdicts)
    if not telling:
        return OutputVerdict("", Verdict.INCONCLUSIVE, "the model has no output to compare")
    said = worst(v.verdict for v in telling)
    speaking = [v for v in telling if v.verdict is said]
    return max(speaking, key=lambda v: v.figures.mean_ratio if v.figures else 0.0)
