"""A torch candidate with one weight off, to see whether that is noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from bnfold.verify.subject import Subject
from bnfold.verify.torch_subject import TorchSubject, torch_subject


def mutable(candidate: Subject) -> tuple[str, Callable[[float], Subject]] | None:
    """The name of the weight in the middle of the model, and the model with it scaled.

    None for a model without a weight of two axes or more.
    """
    assert isinstance(candidate, TorchSubject)
    weights = [name for name, value in candidate.model.state_dict().items()
               if value.ndim > 1 and value.is_floating_point()]  # fmt: skip
    if not weights:
        return None
    name = weights[len(weights) // 2]

    def mutated(factor: float) -> Subject:
        model: Any = copy.deepcopy(candidate.model)
        with torch.no_grad():
            model.state_dict()[name].mul_(factor)
        return torch_subject(model, candidate.name, example_inputs=candidate.example_inputs,
                             example_kwargs=candidate.example_kwargs)  # fmt: skip

    return name, mutated
