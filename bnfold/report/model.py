"""What bnfold did to a model, as plain data: every affine step with its verdict and reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bnfold.channel_graph import ChannelGraph, Leftover
from bnfold.planning import Fold, How, Kept, Plan

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
    """

    source: str
    level: str
    steps: tuple[Step, ...]
    before: Size
    after: Size | None = None
    notes: tuple[str, ...] = ()

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
        """Whether any step vanishes or is written in another form."""
        return any(step.verdict == "folded" or step.form for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types, under ``schema_version``."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self),
                "folded": len(self.folded), "kept": len(self.kept)}  # fmt: skip


def steps_of(graph: ChannelGraph, plan: Plan) -> tuple[Step, ...]:
    """The verdicts of ``plan`` in the order of the graph."""
    verdicts: dict[int, Fold | Kept] = {fold.step: fold for fold in plan.folds}
    verdicts.update({kept.step: kept for kept in plan.kept})
    return tuple(_step(graph, verdicts[index], plan.forms.get(index)) for index in sorted(verdicts))


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
    names = ", ".join(into[:_NAMED])
    names += f" and {len(into) - _NAMED} more" if len(into) > _NAMED else ""
    return {
        How.BACKWARD: f"into {names} before it",
        How.FORWARD: f"into {names} after it",
        How.AROUND: f"into {names} around it",
        How.MERGED: f"merged with {names}",
        How.IDENTITY: "it changed nothing",
        How.EVALUATED: "over constants only: evaluated",
    }[how]
