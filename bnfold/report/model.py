"""What bnfold did to a model, as plain data: every affine step with its verdict and reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bnfold.channel_graph import ChannelGraph, Leftover
from bnfold.planning import Fold, How, Kept, Merge, Plan

SCHEMA_VERSION = 1
_NAMED = 4  # operators that a sentence names


@dataclass(frozen=True, slots=True)
class Step:
    """One affine step of the model.

    Attributes:
        name: The step's operator.
        op_type: Its type.
        verdict: Whether it vanished: ``folded`` or ``kept``.
        how: In which way a folded step vanished; empty for one that stays.
        into: The operators that absorbed a folded step.
        code: The stable code of the reason for which a step stays; empty for a folded one.
        reason: The reason in a word.
        witness: The nodes that stand in the way.
        sentence: The verdict in one sentence.
        hint: The smallest change of the model that would free the step.
        form: As what a step that stays is written now; empty where it is what it was.
    """

    name: str
    op_type: str
    verdict: str
    how: str = ""
    into: tuple[str, ...] = ()
    code: str = ""
    reason: str = ""
    witness: tuple[str, ...] = ()
    sentence: str = ""
    hint: str = ""
    form: str = ""


@dataclass(frozen=True, slots=True)
class Joint:
    """Operators that became one linear operator.

    Attributes:
        into: The one that is left.
        op_type: Its type.
        kind: ``parallel``, ``serial`` or ``side by side``.
        operators: Those that are gone, in the order of the graph.
    """

    into: str
    op_type: str
    kind: str
    operators: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """What happened, in one sentence."""
        what = f"what {named(self.operators)} did" if self.operators else "a term more of a sum"
        return f"{self.kind}: does {what}"


@dataclass(frozen=True, slots=True)
class Size:
    """How large a model is, with its subgraphs and functions.

    Attributes:
        operators: How many nodes there are of each operator.
        parameters: How many elements the weights have.
        parameter_bytes: How many bytes they take.
    """

    operators: Mapping[str, int]
    parameters: int
    parameter_bytes: int

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return sum(self.operators.values())


@dataclass(frozen=True, slots=True)
class Report:
    """Every affine step of ``source``, and the model's size before and after.

    Attributes:
        source: The model that was folded.
        level: How far folds may reach.
        steps: Every affine step, in the order of the graph.
        before: How large the model was.
        after: How large it is; None where nothing was changed (`bnfold.explain`).
        notes: What else there is to know, such as parts of a module that could not be captured.
        joints: Operators that became one.
        apart: Linear operators next to each other that could be one but for the reason stated, by
            the last one of them; their verdict is ``apart``.
    """

    source: str
    level: str
    steps: tuple[Step, ...]
    before: Size
    after: Size | None = None
    notes: tuple[str, ...] = ()
    joints: tuple[Joint, ...] = ()
    apart: tuple[Step, ...] = ()

    @property
    def folded(self) -> tuple[Step, ...]:
        """The steps that vanish."""
        return tuple(step for step in self.steps if step.verdict == "folded")

    @property
    def kept(self) -> tuple[Step, ...]:
        """The steps that stay."""
        return tuple(step for step in self.steps if step.verdict == "kept")

    @property
    def changed(self) -> bool:
        """Whether steps vanish or are written in another form, or operators became one."""
        return bool(self.joints) or any(
            step.verdict == "folded" or step.form for step in self.steps
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types, under ``schema_version``."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self),
                "folded": len(self.folded), "kept": len(self.kept)}  # fmt: skip


def steps_of(graph: ChannelGraph, plan: Plan) -> tuple[Step, ...]:
    """The verdicts of ``plan`` in the order of the graph."""
    verdicts: dict[int, Fold | Kept] = {fold.step: fold for fold in plan.folds}
    verdicts.update({kept.step: kept for kept in plan.kept})
    return tuple(_step(graph, verdicts[index], plan.forms.get(index)) for index in sorted(verdicts))


def joints_of(graph: ChannelGraph, plan: Plan) -> tuple[Joint, ...]:
    """The merges of ``plan`` in the order of the graph."""
    return tuple(_joint(graph, merge) for merge in plan.merges)


def _joint(graph: ChannelGraph, merge: Merge) -> Joint:
    into = graph.operators[merge.into]
    gone = sorted({*merge.gone, *_emptied(graph, merge)})
    names = tuple(graph.operators[index].name for index in gone)
    return Joint(into.name, into.op_type, merge.kind.value, names)


def _emptied(graph: ChannelGraph, merge: Merge) -> Iterator[int]:
    """The sums that are left with one operand, and go."""
    for total, gone in merge.left_out.items():
        if len(graph.operators[total].inputs) - len(gone) == 1:
            yield total


def apart_of(graph: ChannelGraph, plan: Plan) -> tuple[Step, ...]:
    """Linear operators that stay apart, in the order of the graph."""
    said = ((graph.operators[kept.step], kept) for kept in plan.apart)
    return tuple(
        replace(kept_step(op.name, op.op_type, kept), verdict="apart") for op, kept in said
    )


def _step(graph: ChannelGraph, verdict: Fold | Kept, form: Leftover | None) -> Step:
    operator = graph.operators[verdict.step]
    if isinstance(verdict, Fold):
        into = tuple(graph.operators[index].name for index in verdict.into)
        return Step(operator.name, operator.op_type, "folded", verdict.how.value, into,
                    sentence=_how(verdict.how, into))  # fmt: skip
    return kept_step(operator.name, operator.op_type, verdict, form)


def kept_step(name: str, op_type: str, kept: Kept, form: Leftover | None = None) -> Step:
    """A step that stays."""
    written = "" if form is None else f"; it becomes {_FORMS[form]}"
    return Step(
        name, op_type, "kept", code=kept.reason.code, reason=kept.reason.slug,
        witness=kept.witness, sentence=kept.sentence + written, hint=kept.hint,
        form="" if form is None else form.value,
    )  # fmt: skip


_FORMS = {
    Leftover.AFFINE: "a multiplication and an addition",
    Leftover.DEPTHWISE: "a depthwise 1x1 convolution",
}


def _how(how: How, into: tuple[str, ...]) -> str:
    names = named(into)
    return {
        How.BACKWARD: f"into {names} before it",
        How.FORWARD: f"into {names} after it",
        How.AROUND: f"into {names} around it",
        How.MERGED: f"merged with {names}",
        How.IDENTITY: "it changed nothing",
        How.EVALUATED: "over constants only: evaluated",
        How.JOINED: f"became one operator with {names}",
    }[how]


def named(names: Sequence[str]) -> str:
    """The first of ``names``, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
