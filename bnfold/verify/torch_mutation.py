"""A torch candidate with one weight off, to see whether that is noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from bnfold.errors import UsageError
from bnfold.torch_guard import quiet
from bnfold.verify.subject import Subject
from bnfold.verify.torch_copies import words
from bnfold.verify.torch_subject import TorchSubject, torch_subject
from bnfold.verify.torch_weights_expected import named_tensors


def mutable(candidate: Subject) -> tuple[str, Callable[[float], Subject]] | None:
    """The name of the weight in the middle of the model, and the model with it scaled.

    None for a model without a weight of two axes or more.
    """
    assert isinstance(candidate, TorchSubject)
    held = [(name, value) for name, value in named_tensors(candidate.model)
            if value.ndim > 1 and value.is_floating_point()]  # fmt: skip
    learnt = [name for name, value in held if isinstance(value, nn.Parameter)]
    weights = learnt or [name for name, _ in held]
    if not weights:
        return None
    name = weights[len(weights) // 2]

    def mutated(factor: float) -> Subject:
        try:
            model = _copied(candidate.model)
        except Exception as error:  # whatever its tensors and attributes raise
            met = f"a copy can't be made: {words(error)}"
            raise UsageError(met, file=candidate.name) from error
        with torch.no_grad():
            dict(named_tensors(model))[name].mul_(factor)
        return torch_subject(model, candidate.name, example_inputs=candidate.example_inputs,
                             example_kwargs=candidate.example_kwargs)  # fmt: skip

    return name, mutated


def _copied(model: Any) -> Any:
    """A copy, in which the inputs of a program are called what its signature calls them.

    deepcopy renames those that are called like a builtin, such as ``input``.
    """
    with quiet():  # torch warns of what its own classes are made with
        made = copy.deepcopy(model)
    if isinstance(model, ExportedProgram):
        sides = (program.graph.find_nodes(op="placeholder") for program in (model, made))
        for before, after in zip(*sides, strict=True):
            after.name = before.name
    return made
