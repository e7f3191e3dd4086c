"""How a torch model is called: which tensors it takes, by name, and which it returns.

``forward(x, masks)`` with two masks takes ``x``, ``masks[0]`` and ``masks[1]``. Arguments that are
no tensors (a flag, a size, None) stay what they are in the example.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)

from bnfold.errors import UsageError
from bnfold.torch_arrays import as_array
from bnfold.verify.subject import Feeds, Outputs, Size, TensorSpec

_EXAMPLE = "pass example_inputs=, a tuple of the arguments that it is called with"


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One way to call a model.

    Attributes:
        inputs: The tensors that it takes, in order.
        places: Where these stand among the leaves.
        leaves: All leaves of ``(args, kwargs)``; None where a tensor is to be fed.
        spec: How the leaves make ``(args, kwargs)``.
    """

    inputs: tuple[TensorSpec, ...]
    places: tuple[int, ...]
    leaves: tuple[Any, ...]
    spec: TreeSpec

    def arguments(
        self, feeds: Feeds, device: torch.device
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What to call the model with: tensors of their own, which it may write to.

        Raises:
            UsageError: An input is not fed.
        """
        leaves = list(self.leaves)
        for place, spec in zip(self.places, self.inputs, strict=True):
            if spec.name not in feeds:
                raise UsageError(f"input '{spec.name}' is not given")
            leaves[place] = fed(feeds[spec.name]).to(device)
        args, kwargs = tree_unflatten(leaves, self.spec)
        return tuple(args), dict(kwargs)


def call_of(model: Any, name: str, args: Any, kwargs: Mapping[str, Any] | None) -> Call:
    """How ``model`` is called.

    Args:
        model: A module or a program.
        name: What messages call it.
        args: Example arguments: a tuple, or one tensor; a program knows its own.
        kwargs: Example arguments by name.

    Raises:
        UsageError: There is no example, or the model can't be called with it.
    """
    if isinstance(model, ExportedProgram):
        return _call_of_program(model)
    if args is None and kwargs is None:
        raise UsageError("what it takes is not known without an example", file=name, todo=_EXAMPLE)
    if args is None:
        args = ()
    args = tuple(args) if isinstance(args, tuple | list) else (args,)
    names = _parameter_names(model, name, args, dict(kwargs or {}))
    return _call(names, args, dict(kwargs or {}))


def _parameter_names(
    model: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[str]:
    """A name for each positional argument."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        kind = type(model).__name__
        met = f"{kind}.forward{signature} can't be called with the example inputs: {error}"
        raise UsageError(met, file=name, todo=_EXAMPLE) from error
    return positional_names(signature, len(args))


def positional_names(signature: inspect.Signature, count: int) -> list[str]:
    """A name for each of so many positional arguments; ``args[0]`` where they are collected."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = signature.parameters.values()
    names = [p.name for p in parameters if p.kind in kinds][:count]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    return names + [f"{rest}[{i}]" for i in range(count - len(names))]


def _call(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    paths, spec = tree_flatten_with_path((args, kwargs))
    inputs, places, leaves = [], [], []
    for place, (path, value) in enumerate(paths):
        is_tensor = isinstance(value, Tensor)
        leaves.append(None if is_tensor else value)
        if is_tensor:
            places.append(place)
            inputs.append(tensor_spec(_leaf_name(names, path), value))
    return Call(tuple(inputs), tuple(places), tuple(leaves), spec)


def _leaf_name(names: Sequence[str], path: Sequence[Any]) -> str:
    top = path[1]
    head = str(top.key) if hasattr(top, "key") else names[top.idx]
    return head + str(keystr(tuple(path[2:]))).replace("'", "")


def _call_of_program(program: ExportedProgram) -> Call:
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    given = [s.arg for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    leaves = [
        arg.value if isinstance(arg, ConstantArgument) else nodes[arg.name].meta["val"]
        for arg in given
    ]
    args, kwargs = tree_unflatten(leaves, program.call_spec.in_spec)
    signature = program.module_call_graph[0].signature
    names = list(signature.forward_arg_names or ()) if signature else []
    names += [f"args[{i}]" for i in range(len(names), len(args))]
    return _call(names, tuple(args), dict(kwargs))


# ---- results ----


def returned_by_program(program: ExportedProgram) -> tuple[TensorSpec, ...]:
    """What a program says that it returns."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    results = [
        values.get(spec.arg.name) if isinstance(spec.arg, TensorArgument) else _constant(spec.arg)
        for spec in program.graph_signature.output_specs
        if spec.kind is OutputKind.USER_OUTPUT
    ]
    return output_specs(results)


def _constant(argument: Any) -> Any:
    return argument.value if isinstance(argument, ConstantArgument) else 0  # a size that varies


def output_specs(result: Any) -> tuple[TensorSpec, ...]:
    """Name, type and shape of everything in what a model returned."""
    return tuple(_output_spec(f"output{i}", value) for i, value in enumerate(results_in(result)))


def _output_spec(name: str, value: Any) -> TensorSpec:
    if isinstance(value, Tensor):
        return tensor_spec(name, value)
    if isinstance(value, bool | int | float | complex):
        return TensorSpec(name, np.asarray(value).dtype, ())
    return TensorSpec(name, None, None, type(value).__name__)


def outputs_of(result: Any) -> Outputs:
    """What a model returned, by name: tensors and numbers as arrays, anything else as it is."""
    return {f"output{i}": _plain(value) for i, value in enumerate(results_in(result))}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return np.array(as_array(value.detach().cpu().resolve_conj().resolve_neg()))
    return np.asarray(value) if isinstance(value, bool | int | float | complex) else value


def results_in(value: Any) -> Iterator[Any]:
    """Tensors, numbers and whatever else is in nested results; None is no result."""
    if value is None:
        return
    if isinstance(value, Mapping):
        yield from results_in(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from results_in(entry)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from results_in([getattr(value, field.name) for field in fields(value)])
    else:
        leaves, _ = tree_flatten(value)
        if len(leaves) == 1 and leaves[0] is value:
            yield value
        else:
            yield from results_in(leaves)


# ---- tensors ----


def tensor_spec(name: str, tensor: Tensor) -> TensorSpec:
    """Name, type and shape of a tensor; sizes that vary go by their symbol."""
    return TensorSpec(name, array_type(tensor.dtype), tuple(_size(n) for n in tensor.shape))


def _size(size: Any) -> Size:
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else str(expression)
    return int(size)


def array_type(dtype: torch.dtype) -> np.dtype[Any] | None:
    """The numpy type of a torch type; None where there is none."""
    if dtype is torch.bfloat16:
        narrow: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return narrow
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError:
        return None


def fed(array: NDArray[Any]) -> Tensor:
    """A tensor of its own with the numbers of ``array``, in their type."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
