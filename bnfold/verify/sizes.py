"""The sizes that a model leaves open: two for each symbol and for each unknown axis.

A symbol has one size wherever it stands within a sample. Half of the samples have the first sizes,
half the second, so that what was frozen to one size shows.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence

from bnfold.errors import UsageError
from bnfold.verify.dtypes import family
from bnfold.verify.subject import Size, TensorSpec

Pair = tuple[int, int]

# Of an axis of open size: the batch, spatial axes, and the length of a sequence.
BATCH: Pair = (1, 2)
IMAGE: Pair = (64, 96)
VOLUME: Pair = (32, 48)
SEQUENCE: Pair = (16, 24)

_ARITHMETIC: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Div: operator.floordiv,
}  # fmt: skip


def is_open(size: Size) -> bool:
    """Whether an axis has no fixed size."""
    return not (isinstance(size, int) and size > 0)


def sized(
    specs: Sequence[TensorSpec], sizes: Mapping[str, Pair] | None = None, *, second: bool = False
) -> dict[str, tuple[int, ...]]:
    """A shape for each input, by name.

    Args:
        specs: The inputs, all of known rank.
        sizes: Two sizes for each of these symbols, in place of the usual ones.
        second: Take the second size of everything that is open.
    """
    known = {symbol: pair[second] for symbol, pair in (sizes or {}).items()}
    for spec, axis, size in _axes(specs):
        if isinstance(size, str) and size.isidentifier():
            known.setdefault(size, usual_size(spec, axis)[second])
    shapes: dict[str, list[int]] = {spec.name: [] for spec in specs}
    for spec, axis, size in _axes(specs):
        usual = usual_size(spec, axis)[second]
        shapes[spec.name].append(_size(size, known, usual))
    return {name: tuple(shape) for name, shape in shapes.items()}


def _axes(specs: Sequence[TensorSpec]) -> list[tuple[TensorSpec, int, Size]]:
    return [(spec, i, size) for spec in specs for i, size in enumerate(rank_known(spec))]


def rank_known(spec: TensorSpec) -> tuple[Size, ...]:
    """The shape of an input.

    Raises:
        UsageError: It is no tensor, or its rank or type is not known.
    """
    if spec.kind != "tensor" or spec.shape is None or spec.dtype is None:
        what = "tensor of known rank" if spec.kind == "tensor" else f"tensor but a {spec.kind}"
        raise UsageError(
            f"this graph input is no {what}, so no input can be made for it", node=spec.name,
            todo="pass your own inputs" if spec.kind == "tensor" else
            "check a model whose inputs are tensors",
        )  # fmt: skip
    return spec.shape


def usual_size(spec: TensorSpec, axis: int) -> Pair:
    """The two sizes of an axis that nothing is known of."""
    rank = len(spec.shape or ())
    if axis == 0:
        return BATCH
    if rank < 4:
        numbers = spec.dtype is not None and family(spec.dtype) in ("integer", "bool", "string")
        return SEQUENCE if numbers or rank < 3 else VOLUME
    return IMAGE if rank == 4 else VOLUME


def _size(size: Size, known: Mapping[str, int], usual: int) -> int:
    if isinstance(size, int) and size > 0:
        return size
    if not isinstance(size, str):
        return usual
    value = known.get(size)
    value = _evaluated(size, known) if value is None else value
    return usual if value is None or value < 1 else value


def _evaluated(text: str, known: Mapping[str, int]) -> int | None:
    """The value of an expression such as ``2*n + 1``; None where it is none that is known."""
    try:
        return _value(ast.parse(text, mode="eval").body, known)
    except (SyntaxError, KeyError, ZeroDivisionError, ValueError):
        return None


def _value(node: ast.expr, known: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return known[node.id]
    if isinstance(node, ast.BinOp):
        return _ARITHMETIC[type(node.op)](_value(node.left, known), _value(node.right, known))
    raise ValueError(ast.dump(node))
