"""What a module tree can hold of a plan: which modules can vanish, where tensors can be written.

A module vanishes when all it does are steps that vanish, one behind the other, and perhaps a chain
of modules of its own after them (an activation); these are left in its place. Everything else is
code, which nobody changes.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from bnfold.channel_graph import Affine, Bias
from bnfold.planning import Kept, Plan, Reason
from bnfold.torch_calls import Call
from bnfold.torch_describe import Described, NormSite
from bnfold.torch_facts import Facts, Place
from bnfold.torch_leaves import is_unmodified, leaf_arguments
from bnfold.torch_linear import LinearSite, root_of, storage
from bnfold.torch_observe import Observed
from bnfold.torch_reach import Reach, reach_of
from bnfold.torch_reparam import foreign_hooks, reparametrised
from bnfold.torch_steps import StepSite, find_step
from bnfold.torch_walk import parts

_LINEAR = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Removal:
    """A module that can vanish: ``steps`` are the nodes of its steps, ``left`` what stays of it."""

    path: str
    steps: frozenset[fx.Node]
    left: tuple[str, ...]


@dataclass(slots=True)
class ModuleTree:
    """The facts of a module tree; see `bnfold.torch_describe.Tree`.

    Args:
        root: The module.
        facts: What was captured of it, or of a part of it.
        observed: How its modules were called while it was captured.
        outside: Names under which others may read tensors that the graph reads.
        watched: Whether hooks on all modules are there.
    """

    root: nn.Module
    facts: Facts
    observed: Observed
    outside: tuple[str, ...] = ()
    watched: bool = False
    removals: dict[str, Removal] = field(default_factory=dict)
    readers: dict[str, list[Place]] = field(default_factory=lambda: defaultdict(list))
    _reach: Reach = field(default_factory=Reach)
    _modules: dict[str, nn.Module] = field(default_factory=dict)
    _others: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    _paths: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for path, module in self.root.named_modules(remove_duplicate=False):
            self._modules[path] = module
            self._paths[id(module)].append(path)
        for module in self.root.modules():
            self._reach |= reach_of(module)
        self._find_readers()
        self._find_other_readers()
        self.removals.update(_removals(self))

    def module(self, path: str) -> nn.Module:
        """The module at ``path``."""
        return self._modules[path]

    def at(self, call: Call) -> nn.Module:
        """The innermost module in whose code an operation is written."""
        return self._modules[self.facts.place(call).path or self.facts.prefix]

    def has(self, path: str) -> bool:
        """Whether there is a module at ``path``."""
        return path in self._modules

    def paths(self, module: nn.Module) -> list[str]:
        """All paths of a module."""
        return self._paths[id(module)]

    def first_path(self, path: str) -> str:
        """Of all paths of the module at ``path`` the first one."""
        module = self._modules.get(path)
        return path if module is None else self._paths[id(module)][0]

    def is_simple(self, path: str) -> bool:
        """Whether the module at ``path`` makes one tensor of one tensor."""
        module = self._modules[path]
        if leaf_arguments(module) is not None or _is_activation(module):
            return True
        return self.observed.is_simple(module)

    def is_asked_for(self, module: nn.Module) -> bool:
        """Whether code of the tree does something else for modules of another class."""
        return self._reach.asks_for(module)

    def is_taken_apart(self, module: nn.Module, *names: str) -> bool:
        """Whether code of the tree takes one of these attributes of ``module``."""
        return self._reach.takes(module, names)

    def holds(self, name: str | None) -> bool:
        """Whether ``name`` is a tensor of the tree."""
        if name is None:
            return False
        path, _, attribute = name.rpartition(".")
        return isinstance(getattr(self._modules.get(path), attribute, None), Tensor)

    # ---- facts for the planner ----

    def place_of_bias(self, site: LinearSite, bias: Bias) -> Bias:
        """Where a linear operator would put a shift."""
        if site.add is not None or (bias is Bias.BUILT_IN and site.bias is not None):
            given = site.bias if site.add is None else _constant_of(self.facts, site.add)
            own = site.add is None and self._is_own(site.call, "bias", given)
            made = site.add is None and "bias" in reparametrised(self.at(site.call))
            ours = own or made or (self._is_held(given) and self._is_read_once(given))
            return bias if ours and site.beta == 1 else Bias.DYNAMIC
        if bias is Bias.BUILT_IN and self._takes_bias(site):
            return bias
        return Bias.NOWHERE if bias in (Bias.BUILT_IN, Bias.OPERATOR) else bias

    def weight_is_ours(self, site: LinearSite | NormSite) -> bool:
        """Whether the weight of an operator can be written."""
        if isinstance(site, NormSite) and site.call["weight"] is None:
            return leaf_arguments(self.at(site.call)) is not None
        if isinstance(site, NormSite):
            return self._is_own(site.call, "weight", site.call["weight"])
        root = root_of(self.facts, site.weight, site.layout)
        if root is None:
            return site.weight_argument in reparametrised(self.at(site.call))
        return self.holds(self.facts.constants.name(root.argument))

    def code_of(self, site: StepSite) -> str:
        """The code that a step is written in, if it can't vanish from there."""
        for path in reversed(self.facts.place(site.call).paths):
            removal = self.removals.get(self.first_path(path))
            if removal is not None and site.call.node in removal.steps:
                return ""
            if self.hooked(path):
                return ""  # what it reads and makes is in true units anyway
        path = self.facts.place(site.call).path or self.facts.prefix
        return path or type(self.root).__name__

    def hooked(self, path: str) -> bool:
        """Whether somebody sees what goes into the module at ``path`` and what comes out."""
        if path not in self._modules:
            return False
        return self.watched or bool(foreign_hooks(self._modules[path]))

    def other_readers(self, key: str) -> tuple[str, ...]:
        """Who else reads the storage ``key`` in code that was not captured."""
        return tuple(self._others.get(key, ()))

    # ---- modules that vanish as a whole or not at all ----

    def partial(self, described: Described, plan: Plan) -> dict[int, Kept]:
        """Steps that have to stay because others that are done by the same module do."""
        gone = {fold.step for fold in plan.folds}
        steps = _steps_by_node(described)
        refused: dict[int, Kept] = {}
        for removal in self.removals.values():
            indices = [steps[node] for node in removal.steps if node in steps]
            stay = [index for index in indices if index not in gone]
            if stay and len(stay) < len(indices):
                name = described.graph.operators[stay[0]].name
                refused |= {
                    index: Kept(index, Reason.SEVERAL_CALLS, (name,))
                    for index in indices if index in gone
                }  # fmt: skip
        return refused

    # ---- looking ----

    def _is_own(self, call: Call, attribute: str, given: Any) -> bool:
        """Whether ``given`` is an attribute of the module whose code ``call`` is."""
        name, module = self.facts.constants.name(given), self.at(call)
        if name is None or not self.holds(name):
            return False
        owner, _, held = name.rpartition(".")
        return self._modules[owner] is module and held == attribute

    def _is_held(self, given: Any) -> bool:
        return self.holds(self.facts.constants.name(given))

    def _is_read_once(self, given: Any) -> bool:
        key = storage(self.facts.constants.stored(given))
        return len(self.readers.get(key, ())) == 1 and not self.other_readers(key)

    def _takes_bias(self, site: LinearSite) -> bool:
        """Whether the code of an operator would read a bias if its module had one."""
        module = self.at(site.call)
        if not isinstance(module, _LINEAR) or "bias" not in module._parameters:
            return False
        if module.bias is not None or "forward" in vars(module):
            return False
        if self.is_taken_apart(module, "bias"):
            return False
        root = root_of(self.facts, site.weight, site.layout)
        own = root is None or self._is_own(site.call, "weight", root.argument)
        return own and _reads_bias(type(module))

    def _find_readers(self) -> None:
        """Where each tensor is read."""
        constants = self.facts.constants
        for call in self.facts.walk.calls:
            if constants.is_constant(call.node):
                continue
            roots = {root for value in call.arguments.values() for root in constants.roots(value)}
            for root in roots:
                self.readers[storage(constants.of_name(root))].append(self.facts.place(call))

    def _find_other_readers(self) -> None:
        """Owners of tensors in code that was not captured."""
        read = {place for call in self.facts.walk.calls for place in self.facts.place(call).paths}
        read.add(self.facts.prefix)
        for path, module in self.root.named_modules():
            if _has_forward(module) and read.isdisjoint(self._paths[id(module)]):
                for name, tensor in _own_tensors(module):
                    self._others[storage(tensor)].append(f"{path}.{name}".lstrip("."))
        for name in self.outside:
            path, _, attribute = name.rpartition(".")
            other = getattr(self._modules.get(path), attribute, None)
            if isinstance(other, Tensor):
                self._others[storage(other)].append(name)


def _has_forward(module: nn.Module) -> bool:
    """A ParameterList has none: it only holds what others read."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _is_activation(module: nn.Module) -> bool:
    """Whether it is an activation of torch.nn: one tensor in, one tensor out."""
    kind = type(module)
    ours = kind.__module__ == "torch.nn.modules.activation"
    return ours and kind is not nn.MultiheadAttention and is_unmodified(module, kind)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    if isinstance(module, torch.jit.ScriptModule):
        return []
    both = {**module._parameters, **module._buffers}
    return [(n, t) for n, t in both.items() if t is not None and not is_lazy(t)]


def _constant_of(facts: Facts, add: Call) -> Any:
    return next(v for v in (add["other"], add["input"]) if facts.constants.is_constant(v))


def _reads_bias(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class reads ``self.bias``, itself or by torch's own code."""
    forward = inspect.unwrap(kind.forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return "bias" in names


def _steps_by_node(described: Described) -> Mapping[fx.Node, int]:
    return {
        site.call.node: index
        for index, site in enumerate(described.sites)
        if isinstance(site, StepSite) and isinstance(described.graph.operators[index], Affine)
    }


# ---- which modules can vanish ----


def _removals(tree: ModuleTree) -> dict[str, Removal]:
    """The modules that can vanish, by path: all of their calls have to be of one kind."""
    sites: dict[str, dict[str, list[Call]]] = defaultdict(lambda: defaultdict(list))
    for call in tree.facts.walk.calls:
        place = tree.facts.place(call)
        for path, site in zip(place.paths, place.sites, strict=False):
            sites[tree.first_path(path)][site].append(call)
    found: list[Removal] = []
    for path, calls in sites.items():
        if tree.has(path) and _may_go(tree, path):
            each = [_Inside(tree, path, site, inner).removal() for site, inner in calls.items()]
            whole = [removal for removal in each if removal is not None]
            if len(whole) == len(each) and len({removal.left for removal in whole}) == 1:
                steps = frozenset[fx.Node]().union(*(removal.steps for removal in whole))
                found.append(Removal(path, steps, whole[0].left))
    # The innermost module that can go goes; those around it stay.
    deepest = sorted(found, key=lambda removal: removal.path.count("."))
    of_step = {node: removal.path for removal in deepest for node in removal.steps}
    used = set(of_step.values())
    return {removal.path: removal for removal in found if removal.path in used}


def _may_go(tree: ModuleTree, path: str) -> bool:
    """Whether another module could be called in the place of the one at ``path``."""
    module, prefix = tree.module(path), tree.facts.prefix
    if prefix and not all(_is_inside(other, prefix) for other in tree.paths(module)):
        return False  # code that was not captured may call it, too
    if tree.hooked(path) or "forward" in vars(module) or module is tree.root:
        return False
    if tree.is_asked_for(module) or tree.is_taken_apart(module, *_attributes(module)):
        return False  # nn.Identity has none of these
    return tree.is_simple(path)


def _attributes(module: nn.Module) -> set[str]:
    """What code could ask of a module that another one in its place would not have."""
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    return {name for name in own if not name.startswith("_") and name != "training"}


def _is_inside(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}.")


@dataclass(frozen=True, slots=True)
class _Inside:
    """All that one call of a module does."""

    tree: ModuleTree
    path: str
    site: str
    calls: list[Call]

    def removal(self) -> Removal | None:
        """The steps that the module begins with, if nothing but modules of its own follows."""
        is_constant = self.tree.facts.constants.is_constant
        rest = [
            c for c in self.calls if not is_constant(c.node) and not self.tree.facts.is_aside(c)
        ]
        steps: list[Call] = []
        value: fx.Node | None = None
        while rest and self._is_step(rest[0], value):
            steps.append(rest.pop(0))
            value = _output(steps[-1])
            rest = [call for call in rest if call.node is not value]
        if value is None:
            return None
        left = self._chain(rest, value)
        if self._is_read_outside():
            return None
        if left is None or not self._ends_in(rest[-1].node if rest else value):
            return None
        return Removal(self.path, frozenset(call.node for call in steps), left)

    def _is_step(self, call: Call, value: fx.Node | None) -> bool:
        """Whether ``call`` is a step on the one before it, or on what the module is given."""
        found = find_step(self.tree.facts, call)
        if found is None:
            return False
        inner = {c.node for c in self.calls}
        data = found.site.data
        return data not in inner if value is None else data is value

    def _chain(self, rest: list[Call], value: fx.Node) -> tuple[str, ...] | None:
        """The paths of the modules that follow, each called with the output of the last one."""
        left: list[str] = []
        current = ""
        inner: set[fx.Node] = set()
        for call in rest:
            path, site = self._child(self.tree.facts.place(call))
            if not path or not self.tree.is_simple(path):
                return None
            if site != current:
                left.append(path)
                current, given, inner = site, value, set()
            read = [n for n in call.nodes if not self.tree.facts.constants.is_constant(n)]
            if any(n is not given and n not in inner for n in read):
                return None
            value = call.node
            inner.add(value)
        return tuple(left)

    def _is_read_outside(self) -> bool:
        """Whether somebody else reads a tensor that goes with the module."""
        own = [storage(tensor) for _, tensor in _own_tensors(self.tree.module(self.path))]
        return any(
            self.path not in map(self.tree.first_path, place.paths)
            for key in own
            for place in self.tree.readers.get(key, ())
        )

    def _child(self, place: Place) -> tuple[str, str]:
        """The module right inside of this one that an operation is done in, and its call."""
        at = place.sites.index(self.site) + 1 if self.site in place.sites else len(place.sites)
        if at >= len(place.sites):
            return "", ""
        return self.tree.first_path(place.paths[at]), place.sites[at]

    def _ends_in(self, last: fx.Node) -> bool:
        """Whether nobody outside reads anything but the last node."""
        inner = {call.node for call in self.calls}
        outputs = set(self.tree.facts.walk.outputs)
        return all(
            node is last or (node not in outputs and inner.issuperset(node.users))
            for node in inner if not self.tree.facts.constants.is_constant(node)
            and node not in self._aside()
        )  # fmt: skip

    def _aside(self) -> set[fx.Node]:
        return {call.node for call in self.calls if self.tree.facts.is_aside(call)}


def _output(call: Call) -> fx.Node:
    """The node of the one output of an operation that anybody takes."""
    taken = parts(call)
    return call.node if taken is None or len(taken) != 1 else next(iter(taken.values()))
