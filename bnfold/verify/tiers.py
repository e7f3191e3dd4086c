"""Tiers A and B of a pair, by framework: what needs no provider."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bnfold.errors import BnfoldError, InconclusiveError
from bnfold.folding import FoldRefusedError
from bnfold.onnx_read import from_proto, read_model
from bnfold.onnx_shapes import infer_shapes
from bnfold.verify.ends import Pair, Progress
from bnfold.verify.expected import Expected
from bnfold.verify.interface import Interface
from bnfold.verify.judge import Verdict
from bnfold.verify.models import LoadedModel
from bnfold.verify.onnx_expected import recognised
from bnfold.verify.onnx_sites import judge_sites
from bnfold.verify.onnx_subject import OnnxSubject
from bnfold.verify.probe import all_constant, deepest_varying, probed
from bnfold.verify.ranges import weight_ranges
from bnfold.verify.result import TierResult, WeightRange
from bnfold.verify.samples import Samples
from bnfold.verify.subject import Outputs
from bnfold.verify.weights import WeightVerdict, judge_weights

NOT_OURS = (
    "tier A is left out: the candidate has not the form of what bnfold makes of the reference"
)
MIXED = "tiers A and B are left out: they pair models of one framework"


@dataclass(frozen=True, slots=True)
class Found:
    """What the tiers without a provider say.

    Attributes:
        tiers: Tiers A and B, as far as there are any.
        warnings: What is worth knowing, such as why a tier is left out.
        unpaired: Tensors of the candidate with no partner in the reference.
        weights: Weights whose channels changed.
        outputs: The reference's outputs on the first sample, where they were computed.
        expected: What bnfold makes of the reference, if that is what the candidate is.
    """

    tiers: tuple[TierResult, ...] = ()
    warnings: tuple[str, ...] = ()
    unpaired: tuple[str, ...] = ()
    weights: tuple[WeightRange, ...] = ()
    outputs: Outputs | None = None
    expected: Expected | None = None


def site_tiers(
    pair: Pair, samples: Samples, tiers: str, expected: Expected | None, progress: Progress
) -> Found:
    """Tiers A and B, as far as they are asked for and can be had.

    Args:
        pair: The two models.
        samples: Tier B takes the first.
        tiers: The letters of the tiers that are wanted.
        expected: What folding the reference gives, where the caller knows.
        progress: Told how far it is.
    """
    if not set("AB") & set(tiers):
        return Found(expected=expected)
    one, other = pair.reference, pair.candidate
    if isinstance(one, OnnxSubject) and isinstance(other, OnnxSubject):
        return _onnx(one, other, samples, tiers, expected, progress)
    if isinstance(one, OnnxSubject) or isinstance(other, OnnxSubject):
        return Found(warnings=(MIXED,))
    return _torch(one, other, samples, tiers, progress)


# ---- ONNX ----


def _onnx(
    one: OnnxSubject, other: OnnxSubject, samples: Samples, tiers: str,
    expected: Expected | None, progress: Progress,
) -> Found:  # fmt: skip
    warnings: list[str] = []
    found: list[TierResult] = []
    if expected is None:
        progress("folding the reference again", None)
        expected = recognised(lambda: _read(one.model), other.model.proto)
    if "A" in tiers:
        said = None if expected is None else _stored(expected, other.model)
        if said is None:
            warnings.append(NOT_OURS)
            expected = None
        else:
            if said.compared or tiers == "A":  # steps that change nothing go into no weight
                found.append(TierResult("A", "", said.verdict, said.message))
            warnings.extend(said.notes)
    unpaired: tuple[str, ...] = ()
    outputs: Outputs | None = None
    if "B" in tiers:
        try:
            sites = judge_sites(
                one.model, other.model, samples.feeds[0], unit=one.unit, expected=expected,
                oracle=one.lifted, on_step=lambda part: progress("looking at every site", part),
            )  # fmt: skip
        except InconclusiveError as error:
            if expected is not None or tiers in ("B", "AB"):
                found.append(TierResult("B", "", Verdict.INCONCLUSIVE, str(error)))
            else:
                warnings.append(f"tier B is left out: {error}")
        else:
            unpaired, outputs = sites.unpaired, sites.outputs
            nothing = sites.tier.verdict is Verdict.INCONCLUSIVE
            if nothing and expected is None and tiers not in ("B", "AB"):
                warnings.append(f"tier B is left out: {sites.tier.message}")
            else:
                found.append(sites.tier)
    ranges = weight_ranges(one.model.proto, other.model.proto)
    return Found(tuple(found), tuple(warnings), unpaired, ranges, outputs, expected)


def _stored(expected: Expected, candidate: LoadedModel) -> WeightVerdict | None:
    """Tier A; None where bnfold would not have made such a fold, since it leaves the range."""
    try:
        weights = expected.weights()
    except FoldRefusedError:
        return None
    return judge_weights(weights, candidate.weights(weights))


def _read(model: LoadedModel) -> tuple[Any, Any]:
    if model.path is not None:
        file = read_model(model.path)
        return file.model, file.shapes
    graph = from_proto(model.proto, model.name)
    return graph, infer_shapes(graph)


# ---- torch ----


def _torch(one: Any, other: Any, samples: Samples, tiers: str, progress: Progress) -> Found:
    from bnfold.verify.torch_sites import torch_sites
    from bnfold.verify.torch_weights_expected import torch_expected, torch_weight_ranges

    warnings: list[str] = []
    found: list[TierResult] = []
    progress("folding the reference again", None)
    expected = torch_expected(one.model, other.model, example_inputs=one.example_inputs,
                              example_kwargs=one.example_kwargs)  # fmt: skip
    if "A" in tiers:
        warnings.extend(expected.notes)
        if expected.tier is None:
            warnings.append(f"tier A is left out: {expected.message}")
        else:
            found.append(expected.tier)
    unpaired: tuple[str, ...] = ()
    if "B" in tiers:
        progress("looking at every site", None)
        try:
            sites = torch_sites(one, other, samples.feeds[:1], ours=expected.ours)
        except BnfoldError as error:
            warnings.append(f"tier B is left out: {error}")
        else:
            found.append(sites.tier)
            unpaired = sites.unpaired
    ranges = torch_weight_ranges(one.model, other.model)
    return Found(tuple(found), tuple(warnings), unpaired, ranges)


# ---- outputs that never change ----


def inside(
    pair: Pair, samples: Samples, oracle: Sequence[Outputs], expected: Expected | None
) -> Pair | None:
    """The same pair with a tensor inside as its output, where the outputs never change.

    Only if bnfold made the candidate, so that a name stands for one value.
    """
    one, other = pair.reference, pair.candidate
    if expected is None or expected.held is None:
        return None
    if len(oracle) < 2 or not all_constant(oracle, one.unit):
        return None
    if not (isinstance(one, OnnxSubject) and isinstance(other, OnnxSubject)):
        return None
    name = deepest_varying(one.model, other.model, samples.feeds)
    if name is None:
        return None
    deeper = OnnxSubject(probed(one.model, name)), OnnxSubject(probed(other.model, name))
    return Pair(*deeper, Interface(pair.interface.inputs, {name: name}))
