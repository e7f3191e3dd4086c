"""What a module computes, as graphs: exported, else traced, else traced part by part.

The graphs are proofs about the user's module, which is left as it was. What cannot be captured is
reported and left alone; it never stops the rest. Graphs share modules and tensors with the module:
nothing may be changed through them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from bnfold.torch_assembly import alone
from bnfold.torch_guard import join, quiet, unchanged
from bnfold.torch_reach import Reach, reach_of
from bnfold.torch_readers import opaque_leaves, outside_readers
from bnfold.torch_reparam import reparametrised
from bnfold.torch_tracer import is_of_torch, trace


@dataclass(frozen=True, slots=True)
class Captured:
    """What the forward of the submodule at ``path`` computes, as one of the two kinds of graph.

    Nodes of a ``graph_module`` have the paths of the whole module. ``outside_readers`` are, by
    storage, the other names of tensors that the graph reads: who has them may read them, too.
    """

    path: str
    graph_module: fx.GraphModule | None = None
    program: ExportedProgram | None = None
    outside_readers: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the submodule at ``path`` could not be captured as a whole in one of the ways."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Captures:
    """All that could be captured of a module, and what could not."""

    parts: tuple[Captured, ...]
    failures: tuple[Failure, ...] = ()


def capture(
    module: nn.Module,
    example_inputs: object = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Captures:
    """What ``module`` computes, in the mode that each of its modules is in.

    Args:
        module: Left as it was.
        example_inputs: A tuple of positional arguments, or one tensor; with them (or with
            keywords) the module is captured as it is called with them, else as it is called
            with the parameters that have no default.
        example_kwargs: Keyword arguments.
        dynamic_shapes: As ``torch.export.export`` takes them.
    """
    given = example_inputs is not None or example_kwargs is not None
    args = _positional(example_inputs)
    keywords = dict(example_kwargs or {})
    if not given:
        return _traced(module, None, ())
    try:
        program = _exported(module, args, keywords, dynamic_shapes)
    except Exception as error:
        failed = Failure("", f"torch.export: {_reason(error)}")
        return _traced(module, (args, keywords), (failed,))
    return Captures((Captured("", program=program),))


def _positional(inputs: object) -> tuple[Any, ...]:
    if inputs is None:
        return ()
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def _reason(error: Exception) -> str:
    """The first line of an error that says something."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = type(error)
    if not line:
        return kind.__name__
    return line if kind.__module__.startswith("torch") else f"{kind.__name__}: {line}"


# ---- by torch.export ----


def _exported(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        raise TraceError("a Lazy module has seen no input yet")
    with unchanged(module), quiet():
        return torch.export.export(
            module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )


# ---- by tracing ----


def _traced(
    module: nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]] | None,
    failures: tuple[Failure, ...],
) -> Captures:
    reach = _NOBODY
    while True:
        tracing = _Tracing(module, {}, [*failures])
        tracing.visit("", module, call, reach)
        # Code may take apart what it does not contain: modules that have another path, too.
        before, reach = reach, Reach(reach.modules | tracing.taken_apart)
        taken = any(reach.into(module.get_submodule(path)) for path in tracing.graphs)
        if reach == before or not taken:
            break
    readers = outside_readers(module, tracing.graphs)
    parts = (Captured(path, g, None, readers[path]) for path, g in tracing.graphs.items())
    return Captures(tuple(parts), tuple(tracing.failures))


_NOBODY = Reach()


@dataclass(slots=True)
class _Tracing:
    """One walk down the module tree, to the outermost modules that can be traced."""

    whole: nn.Module
    graphs: dict[str, fx.GraphModule]
    failures: list[Failure]
    seen: set[int] = field(default_factory=set)
    taken_apart: frozenset[int] = frozenset()

    def visit(self, path: str, module: nn.Module, call: Any = None, reach: Reach = _NOBODY) -> None:
        """Capture ``module``, or what is inside; one that has several paths under the first.

        ``reach`` is that of all code around it that could not be traced.
        """
        if id(module) in self.seen or isinstance(module, torch.jit.ScriptModule):
            return
        self.seen.add(id(module))
        if path and is_of_torch(module):
            if isinstance(module, _NormBase):
                self.graphs[path] = alone(self.whole, path)
            return
        graph = self._trace(path, module, call, reach) if _is_called(module) else None
        if graph is None:
            around = reach_of(module)
            self.taken_apart |= around.modules
            for name, inner in _children(path, module):
                self.visit(name, inner, None, reach | around)
            return
        self.graphs[path] = graph
        for name, inner in opaque_leaves(graph):
            self.visit(name, inner, None, reach)

    def _trace(
        self, path: str, module: nn.Module, call: Any, reach: Reach
    ) -> fx.GraphModule | None:
        try:
            if reparametrised(module):
                raise TraceError("its own parameters are computed at every call")
            with unchanged(module):
                graph = _graph(self.whole, path, module, call)
            if reach.into(module):
                raise TraceError("code that could not be traced calls what is inside by itself")
            return graph
        except Exception as error:
            self.failures.append(Failure(path, f"torch.fx: {_reason(error)}"))
            return None


def _graph(whole: nn.Module, path: str, module: nn.Module, call: Any) -> fx.GraphModule:
    """The module as it is called, which nobody tells of a part."""
    if call is not None:
        bound = signature(module.forward).bind(*call[0], **call[1])
        return trace(whole, path, bound.arguments)
    graph = trace(whole, path)
    if path and _has_optional(module) and _code(graph) != _code(trace(whole, path, optional=True)):
        raise TraceError("what it computes depends on which optional arguments it is given")
    return graph


def _has_optional(module: nn.Module) -> bool:
    parameters = signature(module.forward).parameters.values()
    return any(parameter.default is not parameter.empty for parameter in parameters)


def _code(graph: fx.GraphModule) -> list[str]:
    nodes = [node for node in graph.graph.nodes if node.op != "placeholder"]
    return [f"{node} = {node.op} {node.target} {node.args} {node.kwargs}" for node in nodes]


def _is_called(module: nn.Module) -> bool:
    """Whether it has a forward; a ModuleList has none."""
    default = type(module).forward is nn.Module.forward and "forward" not in vars(module)
    return not default


def _children(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    made = "parametrizations" if reparametrised(module) else None
    return [(join(path, name), child) for name, child in module.named_children() if name != made]
