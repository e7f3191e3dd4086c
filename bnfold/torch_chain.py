"""What one call of a module does, as a chain: its modules and merges in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from bnfold.channel_graph import Affine
from bnfold.planning import Merge
from bnfold.torch_calls import Call
from bnfold.torch_describe import Described
from bnfold.torch_linear import LinearSite
from bnfold.torch_places import Places
from bnfold.torch_steps import StepSite

if TYPE_CHECKING:
    from bnfold.torch_tree import ModuleTree


@dataclass(frozen=True, slots=True)
class Part:
    """One link of a chain: the module at ``path``, or the layer of the merge ``root``."""

    name: str
    path: str = ""
    root: int = -1


@dataclass(slots=True)
class _Link:
    """A part of a chain with all that it does."""

    part: Part
    nodes: set[fx.Node] = field(default_factory=set)


class Inside:
    """All that one call of a module does, as links of a chain.

    Args:
        tree: The module tree.
        described: What was captured of it.
        path: The module.
        site: The call.
        calls: What it does.
    """

    def __init__(
        self, tree: ModuleTree, described: Described, path: str, site: str, calls: list[Call]
    ) -> None:
        self.tree, self.described, self.path, self.site = tree, described, path, site
        self.facts, self.places, self.calls = tree.facts, Places(described), calls
        self.of_node = steps_by_node(described)
        self.inner = {call.node for call in self.calls}
        self.links: list[_Link] = []
        self.steps: set[int] = set()
        self.same: dict[fx.Node, fx.Node] = {}

    def read(self, merges: list[Merge]) -> bool:
        """Sort the operations into links; whether all of them are in one."""
        of_node: dict[fx.Node, _Link] = {}
        taken: set[str] = set()
        for merge in merges:
            link = _Link(Part(self._name_of(merge, taken), root=merge.root))
            self.links.append(link)
            for call in self.places.calls_of(merge):
                link.nodes.add(call.node)
                of_node[call.node] = link
        swallowed = {self._child(call) for call in self.calls if call.node in of_node} - {("", "")}
        children: dict[str, _Link] = {}
        for call in self.calls:
            if call.node in of_node or call.op == "alias" or self._is_nothing(call):
                continue
            child, site = self._child(call)
            if not child or (child, site) in swallowed or not self.tree.is_simple(child):
                return False
            if site not in children:
                children[site] = _Link(Part(self._name(child, taken), path=child))
                self.links.append(children[site])
            children[site].nodes.add(call.node)
        paths = [link.part.path for link in children.values()]
        return len(set(paths)) == len(paths)

    def parts(self) -> tuple[Part, ...] | None:
        """The links in order; None where they are no chain from one tensor to one tensor."""
        reads = {id(link): self._reads(link) for link in self.links}
        outside = {value for found in reads.values() for value in found if value not in self.inner}
        value = next(iter(outside), None)
        ordered: list[Part] = []
        left = list(self.links)
        while left:
            after = [link for link in left if reads[id(link)] == {value}]
            if len(after) != 1 or len(outside) != 1:
                return None
            (link,) = after
            made = self._made(link)
            if made is None:
                return None
            ordered.append(link.part)
            left.remove(link)
            value = made
        return tuple(ordered) if self._given_out() <= {value} else None

    # ---- links ----

    def _is_nothing(self, call: Call) -> bool:
        """Whether code gives on what it reads: by a step that vanishes, an idle dropout."""
        if self._child(call)[0]:
            return False
        data = call["input"]
        index = self.of_node.get(call.node)
        if index is not None:
            site = self.described.sites[index]
            assert isinstance(site, StepSite)
            data = site.data
            self.steps.add(index)
        elif call.op != "dropout" or call["train"] is not False:
            return False
        if not isinstance(data, fx.Node):
            return False
        self.same[call.node] = data
        return True

    def _reads(self, link: _Link) -> set[fx.Node]:
        """The activations that a link takes from elsewhere."""
        constants = self.facts.constants
        found = set()
        for call in self.calls:
            for node in call.nodes if call.node in link.nodes else ():
                if not constants.is_constant(node) and self._first(node) not in link.nodes:
                    found.add(self._first(node))
        return found

    def _made(self, link: _Link) -> fx.Node | None:
        """The one tensor of a link that anybody else reads."""
        made = {
            self._first(node)
            for other in self.links if other is not link for node in self._reads(other)
        } | self._given_out()  # fmt: skip
        found = made & link.nodes
        return next(iter(found)) if len(found) == 1 else None

    def _given_out(self) -> set[fx.Node]:
        """What is read outside of the module."""
        outputs = set(self.facts.walk.outputs)
        return {
            self._first(node) for node in self.inner
            if node in outputs or not self.inner.issuperset(self._readers(node))
        }  # fmt: skip

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            call = self.facts.call_of(user)
            place = None if call is None else self.facts.place(call)
            if place is None or self.site not in place.sites:
                yield user

    def _first(self, node: fx.Node) -> fx.Node:
        """The first of all names of a tensor."""
        node = self.facts.walk.resolve(node)
        while True:
            call = self.facts.call_of(node)
            aliased = call["input"] if call is not None and call.op == "alias" else None
            found = self.same.get(node, aliased)
            if not isinstance(found, fx.Node):
                return node
            node = self.facts.walk.resolve(found)

    # ---- names ----

    def _child(self, call: Call) -> tuple[str, str]:
        """The module right inside of this one that an operation is done in, and its call."""
        place = self.facts.place(call)
        at = place.sites.index(self.site) + 1
        if at >= len(place.sites):
            return "", ""
        return self.tree.first_path(place.paths[at]), place.sites[at]

    def _name_of(self, merge: Merge, taken: set[str]) -> str:
        """That of the child that the operator which stays is in."""
        site = self.described.sites[merge.into]
        assert isinstance(site, LinearSite)
        child, _ = self._child(site.call)
        return self._name(child.removeprefix(f"{self.path}.").partition(".")[0] or "merged", taken)

    def _name(self, path: str, taken: set[str]) -> str:
        """The name of a child, of which no other one has it."""
        name = path.removeprefix(f"{self.path}.").replace(".", "_")
        while name in taken:
            name += "_"
        taken.add(name)
        return name


def steps_by_node(described: Described) -> Mapping[fx.Node, int]:
    """The affine steps by the nodes that do them."""
    return {
        site.call.node: index
        for index, site in enumerate(described.sites)
        if isinstance(site, StepSite) and isinstance(described.graph.operators[index], Affine)
    }


def is_idle(module: nn.Module) -> bool:
    """Whether a module gives what it is given."""
    return isinstance(module, nn.Identity) or (
        isinstance(module, _DropoutNd) and not module.training
    )


def sequential(parts: Mapping[str, nn.Module]) -> nn.Module:
    """``parts`` one behind the other; a single one by itself."""
    kept = {name: module for name, module in parts.items() if not is_idle(module)}
    if len(kept) == 1:
        return next(iter(kept.values()))
    made = nn.Sequential()
    for name, module in kept.items():
        made.add_module(name, module)
    return made.eval()
