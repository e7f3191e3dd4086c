"""The candidate's run: what agrees with the reference is put right, what does not is followed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from bnfold.verify.judge import Verdict
from bnfold.verify.result import SiteResult
from bnfold.verify.torch_compare import NEAR, SURE, by_drift, by_rounding
from bnfold.verify.torch_lift import widened
from bnfold.verify.torch_steps import Arguments, Step, Value, Walk, first_float, written
from bnfold.verify.torch_tape import Tape

# Twins of a value, and by how many roundings their constants are off.
DRAWS, SHAKEN = 2, 2.0
# How many values of the reference are held against one of the candidate's.
CHOICES = 3


@dataclass(frozen=True, slots=True)
class Rounding:
    """How the candidate's constants were rounded.

    Attributes:
        unit: Half an ulp, relative, of a constant by name; of one that is computed for ``""``.
        changed: Whether a constant of that name differs from the reference's.
        steps: How many roundings a folded constant has behind it.
    """

    unit: Callable[[str], float]
    changed: Callable[[str], bool]
    steps: float


@dataclass(frozen=True, slots=True, eq=False)
class Doubt:
    """What is known of a tensor that agrees with none of the reference's.

    Attributes:
        origins: The sites where the disagreement began.
        twins: The same tensor, computed with other roundings.
    """

    origins: tuple[str, ...]
    twins: tuple[Tensor, ...] = ()


class Follower(Walk):  # type: ignore[no-untyped-call]
    """The candidate's run.

    Args:
        module: As for `Walk`.
        inputs: Likewise.
        tape: The reference's run; None to put nothing right.
        rounding: How the constants were rounded.
        trusting: Whether to take it that nothing is in other units, and to put right what is near.

    Attributes:
        sites: Those that agree, by name, the worst of each.
        lost: Those where a disagreement began.
        near: Those that are wrong if nothing is in other units; only where ``trusting``.
    """

    def __init__(
        self, module: nn.Module, inputs: Iterable[Any], tape: Tape | None, rounding: Rounding,
        *, trusting: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(module, inputs)
        self._trusting = trusting
        self._tape, self._rounding = tape, rounding
        self._doubts: Any = WeakTensorKeyDictionary()
        self._made_by: Any = WeakTensorKeyDictionary()
        self._unrounded: Any = WeakTensorKeyDictionary()
        self._again: list[Any] = []
        self._spare: list[Any] = []
        self._generator = torch.Generator().manual_seed(0)
        self.sites: dict[str, SiteResult] = {}
        self.lost: dict[str, SiteResult] = {}
        self.near: dict[str, SiteResult] = {}

    def doubt(self, value: Tensor) -> Doubt | None:
        """What is known of a tensor that agrees with none; None where it does."""
        found: Doubt | None = self._doubts.get(value)
        return found

    def site_of(self, value: Tensor) -> str:
        """The last operator with constants on the way to a tensor."""
        return str(self._made_by.get(value, ""))

    # ---- every operator ----

    def before(self, step: Step, call: Arguments) -> None:
        """Computes the twins, while the operator has not yet written to anything."""
        known = [self._doubts.get(v) for v in _tensors(call)]
        follows = any(doubt is not None and doubt.twins for doubt in known)
        self._again = self._computed_again(step, call) if follows else []
        spoils = step.varies and step.func._schema.is_mutable and self._changes(step)
        self._spare = self._computed_again(step, call) if spoils and not follows else []

    def took(self, step: Step, call: Arguments, result: Any) -> None:
        """Holds the result against the reference's values."""
        if not step.varies:
            self._derived(step, call, result)
            return
        site, origins = self._site(step, call), self._origins(step, call)
        for value in _tensors(result):
            self._made_by[value] = site
        made = first_float(result)
        agreed = False
        if made is not None and step.computes and self._tape is not None:
            agreed = self._agrees(step, made)
            if not agreed and not origins:
                origins = (site,)
        if not agreed and self._changes(step) and not self._again:
            judged = self._tape is None or (made is not None and step.computes)
            self._again = (self._spare or self._computed_again(step, call)) if judged else []
        self._note(result, made if agreed else None, origins)
        self._note_bases(step)

    def _site(self, step: Step, call: Arguments) -> str:
        if step.constants:
            return step.name
        known = [self._made_by[v] for v in _tensors(call) if v in self._made_by]
        return known[-1] if known else step.name

    def _origins(self, step: Step, call: Arguments) -> tuple[str, ...]:
        """Where the disagreements of the arguments began."""
        doubts = [self._doubts.get(v) for v in _tensors(call)]
        names = [name for doubt in doubts if doubt is not None for name in doubt.origins]
        if names and self._changes(step):
            names.append(step.name)
        return tuple(dict.fromkeys(names))

    def _note(self, result: Any, right: Tensor | None, origins: tuple[str, ...]) -> None:
        """Remembers which results are in doubt, and with what twins."""
        twins = list(zip(*(_tensors(twin) for twin in self._again), strict=True))
        for i, value in enumerate(_tensors(result)):
            if value is right or not (origins or twins):
                self._doubts.pop(value, None)
            else:
                self._doubts[value] = Doubt(origins, twins[i] if twins else ())
        self._again = []

    def _note_bases(self, step: Step) -> None:
        """What is written to through a view has other twins there."""
        for view in written(step.func, step.given):
            base, part = view._base, self.doubt(view) or Doubt(())
            known = (self.doubt(base) if base is not None else None) or Doubt(())
            if base is None or not (part.origins or known.origins):
                continue
            twins: tuple[Tensor, ...] = ()
            if known.twins or part.twins:
                wholes, parts = known.twins or (base,) * DRAWS, part.twins or (view,) * DRAWS
                twins = tuple(map(_pasted, wholes, parts, (view,) * DRAWS))
            self._doubts[base] = Doubt(tuple(dict.fromkeys(known.origins + part.origins)), twins)

    # ---- twins ----

    def _changes(self, step: Step) -> bool:
        return any(self._changed(value) for value in step.constants.values())

    def _changed(self, value: Tensor) -> bool:
        return value not in self._unrounded and self._rounding.changed(self.holder(value))

    def _derived(self, step: Step, call: Arguments, result: Any) -> None:
        """What is computed from no changed constant is in the reference just so."""
        targets = written(step.func, step.given)
        if not any(self._changed(v) for v in _tensors(call) if v.is_floating_point()):
            for value in _tensors(result):
                self._unrounded[value] = True
            return
        for value in [*targets, *(v._base for v in targets if v._base is not None)]:
            self._unrounded.pop(value, None)

    def _computed_again(self, step: Step, call: Arguments) -> list[Any]:
        """What an operator makes of other roundings of its constants, and of twins."""
        results = []
        targets = {id(v) for v in written(step.func, step.given)}
        for draw in range(DRAWS):
            known: dict[int, Tensor] = {}

            def twin(value: Any, draw: int = draw, known: dict[int, Tensor] = known) -> Any:
                if not isinstance(value, Tensor):
                    return value
                if id(value) not in known:
                    known[id(value)] = self._twin(value, draw, id(value) in targets)
                return known[id(value)]

            twin_args, twin_kwargs = tree_map(twin, call)
            results.append(widened(step.func(*twin_args, **twin_kwargs)))
        return results

    def _twin(self, value: Tensor, draw: int, is_written: bool) -> Tensor:
        doubt = self.doubt(value)
        if doubt is not None and doubt.twins:
            return doubt.twins[draw]
        if value.is_floating_point() and not self.varies(value) and self._changed(value):
            return self._shaken(value)
        return value.clone() if is_written else value

    def _shaken(self, value: Tensor) -> Tensor:
        size = SHAKEN * math.sqrt(self._rounding.steps) * self._rounding.unit(self.holder(value))
        drawn = torch.rand(value.shape, generator=self._generator, dtype=value.dtype)
        return value * (1 + size * (2 * drawn - 1))

    # ---- comparison ----

    def _agrees(self, step: Step, made: Tensor) -> bool:
        """Whether a value is one of the reference's; it then becomes that."""
        assert self._tape is not None
        near = self._tape.nearest(made, CHOICES)
        untouched = not self._again and not self._changes(step)
        if untouched and any(torch.equal(made, value.value) for value in near[:1]):
            return True  # the same operator on the same numbers
        found = self._found(step, made, near)
        if found is None:
            return False
        made.copy_(found[0].value)
        if not untouched or found[2] is self.near:
            self._worst(found[2], found[1])
        return True

    def _found(
        self, step: Step, made: Tensor, near: Sequence[Value]
    ) -> tuple[Value, SiteResult, dict[str, SiteResult]] | None:
        """The value that ``made`` is, how well it agrees, and where to remember that."""
        if self._again:
            compare = by_drift(step, made, [_tensors(twin)[0] for twin in self._again])
        else:
            steps, unit = self._rounding.steps, self._unit(step)
            compare = by_rounding(step, made, unit, steps, lambda value: not self.varies(value))
        first: SiteResult | None = None
        for value in near:
            result = compare(value)
            if result.ratio <= 1:
                return value, result, self.sites
            if self._trusting and result.ratio > SURE and result.error < NEAR:
                return value, result, self.near
            first = first or result
        nothing = SiteResult(step.name, step.op, step.name, "", Verdict.PASS, math.inf, 0, math.inf)
        self._worst(self.lost, first or nothing)
        return None

    def _worst(self, found: dict[str, SiteResult], result: SiteResult) -> None:
        known = found.get(result.site)
        if known is None or known.ratio < result.ratio:
            found[result.site] = result

    def _unit(self, step: Step) -> float:
        """Of the coarsest constant that changed; 0 where none did."""
        held = [self.holder(v) for v in step.constants.values() if self._changed(v)]
        return max(map(self._rounding.unit, held), default=0.0)


def _pasted(whole: Tensor, part: Tensor, view: Tensor) -> Tensor:
    """A copy of ``whole`` with ``part`` where ``view`` lies in its base."""
    base = view._base
    assert base is not None
    copied = torch.empty_strided(base.shape, base.stride(), dtype=base.dtype).copy_(whole)
    start = view.storage_offset() - base.storage_offset()
    copied.as_strided(view.shape, view.stride(), start).copy_(part)
    return copied


def _tensors(tree: Any) -> list[Tensor]:
    return [value for value in tree_leaves(tree) if isinstance(value, Tensor)]
