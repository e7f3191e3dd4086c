"""Both front ends decide the same, say the same and write the same weights, bit for bit.

Every net of `agreement_nets` goes through five forms: as a module, as an exported program, as the
same in core ATen, as a GraphModule, and as an ONNX file of the tracing exporter. The program is
what the others are compared with. `Case.differs` lists what one of them has otherwise, with why.
"""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.onnx import TrainingMode

import bnfold
from bnfold.report.model import Report
from tests.agreement_nets import (
    CASES,
    CORE,
    FX,
    JOINED,
    LINEAR,
    MODELS,
    MODULE,
    ONNX,
    PROGRAM,
    STEPS,
    WAYS,
    Together,
    example,
    made,
)

# Captured together; a longer list takes the exporters longer than its parts.
GROUPS = {"layers": [*LINEAR, *STEPS], "ways": [*WAYS, *JOINED], "models": [*MODELS]}
OTHERS = (MODULE, CORE, FX, ONNX)
TOLERANCE = 1e-9
COARSE = 1e-4  # of float32

pytestmark = [
    # torch copies its own tree specs in a way that it deprecates.
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\):FutureWarning"),
]

every = pytest.mark.parametrize("name", CASES)


@dataclass(frozen=True, slots=True)
class Done:
    """A folded form of several nets: the model, the report, and the tensors by name."""

    model: Any
    report: Report
    tensors: Mapping[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Nets this small take several threads longer than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- the forms ----


@contextmanager
def quiet() -> Iterator[None]:
    """Both exporters warn of their own deprecations, which no caller here can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def net(name: str) -> nn.Module:
    return made(name, CASES[name])


def group_of(name: str) -> str:
    return next(group for group, names in GROUPS.items() if name in names)


@cache
def together(group: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    names = GROUPS[group]
    module = Together({name: net(name) for name in names})
    return module, tuple(example(name, CASES[name]) for name in names)


@cache
def program(group: str) -> torch.export.ExportedProgram:
    module, inputs = together(group)
    cases = [CASES[name] for name in GROUPS[group]]
    batches = tuple({0: torch.export.Dim.AUTO} if case.dynamic else {} for case in cases)
    with quiet():
        return torch.export.export(module, inputs, dynamic_shapes=(batches,), strict=False)


def as_onnx(group: str) -> onnx.ModelProto:
    module, inputs = together(group)
    names = {name: f"{name}_input" for name in GROUPS[group]}
    batches = {names[n]: {0: f"{n}_batch"} for n in GROUPS[group] if not CASES[n].fixed}
    file: Any = io.BytesIO()
    with quiet():
        # A copy, because the exporter runs it: what is in training mode would learn.
        torch.onnx.export(
            copy.deepcopy(module), inputs, file, dynamo=False, verbose=False, opset_version=17,
            training=TrainingMode.PRESERVE, do_constant_folding=False,
            input_names=list(names.values()), dynamic_axes=batches,
        )  # fmt: skip
    return onnx.load_from_string(file.getvalue())


@cache
def folded(form: str, group: str) -> Done:
    """All nets of a group in one of the forms, folded."""
    if form == MODULE:
        result = bnfold.fold(*together(group))
        return Done(result.model, result.report, result.model.state_dict())
    if form == ONNX:
        result = bnfold.fold(as_onnx(group))
        return Done(result.model, result.report, _initializers(result.model))
    given = program(group)
    if form == CORE:
        with quiet():
            given = given.run_decompositions()
    result = bnfold.fold(given)
    return Done(result.model, result.report, _held(result.model))


@cache
def traced(name: str) -> Done:
    """A net on its own, as fx traces it, folded."""
    result = bnfold.fold(fx.symbolic_trace(net(name)), example(name, CASES[name]))
    return Done(result.model, result.report, result.model.state_dict())


def _held(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    held = {**program.state_dict, **program.constants}
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def _initializers(model: onnx.ModelProto) -> dict[str, Tensor]:
    """By the names that they have in torch, in the layout that they have there."""
    found = {}
    for tensor in model.graph.initializer:
        value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        name = tensor.name.removesuffix("_folded")
        found[name] = value if name == tensor.name else value.t()
    return found


# ---- where a step is: the path of its module ----


@cache
def paths(name: str) -> Collection[str]:
    return {path for path, _ in net(name).named_modules(remove_duplicate=False)}


def torch_path(label: str, known: Collection[str]) -> str:
    """The longest beginning of what a report calls an operation that is a module."""
    parts = re.sub(r"@\d+", "", label).split(".")
    while parts and ".".join(parts) not in known:
        parts.pop()
    return ".".join(parts)


def onnx_path(label: str, known: Collection[str]) -> str:
    """The scopes of a node's name: ``/name/body/body.0/Conv``, at times more than one name each."""
    found, previous = ["nets"], ""
    for scope in re.sub(r"^\w+\((.*)\)$", r"\1", label).strip("/").split("/")[:-1]:
        own = scope.removeprefix(f"{previous}.")
        whole = ".".join([*found, own])
        again = re.sub(r"_\d+$", "", own)  # a second call of the module
        found.append(own if whole in known else again)
        previous = scope
    return torch_path(".".join(found), known)


@cache
def decisions(form: str, name: str) -> dict[str, str]:
    """How each step vanished, into which modules, or why it stays, by where it is.

    Several steps of one module are numbered. Steps over constants alone are counted by the ONNX
    side only, which has to take care of their nodes.
    """
    if form == FX:
        return _decisions(traced(name).report, torch_path, "", paths(name))
    path = onnx_path if form == ONNX else torch_path
    return _decisions(folded(form, group_of(name)).report, path, f"nets.{name}", paths(name))


def _decisions(
    report: Report, path: Callable[..., str], prefix: str, inside: Collection[str]
) -> dict[str, str]:
    known = {f"{prefix}.{p}".strip(".") for p in inside}
    found: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for step in report.steps:
        at = path(step.name, known)
        if step.how == "evaluated" or at not in known:
            continue
        into = sorted({_within(prefix, path(label, known)) for label in step.into})
        own = _within(prefix, at)
        seen[own] += 1
        key = own if seen[own] == 1 else f"{own}#{seen[own]}"
        found[key] = step.code or f"{step.how} {' '.join(into)}".strip()
    return found


def _within(prefix: str, path: str) -> str:
    return path.removeprefix(prefix).removeprefix(".")


# ---- tensors ----


@cache
def tensors(form: str, name: str) -> dict[str, Tensor]:
    if form == FX:
        return dict(traced(name).tensors)
    held = folded(form, group_of(name)).tensors
    prefix = f"nets.{name}."
    return {key[len(prefix) :]: t for key, t in held.items() if key.startswith(prefix)}


def bits(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().numpy().tobytes()


def _floats(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the counters of batches, which are of no use to a file."""
    return {name: t for name, t in held.items() if t.is_floating_point()}


def _at_home(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A block that became a layer holds tensors under its own name: under those of the layer."""
    moved = {}
    for name, tensor in found.items():
        path, _, attribute = name.rpartition(".")
        inside = [key for key in expected if key.startswith(f"{path}.".lstrip("."))]
        same = [
            k for k in inside if k.endswith(f".{attribute}") and bits(expected[k]) == bits(tensor)
        ]
        moved[same[0] if same and name not in expected else name] = tensor
    return moved


# ---- tests ----


@pytest.mark.parametrize("name", CASES)
def test_all_forms_decide_the_same(name: str) -> None:
    for form in OTHERS:
        expected = {**decisions(PROGRAM, name), **CASES[name].differs.get(form, {})}
        assert decisions(form, name) == {step: how for step, how in expected.items() if how}, form


@every
def test_all_forms_hold_the_same_bits(name: str) -> None:
    expected = _floats(tensors(PROGRAM, name))
    for form in OTHERS:
        if form not in CASES[name].differs:  # else other steps are folded
            found = _floats(tensors(form, name))
            if form == MODULE:
                found = _at_home(found, expected)
            missing = expected.keys() - found.keys()
            if form == ONNX:  # the exporter stores what is equal once
                missing -= {k for k in missing if bits(expected[k]) in map(bits, found.values())}
            assert missing == set(), form
            assert found.keys() - expected.keys() == set(), form
            assert {k for k in found if bits(found[k]) != bits(expected[k])} == set(), form


def test_what_differs_has_a_reason() -> None:
    assert [name for name, case in CASES.items() if bool(case.differs) != bool(case.why)] == []


def test_all_kinds_of_decisions_are_met() -> None:
    """Or the tests above would say little."""
    met = {how.split()[0] for name in CASES for how in decisions(PROGRAM, name).values()}
    assert {"backward", "forward", "around", "merged", "BNF001", "BNF005", "BNF006"} <= met
    assert {"BNF016", "BNF017", "BNF018"} <= met


@every
def test_every_norm_is_decided_in_every_form(name: str) -> None:
    norms = {path for path, m in net(name).named_modules() if isinstance(m, _BatchNorm)}
    for form in (PROGRAM, *OTHERS):
        assert norms <= {step.partition("#")[0] for step in decisions(form, name)}, form


# ---- outputs ----


@cache
def outputs(group: str) -> list[Any]:
    """In float64."""
    module, inputs = together(group)
    with torch.no_grad():
        return list(copy.deepcopy(module).double()(*(x.double() for x in inputs)))


@cache
def outputs_of_folded(form: str, group: str) -> list[Any]:
    """In float32, whose bits are compared above."""
    model = folded(form, group).model
    run = model if form == MODULE else model.module()
    with torch.no_grad():
        return list(run(*together(group)[1]))


def error(found: Any, expected: Any) -> float:
    """The largest error of one output or of several, relative to the norm of each."""
    if isinstance(expected, Tensor):
        size = max(float(expected.norm()), 1e-4)
        return float((found.double() - expected).norm()) / size
    return max(error(f, e) for f, e in zip(found, expected, strict=True))


@every
def test_a_folded_net_says_the_same(name: str) -> None:
    group = group_of(name)
    at = GROUPS[group].index(name)
    for form in (MODULE, PROGRAM, CORE):
        assert error(outputs_of_folded(form, group)[at], outputs(group)[at]) <= COARSE, form


@every
def test_a_folded_graph_says_the_same_in_float64(name: str) -> None:
    module = copy.deepcopy(net(name)).double()
    given = example(name, CASES[name]).double()
    found = bnfold.fold(fx.symbolic_trace(copy.deepcopy(module)), given).model
    with torch.no_grad():
        assert error(found(given), module(given)) <= TOLERANCE
