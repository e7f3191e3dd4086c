"""Tier B: every operator of the candidate on real activations, in float64 with its stored weights.

The candidate is walked through operator by operator, and each tensor that holds a value of the
reference is held against it: they may differ by what rounding the operator's constants explains
(`bnfold.verify.bounds`). Then the reference's value is put in its place, so that errors do not
travel: the first site beyond its bound is the guilty one.

In a candidate of unknown origin a tensor may stand for another value than its name says, or be
stored in other units. Such a tensor is left as it is, and what is computed from it is judged in its
turn, with what rounding does on the way (`bnfold.verify.twins`): it is wrong if an output is. What
is nearly the same is the same value gone wrong, if a weight makes it under its own name and half
of its channels are right, or if nothing behind it can have taken other units back
(`bnfold.verify.suspects`). An output of the model stands for what its name says, in its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bnfold.verify.bounds import F64, Operation, channel_axis, fitting, norms
from bnfold.verify.expected import Expected, Held
from bnfold.verify.integer_biases import rounded_bias_steps
from bnfold.verify.judge import Verdict
from bnfold.verify.lockstep import Pairing, Tape, floats, operation, relative
from bnfold.verify.models import LoadedModel
from bnfold.verify.oracle import Oracle, label
from bnfold.verify.result import SiteResult, TierResult
from bnfold.verify.site_match import NEAR, Match, alike, distance, share_agreeing, told_apart
from bnfold.verify.site_noise import Limit, Noise
from bnfold.verify.subject import Feeds
from bnfold.verify.suspects import MOST, Origins, Suspects
from bnfold.verify.twins import Twins

# Beyond so many times its bound a tensor is off by more than its twins, too.
SURE = 4.0


@dataclass(frozen=True, slots=True)
class SiteCheck:
    """Tier B, and what it could not look at.

    Attributes:
        tier: Its result.
        unpaired: Tensors of the candidate with no partner in the reference.
        outputs: The reference's outputs on the sample, in float64.
    """

    tier: TierResult
    unpaired: tuple[str, ...]
    outputs: dict[str, Any]


def judge_sites(
    reference: LoadedModel, candidate: LoadedModel, feeds: Feeds, *, unit: float,
    expected: Expected | None = None, oracle: Oracle | None = None,
    on_step: Callable[[float], None] | None = None,
) -> SiteCheck:  # fmt: skip
    """Judges every site of ``candidate`` on one sample.

    Args:
        reference: The unfolded model.
        candidate: The folded one.
        feeds: One sample.
        unit: Half an ulp, relative, of the type that weights are stored in.
        expected: Which tensor holds what, if bnfold made the candidate.
        oracle: The reference's oracle, where there is one.
        on_step: Told the fraction that is done.

    Raises:
        InconclusiveError: An operator can't be computed in float64.
    """
    held = None if expected is None else expected.held
    pairing = Pairing(reference.proto.graph, candidate.proto.graph, held)
    walk = _Walk(
        oracle or Oracle(reference.proto), Oracle(candidate.proto, keep=False), pairing, feeds,
        unit, planned=held is not None,
    )  # fmt: skip
    total = max(len(candidate.proto.graph.node), 1)
    for done in walk.run():
        if on_step is not None:
            on_step(done / total)
    return walk.result()


class _Walk:
    def __init__(
        self, reference: Oracle, candidate: Oracle, pairing: Pairing, feeds: Feeds, unit: float,
        *, planned: bool,
    ) -> None:  # fmt: skip
        self.reference, self.candidate, self.pairing = reference, candidate, pairing
        self.feeds, self.planned = feeds, planned
        self.tape = Tape(reference, feeds, pairing.wanted() | set(reference.outputs))
        self.noise = Noise(unit, planned, self.tape)
        self.fixed = set(candidate.constants) | {""}
        self.sites: list[SiteResult] = []
        self.unpaired: list[str] = []
        self.suspects = Suspects(self.tape)
        self.twins = Twins(unit, self.fixed)
        self.makers: dict[str, tuple[str, str]] = {}
        self.steps: dict[str, F64] = {}  # of biases that were rounded to integers
        self.uncovered = False  # whether a weight is behind a tensor that is not known by its name
        self.outputs: dict[str, Any] = {}
        self.misfits: dict[str, str] = {}  # what is said of those that have no error

    def run(self) -> Iterator[int]:
        values: dict[str, Any] = {}
        for done, node in enumerate(self.candidate.walk(self.feeds, values)):
            if self.fixed.issuperset(node.input) and not node.need_context():
                self.fixed.update(node.output)
                self.steps.update(rounded_bias_steps(node, values, self.reference.constants))
                for name in set(node.output).intersection(self.reference.outputs):
                    self._frozen(node, name, values)
            else:
                origins = self.suspects.inherited(node, values, self.fixed)
                for name in filter(None, node.output):
                    self._tensor(node, name, values, origins)
            self.twins.tidy(values)
            yield done
        self.tape.finish()

    def _operation(self, node: Any, values: dict[str, Any]) -> Operation:
        done = operation(node, values, self.fixed)
        step = next((self.steps[name] for name in node.input[2:3] if name in self.steps), None)
        return done if step is None else replace(done, bias_step=step)

    # ---- one tensor ----

    def _frozen(self, node: Any, name: str, values: dict[str, Any]) -> None:
        """An output that is constant in the candidate: in the reference it may be none.

        A tool that computed it beforehand did so in its type, with roundings that nobody counts.
        """
        true, value = self.tape.value(name), values[name]
        if name in self.tape.constants or not isinstance(true, np.ndarray):
            return
        error = distance(value, true) if alike(true, value) else np.inf
        if not error <= NEAR:
            self.misfits[name] = f"is a constant, and off by {error:.2g} of its size"
            found = self._wrong(node, values, true, Held(name), name, error)
            self._doubted(node, name, values, {}, found)

    def _tensor(self, node: Any, name: str, values: dict[str, Any], origins: Origins) -> None:
        value = values.get(name)
        options = self.pairing.alternatives(node, name)
        found = self._match(node, name, value, options, values)
        if found is None:
            inner = self.pairing.is_inner(name)
            self.unpaired += [] if inner else [name]
            done = self._operation(node, values)
            self.makers[name] = self._maker(node, done)
            self.uncovered |= done.linear and not self.planned and not inner
            if not self.planned:
                self.twins.keep(node, name, values)
            if self.planned or not origins:
                self.noise.pass_on(node, name, done, value)
            self.suspects.reached(name, origins)
            return
        twin = self.tape.nodes.get(found.held.reference)
        if not self.pairing.does_the_same(node, twin, self.fixed):
            origins = dict.fromkeys(origins, True)
        self.pairing.paired(name, found.held.reference)
        if name in self.reference.outputs:
            self.outputs[name] = self.tape.value(name)
        if found.wrong and not self.planned:
            self._doubted(node, name, values, origins, found)
        else:
            self._agreed(node, name, values, origins, found)
        for spent in self.pairing.settled(option.reference for option in options):
            self.tape.forget(spent)

    def _doubted(
        self, node: Any, name: str, values: dict[str, Any], origins: Origins, found: Match
    ) -> None:
        self._add(found)
        named = found.weighted and self._covered(name, self._operation(node, values))
        self.twins.keep(node, name, values)
        self.suspects.disagrees(
            name, origins, len(self.sites) - 1, agreeing=found.agreeing, error=found.error,
            named=named,
        )  # fmt: skip

    def _add(self, found: Match) -> None:
        if found.site is not None:
            self.sites.append(found.site)
            self.uncovered |= found.weighted and found.site.caught is None

    def _agreed(
        self, node: Any, name: str, values: dict[str, Any], origins: Origins, found: Match
    ) -> None:
        self._add(found)
        if found.site is not None and found.agreeing >= MOST:
            self.suspects.agrees(origins)
        value, true = values[name], found.true
        told = np.isfinite(true) if floats(true) is not None else np.ones(1, bool)
        if not told.all():
            # What is not known of is left as it is, with its rounding.
            self.noise.pass_on(node, name, self._operation(node, values), value, ~told)
        values[name] = true if told.all() else np.where(told, true, value)

    def _match(
        self, node: Any, name: str, value: Any, options: list[Held], values: dict[str, Any]
    ) -> Match | None:
        """The first that agrees, else the one that is nearest; None where none can be compared."""
        best: Match | None = None
        done = self._operation(node, values) if options else None
        for held in options:
            true = self.tape.value(held.reference)
            if not alike(true, value):
                sure = self.planned or name in self.reference.outputs
                if sure and isinstance(true, np.ndarray) and isinstance(value, np.ndarray):
                    return self._wrong(node, values, true, held, name, np.inf)
                continue
            if floats(true) is None or done is None:
                return self._decided(node, values, true, held, name)
            match = self._site(node, values, true, held, done, name)
            if not match.wrong:
                return match
            if best is None or match.error < best.error:
                best = match
        return best

    def _decided(
        self, node: Any, values: dict[str, Any], true: Any, held: Held, name: str
    ) -> Match:
        """What is no float has no units: an output is what it should be, if what it reads is."""
        right = name not in self.reference.outputs or np.array_equal(values[name], true)
        if right or not self.noise.exact(node, self._operation(node, values)):
            return Match(held, true)
        return self._wrong(node, values, true, held, name, np.inf)

    def _wrong(
        self, node: Any, values: dict[str, Any], true: Any, held: Held, name: str, error: float
    ) -> Match:
        """What is off by more than any rounding, or of another shape or type."""
        value = values[name]
        if value.shape != true.shape:
            self.misfits[name] = f"has shape {list(value.shape)}, not {list(true.shape)}"
        elif value.dtype.kind != true.dtype.kind:
            self.misfits[name] = f"is {value.dtype}, not {true.dtype}"
        elif floats(true) is None:
            self.misfits[name] = "is not the reference's"
        maker = self._maker(node, self._operation(node, values))
        site = SiteResult(*maker, name, held.reference, Verdict.FAIL, error, 0.0, np.inf)
        return Match(held, value, site, agreeing=0.0)

    def _site(
        self, node: Any, values: dict[str, Any], true: F64, held: Held, done: Operation, name: str
    ) -> Match:
        value: F64 = values[name]
        blur, true = held.blur(true), held.stored(true)
        followed = self.twins.reach(node)
        if not followed and self.noise.exact(node, done) and np.array_equal(value, true):
            site = SiteResult(*self._maker(node, done), name, held.reference, Verdict.PASS,
                              error=0.0, bound=0.0, ratio=0.0)  # fmt: skip
            return Match(held, true, site, float(value.any()))
        told, clean, apart = told_apart(value, true)
        lost = not bool(np.isfinite(apart).all())
        apart = np.nan_to_num(apart, nan=0.0, posinf=0.0, neginf=0.0) if lost else apart
        axis = channel_axis(done.op_type, value.ndim)
        sizes = norms(clean, axis)
        size = float(np.linalg.norm(sizes))
        limit = self.noise.limit(node, done, told, held.reference, size)
        far = limit.of(norms(apart, axis))
        if blur.any():
            blurred = limit.of(norms(np.broadcast_to(blur, value.shape), axis))
            limit = replace(limit, norms=limit.norms + blurred)
        allowed = limit.norms
        if not self.planned and (followed or (far > allowed).any()):
            allowed = allowed + limit.of(fitting(self.twins.noise(node, name, values), far.size))
        ratios = far / np.maximum(allowed, 1e-200)
        covered = limit.weighted and self._covered(name, done)
        worst = int(np.argmax(ratios))
        ratio = np.inf if lost else float(ratios[worst])
        site = SiteResult(
            *self._maker(node, done), name, held.reference,
            Verdict.PASS if ratio <= 1.0 else Verdict.FAIL,
            error=relative(far, size), bound=relative(allowed, size), ratio=ratio,
            channel=None if axis is None or limit.whole else worst,
            caught=self._caught(far, limit) if covered else None,
        )  # fmt: skip
        return Match(held, true, site, share_agreeing(ratios, limit.of(sizes)), limit.weighted)

    def _covered(self, name: str, done: Operation) -> bool:
        """Whether a small fault of the constants of what makes ``name`` is sure to be flagged."""
        return self.planned or (any(done.constant) and self.pairing.is_known(name))

    def _maker(self, node: Any, done: Operation) -> tuple[str, str]:
        """The operator to name: what has a weight, if ``node`` only passes on what that makes."""
        before = (self.makers[name] for name in node.input if name in self.makers)
        own = label(node), done.op_type
        return own if any(done.constant) else next(before, own)

    def _caught(self, far: F64, limit: Limit) -> float | None:
        """The smallest 2^-k that would be flagged, had the weight a scale of ``1 + 2^-k``."""
        flagged = limit.norms * (1.0 if self.planned else SURE) + far
        least = float((flagged / np.maximum(limit.linear, 1e-300)).min())
        return float(2.0 ** np.ceil(np.log2(least))) if 0 < least < 1 else None

    # ---- all of them ----

    def result(self) -> SiteCheck:
        guilty = self._guilty()
        # What turned out to be another value, or one in other units, is no site.
        sites = tuple(
            site for index, site in enumerate(self.sites)
            if site.verdict is Verdict.PASS or index in guilty
        )  # fmt: skip
        cleared = [self.sites[i].tensor for i in self.suspects.found if i not in guilty]
        outputs = {name: self.tape.value(name) for name in self.reference.outputs} | self.outputs
        return SiteCheck(self._tier(sites), (*self.unpaired, *cleared), outputs)

    def _guilty(self) -> set[int]:
        """Which sites are wrong: the first that is, and for what bnfold made all that are."""
        wrong = [i for i, site in enumerate(self.sites) if site.verdict is Verdict.FAIL]
        if self.planned or not wrong:
            return set(wrong)
        near = [i for i in wrong if self.sites[i].error < NEAR]
        certain = (self.suspects.local | self.suspects.proved).intersection(near)
        if certain:
            return {self.suspects.root(min(certain), near)}
        left = self.suspects.behind(self.candidate.outputs)
        return {min(left & self.suspects.local or left)} if left else set()

    def _tier(self, sites: tuple[SiteResult, ...]) -> TierResult:
        bad = [site for site in sites if site.verdict is Verdict.FAIL]
        weighted = [site.caught for site in sites if site.caught is not None]
        caught = None if self.uncovered else max(weighted, default=None)
        if not sites:
            return TierResult("B", "", Verdict.INCONCLUSIVE, "no tensor could be paired")
        if bad:
            return TierResult("B", "", Verdict.FAIL, self._said(bad), sites=sites, caught=caught)
        said = f"{len(sites)} tensors agree with the reference, "
        said += f"{len(weighted)} of them made by a weight"
        return TierResult("B", "", Verdict.PASS, said, sites=sites, caught=caught)

    def _said(self, bad: list[SiteResult]) -> str:
        first = bad[0]
        where = "" if first.channel is None else f", most on channel {first.channel}"
        off = (
            f"is off by {first.error:.2g} of its size, {first.ratio:.3g} times what rounding "
            f"explains{where}"
        )
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        said = self.misfits.get(first.tensor, off)
        return f"{first.op_type} '{first.site}' is wrong: '{first.tensor}' {said}{more}"
