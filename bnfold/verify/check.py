"""``fold(model)(x) == model(x)`` in real arithmetic, shown on the providers that will run it.

The worst tier speaks: A (stored weights, where the expected ones are given) and C (end to end
against the float64 oracle of the reference, on each provider).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from bnfold.errors import BnfoldError, InconclusiveError, UsageError
from bnfold.verify.inputs import SAMPLES, Feeds, Samples, synthetic, user_samples
from bnfold.verify.interface import require_same_interface
from bnfold.verify.judge import Verdict, judge_outputs
from bnfold.verify.measure import judge_output
from bnfold.verify.models import LoadedModel, load_model, rounding_unit, same_graph
from bnfold.verify.oracle import Oracle
from bnfold.verify.probe import all_constant, deepest_varying, probed
from bnfold.verify.result import CheckResult, OutputResult, TierResult
from bnfold.verify.runner import OrtRunner, full_name
from bnfold.verify.weights import judge_weights

__all__ = ["CheckResult", "OutputResult", "TierResult", "Verdict", "check"]

# Told what is being done, and the fraction of it that is over.
Progress = Callable[[str, float | None], None]
Outputs = dict[str, Any]

# Samples on which the unfolded model runs twice, to see how far two runs lie apart.
JITTER_SAMPLES = 2


def check(
    reference: Any,
    candidate: Any,
    *,
    providers: Sequence[str] = ("cpu",),
    inputs: Any = None,
    samples: int = SAMPLES,
    seed: int = 0,
    expected_weights: Mapping[str, NDArray[Any]] | None = None,
    same_names: bool = False,
    on_progress: Progress | None = None,
) -> CheckResult:
    """Checks that a folded model says what the unfolded one says.

    Args:
        reference: The unfolded model: a path, an ``onnx.ModelProto`` or an ``onnx_ir.Model``.
        candidate: The folded one, likewise.
        providers: Execution providers to run both on, by short or full name.
        inputs: The user's own inputs (see ``inputs.user_samples``); synthetic ones where None.
        samples: How many synthetic samples.
        seed: Their seed.
        expected_weights: What the fold should have stored, by tensor name; adds tier A.
        same_names: A tensor of one name holds one value in both, as in what bnfold folds: then a
            tensor inside is judged where the outputs are the same for every sample.
        on_progress: Told of each step.

    Returns:
        The verdict of each tier. What could not be computed is inconclusive, never a pass.

    Raises:
        UsageError: The two models' interfaces differ, or the inputs are not the model's.
        ProviderError: ONNX Runtime or a provider is missing.
        ModelError: A model can't be read, or ONNX Runtime refuses it.
    """
    if not providers:
        raise UsageError("no execution provider was named", todo="name one, as providers=('cpu',)")
    names = tuple(dict.fromkeys(full_name(provider) for provider in providers))
    unfolded, folded = load_model(reference, "<reference>"), load_model(candidate, "<candidate>")
    require_same_interface(unfolded, folded)
    drawn = (
        synthetic(unfolded.proto, samples, seed)
        if inputs is None
        else user_samples(unfolded.proto, inputs)
    )
    tiers = []
    warnings: tuple[str, ...] = ()
    if expected_weights is not None:
        tier, warnings = _tier_a(expected_weights, folded)
        tiers.append(tier)
    progress = on_progress or _silent
    tiers.extend(_tier_c(unfolded, folded, names, drawn, progress, same_names=same_names))
    return CheckResult(
        unfolded.name, folded.name, tuple(tiers), len(drawn.feeds), drawn.seed, warnings
    )


def _silent(stage: str, fraction: float | None) -> None:
    """Tell nobody."""


def _tier_a(
    expected: Mapping[str, NDArray[Any]], folded: LoadedModel
) -> tuple[TierResult, tuple[str, ...]]:
    said = judge_weights(expected, folded.weights(expected))
    return TierResult("A", "", said.verdict, said.message), said.notes


def _tier_c(
    unfolded: LoadedModel,
    folded: LoadedModel,
    providers: Sequence[str],
    drawn: Samples,
    progress: Progress,
    *,
    same_names: bool,
) -> Iterator[TierResult]:
    doubt = _empty_proof(unfolded, folded, drawn)
    if doubt:
        yield from (TierResult("C", name, Verdict.INCONCLUSIVE, doubt) for name in providers)
        return
    # Before the oracle, which is what takes the time: a provider may be missing.
    runs = [_Runs.of(unfolded, folded, name, drawn.feeds, progress) for name in providers]
    try:
        oracle = _oracle_outputs(unfolded.proto, drawn.feeds, progress)
    except InconclusiveError as error:
        yield from (_undecided(run.provider, error) for run in runs)
        return
    # The reference's alone: a candidate that stores narrower weights has to answer for it.
    unit = rounding_unit(unfolded.proto)
    if same_names and len(drawn.feeds) > 1 and all_constant(oracle, unit):
        name = deepest_varying(unfolded, folded, drawn.feeds)
        if name is not None:
            inside = (probed(unfolded, name), probed(folded, name))
            for tier in _tier_c(*inside, providers, drawn, progress, same_names=False):
                said = f"the outputs are the same for every sample; inside, {tier.message}"
                yield replace(tier, message=said)
            return
    yield from (_judge(run, oracle, unit) for run in runs)


def _empty_proof(unfolded: LoadedModel, folded: LoadedModel, drawn: Samples) -> str:
    """Why running the models would prove nothing; empty where it would."""
    if same_graph(unfolded.proto, folded.proto):
        return "the two files are the same graph, so that they agree proves nothing"
    if drawn.distinct < 2:
        return "fewer than two distinct samples, so that an output that never changes would pass"
    return ""


@dataclass(frozen=True, slots=True)
class _Runs:
    """Both models' outputs per sample on one provider, or the error that kept them away."""

    provider: str
    unfolded: Sequence[Outputs]
    again: Sequence[Outputs]
    folded: Sequence[Outputs]
    error: BnfoldError | None = None

    @classmethod
    def of(
        cls,
        unfolded: LoadedModel,
        folded: LoadedModel,
        provider: str,
        feeds: Sequence[Feeds],
        progress: Progress,
    ) -> _Runs:
        total = 2 * len(feeds) + JITTER_SAMPLES
        step = iter(range(1, total + 1))

        def run(runner: OrtRunner, feed: Feeds) -> Outputs:
            outputs = runner.run(feed)
            progress(f"running on {provider}", next(step) / total)
            return outputs

        try:
            # One session at a time: each holds the model's weights.
            runner = OrtRunner(unfolded.session_source, provider)
            before = [run(runner, feed) for feed in feeds]
            again = [run(runner, feed) for feed in feeds[:JITTER_SAMPLES]]
            runner = OrtRunner(folded.session_source, provider)
            return cls(provider, before, again, [run(runner, feed) for feed in feeds])
        except InconclusiveError as error:
            return cls(provider, (), (), (), error)


def _oracle_outputs(
    model: onnx.ModelProto, feeds: Sequence[Feeds], progress: Progress
) -> list[Outputs]:
    oracle = Oracle(model)
    outputs = []
    for done, feed in enumerate(feeds, start=1):
        outputs.append(dict(oracle.run(feed)))
        progress("computing the float64 oracle", done / len(feeds))
    return outputs


def _undecided(provider: str, error: BnfoldError) -> TierResult:
    return TierResult("C", provider, Verdict.INCONCLUSIVE, str(error))


def _judge(runs: _Runs, oracle: Sequence[Outputs], unit: float) -> TierResult:
    if runs.error is not None:
        return _undecided(runs.provider, runs.error)
    verdicts = [
        judge_output(
            name,
            [outputs[name] for outputs in oracle],
            [outputs[name] for outputs in runs.unfolded],
            [outputs[name] for outputs in runs.folded],
            unit=unit,
            jitter=_jitter(name, runs, oracle),
        )
        for name in oracle[0]
    ]
    speaker = judge_outputs(verdicts)
    return TierResult(
        "C", runs.provider, speaker.verdict, speaker.message,
        tuple(OutputResult(v.output, v.verdict, v.message, v.figures) for v in verdicts),
    )  # fmt: skip


def _jitter(name: str, runs: _Runs, oracle: Sequence[Outputs]) -> float:
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
