"""A user's nn.Module, folded: captured, planned, and written back under the user's own names.

The graphs that were captured only prove what the module does. The result is the module itself, or
a copy of it: weights are new parameters where the old ones were, and modules that did nothing but
steps that vanished are Identity, or the activation that they ended with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from bnfold.errors import UsageError
from bnfold.folding import Options
from bnfold.planning import Kept, Reason
from bnfold.report.model import Report, Size, Step, kept_step
from bnfold.torch_capture import Captured, Captures, Failure, capture
from bnfold.torch_describe import describe
from bnfold.torch_facts import Facts
from bnfold.torch_model import Folded, Inputs, facts_of, fold_graph, settled
from bnfold.torch_module_editor import ModuleEditor
from bnfold.torch_observe import Observed, is_watched_globally, observing
from bnfold.torch_reparam import copied, owned
from bnfold.torch_steps import StepSite
from bnfold.torch_tree import DescribeAgainError, ModuleTree
from bnfold.torch_weights import storage


def fold_module(
    module: nn.Module, inputs: Inputs, options: Options, *, inplace: bool
) -> tuple[nn.Module, Report]:
    """The module folded, or a folded copy of it."""
    root, lent = (module, {}) if inplace else _copy(module)
    before = size_of(root)
    captures, seen = _captured(root, inputs)
    parts = [_fold_part(root, part, seen, options) for part in captures.parts]
    report = _report(root, parts, captures, options, before, size_of(root))
    owned(root, lent)
    return root, report


def _copy(module: nn.Module) -> tuple[nn.Module, dict[int, Tensor]]:
    try:
        return copied(module)
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        met = f"a copy of {type(module).__name__} can't be made: {reason}"
        raise UsageError(met, todo="fold it with inplace=True") from error


def explain_module(module: nn.Module, inputs: Inputs, options: Options) -> Report:
    """What `fold_module` would do; the module is left as it is."""
    captures, seen = _captured(module, inputs)
    parts = [_explained(module, part, seen, options) for part in captures.parts]
    return _report(module, parts, captures, options, size_of(module), None)


@dataclass(frozen=True, slots=True)
class _Seen:
    """How modules were called while they were captured, and whether others watch all of them."""

    observed: Observed
    watched: bool


def _captured(module: nn.Module, inputs: Inputs) -> tuple[Captures, _Seen]:
    if inputs.args is not None:
        _refuse_misfits(module, inputs)
    watched = is_watched_globally()
    given = (inputs.args, inputs.kwargs, inputs.dynamic_shapes)
    with observing() as observed:
        captures = capture(module, *given)
    if inputs.args is not None and captures.failures:
        # torch.cond can't be exported while a hook on all modules is there.
        unobserved = capture(module, *given)
        if not unobserved.failures:
            return unobserved, _Seen(Observed(), watched)
    return captures, _Seen(observed, watched)


def _refuse_misfits(module: nn.Module, inputs: Inputs) -> None:
    try:
        inspect.signature(module.forward).bind(*inputs.args or (), **inputs.kwargs or {})
    except TypeError as error:
        met = f"the example inputs do not fit the forward of {type(module).__name__}: {error}"
        raise UsageError(met, todo="give the arguments that the module is called with") from error
    except ValueError:
        return  # nobody knows its signature


def _described(
    root: nn.Module, part: Captured, seen: _Seen
) -> tuple[ModuleEditor, Facts, ModuleTree]:
    editor = ModuleEditor(root, part)
    changed = (
        () if part.program is None else part.program.graph_signature.buffers_to_mutate.values()
    )
    facts = facts_of(editor, changed=changed, prefix=part.path)
    outside = tuple(name for names in part.outside_readers.values() for name in names)
    tree = ModuleTree(root, facts, seen.observed, outside, seen.watched)
    editor.tree = tree
    return editor, facts, tree


def _fold_part(root: nn.Module, part: Captured, seen: _Seen, options: Options) -> Folded:
    editor, facts, tree = _described(root, part, seen)
    return _decided(lambda: fold_graph(editor, facts, options, tree, tree.partial))


def _explained(root: nn.Module, part: Captured, seen: _Seen, options: Options) -> Folded:
    _, facts, tree = _described(root, part, seen)
    return _decided(lambda: settled(describe(facts, tree), options, tree.partial))


def _decided(decide: Callable[[], Folded]) -> Folded:
    """What is decided in the end, once the tree has said what can vanish from code."""
    while True:
        try:
            return decide()
        except DescribeAgainError:
            continue


# ---- reports ----


def size_of(module: nn.Module) -> Size:
    """How large a module is: its innermost modules by class, its parameters and buffers."""
    operators: dict[str, int] = {}
    for inner in module.modules():
        if not list(inner.children()):
            operators[type(inner).__name__] = operators.get(type(inner).__name__, 0) + 1
    tensors = [t for t in (*module.parameters(), *module.buffers()) if not is_lazy(t)]
    stored = {t.untyped_storage()._cdata: t for t in tensors}
    parameters = sum(tensor.numel() for tensor in stored.values())
    return Size(operators, parameters, sum(tensor.nbytes for tensor in stored.values()))


def _report(
    root: nn.Module,
    parts: Iterable[Folded],
    captures: Captures,
    options: Options,
    before: Size,
    after: Size | None,
) -> Report:
    done = list(parts)
    steps = [step for part in done for step in part.steps]
    steps += _not_captured(root, done, captures)
    notes = tuple(dict.fromkeys(_note(failure) for failure in captures.failures))
    joints = tuple(joint for part in done for joint in part.joints)
    apart = tuple(step for part in done for step in part.apart)
    return Report(type(root).__name__, options.level, tuple(steps), before, after, notes,
                  joints=joints, apart=apart)  # fmt: skip


def _note(failure: Failure) -> str:
    what = f"'{failure.path}'" if failure.path else "the module"
    return f"{what} could not be captured as a whole: {failure.reason}"


def _not_captured(root: nn.Module, parts: list[Folded], captures: Captures) -> list[Step]:
    """The normalisations that no graph shows."""
    steps_of_parts = [
        (part.described.facts, site.call)
        for part in parts for site in part.described.sites if isinstance(site, StepSite)
    ]  # fmt: skip
    seen = {path for facts, call in steps_of_parts for path in facts.place(call).paths}
    read = {key for part in parts for key in part.described.readers}
    steps = []
    for path, module in root.named_modules():
        if isinstance(module, _NormBase) and path not in seen and not _is_read(module, read):
            if not module.track_running_stats and isinstance(module, _InstanceNorm):
                continue  # by statistics of the input: no affine step
            why = next((f.reason for f in captures.failures if _is_around(f.path, path)), "")
            name = path or type(root).__name__
            lazy = "a Lazy module has seen no input yet" if _is_lazy(module) else ""
            kept = Kept(0, Reason.NOT_CAPTURED, (name,), lazy or why or "nothing calls it")
            steps.append(kept_step(name, type(module).__name__, kept))
    return steps


def _is_lazy(module: nn.Module) -> bool:
    return any(is_lazy(t) for t in (*module.parameters(), *module.buffers()))


def _is_read(module: nn.Module, read: set[str]) -> bool:
    """Whether a graph shows what is done with the statistics of a module."""
    mean = module.running_mean
    return isinstance(mean, Tensor) and not is_lazy(mean) and storage(mean) in read


def _is_around(path: str, inner: str) -> bool:
    return not path or inner == path or inner.startswith(f"{path}.")
