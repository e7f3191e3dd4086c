"""``e = ||y - y*|| / ||y*||``, and a fold may not make the runtime's own error twice as large.

``y*`` is the float64 oracle of the unfolded model. For each sample the fold's error ``e_fold`` is
held against ``level = max(e_unfold, jitter, 4u)``: what the unfolded model itself gets wrong on the
same runtime, how far two runs of it lie apart, and four roundings. Tier C fails

- when the geometric mean of ``e_fold / level`` is above 2, by more than two standard errors, or
- when one ``e_fold`` is above 4 times both its own level and the usual one (the second largest
  ``e_unfold``; with the largest, one ill sample would hide a fault in the rest), and stays so on
  neighbours of that sample (``bnfold.verify.second_look``).

No tolerance is fixed: a net whose own error is 10 % raises no alarm, and a bias off by 1e-5 in a
good net is caught. Of a right fold both errors are draws of one kind, so that the logarithms of the
ratios scatter about zero, by s: their mean over n samples by s / sqrt(n), the standard error. A
limit of 2 on the mean alone is many of these away where an output has many numbers (s is below 0.2
there, and the second condition changes nothing), but less than one where an output is a single
number or a net is near chaos (LeViT on noise: s is 5). Two standard errors keep the false alarms of
those below one in twenty even for a fold whose errors are twice as large in truth.

Tier D holds decisions against the oracle's: the largest of a row, and the set of its five largest,
where the margin is at least eight times the unfolded model's own largest error on that sample, so
that a fold which changes one is wrong by four times as much as the runtime.

What is judged is `Measured`, plain numbers: nothing here runs a model, and a stored measurement can
be judged again with other gates.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bnfold.errors import UsageError

F64 = NDArray[np.float64]

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
class Gates:
    """The user's own limits: ``|y_fold - y_unfold| <= atol + rtol |y_unfold|`` everywhere.

    None of either stands for 0 where the other is given; with both None there is no such gate.
    """

    rtol: float | None = None
    atol: float | None = None

    @classmethod
    def of(cls, rtol: float | None, atol: float | None) -> Gates:
        """The gates as callers give them.

        Raises:
            UsageError: A limit is negative or not a finite number.
        """
        for name, limit in (("rtol", rtol), ("atol", atol)):
            if limit is not None and not 0 <= limit < math.inf:
                raise UsageError(f"{name} is {limit}", todo="give a number that is not negative")
        return cls(rtol, atol)


@dataclass(frozen=True, slots=True)
class Settled:
    """A verdict that needs no numbers: another type or shape, a NaN, integers that differ."""

    verdict: Verdict
    message: str
    constant: bool = False


@dataclass(frozen=True, slots=True)
class Decisions:
    """How many rows decide alike: by their largest value, and by the set of their five largest.

    Attributes:
        rows: How many there are.
        clear: How many the oracle decides by a margin that rounding can't take away.
        flipped: How many of the clear ones the folded model decides otherwise.
        clear_top: As ``clear``, of the five largest.
        flipped_top: As ``flipped``, of the five largest.
    """

    rows: int
    clear: int
    flipped: int
    clear_top: int = 0
    flipped_top: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one output, sample by sample.

    Attributes:
        output: Its name.
        dtype: Its type in the reference, as numpy calls it.
        unit: Half an ulp, relative, of the coarsest float type in the model.
        jitter: The largest relative distance of two runs of the unfolded model.
        e_fold: The folded model's relative error against the oracle, of each sample.
        e_unfold: The unfolded model's.
        varies: Whether the oracle's output differs between samples.
        hull: The upper hull of ``(|y_unfold|, |y_fold - y_unfold|)`` over all elements: enough to
            tell whether all of them are within any ``rtol`` and ``atol``.
        decisions: The decisions that the output's rows may stand for.
        settled: What is decided without numbers; then there are none.
    """

    output: str
    dtype: str
    unit: float
    jitter: float = 0.0
    e_fold: tuple[float, ...] = ()
    e_unfold: tuple[float, ...] = ()
    varies: bool = True
    hull: tuple[tuple[float, float], ...] = ()
    decisions: Decisions | None = None
    settled: Settled | None = None


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
        caught: The smallest relative error of the output that would have failed, had it come on
            top of the folded model's own on every sample.
    """

    e_fold: float
    e_unfold: float
    jitter: float
    mean_ratio: float
    sure_ratio: float
    worst_ratio: float
    caught: float = math.inf


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


# ---- tier C ----


def judge_errors(measured: Measured, gates: Gates | None = None) -> OutputVerdict:
    """Tier C on one output: the relative errors against the oracle, and the user's gates."""
    name, settled = measured.output, measured.settled
    if settled is not None:
        return OutputVerdict(name, settled.verdict, settled.message, constant=settled.constant)
    if not (measured.e_unfold and np.isfinite(measured.e_unfold).all()):
        met = f"output '{name}': the unfolded model's own error is not a number"
        return OutputVerdict(name, Verdict.INCONCLUSIVE, met)
    figures = _figures(measured)
    said = (
        f"its error is {figures.e_fold:.2g} after folding and {figures.e_unfold:.2g} before "
        f"({figures.mean_ratio:.3g} times what rounding explains, "
        f"{figures.worst_ratio:.3g} on the worst sample)"
    )
    if _too_large(figures.sure_ratio, figures.worst_ratio):
        limits = f"at most {MEAN_LIMIT:g} is allowed, and {WORST_LIMIT:g} on the worst sample"
        return OutputVerdict(name, Verdict.FAIL, f"output '{name}': {said}; {limits}", figures)
    beyond = _beyond(measured, gates or Gates())
    if beyond:
        return OutputVerdict(name, Verdict.FAIL, f"output '{name}': {beyond}; {said}", figures)
    own = max(_usual(np.array(measured.e_unfold)), measured.jitter)
    if own > NO_SIGNAL:
        return OutputVerdict(
            name, Verdict.INCONCLUSIVE,
            f"output '{name}': the unfolded model's own error on this runtime is "
            f"{own:.2g} of its output, so nothing can be told", figures,
        )  # fmt: skip
    if not measured.varies:
        return constant_output(name, figures)
    return OutputVerdict(name, Verdict.PASS, f"output '{name}': {said}", figures)


def _figures(measured: Measured) -> Figures:
    e_fold, e_unfold = np.array(measured.e_fold), np.array(measured.e_unfold)
    return Figures(
        e_fold=float(np.exp(_logs(e_fold).mean())),
        e_unfold=float(np.exp(_logs(e_unfold).mean())),
        jitter=measured.jitter,
        **_ratios(e_fold, e_unfold, measured),
        caught=_caught(e_fold, e_unfold, measured),
    )


def _ratios(e_fold: F64, e_unfold: F64, measured: Measured) -> dict[str, float]:
    level = _level(e_unfold, measured)
    ratios = _logs(e_fold / level)
    with np.errstate(invalid="ignore"):  # an infinite error has no deviation: not a number
        doubt = STANDARD_ERRORS * float(ratios.std(ddof=1)) / len(ratios) ** 0.5
    return {
        "mean_ratio": float(np.exp(ratios.mean())),
        "sure_ratio": float(np.exp(ratios.mean() - doubt)),
        "worst_ratio": float(_by_itself(e_fold, e_unfold, level).max()),
    }


def ratios_by_sample(measured: Measured) -> F64:
    """What the limit of the worst sample is held against, for each of them."""
    e_fold, e_unfold = np.array(measured.e_fold), np.array(measured.e_unfold)
    return _by_itself(e_fold, e_unfold, _level(e_unfold, measured))


def _level(e_unfold: F64, measured: Measured) -> F64:
    """What rounding explains of each sample's error."""
    level: F64 = np.maximum(e_unfold, max(measured.jitter, 4 * measured.unit))
    return level


def _by_itself(e_fold: F64, e_unfold: F64, level: F64) -> F64:
    ratios: F64 = e_fold / np.maximum(level, _usual(e_unfold))
    return ratios


def _usual(e_unfold: F64) -> float:
    return float(np.sort(e_unfold)[-2 if len(e_unfold) >= MANY else -1])


def _too_large(sure_ratio: float, worst_ratio: float) -> bool:
    # A number that is none is no small one.
    return not (sure_ratio <= MEAN_LIMIT and worst_ratio <= WORST_LIMIT)


def _caught(e_fold: F64, e_unfold: F64, measured: Measured) -> float:
    """The smallest power of two that, added at a right angle to every error, would fail.

    Infinite where the errors fail as they are.
    """

    def fails(errors: F64) -> bool:
        found = _ratios(errors, e_unfold, measured)
        return _too_large(found["sure_ratio"], found["worst_ratio"])

    if fails(e_fold):
        return math.inf
    for power in range(-52, 1):
        added = 2.0**power
        if fails(np.hypot(e_fold, added)):
            return added
    return math.inf


def _beyond(measured: Measured, gates: Gates) -> str:
    """How the user's gates are broken; empty where they are not, or there are none."""
    if gates.rtol is None and gates.atol is None:
        return ""
    rtol, atol = gates.rtol or 0.0, gates.atol or 0.0
    excess = max((far - rtol * size for size, far in measured.hull), default=0.0)
    if excess <= atol:
        return ""
    needed = max(excess, 0.0)
    return (
        f"an element differs from the unfolded model's by more than atol {atol:g} + rtol {rtol:g}"
        f" times its size (with this rtol, atol {needed:.3g} would do)"
    )


# ---- tier D ----


def judge_decisions(measured: Measured) -> OutputVerdict | None:
    """Tier D on one output; None where the oracle decides nothing clearly, or there is nothing to.

    Integers, booleans and strings are decisions as they stand.
    """
    name, found = measured.output, measured.decisions
    if found is None or not (found.clear or found.clear_top):
        return None
    said = f"output '{name}': {found.clear} of {found.rows} decisions are clear"
    if found.flipped or found.flipped_top:
        kinds = ((found.flipped, "the largest value"), (found.flipped_top, "the five largest"))
        others = " and ".join(f"{count} by {what}" for count, what in kinds if count)
        return OutputVerdict(name, Verdict.FAIL, f"{said}, and rows differ: {others}")
    return OutputVerdict(name, Verdict.PASS, f"{said}, and all of these agree")


# ---- both ----


def constant_output(name: str, figures: Figures | None = None) -> OutputVerdict:
    """Nothing is shown by agreeing on what never changes."""
    return OutputVerdict(
        name, Verdict.INCONCLUSIVE,
        f"output '{name}' is the same for every sample, so agreeing on it proves nothing",
        figures, constant=True,
    )  # fmt: skip


def _logs(values: F64) -> F64:
    # An error of exactly zero would make the mean zero whatever the others are.
    logs: F64 = np.log(np.maximum(values, 2.0**-80))
    return logs


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
