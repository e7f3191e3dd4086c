"""Small torch models with random statistics, and folding them in every kind that a model has."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

import bnfold
from bnfold.report.model import Report, Step

MODULE, TRACED, GRAPH, BARE, PROGRAM = "module", "traced", "graph", "bare", "program"
KINDS = (MODULE, TRACED, GRAPH, BARE, PROGRAM)
"""A module with example inputs and without, a GraphModule likewise, a program."""

Shape = tuple[int, ...]


def made(run: Callable[..., Any], **held: Any) -> nn.Module:
    """A module of a class of its own with the forward ``run``, and what that calls by name."""
    model: nn.Module = type("Net", (nn.Module,), {"forward": run})()
    for name, value in held.items():
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            model.register_buffer(name, value)
        else:
            setattr(model, name, value)
    return model


def random(*shape: int, seed: int = 5) -> Tensor:
    """Numbers around 0, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def lively(model: nn.Module, *, positive: bool = False, seed: int = 0) -> Any:
    """``model`` in float64 and evaluation mode, its statistics as hard as they come.

    Gammas are negative, tiny and zero on the first three channels, unless all are ``positive``.
    """
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=generator)
        for norm in model.modules():
            if isinstance(norm, _NormBase):
                _liven(norm, generator, positive)
    return model


def _liven(norm: _NormBase, generator: torch.Generator, positive: bool) -> None:
    if norm.weight is not None:
        norm.weight.normal_(1, 0.5, generator=generator)
        if positive:
            norm.weight.abs_().add_(0.1)
        else:
            hard = torch.tensor([-1.5, 1e-6, 0.0])[: norm.num_features]
            norm.weight[: len(hard)] = hard
    if norm.running_mean is not None and norm.running_var is not None:
        norm.running_mean.normal_(0, 1, generator=generator)
        norm.running_var.uniform_(0.01, 5, generator=generator)


def one_thread() -> Iterator[None]:
    """A fixture: on nets this small more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- folding ----


def exported(model: nn.Module, inputs: Sequence[Tensor], **options: Any) -> Any:
    """The program of ``model``."""
    return torch.export.export(model, tuple(inputs), strict=False, **options)


def decomposed(program: Any) -> Any:
    """A program in core ATen."""
    with warnings.catch_warnings():
        # torch 2.13 copies its own specs in a way that it calls deprecated.
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        return program.run_decompositions()


def folded(kind: str, model: nn.Module, inputs: Sequence[Tensor], **options: Any) -> Any:
    """What `bnfold.fold` gives for ``model`` as one of `KINDS`."""
    args = tuple(inputs)
    if kind == MODULE:
        return bnfold.fold(model, args, **options)
    if kind == TRACED:
        return bnfold.fold(model, **options)
    if kind == PROGRAM:
        return bnfold.fold(exported(model, args), **options)
    graph = fx.symbolic_trace(copy.deepcopy(model))
    return bnfold.fold(graph, args if kind == GRAPH else None, **options)


def outputs(model: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """All tensors that ``model`` gives, a program too, and whatever else it is kept in."""
    runs = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    with torch.no_grad():
        return list(tensors_in(runs(*(value.clone() for value in inputs))))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors among results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_in(entry)


def error(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest number of each output."""
    assert len(expected) == len(got) > 0
    worst = 0.0
    for one, other in zip(expected, got, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        size = one.double().abs().max().item() or 1.0
        worst = max(worst, (one.double() - other.double()).abs().max().item() / size)
    return worst


def verdicts(report: Report) -> dict[str, str]:
    """How every step folded, or the code of the reason why it stays, by name."""
    return {step.name: step.how or step.code for step in report.steps}


def step(report: Report, name: str) -> Step:
    """The step of that name."""
    return next(found for found in report.steps if found.name == name)
