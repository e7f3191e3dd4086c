"""``W -> (1 + 2^-k) W`` for one weight of the candidate, for the largest k that is still flagged.

What tier C would have caught, where there is no tier B to say it: the mutated candidate is run on
the provider and judged as the candidate was. The weight is that of the linear operator in the
middle of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from bnfold.errors import BnfoldError
from bnfold.verify.bounds import LINEAR
from bnfold.verify.ends import Pair, Runs, judge_ends, measure_runs
from bnfold.verify.judge import Gates, Verdict
from bnfold.verify.onnx_subject import OnnxSubject
from bnfold.verify.subject import Feeds, Outputs, RunOptions, Subject

# Between a quarter and what float32 can hold beside one.
LARGEST, SMALLEST = 2, 22


def caught_by_mutation(
    pair: Pair,
    runs: Runs,
    feeds: Sequence[Feeds],
    oracle: Sequence[Outputs],
    options: RunOptions,
    apart: Mapping[str, float] | None = None,
) -> tuple[str, float] | None:
    """The mutated weight, and the smallest ``2^-k`` that tier C flags there.

    Args:
        pair: The two models, whose candidate passes.
        runs: How they ran on the provider, for these samples.
        feeds: The samples, by the reference's input names.
        oracle: What the reference says of them in float64.
        options: How they were run.
        apart: By output, how far two right folds lie apart.

    Returns:
        None where no weight can be mutated, or not even a quarter is flagged.
    """
    mutate = _mutable(pair.candidate)
    if mutate is None:
        return None
    name, mutated = mutate

    def flagged(power: int) -> bool:
        wrong = mutated(1.0 + 2.0**-power)
        runner = wrong.runner(runs.provider, replace(options, profile=False))
        renamed = [pair.interface.to_candidate(feed) for feed in feeds]
        folded = [pair.interface.from_candidate(runner.run(feed)) for feed in renamed]
        measured = measure_runs(replace(runs, folded=folded), oracle, pair.reference.unit, apart)
        said = judge_ends(runs.provider, measured, "C", Gates())
        return any(tier.verdict is Verdict.FAIL for tier in said)

    try:
        power = _last(flagged)
    except BnfoldError:
        return None
    return None if power is None else (name, 2.0**-power)


def _last(flagged: Callable[[int], bool]) -> int | None:
    """The largest power that is flagged, by bisection."""
    if not flagged(LARGEST):
        return None
    good, bad = LARGEST, SMALLEST + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if flagged(middle) else (good, middle)
    return good


# ---- mutants ----


def _mutable(candidate: Subject) -> tuple[str, Callable[[float], Subject]] | None:
    if isinstance(candidate, OnnxSubject):
        return _onnx(candidate)
    from bnfold.verify.torch_mutation import mutable

    return mutable(candidate)


def _onnx(candidate: OnnxSubject) -> tuple[str, Callable[[float], Subject]] | None:
    stored = {tensor.name for tensor in candidate.model.proto.graph.initializer}
    weights = [
        name
        for node in candidate.model.proto.graph.node
        if node.op_type in LINEAR
        for name in node.input[:2]
        if name in stored
    ]
    if not weights:
        return None
    name = weights[len(weights) // 2]

    def mutated(factor: float) -> Subject:
        proto = onnx.ModelProto()
        proto.CopyFrom(candidate.model.proto)
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(scaled(tensor, factor), name))
        return OnnxSubject(replace(candidate.model, proto=proto, path=None))

    return name, mutated


def scaled(tensor: onnx.TensorProto, factor: float) -> Any:
    """A weight times ``factor``, computed in float64 and cast once."""
    weight = numpy_helper.to_array(tensor)
    return (weight.astype(np.float64) * factor).astype(weight.dtype)
