"""What a module tree can hold of a plan: which modules can vanish, where tensors can be written.

A module vanishes when all it does are steps that vanish, one behind the other, and perhaps a chain
of modules of its own after them (an activation); these are left in its place. Everything else is
code, which nobody changes.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnfold.channel_graph import Bias
from bnfold.planning import Kept, Plan, Reason
from bnfold.torch_calls import Call
from bnfold.torch_chain import steps_by_node
from bnfold.torch_describe import Described, NormSite
from bnfold.torch_facts import Facts, Place
from bnfold.torch_hosts import Hosts, hosts_of
from bnfold.torch_leaves import is_unmodified, leaf_arguments
from bnfold.torch_linear import LinearSite
from bnfold.torch_observe import Observed
from bnfold.torch_reach import Reach, reach_of
from bnfold.torch_removals import Removal, removals_of
from bnfold.torch_reparam import foreign_hooks, own_tensors, reparametrised
from bnfold.torch_steps import StepSite
from bnfold.torch_weights import root_of, storage


class DescribeAgainError(Exception):
    """The tree can hold something else than it said; nothing was edited."""


_LINEAR = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear,
)  # fmt: skip


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
    hosts: Hosts = field(default_factory=Hosts)
    freed: set[str] = field(default_factory=set)
    banned: set[str] = field(default_factory=set)
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
        self.removals.update(removals_of(self))

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
            given = site.bias
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
        if self.first_path(path) in self.freed:
            return ""
        return path or type(self.root).__name__

    def is_alone(self, site: StepSite) -> bool:
        """Whether another module can stand in the place of one that does a step, and no other."""
        node = site.call.node
        return any(removal.steps == {node} for removal in self.removals.values())

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
        """Steps that have to stay because others that are done by the same module do.

        Also merges that no module can hold, by their last operator.

        Raises:
            DescribeAgainError: Steps that are written in code can vanish, or can't after all.
        """
        gone = {fold.step for fold in plan.folds}
        steps = steps_by_node(described)
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
        self.hosts = hosts_of(self, described, plan)
        self._settle_code(gone)
        return refused | self.hosts.refused

    def _settle_code(self, gone: set[int]) -> None:
        """Let the steps in the code of modules that go vanish, if they do.

        Raises:
            DescribeAgainError: Not all that was said of such code holds.
        """
        chains = self.hosts.chains
        stay = {path for path, chain in chains.items() if not chain.steps <= gone}
        wrong = {path for path in self.freed if path not in chains or path in stay}
        new = stay - self.freed
        if wrong or new:
            self.banned |= wrong
            self.freed = (self.freed | new) - wrong
            raise DescribeAgainError

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
                for name, tensor in own_tensors(module):
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


def _reads_bias(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class reads ``self.bias``, itself or by torch's own code."""
    forward = inspect.unwrap(kind.forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return "bias" in names
