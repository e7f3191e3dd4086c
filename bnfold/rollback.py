"""Fold, check, and where the check fails take back the fold that is wrong, and keep the rest.

Tiers A and B name the operator whose weights are wrong; where only a provider disagrees, the folds
are bisected: the shortest run of them, in the order of the graph, with which the check fails, ends
with a guilty one. What failed is written down as a reproducer before anything is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx

from bnfold.folding import FoldRefusedError, Options, refusals
from bnfold.onnx_commit import commit
from bnfold.onnx_model import Planned, plan_model, size_of
from bnfold.onnx_read import ModelFile, read_model
from bnfold.onnx_write import refuse_overwriting, write_model
from bnfold.planning import Kept, Reason
from bnfold.report.model import Report
from bnfold.verify.ends import Progress
from bnfold.verify.expected import Expected
from bnfold.verify.judge import Gates, Verdict
from bnfold.verify.onnx_expected import expected_fold
from bnfold.verify.rejudge import gated
from bnfold.verify.result import CheckResult

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
        if not self._needs_check(folded):
            return Outcome(folded, None)  # the same graph again
        said = self._judge(folded, "ABCD", self.reproducer)
        if said.verdict is not Verdict.FAIL:
            return Outcome(folded, said)
        if gated(said, Gates()).verdict is not Verdict.FAIL:
            return Outcome(folded, said, (), self.reproducer)  # no fold is wrong: a gate is narrow
        while said.verdict is Verdict.FAIL and len(self._dropped) < MOST:
            guilty = self._guilty(folded, said)
            if not guilty:
                break
            self._dropped.update(guilty)
            folded = self._fold(self._dropped)
            if not self._needs_check(folded):
                break  # every fold was wrong; that the model agrees with itself would say nothing
            said = self._judge(folded, "ABCD", None)
        names = tuple(folded.planned.described.graph.operators[i].name for i in self._dropped)
        return Outcome(folded, said, names, self.reproducer)

    def _needs_check(self, folded: FoldedFile) -> bool:
        return folded.report.changed or self.always

    def _fold(self, refused: Mapping[int, Kept]) -> FoldedFile:
        return fold_file(self.source, self.target, self.place, self.options, self.tell, refused)

    def _judge(self, folded: FoldedFile, tiers: str, reproducer: Path | None) -> CheckResult:
        file = read_model(self.source)
        expected = expected_fold(file.model, file.shapes, self.options, folded.refused)
        return self.check(folded.place, expected, tiers, reproducer)

    # ---- who it was ----

    def _guilty(self, folded: FoldedFile, said: CheckResult) -> dict[int, Kept]:
        """The steps to take back: those that named operators absorbed, else one by bisection.

        A step that stays in another form takes its own form again.
        """
        wrong = _wrong_tensors(said, folded.place)
        absorbed = {index for tensor in wrong for index in _operators_of(folded, tensor)}
        plan, into = folded.planned.plan, _decisions(folded)
        steps = [index for index in plan.forms if index in absorbed]
        steps += [step for step, taken in into.items() if absorbed.intersection(taken)]
        if not steps:
            failing = "".join({tier.tier for tier in said.tiers if tier.verdict is Verdict.FAIL})
            steps = self._bisected(folded, failing)
        return {step: _taken_back(folded, step) for step in steps}

    def _bisected(self, folded: FoldedFile, tiers: str) -> list[int]:
        """The last of the shortest run of folds with which the check fails."""
        steps = sorted([*folded.planned.plan.forms, *_decisions(folded)])
        good, bad = 0, len(steps)
        while bad - good > 1:
            middle = (good + bad) // 2
            self.tell("looking for the fold that is wrong", None)
            left_out = {step: _taken_back(folded, step) for step in steps[middle:]}
            tried = self._fold({**self._dropped, **left_out})
            fails = tried.report.changed and (
                self._judge(tried, tiers, None).verdict is Verdict.FAIL
            )
            good, bad = (good, middle) if fails else (middle, bad)
        return steps[bad - 1 : bad]


def _decisions(folded: FoldedFile) -> dict[int, tuple[int, ...]]:
    """What can be taken back, and what each went into: folds, and merges by their last operator."""
    plan = folded.planned.plan
    found = {fold.step: fold.into for fold in plan.folds if fold.step not in plan.joined}
    for merge in plan.merges:  # several may end in one Concat
        found[merge.root] = (*found.get(merge.root, ()), merge.into)
    return found


def _taken_back(folded: FoldedFile, step: int) -> Kept:
    """The step stays; its witness is what its fold went into."""
    operators, plan = folded.planned.described.graph.operators, folded.planned.plan
    if step in plan.forms:
        return replace(next(k for k in plan.kept if k.step == step), unchanged=True)
    names = tuple(operators[index].name for index in _decisions(folded)[step] or (step,))
    return Kept(step, Reason.ROLLED_BACK, names)


def _wrong_tensors(said: CheckResult, candidate: Path) -> list[str]:
    """What tiers A and B call wrong: tensors that operators of the candidate make."""
    failing = [tier for tier in said.tiers if tier.verdict is Verdict.FAIL]
    wrong = [site.tensor for t in failing for site in t.sites if site.verdict is Verdict.FAIL]
    weights = [tier.message for tier in failing if tier.tier == "A"]
    if not weights:
        return wrong
    nodes = onnx.load(candidate, load_external_data=False).graph.node
    return wrong + [
        tensor for node in nodes for tensor in node.output
        if any(f"'{name}'" in message for name in node.input if name for message in weights)
    ]  # fmt: skip


def _operators_of(folded: FoldedFile, tensor: str) -> list[int]:
    """The operators that are left and make ``tensor``, as the folded file calls it."""
    described, plan = folded.planned.described, folded.planned.plan
    gone = {fold.step for fold in plan.folds} | plan.joined
    merged = {merge.into: (merge.target,) for merge in plan.merges}
    found = []
    for index, operator in enumerate(described.graph.operators):
        site = described.sites[index]
        outputs = merged.get(index, operator.outputs)
        values = (value for value in outputs if value < len(described.values))  # others are new
        made = {described.values[value].name for value in values}
        made |= set() if site is None else {value.name for value in site.node.outputs}
        if tensor in made and index not in gone:
            found.append(index)
    return found
