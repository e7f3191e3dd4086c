"""Tier A of torch models: the stored weights are those that bnfold stores.

Only what bnfold made is held against it bit for bit: another tool may round otherwise and be right.
Which of them made the candidate is told from the candidate itself. Folding the reference again must
give the same tensors, by name, type and shape, and nearly all numbers that it changes must be there
to the last bit, which a tool that computes in the stored type gets right for about half of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.modules.conv import _ConvTransposeNd

from bnfold.errors import BnfoldError
from bnfold.folding import LEFTOVERS, Options
from bnfold.torch_api import fold_torch, given
from bnfold.torch_arrays import as_array
from bnfold.verify.judge import Verdict
from bnfold.verify.result import TierResult, WeightRange
from bnfold.verify.torch_subject import kind_of
from bnfold.verify.weights import judge_weights

Arrays = Mapping[str, NDArray[Any]]

LEVELS = ("max", "local")
# The share of changed numbers that have to be bnfold's own to the last bit.
OURS = 0.8
MOST_CHANNELS = 256


@dataclass(frozen=True, slots=True)
class TorchExpected:
    """Tier A, if there is one.

    Attributes:
        tier: Its result; None where the candidate is not bnfold's.
        message: Why there is none.
        notes: What is fragile about the weights.
        ours: Whether bnfold made the candidate.
    """

    tier: TierResult | None
    message: str = ""
    notes: tuple[str, ...] = ()
    ours: bool = False


def torch_expected(
    reference: Any,
    candidate: Any,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> TorchExpected:
    """Holds the candidate's weights against those that bnfold would have stored.

    Args:
        reference: The unfolded module or program.
        candidate: The folded one.
        example_inputs: Of a module, as for `bnfold.fold`.
        example_kwargs: Likewise.
    """
    if kind_of(reference) != kind_of(candidate):
        met = f"a {kind_of(candidate)} made of a {kind_of(reference)}"
        return TorchExpected(None, f"{met} is not what bnfold returns: its weights are not known")
    found, before = state_of(candidate), state_of(reference)
    message = "folding the reference does not give the candidate's tensors: another tool made it"
    for folded in _folds(reference, found, example_inputs, example_kwargs):
        if not _same_tensors(folded, found):
            continue
        changed = {n: a for n, a in folded.items() if n not in before or not equal(a, before[n])}
        if not changed:
            message = "folding the reference changes no weight"
            continue
        share = _agreement(changed, found)
        if share < OURS:
            message = (f"only {100 * share:.0f} % of the folded weights are as bnfold rounds them: "
                       "another tool made it")  # fmt: skip
            continue
        said = judge_weights(changed, found)
        if said.verdict is Verdict.FAIL and _only_rounded(changed, found):
            message = ("the folded weights are within one rounding of bnfold's, but not the same: "
                       "another tool made it")  # fmt: skip
            continue
        tier = TierResult("A", "", said.verdict, said.message)
        return TorchExpected(tier, "", said.notes, ours=True)
    return TorchExpected(None, message)


def _folds(
    model: Any, found: Arrays, example_inputs: Any, example_kwargs: Mapping[str, Any] | None
) -> Iterator[Arrays]:
    """The weights of everything that `bnfold.fold` makes of a model, to have those that are found.

    Other forms of what stays are tried where the candidate lacks tensors that it stays with.
    """
    of_program = isinstance(model, ExportedProgram)
    calls = [(None, None)] if of_program else [(example_inputs, example_kwargs), (None, None)]
    for args, kwargs in calls:
        for level, leftover in product(LEVELS, LEFTOVERS):
            if leftover == "keep":
                missing = False
            elif not missing:
                continue
            try:
                options = Options.of(level, False, False, leftover)
                made, _ = fold_torch(model, given(args, kwargs, None), options, inplace=False)
            except BnfoldError:
                continue
            folded = state_of(made)
            missing = missing or not folded.keys() <= found.keys()
            yield folded


def state_of(model: Any) -> dict[str, NDArray[Any]]:
    """Every floating tensor that a model holds, by name."""
    return {name: as_array(t) for name, t in named_tensors(model) if t.is_floating_point()}


def named_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, under all of its names, and a program's constants."""
    if isinstance(model, ExportedProgram):
        yield from model.state_dict.items()
        constants = model.constants.items()
        yield from ((name, value) for name, value in constants if isinstance(value, Tensor))
    else:
        yield from model.named_parameters(remove_duplicate=False)
        yield from model.named_buffers(remove_duplicate=False)


def _same_tensors(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].shape == other[name].shape
        for name in one
    )


def _agreement(expected: Arrays, found: Arrays) -> float:
    """The share of numbers that are the same to the last bit."""
    same = sum(int((_bits(array) == _bits(found[name])).sum()) for name, array in expected.items())
    return same / max(sum(array.size for array in expected.values()), 1)


def _only_rounded(expected: Arrays, found: Arrays) -> bool:
    """Whether all numbers are next to each other, as of a tool that rounds twice."""
    return all(
        bool((np.abs(_wide(found[name]) - _wide(array)) <= _spacing(array)).all())
        for name, array in expected.items()
    )


def _wide(array: NDArray[Any]) -> NDArray[np.float64]:
    return array.astype(np.float64)


def _spacing(array: NDArray[Any]) -> NDArray[np.float64]:
    """Of the numbers around each number of an array."""
    info = ml_dtypes.finfo(array.dtype)  # type: ignore[no-untyped-call]
    return float(info.eps) * np.maximum(np.abs(_wide(array)), float(info.smallest_normal))


def equal(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two arrays are the same, bit for bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool((_bits(one) == _bits(other)).all())


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


# ---- ranges ----


def torch_weight_ranges(reference: Any, candidate: Any) -> tuple[WeightRange, ...]:
    """How large each output channel is, of all weights that changed.

    Args:
        reference: The unfolded module or program.
        candidate: The folded one.
    """
    before, after = state_of(reference), state_of(candidate)
    transposed = set(_transposed(candidate))
    changed = [
        (name, int(name in transposed))
        for name, array in after.items()
        if array.ndim > 1 and not (name in before and equal(array, before[name]))
    ]
    return tuple(
        WeightRange(name, _peaks(before.get(name), axis), _peaks(after[name], axis))
        for name, axis in changed
    )


def _transposed(model: Any) -> Iterator[str]:
    """Names of weights whose output channels lie on axis 1."""
    if isinstance(model, nn.Module):
        for path, module in model.named_modules():
            if isinstance(module, _ConvTransposeNd):
                yield f"{path}.weight".removeprefix(".")
    elif isinstance(model, ExportedProgram):
        by_node = {s.arg.name: s.target for s in model.graph_signature.input_specs if s.target}
        for node in model.graph.nodes:
            if "conv_transpose" in str(node.target) and isinstance(node.args[1], fx.Node):
                yield by_node.get(node.args[1].name, "")


def _peaks(array: NDArray[Any] | None, axis: int) -> tuple[float, ...]:
    if array is None or array.ndim < 2 or not array.size:
        return ()
    sizes = np.abs(array.astype(np.float64))
    peaks = np.moveaxis(sizes, axis, 0).reshape(sizes.shape[axis], -1).max(axis=1)
    parts = np.array_split(peaks, min(MOST_CHANNELS, len(peaks)))
    return tuple(float(part.max()) for part in parts)
