"""One sample speaks against the folded model: is it the model, or chance?

The error of a runtime on one sample is a single draw, and near an edge (a Relu that flips) draws of
one and the same model lie apart by a factor of ten. So where nothing but the worst sample is beyond
its limit, both models run again on neighbours of that sample, whose numbers are off by a rounding
or two, and the geometric means take the place of the two errors. A fault stays; chance does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfold.verify.ends import Pair, Runs, measure_runs
from bnfold.verify.judge import WORST_LIMIT, Measured, Verdict, judge_errors, ratios_by_sample
from bnfold.verify.subject import Feeds, Outputs, RunOptions

NEIGHBOURS = 7
ROUNDINGS = 2.0


def second_look(
    pair: Pair, runs: Runs, feeds: Sequence[Feeds], measured: Sequence[Measured],
    options: RunOptions,
) -> list[Measured]:  # fmt: skip
    """What was measured, with the errors of samples that stand alone replaced.

    Args:
        pair: The two models.
        runs: How they ran on the provider.
        feeds: The samples, by the reference's input names.
        measured: What was measured on them.
        options: How they were run.

    Raises:
        InconclusiveError: A neighbour can't be computed.
    """
    alone = sorted({index for m in measured for index in _alone(m)})
    if not alone:
        return list(measured)
    options = replace(options, profile=False)
    around = {index: _neighbours(feeds[index], index) for index in alone}
    flat = [feed for index in alone for feed in around[index]]
    compute, before = pair.reference.oracle(), pair.reference.runner(runs.provider, options)
    oracle = [dict(compute(feed)) for feed in flat]
    unfolded = [before.run(feed) for feed in flat]
    del before
    after = pair.candidate.runner(runs.provider, options)
    folded = [_folded(pair, after, feed) for feed in flat]
    again = measure_runs(Runs(runs.provider, unfolded, (), folded), oracle, pair.reference.unit)
    return [_merged(one, two, alone) for one, two in zip(measured, again, strict=True)]


def _folded(pair: Pair, runner: Any, feed: Feeds) -> Outputs:
    renamed: Any = pair.interface.to_candidate(feed)
    return pair.interface.from_candidate(runner.run(renamed))


def _alone(measured: Measured) -> Iterator[int]:
    """Samples beyond the limit of the worst one, where the mean is within its own."""
    if measured.settled is not None or judge_errors(measured).verdict is not Verdict.FAIL:
        return
    for index, ratio in enumerate(ratios_by_sample(measured)):
        if ratio > WORST_LIMIT:
            yield index


def _neighbours(feed: Feeds, index: int) -> list[Feeds]:
    found: list[Feeds] = []
    for draw in range(NEIGHBOURS):
        rng = np.random.default_rng([index, draw])
        found.append({name: _shaken(rng, array) for name, array in feed.items()})
    return found


def _shaken(rng: np.random.Generator, array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind not in "fV":
        return array
    wide = array.astype(np.float64)
    digits = {"float16": 11, "bfloat16": 8, "float64": 53}.get(array.dtype.name, 24)
    shaken = wide * (1 + ROUNDINGS * 2.0**-digits * rng.uniform(-1, 1, wide.shape))
    return np.asarray(shaken).astype(array.dtype)


def _merged(one: Measured, two: Measured, alone: Sequence[int]) -> Measured:
    """The errors of the lone samples as means over their neighbours and themselves."""
    if one.settled is not None or two.settled is not None:
        return one
    errors = []
    for mine, theirs in ((one.e_fold, two.e_fold), (one.e_unfold, two.e_unfold)):
        kept = list(mine)
        for place, index in enumerate(alone):
            near = theirs[place * NEIGHBOURS : (place + 1) * NEIGHBOURS]
            logs = np.log(np.maximum([mine[index], *near], 2.0**-80))
            kept[index] = float(np.exp(logs.mean()))
        errors.append(tuple(kept))
    return replace(one, e_fold=errors[0], e_unfold=errors[1])
