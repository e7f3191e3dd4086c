"""A torch model under check: a module, an ``fx.GraphModule`` or an ``ExportedProgram``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from bnfold.errors import UsageError
from bnfold.torch_api import KINDS
from bnfold.torch_guard import tensors_of
from bnfold.verify.subject import Feeds, Outputs, RunOptions, TensorSpec
from bnfold.verify.torch_calling import (
    Call,
    array_type,
    call_of,
    output_specs,
    outputs_of,
    returned_by_program,
)
from bnfold.verify.torch_copies import Replica
from bnfold.verify.torch_lift import Lift, lifted, widened
from bnfold.verify.torch_runner import TorchRunner
from bnfold.verify.torch_training import require_evaluation

_CPU = torch.device("cpu")


def torch_subject(
    model: Any,
    name: str,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> TorchSubject:
    """A torch model under check; it is never changed.

    Args:
        model: A module, an ``fx.GraphModule`` or an ``ExportedProgram``.
        name: What messages call it.
        example_inputs: A tuple of positional arguments, or one tensor; a program has its own. They
            say which tensors the model takes, of which types and sizes.
        example_kwargs: Further arguments by name.

    Raises:
        UsageError: It is no torch model, it is in training mode, or can't be called like that.
    """
    if not isinstance(model, KINDS):
        raise UsageError(f"a {type(model).__name__} is no torch model", file=name)
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            "a torch.jit.ScriptModule can't be checked", file=name, todo="check before scripting"
        )
    if type(model).__module__.startswith("torch._dynamo"):
        met = "a module that torch.compile returned can't be checked"
        raise UsageError(met, file=name, todo="check before torch.compile")
    require_evaluation(model, name)
    return TorchSubject(model, name, call_of(model, name, example_inputs, example_kwargs),
                        example_inputs, example_kwargs)  # fmt: skip


class TorchSubject:
    """A torch model and how it is called.

    Attributes:
        model: The module or program.
        name: What messages call it.
        call: How it is called.
        example_inputs: As they were given.
        example_kwargs: As they were given.
    """

    def __init__(
        self, model: Any, name: str, call: Call, example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.name, self.call = model, name, call
        self.example_inputs, self.example_kwargs = example_inputs, example_kwargs

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors among its arguments."""
        return self.call.inputs

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it returns, flattened; a module runs once to tell."""
        if isinstance(self.model, ExportedProgram):
            return returned_by_program(self.model)
        device = next((t.device for t in tensors_in(self.model)), _CPU)
        replica = Replica(self.model, self.name, lambda t: t)
        args, kwargs = self.call.arguments(_zeros(self.inputs), device)
        return output_specs(replica.run(args, kwargs))

    @cached_property
    def unit(self) -> float:
        """Of the coarsest float type that it holds, takes or returns."""
        held = [array_type(t.dtype) for t in tensors_in(self.model)]
        types = held + [spec.dtype for spec in (*self.inputs, *self.outputs)]
        return max((u for u in map(rounding_unit, types) if u), default=2.0**-24)

    @cached_property
    def replica(self) -> Replica:
        """The model in float64 on the CPU, to be run under `Lift`; one for all who ask."""
        return Replica(self.model, self.name, lifted)

    def wide_arguments(self, feeds: Feeds) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What to call the replica with."""
        # Some operators compare types before `Lift` sees them.
        args, kwargs = self.call.arguments(feeds, _CPU)
        wide_args, wide_kwargs = widened((args, kwargs))
        return wide_args, wide_kwargs

    def oracle(self) -> Callable[[Feeds], Outputs]:
        """A copy of the model in float64."""
        replica = self.replica

        def run(feeds: Feeds) -> Outputs:
            args, kwargs = self.wide_arguments(feeds)
            with Lift():
                return outputs_of(replica.run(args, kwargs))

        return run

    def runner(self, provider: str, options: RunOptions) -> TorchRunner:
        """A copy of the model on the CPU or on CUDA, in its own types."""
        return TorchRunner(self.model, self.name, self.call, provider, options)


def tensors_in(model: Any) -> Iterator[Tensor]:
    """Every tensor that a model holds."""
    if isinstance(model, ExportedProgram):
        yield from model.state_dict.values()
        yield from (value for value in model.constants.values() if isinstance(value, Tensor))
    else:
        yield from (tensor for _, _, tensor in tensors_of(model))


def rounding_unit(dtype: np.dtype[Any] | None) -> float | None:
    """Half an ulp, relative, of a float type; None of other types."""
    if dtype is None or dtype.kind not in "fV":
        return None
    return 2.0**-8 if dtype == ml_dtypes.bfloat16 else float(np.finfo(dtype).eps) / 2


def kind_of(model: Any) -> str:
    """``program``, ``graph`` or ``module``: what bnfold returns the same of."""
    if isinstance(model, ExportedProgram):
        return "program"
    return "graph" if isinstance(model, fx.GraphModule) else "module"


def _zeros(specs: tuple[TensorSpec, ...]) -> Feeds:
    return {
        spec.name: np.zeros([n for n in spec.shape or () if isinstance(n, int)], spec.dtype)
        for spec in specs
    }
