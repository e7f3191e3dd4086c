"""Fold, check, and where the check fails take back the fold that is wrong, and keep the rest.

Tiers A and B name the operator whose weights are wrong; where only a provider disagrees, the folds
are bisected: the shortest run of them, in the order of the graph, with which the check fails, ends
with a guilty one. What failed is written down as a reproducer before anything is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from bnfold.folding import FoldRefusedError, Options, refusals
from bnfold.onnx_commit import commit
from bnfold.onnx_model import Planned, plan_model, size_of
from bnfold.onnx_read import ModelFile, read_model
from bnfold.onnx_write import refuse_overwriting, write_model
from bnfold.planning import Kept, Reason
from bnfold.report.model import Report
from bnfold.verify.expected import Expected
from bnfold.verify.judge import Verdict
from bnfold.verify.onnx_expected import expected_fold
from bnfold.verify.result import CheckResult

Progress = Callable[[str, float | None], None]
# (the folded file, what the fold should give, the tiers to judge by, the folder for a reproducer)
Check = Callable[[Path, Expected, str, Path | None], CheckResult]

MOST = 8  # folds are taken back; a model with more wrong ones is not worth folding


@dataclass(frozen=True, slots=True)
class FoldedFile:
    """A file that was folded, and written as ``place``."""

    place: Path
    planned: Planned
    report: Report
    refused: Mapping[int, Kept]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of folding and checking.

    Attributes:
        folded: The last fold, whose file is in its place.
        check: What the check said of it; None where nothing was checked.
        dropped: Steps whose fold was taken back, by name.
        reproducer: The folder with the fold that failed; None where none did.
    """

    folded: FoldedFile
    check: CheckResult | None
    dropped: tuple[str, ...] = ()
    reproducer: Path | None = None


def fold_file(
    source: Path, target: Path, place: Path, options: Options, tell: Progress,
    refused: Mapping[int, Kept] | None = None,
) -> FoldedFile:  # fmt: skip
    """Fold ``source`` for ``target``, writing to ``place``.

    Args:
        source: The file to fold.
        target: The file that it is for, which may not be one that is read.
        place: Where to write.
        options: How to fold.
        tell: Told of each stage.
        refused: Steps that must stay.
    """
    kept = dict(refused or {})
    while True:
        tell("reading", None)
        file = read_model(source)
        refuse_overwriting(file, target)
        planned = plan_model(file.model, file.shapes, options, kept, str(source))
        try:
            commit(planned.described, planned.plan, lazy=True)
            _write(file, place, tell)
        except FoldRefusedError as fault:
            kept.update(refusals(planned.described.graph, planned.plan, fault))
        else:
            report = planned.report(str(source), size_of(file.model))
            return FoldedFile(place, planned, report, kept)


def _write(file: ModelFile, target: Path, tell: Progress) -> None:
    def wrote(done: int, total: int) -> None:
        tell("writing", done / max(total, 1))

    write_model(file.model, target, external=file.external, source=file, on_progress=wrote)


@dataclass(slots=True)
class Checked:
    """Folds ``source`` into ``place`` until the check does not fail.

    Attributes:
        source: The file to fold.
        target: The file that it is for.
        place: Where to write.
        options: How to fold.
        check: Checks a folded file.
        tell: Told of each stage.
        reproducer: Where to write what failed.
        always: Whether to check even if nothing was folded.
    """

    source: Path
    target: Path
    place: Path
    options: Options
    check: Check
    tell: Progress
    reproducer: Path
    always: bool = False
    _dropped: dict[int, Kept] = field(default_factory=dict)

    def run(self) -> Outcome:
        """The last fold, and what the check said of it."""
        folded = self._fold(self._dropped)
        if not folded.report.folded and not self.always:
            return Outcome(folded, None)  # the same graph again: there is nothing to check
        said = self._judge(folded, "ABCD", self.reproducer)
        if said.verdict is not Verdict.FAIL or not folded.report.folded:
            return Outcome(folded, said)
        while said.verdict is Verdict.FAIL and len(self._dropped) < MOST:
            guilty = self._guilty(folded, said)
            if not guilty:
                break
            self._dropped.update(guilty)
            folded = self._fold(self._dropped)
            said = self._judge(folded, "ABCD", None)
        names = tuple(folded.planned.described.graph.operators[i].name for i in self._dropped)
        return Outcome(folded, said, names, self.reproducer)

    def _fold(self, refused: Mapping[int, Kept]) -> FoldedFile:
        return fold_file(self.source, self.target, self.place, self.options, self.tell, refused)

    def _judge(self, folded: FoldedFile, tiers: str, reproducer: Path | None) -> CheckResult:
        file = read_model(self.source)
        expected = expected_fold(file.model, file.shapes, self.options, folded.refused)
        return self.check(folded.place, expected, tiers, reproducer)

    # ---- who it was ----

    def _guilty(self, folded: FoldedFile, said: CheckResult) -> dict[int, Kept]:
        """The steps to take back: those that the named operator absorbed, else by bisection."""
        for name in _named(said, folded.place):
            index = _operator(folded, name)
            if index is not None:
                return self._blamed(folded, index, name)
        step = self._bisected(folded)
        if step is None:
            return {}
        name = folded.planned.described.graph.operators[step].name
        return {step: Kept(step, Reason.ROLLED_BACK, (name,))}

    def _blamed(self, folded: FoldedFile, index: int, name: str) -> dict[int, Kept]:
        fault = FoldRefusedError(index, Reason.ROLLED_BACK, "")
        graph, plan = folded.planned.described.graph, folded.planned.plan
        into = {fold.step for fold in plan.folds if index in fold.into}
        found = {step: Kept(step, Reason.ROLLED_BACK, (name,)) for step in into}
        return found or dict(refusals(graph, plan, fault))

    def _bisected(self, folded: FoldedFile) -> int | None:
        """The last of the shortest run of folds with which the check fails."""
        steps = sorted(fold.step for fold in folded.planned.plan.folds)
        good, bad = 0, len(steps)
        while bad - good > 1:
            middle = (good + bad) // 2
            self.tell("looking for the fold that is wrong", None)
            left_out = {s: Kept(s, Reason.ROLLED_BACK, ("bisection",)) for s in steps[middle:]}
            tried = self._fold({**self._dropped, **left_out})
            fails = bool(tried.report.folded) and (
                self._judge(tried, "CD", None).verdict is Verdict.FAIL
            )
            good, bad = (good, middle) if fails else (middle, bad)
        return steps[bad - 1] if steps else None


def _named(said: CheckResult, candidate: Path) -> Iterator[str]:
    """Operators that tiers A and B call wrong, the surest first."""
    yield from filter(None, (said.guilty,))
    for tier in said.tiers:
        if tier.tier == "A" and tier.verdict is Verdict.FAIL:
            graph = onnx.load(candidate, load_external_data=False).graph
            for node in graph.node:
                if any(f"'{name}'" in tier.message for name in node.input if name):
                    yield node.name or next(iter(node.output), "")


def _operator(folded: FoldedFile, name: str) -> int | None:
    operators = folded.planned.described.graph.operators
    return next((i for i, operator in enumerate(operators) if operator.name == name), None)
