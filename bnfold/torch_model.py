"""One torch model through the planner: describe, plan, commit; again where a fold did not fit."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from bnfold.channel_graph import Affine, ChannelGraph
from bnfold.folding import FoldRefusedError, Options, refusals
from bnfold.planning import Kept, Plan, Reason
from bnfold.report.model import Joint, Report, Size, Step, apart_of, joints_of, steps_of
from bnfold.torch_commit import commit
from bnfold.torch_constants import Constants
from bnfold.torch_describe import Described, Tree, describe
from bnfold.torch_edit import Editor
from bnfold.torch_facts import Facts, Shape, dim, type_name
from bnfold.torch_graph import GraphEditor
from bnfold.torch_guard import quiet
from bnfold.torch_program import ProgramEditor
from bnfold.torch_shapes import known_shapes
from bnfold.torch_steps import StepSite
from bnfold.torch_walk import Walk, walk

Refused = dict[int, Kept]
Extra = Callable[[Described, Plan], Refused]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Example inputs of a model.

    Attributes:
        args: Positional ones; None when there are no example inputs.
        kwargs: By name.
        dynamic_shapes: Which of their sizes vary, as `torch.export.export` has it.
    """

    args: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] | None = None
    dynamic_shapes: Any = None


@dataclass(frozen=True, slots=True)
class Folded:
    """A graph that was planned, and perhaps edited, with the verdicts on its steps."""

    described: Described
    plan: Plan

    @property
    def steps(self) -> tuple[Step, ...]:
        """The verdicts on its steps."""
        return steps_of(self.described.graph, self.plan)

    @property
    def joints(self) -> tuple[Joint, ...]:
        """Operators that became one."""
        return joints_of(self.described.graph, self.plan)

    @property
    def apart(self) -> tuple[Step, ...]:
        """Linear operators that stay what they are."""
        return apart_of(self.described.graph, self.plan)


def fold_program(program: ExportedProgram, options: Options) -> tuple[ExportedProgram, Report]:
    """A folded program; the given one is left as it is."""
    editor = ProgramEditor(program)
    before = size_of(editor)
    done = fold_graph(editor, facts_of(editor, changed=_mutated(program)), options)
    result = editor.finish()
    return result, _report("ExportedProgram", options, done, before, size_of(ProgramEditor(result)))


def explain_program(program: ExportedProgram, options: Options) -> Report:
    """What `fold_program` would do."""
    editor = ProgramEditor(program)
    facts = facts_of(editor, changed=_mutated(program))
    done = settled(describe(facts), options)
    return _report("ExportedProgram", options, done, size_of(editor))


def fold_graph_module(
    graph_module: fx.GraphModule, inputs: Inputs, options: Options, *, inplace: bool
) -> tuple[fx.GraphModule, Report]:
    """A folded GraphModule; the given one is left as it is unless ``inplace``."""
    editor = GraphEditor(graph_module, inplace)
    before, known = size_of(editor), _shapes(editor, inputs)
    done = fold_graph(editor, facts_of(editor, known.shapes, known.dtypes), options)
    result = editor.finish()
    name = type(graph_module).__name__
    report = _report(name, options, done, before, size_of(editor))
    return result, replace(report, notes=known.notes)


def explain_graph_module(graph_module: fx.GraphModule, inputs: Inputs, options: Options) -> Report:
    """What `fold_graph_module` would do."""
    editor = GraphEditor(graph_module)
    known = _shapes(editor, inputs)
    described = describe(facts_of(editor, known.shapes, known.dtypes))
    done = settled(described, options)
    report = _report(type(graph_module).__name__, options, done, size_of(editor))
    return replace(report, notes=known.notes)


# ---- planning and committing ----


def plan_graph(described: Described, options: Options, refused: Refused) -> Folded:
    """Decide every affine step of a graph that was described."""
    plan = options.plan(described.graph, refused)
    if any(kept.reason is Reason.IN_CODE for kept in plan.kept):
        plan = replace(plan, kept=_beyond_code(described.graph, plan, options, refused))
    return Folded(described, plan)


def refused_by_hooks(described: Described) -> Refused:
    """Steps of modules that somebody watches: such a module can't go, even if it does nothing."""
    found = {}
    for index, site in enumerate(described.sites):
        if isinstance(site, StepSite) and site.call.node in described.watched:
            name = described.graph.operators[index].name
            found[index] = Kept(index, Reason.HOOK, (f"'{name}'",))
    return found


def _beyond_code(
    graph: ChannelGraph, plan: Plan, options: Options, refused: Refused
) -> tuple[Kept, ...]:
    """Of steps that stay because they are written in code: what else stands in their way."""
    free = tuple(
        replace(operator, stays="") if isinstance(operator, Affine) else operator
        for operator in graph.operators
    )
    without = options.plan(replace(graph, operators=free), refused)
    other = {kept.step: kept for kept in without.kept}
    return tuple(
        other.get(kept.step, kept) if kept.reason is Reason.IN_CODE else kept for kept in plan.kept
    )


def fold_graph(
    editor: Editor,
    facts: Facts,
    options: Options,
    tree: Tree | None = None,
    extra: Extra = lambda _described, _plan: {},
) -> Folded:
    """Describe a graph, plan, and commit through ``editor``, until everything fits.

    Args:
        editor: Of the graph; it is edited.
        facts: What is known of the graph.
        options: How to fold.
        tree: The module tree that has to hold the result, if it is not the graph itself.
        extra: Steps that have to stay because of what else a plan does.
    """
    described = describe(facts, tree)
    return settled(described, options, extra, lambda plan: commit(described, plan, editor))


def settled(
    described: Described,
    options: Options,
    extra: Extra = lambda _described, _plan: {},
    write: Callable[[Plan], None] = lambda _plan: None,
) -> Folded:
    """Plan, and ``write`` what was decided, again without the steps that turn out to have to stay.

    Args:
        described: The graph.
        options: How to fold.
        extra: Steps that have to stay because of what else a plan does.
        write: May refuse a fold, as long as nothing has been written.
    """
    refused = refused_by_hooks(described)
    while True:
        done = plan_graph(described, options, refused)
        more = extra(described, done.plan)
        if not more:
            try:
                write(done.plan)
                return done
            except FoldRefusedError as fault:
                more = refusals(described.graph, done.plan, fault)
        assert not more.items() <= refused.items(), "a step was refused twice"
        refused.update(more)


# ---- facts ----


def facts_of(
    editor: Editor,
    shapes: Mapping[fx.Node, Shape] | None = None,
    dtypes: Mapping[fx.Node, str] | None = None,
    *,
    changed: Iterable[str] = (),
    prefix: str = "",
) -> Facts:
    """What is known of the graph of ``editor``; shapes are derived where none are given."""
    found = walk(editor.graph_module, editor.held)
    constants = Constants(found, editor.held, editor.tensors, frozenset(changed))
    if shapes is None:
        shapes = {} if _is_shaped(found) else known_shapes(found, constants)
    return Facts(editor.graph_module, found, constants, shapes, dtypes or {}, prefix)


def _is_shaped(found: Walk) -> bool:
    return any("val" in node.meta for node in found.inputs)


def _mutated(program: ExportedProgram) -> Iterable[str]:
    signature = program.graph_signature
    names = set(signature.buffers_to_mutate.values())
    return names | set(getattr(signature, "parameters_to_mutate", {}).values())


@dataclass(frozen=True, slots=True)
class _Shapes:
    """Shapes and types by node, where example inputs gave them; why they did not as a note."""

    shapes: Mapping[fx.Node, Shape] | None = None
    dtypes: Mapping[fx.Node, str] | None = None
    notes: tuple[str, ...] = ()


def _shapes(editor: GraphEditor, inputs: Inputs) -> _Shapes:
    """Shapes and types of all nodes for the example inputs, if there are any."""
    graph = editor.graph_module.graph
    if inputs.args is None or any("val" in n.meta for n in graph.find_nodes(op="placeholder")):
        return _Shapes()
    before = {node: node.meta for node in graph.nodes}
    for node in graph.nodes:
        node.meta = dict(node.meta)  # which a copy of a graph has in common with it
    try:
        _propagate(editor.graph_module, inputs)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return _Shapes(notes=(f"the graph could not be run on the example inputs: {reason}",))
    finally:
        values = {node: node.meta.get("val") for node in graph.nodes}
        for node, meta in before.items():
            node.meta = meta
    tensors = {node: value for node, value in values.items() if isinstance(value, Tensor)}
    shapes = {node: tuple(dim(size) for size in value.shape) for node, value in tensors.items()}
    return _Shapes(shapes, {node: type_name(value.dtype) for node, value in tensors.items()})


def _propagate(graph_module: fx.GraphModule, inputs: Inputs) -> None:
    """Run the graph on fake tensors, as it would be called."""
    bound = inspect.signature(graph_module.forward).bind(*inputs.args or (), **inputs.kwargs or {})
    bound.apply_defaults()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), quiet():
        FakeTensorProp(graph_module, mode).propagate(*bound.args, *bound.kwargs.values())


# ---- reports ----


def size_of(editor: Editor) -> Size:
    """How large a graph is, with the tensors that it holds."""
    found = walk(editor.graph_module, editor.held)
    operators = Counter(call.op for call in found.calls)
    tensors = {t.untyped_storage()._cdata: t for t in editor.tensors.values()}.values()
    parameters = sum(tensor.numel() for tensor in tensors)
    return Size(dict(operators), parameters, sum(tensor.nbytes for tensor in tensors))


def _report(
    source: str, options: Options, done: Folded, before: Size, after: Size | None = None
) -> Report:
    return Report(source, options.level, done.steps, before, after,
                  joints=done.joints, apart=done.apart)  # fmt: skip
