"""Which kinds of torch models can be folded, and by what."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from bnfold.errors import UsageError
from bnfold.folding import Options
from bnfold.report.model import Report
from bnfold.torch_model import (
    Inputs,
    explain_graph_module,
    explain_program,
    fold_graph_module,
    fold_program,
)
from bnfold.torch_modules import explain_module, fold_module

KINDS = (nn.Module, ExportedProgram)
"""What can be folded; an ``fx.GraphModule`` is an ``nn.Module``."""


def given(example_inputs: Any, example_kwargs: Any, dynamic_shapes: Any) -> Inputs:
    """Example inputs as they were given; one tensor is one input."""
    args = example_inputs
    if args is not None:
        args = tuple(args) if isinstance(args, tuple | list) else (args,)
    elif example_kwargs is not None:
        args = ()
    return Inputs(args, example_kwargs, dynamic_shapes)


def fold_torch(
    model: Any, inputs: Inputs, options: Options, *, inplace: bool
) -> tuple[Any, Report]:
    """The folded model, of the kind that was given, and what was done.

    Raises:
        UsageError: A model of this kind can't be folded, or not in place.
        InvalidModelError: A normalisation has parameters that mean nothing.
    """
    if isinstance(model, ExportedProgram):
        if inplace:
            met = "an ExportedProgram can't be changed in place"
            raise UsageError(met, todo="take the program that is returned")
        return fold_program(model, options)
    _refuse(model)
    if isinstance(model, fx.GraphModule):
        return fold_graph_module(model, inputs, options, inplace=inplace)
    return fold_module(model, inputs, options, inplace=inplace)


def explain_torch(model: Any, inputs: Inputs, options: Options) -> Report:
    """What `fold_torch` would do.

    Raises:
        As `fold_torch`.
    """
    if isinstance(model, ExportedProgram):
        return explain_program(model, options)
    _refuse(model)
    if isinstance(model, fx.GraphModule):
        return explain_graph_module(model, inputs, options)
    return explain_module(model, inputs, options)


def _refuse(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError("a torch.jit.ScriptModule can't be folded", todo="fold before scripting")
    if type(model).__module__.startswith("torch._dynamo"):
        met = "a module that torch.compile returned can't be folded"
        raise UsageError(met, todo="fold before torch.compile")
