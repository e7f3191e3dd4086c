"""``fold(model)(x) == model(x)`` in real arithmetic, shown on the providers that will run it.

Four tiers, cheap to dear; the worst one speaks: A (stored weights against the fold that bnfold
would make), B (site by site in float64), C (end to end on each provider against the float64 oracle
of the reference) and D (decisions there).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bnfold.errors import InconclusiveError, UsageError
from bnfold.verify.caught import what_was_caught
from bnfold.verify.customops import require_known_operators
from bnfold.verify.ends import (
    Pair,
    Progress,
    Runs,
    certified,
    judge_ends,
    measure_runs,
    only,
    oracle_outputs,
    run_both,
    undecided,
    within_range,
)
from bnfold.verify.environment import environment
from bnfold.verify.expected import Expected
from bnfold.verify.inputs import user_samples
from bnfold.verify.integer_biases import folds_apart
from bnfold.verify.interface import require_same_interface
from bnfold.verify.judge import Gates, Measured, Verdict
from bnfold.verify.memory import float64_bytes, memory_guard, require_memory
from bnfold.verify.mutation import caught_by_mutation
from bnfold.verify.onnx_subject import OnnxSubject
from bnfold.verify.providers import CPU, full_name, import_onnxruntime, require_available
from bnfold.verify.reproducer import write_reproducer
from bnfold.verify.result import (
    CheckResult,
    Mutation,
    OutputResult,
    ProviderRun,
    SiteResult,
    TierResult,
    WeightRange,
)
from bnfold.verify.samples import SAMPLES, Samples
from bnfold.verify.second_look import second_look
from bnfold.verify.subject import Feeds, Outputs, RunOptions, Subject
from bnfold.verify.subjects import drawn_samples, load_pair, same_model
from bnfold.verify.tiers import inside, site_tiers

__all__ = [
    "TIERS", "CheckResult", "OutputResult", "Progress", "TierResult", "Verdict", "check",
]  # fmt: skip

TIERS = "ABCD"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a check is to do."""

    providers: tuple[str, ...]
    tiers: str
    gates: Gates
    options: RunOptions

    @classmethod
    def of(
        cls,
        providers: Sequence[str],
        tiers: str,
        rtol: float | None,
        atol: float | None,
        tf32: bool,
    ) -> Plan:
        """The plan as callers give it.

        Raises:
            UsageError: There is no such tier or provider, none at all, or a negative limit.
        """
        letters = "".join(dict.fromkeys(tiers.upper().replace(",", "").replace(" ", "")))
        if not letters or set(letters) - set(TIERS):
            raise UsageError(f"there is no tier '{tiers}'", todo="the tiers are A, B, C and D")
        providers = (providers,) if isinstance(providers, str) else providers
        if not providers:
            raise UsageError("no execution provider was named", todo="name one: providers=('cpu',)")
        named = tuple(dict.fromkeys(full_name(provider) for provider in providers))
        plan = cls(named, letters, Gates.of(rtol, atol), RunOptions(tf32=tf32))
        if not plan.runs and named != (CPU,):
            met = f"tiers {' and '.join(letters)} run nothing on {', '.join(named)}"
            raise UsageError(met, todo="add tiers C and D, or ask for no provider")
        return plan

    def require_providers(self) -> None:
        """What has to run something is there.

        Raises:
            ProviderError: ONNX Runtime or a provider is missing.
        """
        for name in self.providers if self.runs else ():
            require_available(import_onnxruntime(), name)

    @property
    def runs(self) -> bool:
        """Whether a provider has to run anything."""
        return "C" in self.tiers or "D" in self.tiers


def check(
    reference: Any,
    candidate: Any,
    *,
    providers: Sequence[str] = ("cpu",),
    inputs: Any = None,
    samples: int = SAMPLES,
    seed: int = 0,
    tiers: str = TIERS,
    rtol: float | None = None,
    atol: float | None = None,
    allow_tf32: bool = False,
    example_inputs: Any = None,
    expected: Expected | None = None,
    reproducer: Path | None = None,
    on_progress: Progress | None = None,
) -> CheckResult:
    """Checks that a folded model says what the unfolded one says.

    Args:
        reference: The unfolded model: a path, an ``onnx.ModelProto``, an ``onnx_ir.Model`` or a
            torch model of any kind.
        candidate: The folded one, likewise; it may be of the other framework.
        providers: Execution providers to run both on, by short or full name.
        inputs: The user's own inputs (see ``inputs.user_samples``); synthetic ones where None.
        samples: How many synthetic samples.
        seed: Their seed.
        tiers: Which of the tiers, by their letters.
        rtol: A limit of the user's own: see ``judge.Gates``.
        atol: Likewise.
        allow_tf32: Whether products of float32 may be rounded to TF32 on NVIDIA devices.
        example_inputs: Of a torch module: what its forward takes; only shapes and types matter.
        expected: What folding the reference gives, where the caller knows; else it is looked for.
        reproducer: A folder to write a reproducer to, if the check fails; ONNX models only.
        on_progress: Told of each step.

    Returns:
        The verdict of each tier. What could not be computed is inconclusive, never a pass.

    Raises:
        UsageError: The two models' interfaces differ, or the inputs are not the model's.
        ProviderError: A runtime or a provider is missing, or did not run all of a model.
        ModelError: A model can't be read, or the runtime refuses it.
        InconclusiveError: A model has operators that can't be run, or memory does not suffice.
    """
    plan = Plan.of(providers, tiers, rtol, atol, allow_tf32)
    one, other = load_pair(reference, candidate, example_inputs)
    pair = Pair(one, other, require_same_interface(one, other))
    _require_possible(one, other, plan)
    drawn = user_samples(one.inputs, inputs) if inputs is not None else None
    if drawn is None:
        first = plan.providers[0] if plan.runs else ""
        drawn = drawn_samples(pair, samples, seed, first, plan.options)
    run = _Check(pair, plan, drawn, expected, on_progress or _silent)
    with memory_guard(one.name):
        result = run.run()
    if reproducer is not None and result.verdict is Verdict.FAIL:
        run.reproduce(reproducer, result.message)
    return result


def _require_possible(one: Subject, other: Subject, plan: Plan) -> None:
    """What can be told to be impossible before anything has begun."""
    if isinstance(one, OnnxSubject) and plan.tiers != "A":
        require_memory(float64_bytes(one.model.proto), file=one.name)
    for subject in (one, other):
        if isinstance(subject, OnnxSubject) and plan.tiers != "A":
            require_known_operators(subject.model.proto, subject.name)


def _silent(stage: str, fraction: float | None) -> None:
    """Tell nobody."""


class _Check:
    def __init__(
        self, pair: Pair, plan: Plan, samples: Samples, expected: Expected | None,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.pair, self.plan, self.samples, self.progress = pair, plan, samples, progress
        self.expected = expected
        self.warnings: list[str] = []
        self.runs: list[ProviderRun] = []
        self.unpaired: tuple[str, ...] = ()
        self.weights: tuple[WeightRange, ...] = ()
        self.first: Outputs | None = None
        self.oracle: list[Outputs] = []
        self.sited = False
        self.apart: dict[str, float] | None = None
        self.mutations: list[Mutation] = []

    def run(self) -> CheckResult:
        tiers = tuple(self._tiers())
        guilty = next((site for tier in tiers for site in _wrong(tier)), None)
        result = CheckResult(
            self.pair.reference.name, self.pair.candidate.name, tiers,
            len(self.samples.feeds), self.samples.seed, tuple(self.warnings),
            runs=tuple(self.runs), inputs=self.samples.uses(), weights=self.weights,
            unpaired=self.unpaired, guilty="" if guilty is None else guilty.site,
            mutations=tuple(self.mutations), gates=self.plan.gates, environment=environment(),
        )  # fmt: skip
        return replace(result, caught=what_was_caught(result))

    def _tiers(self) -> Iterator[TierResult]:
        doubt = self._empty_proof()
        if doubt:
            yield TierResult(_dearest(self.plan), "", Verdict.INCONCLUSIVE, doubt)
            return
        # Before anything that takes time: a provider may be missing.
        runs = [
            run_both(self.pair, name, self.samples, self.plan.options, self.progress)
            for name in (self.plan.providers if self.plan.runs else ())
        ]
        found = site_tiers(self.pair, self.samples, self.plan.tiers, self.expected, self.progress)
        self.warnings.extend(found.warnings)
        self.unpaired, self.weights, self.first = found.unpaired, found.weights, found.outputs
        self.expected = found.expected
        self.sited = any(tier.tier == "B" and tier.caught is not None for tier in found.tiers)
        yield from found.tiers
        if self.plan.runs:
            yield from self._ends(runs)
        elif not found.tiers:
            why = found.warnings[-1] if found.warnings else "there is nothing to compare"
            yield TierResult(self.plan.tiers[0], "", Verdict.INCONCLUSIVE, why)

    def _ends(self, runs: Sequence[Runs]) -> Iterator[TierResult]:
        if self.samples.distinct < 2:
            doubt = "fewer than two distinct samples: an output that never changes would pass"
            for run in runs:
                yield from undecided(run.provider, self.plan.tiers, doubt)
            return
        try:
            oracle = oracle_outputs(
                self.pair.reference, self.samples.feeds, self.progress, self.first
            )
        except InconclusiveError as error:
            for run in runs:
                yield from undecided(run.provider, self.plan.tiers, str(error))
            return
        self.oracle = oracle
        kept, lost = within_range(self.samples, runs, oracle)
        if lost:
            self.warnings.append(f"{lost} extreme samples overflow in the unfolded model: left out")
        oracle = [oracle[i] for i in kept]
        feeds = [self.samples.feeds[i] for i in kept]
        ends = [tier for run in runs for tier in self._end(only(run, kept), feeds, oracle)]
        deeper = inside(self.pair, self.samples, oracle, self.expected)
        sound = all(run.error is None for run in runs) and not _any_fails(ends)
        yield from self._inside(deeper) if deeper is not None and sound else ends

    def _end(
        self, run: Runs, feeds: Sequence[Feeds], oracle: Sequence[Outputs]
    ) -> list[TierResult]:
        if run.error is not None:
            return list(undecided(run.provider, self.plan.tiers, str(run.error)))
        measured = self._measured(run, feeds, oracle)
        certificate = certified(run, measured)
        self.runs.extend(() if certificate is None else (certificate,))
        tiers = list(judge_ends(run.provider, measured, self.plan.tiers, self.plan.gates))
        if not self.sited and all(tier.verdict is Verdict.PASS for tier in tiers):
            self._mutate(run, feeds, oracle)
        return tiers

    def _measured(
        self, run: Runs, feeds: Sequence[Feeds], oracle: Sequence[Outputs]
    ) -> list[Measured]:
        measured = measure_runs(run, oracle, self.pair.reference.unit, self._apart(feeds))
        try:
            return second_look(self.pair, run, feeds, measured, self.plan.options)
        except InconclusiveError:
            return measured  # a neighbour can't be run: what was seen first stands

    def _apart(self, feeds: Sequence[Feeds]) -> dict[str, float]:
        """How far two right folds lie apart; the same on every provider."""
        if self.apart is None:
            self.apart = folds_apart(self.pair, feeds, self.progress)
        return self.apart

    def _mutate(self, run: Runs, feeds: Sequence[Feeds], oracle: Sequence[Outputs]) -> None:
        """Without tier B, what would have been caught is seen by spoiling a weight."""
        self.progress(f"running mutants on {run.provider}", None)
        found = caught_by_mutation(
            self.pair, run, feeds, oracle, self.plan.options, self._apart(feeds)
        )
        self.mutations += [] if found is None else [Mutation(run.provider, *found)]

    def _inside(self, pair: Pair) -> Iterator[TierResult]:
        """The outputs are the same for every sample: a tensor inside is judged in their place."""
        plan = replace(self.plan, tiers="".join(t for t in self.plan.tiers if t in "CD"))
        deeper = _Check(pair, plan, self.samples, None, self.progress)
        deeper.sited = self.sited
        runs = [run_both(pair, provider, self.samples, plan.options, self.progress)
                for provider in plan.providers]  # fmt: skip
        for tier in deeper._ends(runs):
            said = f"the outputs are the same for every sample; inside, {tier.message}"
            yield replace(tier, message=said)
        self.mutations += deeper.mutations

    def reproduce(self, folder: Path, said: str) -> None:
        """Writes what failed to a folder."""
        one, other = self.pair.reference, self.pair.candidate
        if isinstance(one, OnnxSubject) and isinstance(other, OnnxSubject):
            oracle = self.oracle or ([self.first] if self.first else [])
            write_reproducer(folder, one.model.proto, other.model.proto, self.samples.feeds,
                             oracle, self.plan.providers, said,
                             options=self.plan.options)  # fmt: skip

    def _empty_proof(self) -> str:
        if same_model(self.pair):
            return "the two files are the same graph, so that they agree proves nothing"
        return "" if self.samples.feeds else "there are no samples"


def _dearest(plan: Plan) -> str:
    return "C" if "C" in plan.tiers else plan.tiers[-1]


def _any_fails(tiers: Sequence[TierResult]) -> bool:
    return any(tier.verdict is Verdict.FAIL for tier in tiers)


def _wrong(tier: TierResult) -> Iterator[SiteResult]:
    return (site for site in tier.sites if site.verdict is Verdict.FAIL)
