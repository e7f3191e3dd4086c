"""Tiers C and D: both models run from end to end on a provider, held against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bnfold.errors import BnfoldError, InconclusiveError
from bnfold.verify.interface import Interface
from bnfold.verify.judge import (
    Gates,
    Measured,
    OutputVerdict,
    Verdict,
    judge_decisions,
    judge_errors,
    judge_outputs,
)
from bnfold.verify.measure import measure_output
from bnfold.verify.result import OutputResult, ProviderRun, TierResult
from bnfold.verify.samples import Samples
from bnfold.verify.subject import Feeds, Outputs, Runner, RunOptions, Subject

# Told what is being done, and the fraction of it that is over.
Progress = Callable[[str, float | None], None]

# Samples on which the unfolded model runs twice, to see how far two runs lie apart.
JITTER_SAMPLES = 2


@dataclass(frozen=True, slots=True)
class Pair:
    """The two models under check, and which input and output of one is which of the other."""

    reference: Subject
    candidate: Subject
    interface: Interface


@dataclass(frozen=True, slots=True)
class Runs:
    """Both models' outputs per sample on one provider, or the error that kept them away."""

    provider: str
    unfolded: Sequence[Outputs] = ()
    again: Sequence[Outputs] = ()
    folded: Sequence[Outputs] = ()
    certificate: ProviderRun | None = None
    error: BnfoldError | None = None


def run_both(
    pair: Pair, provider: str, samples: Samples, options: RunOptions, progress: Progress
) -> Runs:
    """Runs both models on ``provider``, one after the other.

    Raises:
        ProviderError: The provider is missing, or did not run all of a model.
        InvalidModelError: The runtime refuses a model.
    """
    feeds = samples.feeds
    total = 2 * len(feeds) + JITTER_SAMPLES
    step = iter(range(1, total + 1))

    def run(runner: Runner, feed: Any) -> Outputs:
        outputs = runner.run(feed)
        progress(f"running on {provider}", next(step) / total)
        return outputs

    try:
        # One session at a time: each holds the model's weights.
        runner = pair.reference.runner(provider, options)
        before = [run(runner, feed) for feed in feeds]
        again = [run(runner, feed) for feed in feeds[:JITTER_SAMPLES]]
        runner.certificate()
        del runner
        runner = pair.candidate.runner(provider, options)
        renamed = [pair.interface.to_candidate(feed) for feed in feeds]
        after = [pair.interface.from_candidate(run(runner, feed)) for feed in renamed]
        return Runs(provider, before, again, after, runner.certificate())
    except InconclusiveError as error:
        return Runs(provider, error=error)


def oracle_outputs(
    subject: Subject, feeds: Sequence[Feeds], progress: Progress,
    first: Mapping[str, Any] | None = None,
) -> list[Outputs]:  # fmt: skip
    """What the unfolded model says in float64, sample by sample.

    Args:
        subject: The unfolded model.
        feeds: The samples.
        progress: Told how far it is.
        first: Its outputs on the first sample, where they are known already.

    Raises:
        InconclusiveError: An operator can't be computed.
    """
    compute = subject.oracle()
    outputs: list[Outputs] = []
    for done, feed in enumerate(feeds, start=1):
        outputs.append(dict(first) if first and done == 1 else dict(compute(feed)))
        progress("computing the float64 oracle", done / len(feeds))
    return outputs


def undecided(provider: str, tiers: str, doubt: str) -> Iterator[TierResult]:
    """What is said where there is nothing to compare."""
    for tier in "CD":
        if tier in tiers:
            yield TierResult(tier, provider, Verdict.INCONCLUSIVE, doubt)
            return


def measure_runs(
    runs: Runs, oracle: Sequence[Outputs], unit: float, apart: Mapping[str, float] | None = None
) -> list[Measured]:
    """The errors of every output, over all samples of the runs.

    Args:
        runs: Both models' outputs.
        oracle: The unfolded model's in float64.
        unit: Half an ulp, relative, of the coarsest float type in the model.
        apart: By output, how far two right folds lie apart, where that is more than rounding
            explains (`bnfold.verify.integer_biases`).
    """
    return [
        measure_output(
            name,
            [outputs[name] for outputs in oracle],
            [outputs[name] for outputs in runs.unfolded],
            [outputs[name] for outputs in runs.folded],
            unit=unit,
            jitter=max(_jitter(name, runs, oracle), (apart or {}).get(name, 0.0)),
        )
        for name in oracle[0]
    ]


def judge_ends(
    provider: str, measured: Sequence[Measured], tiers: str, gates: Gates
) -> Iterator[TierResult]:
    """Tiers C and D on what was measured on one provider.

    Outputs that are no floats are decisions; a model that has no others has no tier C.
    """
    errors = [(m, judge_errors(m, gates)) for m in measured if _is_float(m)]
    if "C" in tiers and (errors or not measured):
        yield _tier("C", provider, errors)
    decided = [(m, judge_errors(m)) for m in measured if not _is_float(m)]
    decided += [(m, said) for m in measured if (said := judge_decisions(m)) is not None]
    if "D" in tiers and decided:
        yield _tier("D", provider, decided)
    elif "D" in tiers and "C" not in tiers:
        yield from undecided(provider, "D", "no decision of the unfolded model is clear")


def _tier(tier: str, provider: str, judged: Sequence[tuple[Measured, OutputVerdict]]) -> TierResult:
    speaker = judge_outputs([said for _, said in judged])
    outputs = tuple(
        OutputResult(said.output, said.verdict, said.message, said.figures,
                     measured if tier == "C" or not _is_float(measured) else None)
        for measured, said in judged
    )  # fmt: skip
    passing = speaker.verdict is Verdict.PASS and tier == "C"
    caught = [said.figures.caught for _, said in judged if said.figures is not None and passing]
    return TierResult(
        tier, provider, speaker.verdict, speaker.message, outputs,
        caught=max(caught, default=None),
    )  # fmt: skip


def _is_float(measured: Measured) -> bool:
    return measured.dtype.startswith(("float", "bfloat")) or not measured.dtype


def _jitter(name: str, runs: Runs, oracle: Sequence[Outputs]) -> float:
    """The largest relative distance of two runs of the unfolded model on the same sample."""
    worst = 0.0
    for y, one, other in zip(oracle, runs.unfolded, runs.again, strict=False):
        a, b = one[name], other[name]
        if not isinstance(a, np.ndarray) or a.dtype.kind not in "fV" or a.shape != b.shape:
            continue
        size = float(np.linalg.norm(np.nan_to_num(y[name])))
        apart = float(np.linalg.norm(np.nan_to_num(a.astype(np.float64) - b.astype(np.float64))))
        worst = max(worst, apart / size if size else 0.0)
    return worst


def certified(runs: Runs, measured: Sequence[Measured]) -> ProviderRun | None:
    """The certificate, with the jitter that was measured."""
    if runs.certificate is None:
        return None
    return replace(runs.certificate, jitter=max((m.jitter for m in measured), default=0.0))


def within_range(
    samples: Samples, runs: Sequence[Runs], oracle: Sequence[Outputs]
) -> tuple[list[int], int]:
    """The samples to judge by, and how many extreme ones overflow in the unfolded model."""
    ran = [run.unfolded for run in runs if run.error is None]
    finite = [all(_finite(outputs[i]) for outputs in (oracle, *ran)) for i in range(len(oracle))]
    extreme = [role not in ("ordinary", "given") for role in samples.roles] or [False] * len(oracle)
    ordinary = [ok for ok, odd in zip(finite, extreme, strict=True) if not odd]
    if not all(ordinary) or all(finite):
        return list(range(len(oracle))), 0
    kept = [i for i, ok in enumerate(finite) if ok]
    return kept, len(oracle) - len(kept)


def _finite(outputs: Mapping[str, Any]) -> bool:
    return all(
        bool(np.isfinite(value.astype(np.float64)).all())
        for value in outputs.values()
        if isinstance(value, np.ndarray) and value.dtype.kind in "fV"
    )


def only(runs: Runs, kept: Sequence[int]) -> Runs:
    """The runs of some of the samples."""
    if runs.error is not None or len(kept) == len(runs.unfolded):
        return runs
    again = [outputs for i, outputs in enumerate(runs.again) if i in kept]
    unfolded, folded = ([side[i] for i in kept] for side in (runs.unfolded, runs.folded))
    return replace(runs, again=again, unfolded=unfolded, folded=folded)
