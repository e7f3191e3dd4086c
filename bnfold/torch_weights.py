"""Where the weight of a torch operation is stored: transposed on its way, repeated, or computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from bnfold.affine import Layout
from bnfold.channel_graph import Weight
from bnfold.torch_calls import Call
from bnfold.torch_constants import MOVES
from bnfold.torch_facts import DTYPES, Facts

Readers = Callable[[Any], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Root:
    """The tensor that a weight is, as the graph holds it."""

    argument: Any
    layout: Layout


def root_of(facts: Facts, weight: Any, layout: Layout) -> Root | None:
    """Where a weight is stored, and its layout there; None when it is computed."""
    while facts.constants.name(weight) is None:
        call = facts.constants.computed(weight) if isinstance(weight, fx.Node) else None
        if call is None or not isinstance(call["input"], fx.Node):
            return None
        if call.op in _REPEATS and _keeps_matrix(facts, call) and layout.out_axis < 0:
            weight = call["input"]
            continue
        if call.op not in MOVES:
            return None
        if _swaps(facts, call):
            if len(facts.shape(weight) or ()) != 2:
                return None
            # Counted from either end, the two axes change places.
            layout = Layout(layout.in_axis, layout.out_axis)
        weight = call["input"]
    return Root(weight, layout)


_REPEATS = frozenset({"expand", "unsqueeze", "view", "reshape", "_unsafe_view"})


def _keeps_matrix(facts: Facts, call: Call) -> bool:
    """Whether the last two axes are what they were, with or without batches of the same before."""
    before, after = facts.shape(call["input"]), facts.shape(call.node)
    if before is None or after is None or len(before) != 2:
        return False
    return tuple(before) == tuple(after[-2:])


def _swaps(facts: Facts, call: Call) -> bool:
    """Whether a move changes the order of axes."""
    before = facts.shape(call["input"])
    if call.op == "permute":
        return list(call["dims"]) not in (list(range(len(before or ()))), [])
    return call.op in ("t", "transpose", "numpy_T")


def weight_of(facts: Facts, weight: Any, layout: Layout, readers: Readers) -> Weight | None:
    """The weight of a linear operator in the neutral vocabulary; None when it is no constant."""
    if not facts.constants.is_constant(weight):
        return None
    root = root_of(facts, weight, layout)
    shape = facts.shape(weight)
    if root is None:
        dtype = facts.dtype(weight) or "of an unknown type"
        roots = [facts.constants.of_name(name) for name in facts.constants.roots(weight)]
        if not all(tensor.dtype in DTYPES for tensor in roots):
            dtype = "numbers computed from integers"
        return Weight(f"'{weight.name}'", dtype, readers(weight), 0, str(layout))
    tensor = facts.constants.stored(root.argument)
    if tensor.is_meta or shape is None:
        return None
    stored = facts.dtype(root.argument) or "of an unknown type"
    view = f"{root.layout} {tuple(tensor.shape)} {tensor.storage_offset()}"
    return Weight(storage(tensor), stored, readers(root.argument), tensor.nbytes, view)


def storage(tensor: Tensor) -> str:
    """What two tensors have in common if a change of one is a change of the other."""
    return f"{tensor.untyped_storage()._cdata:x}"
