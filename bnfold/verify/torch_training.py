"""A model in training mode computes something else at every run: it can't be checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from bnfold.errors import UsageError

# What torch's own modules do while training is something else only in these.
_SENSITIVE = (_NormBase, _DropoutNd, nn.RReLU, nn.MultiheadAttention, nn.RNNBase)
_FLAGS = ("train", "training")


def require_evaluation(model: Any, name: str) -> None:
    """Nothing in ``model`` is in training mode.

    Raises:
        UsageError: Names what is.
    """
    found = next(_in_training(model), None)
    if found is not None:
        todo = "call .eval() on the model" + (" before exporting it" if _is_graph(model) else "")
        raise UsageError("it is in training mode", file=name, node=found or "forward", todo=todo)


def _is_graph(model: Any) -> bool:
    return isinstance(model, ExportedProgram | fx.GraphModule)


def _in_training(model: Any) -> Iterator[str]:
    if isinstance(model, ExportedProgram):
        yield from (node.name for node in model.graph.nodes if _trains(node))
        return
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            yield from (node.name for node in module.graph.nodes if _trains(node))
        elif module.training and (isinstance(module, _SENSITIVE) or not _is_torchs_own(module)):
            yield path


def _is_torchs_own(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _trains(node: fx.Node) -> bool:
    """Whether a call in a graph asks for what is done while training."""
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return any(given.get(flag) is True for flag in _FLAGS)
