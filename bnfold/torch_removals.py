"""Which modules of a tree can vanish: those whose steps come first, and then modules of their own.

    BatchNorm, Scale                  -> Identity
    BatchNorm with an activation      -> the activation

All calls of a module have to be of one kind, and nobody may miss it: no code takes an attribute of
it, asks for its class, or reads what is between its steps.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx, nn

from bnfold.torch_calls import Call
from bnfold.torch_facts import Place
from bnfold.torch_reach import stores
from bnfold.torch_reparam import own_tensors
from bnfold.torch_steps import find_step
from bnfold.torch_walk import parts
from bnfold.torch_weights import storage

if TYPE_CHECKING:
    from bnfold.torch_tree import ModuleTree


@dataclass(frozen=True, slots=True)
class Removal:
    """A module that can vanish: ``steps`` are the nodes of its steps, ``left`` what stays of it."""

    path: str
    steps: frozenset[fx.Node]
    left: tuple[str, ...]


def removals_of(tree: ModuleTree) -> dict[str, Removal]:
    """The modules that can vanish, by path: all of their calls have to be of one kind."""
    sites: dict[str, dict[str, list[Call]]] = defaultdict(lambda: defaultdict(list))
    for call in tree.facts.walk.calls:
        place = tree.facts.place(call)
        for path, site in zip(place.paths, place.sites, strict=False):
            sites[tree.first_path(path)][site].append(call)
    found: list[Removal] = []
    for path, calls in sites.items():
        if tree.has(path) and may_go(tree, path):
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


def may_go(tree: ModuleTree, path: str) -> bool:
    """Whether another module could be called in the place of the one at ``path``."""
    module, prefix = tree.module(path), tree.facts.prefix
    if prefix and not all(_is_inside(other, prefix) for other in tree.paths(module)):
        return False  # code that was not captured may call it, too
    if tree.hooked(path) or "forward" in vars(module) or module is tree.root:
        return False
    if tree.is_asked_for(module) or tree.is_taken_apart(module, *_attributes(module)):
        return False  # nn.Identity has none of these
    if stores(module):
        return False  # somebody may read that
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
        own = [storage(tensor) for _, tensor in own_tensors(self.tree.module(self.path))]
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
