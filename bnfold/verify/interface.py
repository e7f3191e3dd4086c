"""Two models can be compared when they take and return the same tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bnfold.errors import InvalidModelError, UsageError
from bnfold.verify.onnx_subject import OnnxSubject
from bnfold.verify.sizes import is_open
from bnfold.verify.subject import Subject, TensorSpec

T = TypeVar("T")

_TODO = "check a model against the one it was made from"
_SAME_INPUTS = "models can be timed side by side where all take the same inputs"


@dataclass(frozen=True, slots=True)
class Interface:
    """Which input and output of the candidate is which of the reference.

    Attributes:
        inputs: The candidate's names by the reference's, in the reference's order.
        outputs: The same of outputs.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    def to_candidate(self, feeds: Mapping[str, T]) -> dict[str, T]:
        """Inputs by the reference's names, made inputs by the candidate's."""
        return {self.inputs[name]: value for name, value in feeds.items()}

    def from_candidate(self, outputs: Mapping[str, T]) -> dict[str, T]:
        """Outputs by the candidate's names, made outputs by the reference's."""
        return {name: outputs[other] for name, other in self.outputs.items()}


def require_same_interface(reference: Subject, candidate: Subject) -> Interface:
    """Both models take and return tensors of the same types and sizes.

    Two ONNX models are paired by name. Where one of the two is a torch model, names are paired
    where both have the same ones, and otherwise by order.

    Raises:
        UsageError: Names the first input or output that differs.
        InvalidModelError: A model has no outputs.
    """
    for model in (reference, candidate):
        if not model.outputs:
            raise InvalidModelError(
                "the model has no outputs, so there is nothing to compare", file=model.name,
                todo="export it with its outputs",
            )  # fmt: skip
    by_name = isinstance(reference, OnnxSubject) and isinstance(candidate, OnnxSubject)
    sides = (
        ("input", reference.inputs, candidate.inputs),
        ("output", reference.outputs, candidate.outputs),
    )
    if by_name:
        _refuse_renamed(sides, candidate.name)
    inputs, outputs = (_paired(*side, candidate.name, by_name=by_name) for side in sides)
    return Interface(inputs, outputs)


def require_same_inputs(reference: Subject, candidate: Subject) -> None:
    """Both models take tensors of the same names, types and sizes.

    Raises:
        UsageError: Names the first input that differs.
    """
    _paired("input", reference.inputs, candidate.inputs, candidate.name, by_name=True,
            todo=_SAME_INPUTS)  # fmt: skip


def _paired(
    what: str, before: Sequence[TensorSpec], after: Sequence[TensorSpec], file: str, *,
    by_name: bool, todo: str = _TODO,
) -> dict[str, str]:  # fmt: skip
    if by_name or {spec.name for spec in before} == {spec.name for spec in after}:
        fault = _names_differ(before, after)
    else:
        fault = _numbers_differ(before, after)
    if fault:
        raise UsageError(f"the models' interfaces differ: {what} {fault}", file=file, todo=todo)
    if {spec.name for spec in before} == {spec.name for spec in after}:
        known = {spec.name: spec for spec in after}
        after = [known[spec.name] for spec in before]
    for one, other in zip(before, after, strict=True):
        if not _compatible(one, other):
            called = "" if one.name == other.name else f" ('{one.name}' of the reference)"
            raise UsageError(
                f"the models' interfaces differ: {what} '{other.name}'{called} is "
                f"{_described(other)}, not {_described(one)}", file=file, todo=todo,
            )  # fmt: skip
    return {one.name: other.name for one, other in zip(before, after, strict=True)}


def _names_differ(before: Sequence[TensorSpec], after: Sequence[TensorSpec]) -> str:
    old, new = ({spec.name for spec in side} for side in (before, after))
    for spec in (*before, *after):
        if spec.name not in new:
            return f"'{spec.name}' is missing"
        if spec.name not in old:
            return f"'{spec.name}' is not in the reference"
    return ""


def _numbers_differ(before: Sequence[TensorSpec], after: Sequence[TensorSpec]) -> str:
    if len(before) == len(after):
        return ""
    return f"count is {len(after)} ({_listed(after)}), not {len(before)} ({_listed(before)})"


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in specs) or "none"


def _refuse_renamed(
    sides: Sequence[tuple[str, Sequence[TensorSpec], Sequence[TensorSpec]]], file: str
) -> None:
    """Where nothing but names differs, say so, and how to mend it."""
    renamed = []
    for _, before, after in sides:
        fits = len(before) == len(after) and all(
            _compatible(one, other) for one, other in zip(before, after, strict=True)
        )
        if not fits:
            return
        if {spec.name for spec in before} == {spec.name for spec in after}:
            continue
        renamed += [
            f"'{other.name}' is '{one.name}' in the reference"
            for one, other in zip(before, after, strict=True)
            if one.name != other.name
        ]
    if renamed:
        raise UsageError(
            f"only the names of inputs or outputs differ: {', '.join(renamed[:4])}", file=file,
            todo="rename them in one of the models, or export both with the same input_names and "
            "output_names",
        )  # fmt: skip


def _compatible(one: TensorSpec, other: TensorSpec) -> bool:
    if one.kind != other.kind:
        return False
    # A side that says nothing of its type or shape contradicts nothing.
    if one.dtype is not None and other.dtype is not None and one.dtype != other.dtype:
        return False
    if one.shape is None or other.shape is None:
        return True
    return len(one.shape) == len(other.shape) and all(
        is_open(a) or is_open(b) or a == b for a, b in zip(one.shape, other.shape, strict=True)
    )


def _described(spec: TensorSpec) -> str:
    if spec.kind != "tensor":
        return spec.kind
    kind = "untyped" if spec.dtype is None else str(spec.dtype)
    kind = "string" if kind == "object" else kind
    if spec.shape is None:
        return kind
    return f"{kind}[{', '.join(str(size) if size else '?' for size in spec.shape)}]"
