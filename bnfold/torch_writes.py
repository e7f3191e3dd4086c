"""Edits that put a computed tensor where an operation reads it: over what is there or beside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from bnfold.channel_graph import Linear
from bnfold.folding import FoldRefusedError
from bnfold.planning import Reason
from bnfold.torch_arrays import as_array
from bnfold.torch_calls import Call
from bnfold.torch_constants import MOVES, UncomputableError
from bnfold.torch_describe import Described
from bnfold.torch_edit import Editor
from bnfold.torch_literal import can_be_functional, make_functional, set_literal
from bnfold.torch_steps import StepSite
from bnfold.torch_weights import storage

Edit = Callable[[], None]


class Writer:
    """Makes edits, none of which is done before it is called.

    Args:
        described: What was described.
        editor: Of the graph, or the module tree, that it was described from.
    """

    def __init__(self, described: Described, editor: Editor) -> None:
        self._described, self._editor = described, editor
        self._constants = described.facts.constants
        self._by_storage: dict[str, list[int]] = {}
        self._claims: dict[tuple[int, str, str], list[tuple[int, bytes]]] = {}
        self.now = 0
        for index, operator in enumerate(described.graph.operators):
            if isinstance(operator, Linear) and operator.weight is not None:
                self._by_storage.setdefault(operator.weight.storage, []).append(index)

    # ---- looking ----

    @property
    def edits_nodes(self) -> bool:
        """Whether nodes of the graph are what is edited."""
        return self._editor.edits_nodes

    def root(self, argument: Any) -> Any | None:
        """The tensor that ``argument`` is another arrangement of, if the graph holds one."""
        while self._constants.name(argument) is None:
            call = self._constants.computed(argument) if isinstance(argument, fx.Node) else None
            if call is None or call.op not in MOVES:
                return None
            argument = call["input"]
        return argument

    def readers_of_weight(self, index: int) -> list[int]:
        """The linear operators that read the same storage as operator ``index``."""
        linear = self._described.graph.operators[index]
        assert isinstance(linear, Linear)
        assert linear.weight is not None
        return self._by_storage[linear.weight.storage]

    def some_tensor(self, call: Call) -> Tensor:
        """A tensor that stands where those stand that ``call`` reads."""
        names = [name for value in call.arguments.values() for name in self._roots(value)]
        return self._editor.tensors[names[0] if names else self._any()]

    def _roots(self, argument: Any) -> tuple[str, ...]:
        return self._constants.roots(argument)

    def like(self, argument: Any) -> str:
        """The tensor beside which one that takes the place of ``argument`` belongs."""
        found = self._roots(argument)
        return found[0] if found else self._any()

    def _any(self) -> str:
        """Any tensor, rather one that is not trained."""
        tensors = self._editor.tensors
        for name in sorted(tensors, key=lambda name: tensors[name].requires_grad):
            return name
        raise UncomputableError("the graph holds no tensor beside which a new one could stand")

    # ---- tensors ----

    def over(self, given: Any, tensor: Tensor) -> Edit:
        """``tensor`` in the place of the one that the graph holds, for all who read it."""
        name = self._constants.name(self.root(given))
        assert name is not None
        return lambda: self._editor.write(name, tensor)

    def write(self, call: Call, argument: str, given: Any, tensor: Tensor) -> Edit:
        """``tensor`` as ``argument`` of ``call``: over what it reads, if nobody else reads that."""
        root = self.root(given)
        if root is None:
            return self.new(call, argument, given, tensor)
        old = self._constants.stored(root)
        key = storage(old)
        if len(self._described.readers.get(key, ())) > 1 or key in self._described.outside:
            return self.new(call, argument, given, tensor)
        alike = tensor.numel() == old.numel()
        return self.over(given, tensor.reshape(old.shape) if alike else tensor)

    def new(self, call: Call, argument: str, given: Any, tensor: Tensor) -> Edit:
        """``tensor`` as ``argument`` of ``call``, under a name of its own."""
        like = self.like(given)
        return self._named(call, argument, f"{like}_folded", tensor, like)

    def beside(self, call: Call, argument: str, given: Any, tensor: Tensor) -> Edit:
        """``tensor`` as ``argument`` that ``call`` did not have, named like its ``given``."""
        like = self.like(given)
        path = str(call.node.target) if call.module is not None else self._home(call, like)
        return self._named(call, argument, f"{path}.{argument}".lstrip("."), tensor, like)

    def _home(self, call: Call, like: str) -> str:
        """The path of the layer that ``call`` is, as its weight has it, or its place says."""
        path = self._described.facts.place(call).path
        tensors = self._editor.tensors
        own = tensors.get(f"{path}.{like.rpartition('.')[2]}".lstrip("."))
        if own is not None and storage(own) == storage(tensors[like]):
            return path
        return like.rpartition(".")[0] if call["weight"] is not None else path

    def _named(self, call: Call, argument: str, name: str, tensor: Tensor, like: str) -> Edit:
        self._claim(call, argument, as_array(tensor).tobytes())
        self._refuse_other_readers(call, argument)
        aten = isinstance(call.node.target, torch._ops.OpOverload)
        spelled = "self" if argument == "input" and aten and _says_self(call.node) else argument

        def edit() -> None:
            made = self._editor.add(name, tensor, like)
            self._editor.set_argument(call.node, spelled, made)

        return edit

    # ---- nodes ----

    def add_after(self, call: Call, weight: Any, bias: Tensor) -> Edit:
        """``call(...) + bias`` in the place of ``call(...)``."""
        node, like = call.node, self.like(weight)

        def edit() -> None:
            name = self._editor.add(f"{like.rpartition('.')[0]}.bias".lstrip("."), bias, like)
            with node.graph.inserting_after(node):
                made = node.graph.call_function(torch.ops.aten.add.Tensor, (node, node))
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
            self._editor.set_argument(made, "other", name)

        return edit

    def instead(
        self, index: int, site: StepSite, scale: Tensor | None, shift: Tensor | None
    ) -> list[Edit]:
        """A step that multiplies by ``scale`` or adds ``shift`` in the place of ``site``.

        Raises:
            FoldRefusedError: It is written in code that can't be changed.
        """
        call = site.call
        if site.scale and site.shift:
            given = {site.scale: scale, site.shift: shift}
            return [self.write(call, name, call[name], t) for name, t in given.items()
                    if t is not None]  # fmt: skip
        tensor = scale if shift is None else shift
        assert tensor is not None
        op, argument = ("mul", site.scale) if shift is None else ("add", site.shift)
        if call.op == op and call["alpha"] in (None, 1) and self.root(call[argument]) is not None:
            return [self.write(call, argument, call[argument], tensor)]
        if not self._editor.edits_nodes:
            name = self._described.facts.label(call)
            raise FoldRefusedError(index, Reason.IN_CODE, f"{name} can hold no other number")
        return [lambda: self._replace(site, op, tensor)]

    def _replace(self, site: StepSite, op: str, tensor: Tensor) -> None:
        node, resolve = site.call.node, self._described.facts.walk.resolve
        data = next(n for n in node.all_input_nodes if resolve(n) is site.data)
        own = self._roots(site.call[site.scale or site.shift])
        name = self._editor.add(f"{node.name}_merged", tensor, own[0] if own else self._any())
        node.op, node.target = "call_function", getattr(torch.ops.aten, op).Tensor
        node.args, node.kwargs = (data, data), {}
        self._editor.set_argument(node, "other", name)

    def literal(self, call: Call, argument: str, value: float) -> Edit:
        """``value`` as ``argument`` of ``call``."""
        self._claim(call, argument, repr(value).encode())
        return lambda: set_literal(call, self._editor.module_of(call), argument, value)

    def can_be_functional(self, call: Call) -> bool:
        """Whether ``call`` can be made to leave what it reads as it is."""
        return can_be_functional(call, self._editor.module_of(call), self._editor.edits_nodes)

    def functional(self, call: Call) -> Edit:
        """``call`` without its effect on what it reads."""
        return lambda: make_functional(call, self._editor.module_of(call))

    # ---- modules that are called more than once ----

    def _claim(self, call: Call, argument: str, value: bytes) -> None:
        """Note that operator ``now`` asks its module to hold ``value`` as ``argument``."""
        module = self._editor.module_of(call)
        if module is not None:
            self._claims.setdefault((id(module), call.op, argument), []).append((self.now, value))

    def _refuse_other_readers(self, call: Call, argument: str) -> None:
        """A module's own tensor is overwritten: nobody else may read it.

        Raises:
            FoldRefusedError: Somebody does.
        """
        module, root = self._editor.module_of(call), self.root(call[argument])
        if module is None or root is None:
            return
        key = storage(self._constants.stored(root))
        for label in self._described.outside.get(key, ()):
            raise FoldRefusedError(self.now, Reason.SHARED_WEIGHT, f"its {argument}, by {label}")
        for other in self._described.readers.get(key, ()):
            if self._editor.module_of(other) is not module or other.op != call.op:
                label = self._described.facts.label(other)
                raise FoldRefusedError(
                    self.now, Reason.SHARED_WEIGHT, f"its {argument}, by {label}"
                )

    def disagreeing(self) -> Iterator[tuple[int, str]]:
        """Operators that ask of a module what not all of its other calls ask, with their names."""
        calls = self._calls_by_module()
        for (module, op, _), claims in self._claims.items():
            if len({value for _, value in claims}) > 1 or len(claims) < calls[module, op]:
                index = claims[0][0]
                yield index, self._described.graph.operators[index].name

    def _calls_by_module(self) -> Counter[tuple[int, str]]:
        found: Counter[tuple[int, str]] = Counter()
        for site in self._described.sites:
            if site is not None:
                module = self._editor.module_of(site.call)
                found[id(module), site.call.op] += module is not None
        return found


def _says_self(node: fx.Node) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    return any(parameter.name == "self" for parameter in node.target._schema.arguments)
