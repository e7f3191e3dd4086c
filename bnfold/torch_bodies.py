"""A graph with the bodies of its higher-order operators: copied, entered, pruned.

``torch.cond``, ``torch.no_grad`` and their kin run graphs of their own, which see nothing but their
operands: a tensor that a body is to read has to be handed down, from the outermost graph on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

# Where an operator keeps the operands that it hands on to its bodies unchanged: they are the last
# placeholders of each body. The operands of a loop that change from step to step are not theirs.
LAST_TUPLE = frozenset({"cond", "while_loop", "map_impl", "scan", "associative_scan"})
TRAILING = frozenset(
    {
        "wrap_with_set_grad_enabled",
        "wrap_with_autocast",
        "invoke_subgraph",
        "wrap",
        "wrap_activation_checkpoint",
        "tag_activation_checkpoint",
    }
)
# What they run is part of the graph around them once it is decomposed; others refuse aliases.
ALIASING = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})
# Arguments that make an operator update its buffers although its schema names no mutation.
TRAINING_FLAGS = frozenset({"training", "train", "use_input_stats"})


class Nest:
    """A graph module, with the bodies in it at any depth.

    Args:
        root: The outermost graph module.
    """

    def __init__(self, root: fx.GraphModule) -> None:
        self.root = root
        self.modules = list(_modules(root))
        self._body_of = {module.graph: module for module in self.modules}
        self._callers: dict[fx.GraphModule, list[fx.Node]] = {}
        for node in self.nodes():
            for body in bodies(node):
                self._callers.setdefault(body, []).append(node)

    def nodes(self) -> Iterator[fx.Node]:
        """All nodes of all graphs, from the last to the first of each."""
        for module in self.modules:
            yield from reversed(list(module.graph.nodes))

    def source(self, node: fx.Node) -> fx.Node | None:
        """The node of the outermost graph that ``node`` is at every call, if that is one node."""
        if node.graph is self.root.graph:
            return node
        if node.op != "placeholder":
            return None
        body = self._body_of[node.graph]
        back = len(placeholders(body)) - placeholders(body).index(node)
        found = {self._operand_source(caller, back) for caller in self._callers[body]}
        return found.pop() if len(found) == 1 else None

    def _operand_source(self, caller: fx.Node, back: int) -> fx.Node | None:
        handed = operands(caller)
        operand = handed[-back] if back <= len(handed) else None
        return self.source(operand) if isinstance(operand, fx.Node) else None

    def same(self, node: fx.Node) -> list[fx.Node]:
        """``node`` of the outermost graph, and what stands for it in the bodies."""
        entries = [entry for body in self.modules[1:] for entry in placeholders(body)]
        return [node, *(entry for entry in entries if self.source(entry) is node)]

    def deliver(self, node: fx.Node, graph: fx.Graph) -> fx.Node:
        """What stands in ``graph`` for ``node`` of the outermost graph; handed down if need be."""
        if graph is self.root.graph:
            return node
        body = self._body_of[graph]
        for entry in placeholders(body):
            if self.source(entry) is node:
                return entry
        callers, together = self._together(body)
        for caller in callers:
            operand = self.deliver(node, caller.graph)
            _set_operands(caller, (*operands(caller), operand))
        return {each: _new_placeholder(each.graph, node) for each in together}[body]

    def _together(self, body: fx.GraphModule) -> tuple[list[fx.Node], list[fx.GraphModule]]:
        """All calls and bodies that have to agree on their operands with ``body``."""
        callers: list[fx.Node] = []
        together = [body]
        for each in together:
            new = [caller for caller in self._callers[each] if caller not in callers]
            callers += new
            for caller in new:
                together += [other for other in bodies(caller) if other not in together]
        return callers, together

    def erase(self, node: fx.Node) -> None:
        """Remove a node that nobody reads."""
        for body in bodies(node):
            self._callers[body].remove(node)
        node.graph.erase_node(node)

    def cut(self, left: Callable[[fx.Node], bool]) -> bool:
        """Hand over one operand less that no body reads any more; whether there was one.

        Args:
            left: Whether a placeholder that nobody reads was read once.
        """
        for body, calls in self._callers.items():
            for back in range(1, 1 + min(map(len, map(operands, calls)), default=0)):
                callers, together = self._together(body)
                entries = [placeholders(each)[-back] for each in together]
                if any(entry.users for entry in entries) or not any(map(left, entries)):
                    continue
                for caller in callers:
                    _set_operands(caller, _without(operands(caller), back))
                for entry in entries:
                    entry.graph.erase_node(entry)
                return True
        return False

    def alias(self, graph: fx.Graph) -> bool:
        """Whether a result of ``graph`` may be one of its inputs, or another result."""
        if graph is self.root.graph:
            return True
        names = map(_operator, self._callers[self._body_of[graph]])
        return ALIASING.issuperset(names)


def copied(
    module: fx.GraphModule, done: dict[fx.GraphModule, fx.GraphModule] | None = None
) -> fx.GraphModule:
    """The same graph and bodies again, node for node; tensors are shared.

    Args:
        module: What is copied.
        done: The bodies copied so far, each with its copy: a body that runs twice stays one.
    """
    done = {} if done is None else done
    if module in done:
        return done[module]
    held = {
        name: copied(value, done) if isinstance(value, fx.GraphModule) else value
        for name, value in _attributes(module).items()
    }
    done[module] = twin = fx.GraphModule(held, _copied_graph(module.graph), type(module).__name__)
    twin.meta.update(module.meta)
    twin.training = module.training
    return twin


def _copied_graph(graph: fx.Graph) -> fx.Graph:
    twin = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        nodes[node] = twin.node_copy(node, nodes.__getitem__)
        # torch.export names a placeholder as the user did, even where fx would not (`input`).
        nodes[node].name = node.name
    # There is a public way to set how the inputs are unpacked, but none to ask.
    twin.set_codegen(graph._codegen)
    return twin


def _attributes(module: fx.GraphModule) -> dict[str, object]:
    targets = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    return {target: attribute(module, target) for target in sorted(targets)}


def attribute(module: torch.nn.Module, path: str) -> object:
    """What ``module`` holds under a dotted path."""
    found: object = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _modules(root: fx.GraphModule) -> Iterator[fx.GraphModule]:
    found = [root]
    for module in found:
        yield module
        inner = (body for node in module.graph.nodes for body in bodies(node))
        found += [body for body in dict.fromkeys(inner) if body not in found]


def bodies(node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that ``node`` runs."""
    if not isinstance(node.target, HigherOrderOperator):
        return []
    held = map(_read, node.args)
    return list(dict.fromkeys(body for body in held if isinstance(body, fx.GraphModule)))


def _read(argument: object) -> object:
    """What the graph module holds where ``argument`` reads it; None where it reads nothing."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    module = argument.graph.owning_module
    return None if module is None else attribute(module, str(argument.target))


def placeholders(module: fx.GraphModule) -> list[fx.Node]:
    """The inputs of a graph, in order."""
    return list(module.graph.find_nodes(op="placeholder"))


Arguments = tuple[fx.node.Argument, ...]


def operands(node: fx.Node) -> Arguments:
    """What ``node`` hands on to the last placeholders of its bodies, as far as that is known."""
    return _split(node)[1]


def _split(node: fx.Node) -> tuple[Arguments, Arguments]:
    """The arguments of ``node``: what it keeps for itself, and its operands."""
    name = _operator(node)
    last = node.args[-1] if node.args else None
    if name in LAST_TUPLE and isinstance(last, tuple | list):
        return node.args[:-1], tuple(last)
    inner = [i for i, arg in enumerate(node.args) if isinstance(_read(arg), fx.GraphModule)]
    if name not in TRAILING or not inner:
        return node.args, ()
    return node.args[: inner[-1] + 1], node.args[inner[-1] + 1 :]


def _operator(node: fx.Node) -> str:
    """The name of a higher-order operator; empty if ``node`` calls none."""
    return node.target.__name__ if isinstance(node.target, HigherOrderOperator) else ""


def _set_operands(node: fx.Node, handed: Arguments) -> None:
    own, _ = _split(node)
    if _operator(node) in LAST_TUPLE:
        node.args = (*own, handed)
    elif _operator(node) in TRAILING:
        node.args = (*own, *handed)
    else:
        raise ValueError(f"it is unknown how {node.target} hands tensors to its bodies")


def _without(handed: Arguments, back: int) -> Arguments:
    at = len(handed) - back
    return handed[:at] + handed[at + 1 :]


def _new_placeholder(graph: fx.Graph, like: fx.Node) -> fx.Node:
    present = list(graph.find_nodes(op="placeholder"))
    first = next(iter(graph.nodes))
    with graph.inserting_after(present[-1]) if present else graph.inserting_before(first):
        return named_placeholder(graph, like.name, like.meta)


def named_placeholder(graph: fx.Graph, name: str, meta: Mapping[str, object]) -> fx.Node:
    """A new placeholder at the point of insertion; it is called as it is named."""
    node = graph.placeholder(name)
    node.target = node.name
    node.meta.update(meta)
    return node


def is_pure(node: fx.Node) -> bool:
    """Whether nothing is lost with ``node`` but its result."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    if node.target is torch.ops.aten.detach_.default:
        # It changes nothing that is computed, only what autograd records of its operand.
        return all(len(operand.users) == 1 for operand in node.all_input_nodes)
    if isinstance(node.target, HigherOrderOperator):
        inner = [each for body in bodies(node) for each in body.graph.nodes]
        computing = [each for each in inner if each.op not in ("placeholder", "output")]
        return bool(inner) and not node.is_impure() and all(map(is_pure, computing))
    return not node.is_impure() and not _in_training(node)


def _in_training(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    given = dict(
        zip([each.name for each in node.target._schema.arguments], node.args, strict=False)
    )
    given.update(node.kwargs)
    return any(given.get(flag) is True for flag in TRAINING_FLAGS)
