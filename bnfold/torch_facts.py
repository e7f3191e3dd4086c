"""What is known of a torch graph before anything is decided: shapes, types, names, readers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from bnfold.channel_graph import Dim
from bnfold.torch_calls import Call
from bnfold.torch_constants import Constants
from bnfold.torch_schemas import Held
from bnfold.torch_walk import Walk

Shape = tuple[Dim, ...]

DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "DOUBLE", torch.float32: "FLOAT", torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
}  # fmt: skip
"""The float types that can be scaled, in the words of the channel graph."""

# Operations that a module's path alone names, even where other modules are inside of it.
_MAIN = (
    "conv", "linear", "batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm",
    "addmm", "_native_batch_norm", "native_batch_norm", "native_layer_norm", "native_group_norm",
)  # fmt: skip


# These read no numbers, or make no tensor.
_ASIDE = frozenset({
    "_assert", "_assert_async", "_assert_scalar", "_assert_tensor_metadata", "dim",
    "is_floating_point", "ndimension", "nelement", "numel", "size", "storage_offset", "stride",
    "sym_constrain_range", "sym_constrain_range_for_size", "sym_numel", "sym_size", "sym_stride",
})  # fmt: skip
_SIZES_OF_TENSORS = frozenset({
    "device", "dtype", "is_cuda", "itemsize", "layout", "nbytes", "ndim", "requires_grad", "shape",
})  # fmt: skip
_MADE_OF_SIZES = frozenset({
    "arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "scalar_tensor",
    "tensor", "zeros",
})  # fmt: skip
_FOR_OTHERS = frozenset({"cond"})  # whatever they give, they read what they are given


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the user's module tree an operation was written.

    ``path`` is that of the innermost module, ``site`` also tells several calls of it apart.
    ``paths`` are all modules around the operation, the outermost first, but for the root;
    ``sites`` are the calls of these.
    """

    path: str
    site: str
    kind: str
    paths: tuple[str, ...]
    sites: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """Read-only questions about a torch graph.

    Args:
        graph_module: The graph.
        walk: All its operations.
        constants: Which tensors are constant.
        shapes: Shapes by node, where they are known.
        prefix: The path of the module that the graph is of, within the user's module.
    """

    graph_module: fx.GraphModule
    walk: Walk
    constants: Constants
    shapes: Mapping[fx.Node, Shape] = field(default_factory=dict)
    dtypes: Mapping[fx.Node, str] = field(default_factory=dict)
    prefix: str = ""
    _labels: dict[fx.Node, str] = field(default_factory=dict)
    _places: dict[fx.Node, Place] = field(default_factory=dict)
    _calls: dict[fx.Node, Call] = field(default_factory=dict)
    _aside: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._calls.update({call.node: call for call in self.walk.calls})
        for call in self.walk.calls:
            if self._reads_no_numbers(call):
                self._aside.add(call.node)
        self._places.update({call.node: _place(call.node) for call in self.walk.calls})
        self._labels.update(_labels(self.walk.calls, self._places, self.prefix))

    def call_of(self, node: fx.Node) -> Call | None:
        """The operation that ``node`` stands for, if it is one."""
        return self._calls.get(node)

    def label(self, call: Call) -> str:
        """What reports call an operation: its module's path, or that and the node's name."""
        return self._labels[call.node]

    def kind(self, call: Call) -> str:
        """What reports call its kind: the module's class, or the operation."""
        place = self._places[call.node]
        own = self._labels[call.node] == place.site
        return place.kind if own and place.kind else call.op.removeprefix("?")

    def place(self, call: Call) -> Place:
        """Where in the user's module tree the operation was written."""
        return self._places[call.node]

    def shape(self, argument: Any) -> Shape | None:
        """The shape of an activation or a constant; None when its rank is unknown."""
        if isinstance(argument, Held) or (
            isinstance(argument, fx.Node) and self.constants.name(argument) is not None
        ):
            return tuple(self.constants.stored(argument).shape)
        if isinstance(argument, Tensor):
            return tuple(argument.shape)
        if isinstance(argument, int | float):
            return ()
        if argument in self.shapes:
            return self.shapes[argument]
        value = fake(argument)
        return None if value is None else tuple(dim(size) for size in value.shape)

    def dtype(self, argument: Any) -> str | None:
        """The type of an activation or a constant, as the channel graph calls it.

        None when it is unknown; of a type that can't be scaled the name that torch has for it.
        """
        if isinstance(argument, Held) or self.constants.name(argument) is not None:
            return type_name(self.constants.stored(argument).dtype)
        if isinstance(argument, fx.Node) and argument in self.dtypes:
            return self.dtypes[argument]
        value = argument if isinstance(argument, Tensor) else fake(argument)
        if value is None and isinstance(argument, fx.Node):
            return self._type_computed(argument)
        return None if value is None else type_name(value.dtype)

    def _type_computed(self, node: fx.Node) -> str | None:
        """The type of what is computed from tensors that are all of one type."""
        types = {self.constants.of_name(name).dtype for name in self.constants.roots(node)}
        casts = self.constants.is_cast_on_the_way(node)
        return type_name(next(iter(types))) if len(types) == 1 and not casts else None

    def is_float(self, argument: Any) -> bool:
        """Whether a tensor is of a float type, or may be: where nothing is known, it is."""
        return self.dtype(argument) in {*DTYPES.values(), None}

    def likely_dtype(self, argument: Any) -> str:
        """The type of a tensor; where nothing states it, the one that the graph's tensors have."""
        one = self.constants.one_type
        return self.dtype(argument) or ("UNDEFINED" if one is None else type_name(one))

    def is_double(self, argument: Any) -> bool:
        """Whether a tensor is of float64; where nothing is known, if the graph holds such."""
        found = self.dtype(argument)
        return found == "DOUBLE" if found is not None else self.constants.holds_doubles

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether ``node`` is a tensor, as far as is known."""
        if "val" in node.meta:
            return isinstance(node.meta["val"], Tensor)
        return node not in self._aside

    def is_aside(self, call: Call) -> bool:
        """Whether an operation makes no tensor: sizes, what is computed from them, assertions."""
        return call.node in self._aside

    def _reads_no_numbers(self, call: Call) -> bool:
        made = call.node.meta.get("val")
        if isinstance(made, Tensor | list | tuple):
            return False
        if call.op in _ASIDE or (call.op == "getattr" and call["1"] in _SIZES_OF_TENSORS):
            return True
        read = [node for node in call.nodes if not self.constants.is_constant(node)]
        sizes = bool(read) and self._aside.issuperset(read) and call.op not in _MADE_OF_SIZES
        return sizes or ("val" in call.node.meta and call.op not in _FOR_OTHERS)


_RANKS = frozenset({"dim", "is_floating_point", "ndimension"})


def asks_for_rank(call: Call) -> bool:
    """Whether an operation that reads no numbers asks for no sizes either, but rank or type."""
    if call.op == "getattr":
        return call["1"] in _SIZES_OF_TENSORS - {"shape", "nbytes"}
    return call.op in _RANKS


def fake(node: Any) -> Tensor | None:
    """What the graph itself says of the tensor ``node``."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def dim(size: Any) -> Dim:
    """A size: a number, or the expression that it is."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else str(expression)


def type_name(dtype: torch.dtype) -> str:
    """The name of a type."""
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))


# ---- names ----


def _place(node: fx.Node) -> Place:
    stack = node.meta.get("nn_module_stack") or {}
    around = [(str(key), *_entry(value)) for key, value in stack.items()]
    entries = [(path, _site(key, path), kind) for key, path, kind in around if path]
    if node.op == "call_module":
        root = node.graph.owning_module
        assert root is not None
        path, kind = str(node.target), type(root.get_submodule(str(node.target))).__name__
        if not entries or entries[-1][0] != path:
            entries.append((path, path, kind))
    inner = entries[-1] if node.op == "call_module" or (around and around[-1][1]) else ("", "", "")
    paths, sites = (tuple(dict.fromkeys(e[k] for e in entries)) for k in (0, 1))
    return Place(*inner, paths, sites)


def _site(key: str, path: str) -> str:
    """The path, and which of several calls of the module it is, as the key of its entry says."""
    again = key.rpartition("@")[2]
    return f"{path}@{again}" if "@" in key and again.isdigit() else path


def _entry(value: Any) -> tuple[str, str]:
    """The path and the class of a module, as graphs of all kinds note them."""
    if not isinstance(value, tuple):
        return "", ""
    path, kind = value
    name = kind if isinstance(kind, str) else kind.__name__
    return str(path), name.rsplit(".", 1)[-1]


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _labels(calls: list[Call], places: Mapping[fx.Node, Place], prefix: str) -> dict[fx.Node, str]:
    """A name of its own for every operation: the path of its module if it is what that does.

    Of what is written in the code of the module at ``prefix`` itself no place says where.
    """
    inner = Counter(path for place in places.values() for path in place.paths[:-1])
    of_site = Counter(places[call.node].site for call in calls)
    main = Counter(places[call.node].site for call in calls if _is_main(call))
    found: dict[fx.Node, str] = {}
    taken: Counter[str] = Counter()
    for call in calls:
        place = places[call.node]
        alone = of_site[place.site] == 1 and not inner[place.path]
        whole = place.path and (alone or (_is_main(call) and main[place.site] == 1))
        name = place.site if whole else _joined(place.path or prefix, call.node.name)
        if call.node.op == "call_module":
            name = place.site
        taken[name] += 1
        found[call.node] = name if taken[name] == 1 else f"{name}@{taken[name] - 1}"
    return found


def _is_main(call: Call) -> bool:
    return call.op.startswith(_MAIN)
