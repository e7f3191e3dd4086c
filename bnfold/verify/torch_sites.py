"""Tier B of torch models: every operator of the candidate on real activations, in float64.

The reference runs in float64 and keeps what its operators compute. Then the candidate runs with its
stored weights, and what each of its operators computes is held against the nearest value that the
reference computed. They may differ by what rounding the operator's own constants explains
(`bnfold.verify.bounds`): once (k = 1) for what bnfold made, by four roundings of the weights and of
the constants that they are made of (k = 4) for other tools, which fold in the stored type. Then the
reference's value is put in its place, so that errors do not travel.

A value that agrees with none may be wrong, or stored in other units. It is left as it is, and from
there on the run carries two twins of every tensor, computed with constants that are off by so many
roundings at random: what these differ by is what rounding explains, up to the next value that
agrees, or to the outputs. Where an output is off by more, the site where the disagreement began is
guilty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bnfold.errors import InconclusiveError
from bnfold.verify.bounds import ROUNDINGS
from bnfold.verify.judge import Verdict
from bnfold.verify.result import SiteResult, TierResult
from bnfold.verify.subject import Feeds
from bnfold.verify.torch_calling import results_in
from bnfold.verify.torch_compare import NEAR, SURE, distance, drift_of
from bnfold.verify.torch_copies import Replica
from bnfold.verify.torch_follow import Doubt, Follower, Rounding
from bnfold.verify.torch_operations import WEIGHTED
from bnfold.verify.torch_steps import Walk
from bnfold.verify.torch_subject import TorchSubject, rounding_unit
from bnfold.verify.torch_tape import Tape
from bnfold.verify.torch_weights_expected import equal, state_of

ROUNDED_ONCE = 1.0
# Of narrower types a unit of a channel may pass for a rounding, and be put right where it is not.
NARROW = 2.0**-20
# An output that depends on no input may be rounded, too.
CONSTANT = 2.0**-20


@dataclass(frozen=True, slots=True)
class TorchSites:
    """Tier B, and what it could not look at.

    Attributes:
        tier: Its result.
        unpaired: Sites whose values agree with none of the reference's, though the outputs do.
        guilty: The first site that is wrong; empty where none is.
    """

    tier: TierResult
    unpaired: tuple[str, ...] = ()
    guilty: str = ""


def torch_sites(
    reference: TorchSubject,
    candidate: TorchSubject,
    feeds: Sequence[Feeds],
    *,
    ours: bool = False,
) -> TorchSites:
    """Holds every operator of the candidate against the reference, in float64.

    Args:
        reference: The unfolded model.
        candidate: The folded one.
        feeds: Samples; each takes as long as about five runs in float64.
        ours: Whether bnfold made the candidate, so that its weights are rounded once.
    """
    if not feeds:
        return _inconclusive("there are no samples")
    try:
        rounding = _rounding(reference, candidate, ROUNDED_ONCE if ours else ROUNDINGS)
        pair = _Pair(reference, candidate, rounding)
        return _merged([pair.run(feed) for feed in feeds])
    except InconclusiveError as error:
        return _inconclusive(str(error))


def _inconclusive(message: str) -> TorchSites:
    return TorchSites(TierResult("B", "", Verdict.INCONCLUSIVE, message))


def _rounding(reference: TorchSubject, candidate: TorchSubject, steps: float) -> Rounding:
    before, after = state_of(reference.model), state_of(candidate.model)
    same = {name for name, array in after.items() if name in before and equal(array, before[name])}
    units = {name: rounding_unit(array.dtype) or 0.0 for name, array in after.items()}
    return Rounding(
        lambda name: units.get(name, candidate.unit), lambda name: name not in same, steps
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """One sample: sites that agree, sites that do not, and how an output is off."""

    sites: Mapping[str, SiteResult]
    lost: Mapping[str, SiteResult]
    guilty: str = ""
    said: str = ""


class _Pair:
    """Both models in float64, to be run side by side."""

    def __init__(
        self, reference: TorchSubject, candidate: TorchSubject, rounding: Rounding
    ) -> None:
        self._reference, self._candidate, self._rounding = reference, candidate, rounding
        self._before, self._after = reference.replica, candidate.replica

    def run(self, feed: Feeds) -> _Found:
        tape, right = self._taped(feed)
        follower, made = self._followed(feed, tape)
        fault = _fault(follower, right, made)
        is_narrow = self._candidate.unit > NARROW
        if fault is not None and is_narrow:
            alone, again = self._followed(feed, None)
            if _fault(alone, right, again) is None:
                fault = None
        if fault is None and not is_narrow:
            fault = self._single_fault(feed, tape, follower)
        sites = follower.sites
        if is_narrow or follower.lost:
            # What is a little off might pass for rounding there, or for other units.
            sites = {name: replace(site, caught=None) for name, site in sites.items()}
        return _Found(sites, follower.lost, *(fault or ()))

    def _single_fault(self, feed: Feeds, tape: Tape, follower: Follower) -> tuple[str, str] | None:
        """The one site that is wrong though the outputs do not show it; None if there is none.

        What is near, but farther off than rounding explains, may be in units that are nearly 1.
        Then another site has the inverse of these, and is off as well where the value is put right.
        """
        if not any(r.ratio > SURE and r.error < NEAR for r in follower.lost.values()):
            return None
        trusting, _ = self._followed(feed, tape, trusting=True)
        if trusting.lost or len(trusting.near) != 1:
            return None
        (found,) = trusting.near.values()
        said = (f"its values are off by {found.error:.2g} in float64, where rounding the weights"
                f" explains {found.bound:.2g}")  # fmt: skip
        follower.lost.setdefault(found.site, found)
        return found.site, said

    def _taped(self, feed: Feeds) -> tuple[Tape, list[Any]]:
        args, kwargs = self._reference.wide_arguments(feed)
        tape = Tape(self._before.module, tree_leaves((args, kwargs)))
        return tape, _ran(tape, self._before, args, kwargs)

    def _followed(
        self, feed: Feeds, tape: Tape | None, *, trusting: bool = False
    ) -> tuple[Follower, list[Any]]:
        args, kwargs = self._candidate.wide_arguments(self._renamed(feed))
        inputs = tree_leaves((args, kwargs))
        follower = Follower(self._after.module, inputs, tape, self._rounding, trusting=trusting)
        return follower, _ran(follower, self._after, args, kwargs)

    def _renamed(self, feed: Feeds) -> Feeds:
        """By the candidate's names: the same ones, or in order."""
        before, after = ([s.name for s in m.inputs] for m in (self._reference, self._candidate))
        if set(before) == set(after):
            return feed
        return {mine: feed[theirs] for mine, theirs in zip(after, before, strict=True)}


def _ran(walk: Walk, replica: Replica, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    with walk.names(), walk:
        return list(results_in(replica.run(args, kwargs)))


def _fault(follower: Follower, right: Sequence[Any], made: Sequence[Any]) -> tuple[str, str] | None:
    """The guilty site, and how an output is off; None where rounding explains everything."""
    if len(right) != len(made):
        return "", f"it returns {len(made)} values, not {len(right)}"
    for i, (wanted, found) in enumerate(zip(right, made, strict=True)):
        if not (_is_float(wanted) and _is_float(found)):
            continue
        if wanted.shape != found.shape:
            return follower.site_of(found), f"output{i} has shape {list(found.shape)}"
        doubt = follower.doubt(found) or Doubt(())
        floor = drift_of(found, doubt.twins)
        apart = distance(found, wanted)
        if apart > floor and (apart > CONSTANT * float(wanted.norm()) or follower.varies(found)):
            size = float(wanted.norm()) or 1.0
            begun = next((name for name in doubt.origins), follower.site_of(found))
            said = (f"output{i} is off by {apart / size:.2g} in float64, where rounding the"
                    f" weights explains {floor / size:.2g}")  # fmt: skip
            return begun, said
    return None


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.float64 and value.numel() > 0


# ---- results ----


def _merged(found: Sequence[_Found]) -> TorchSites:
    """What all samples say together: of each site the worst."""
    sites: dict[str, SiteResult] = {}
    lost: dict[str, SiteResult] = {}
    for sample in found:
        for kept, more in ((sites, sample.sites), (lost, sample.lost)):
            for name, result in more.items():
                if name not in kept or kept[name].ratio < result.ratio:
                    kept[name] = result
    wrong = next((sample for sample in found if sample.said), None)
    if wrong is not None:
        return _failed(sites, lost, wrong)
    results = tuple(sites.values())
    if not results and not lost:
        return _inconclusive("no weight of the candidate differs from the reference's")
    uncovered = any(r.caught is None and r.op_type in WEIGHTED for r in results)
    known = [r.caught for r in results if r.caught is not None]
    caught = None if uncovered else max(known, default=None)
    unpaired = tuple(name for name in lost if name not in sites)
    said = f"{len(results)} sites agree with the reference"
    if unpaired:
        said += f"; {len(unpaired)} hold values in other units, and the outputs agree"
    return TorchSites(
        TierResult("B", "", Verdict.PASS, said, sites=results, caught=caught), unpaired
    )


def _failed(
    sites: Mapping[str, SiteResult], lost: Mapping[str, SiteResult], wrong: _Found
) -> TorchSites:
    guilty = wrong.guilty
    known = lost.get(guilty) or sites.get(guilty)
    kept = [result for name, result in sites.items() if name != guilty]
    if known is not None:
        kept.append(replace(known, verdict=Verdict.FAIL))
    where = f"site '{guilty}' is wrong: " if guilty else ""
    tier = TierResult("B", "", Verdict.FAIL, f"{where}{wrong.said}", sites=tuple(kept))
    return TorchSites(tier, tuple(name for name in lost if name not in sites), guilty)
