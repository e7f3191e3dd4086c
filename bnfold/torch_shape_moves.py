"""Shapes of what is arranged anew, put together or taken apart."""

from __future__ import annotations

from collections.abc import Mapping

from bnfold.channel_graph import Dim
from bnfold.torch_shape_asked import (
    Array,
    Asked,
    Known,
    Pieces,
    Rule,
    Shape,
    data_and_axis,
    with_sizes,
)
from bnfold.torch_sizes import Window, added, product, quotient

# ---- another arrangement ----


def _view(asked: Asked) -> Known:
    sizes, data = asked.sizes("shape" if "shape" in asked.call.arguments else "size"), asked.shape()
    if sizes is None:
        return None
    rest = None if data is None else product(data)
    return Array(_inferred(sizes, rest))


def _inferred(sizes: Shape, whole: Dim) -> Shape:
    """``sizes`` with what -1 stands for; torch refuses it where the others multiply to 0."""
    rest = quotient(whole, product(size for size in sizes if size != -1))
    return tuple(rest if size == -1 else size for size in sizes)


def _flatten(asked: Asked) -> Known:
    data, start, end = asked.shape(), asked.call["start_dim"], asked.call["end_dim"]
    if data is None:  # the rank is no less than where it starts
        plain = isinstance(start, int) and start >= 0 and end == -1
        return Array((None,) * (start + 1)) if plain else None
    if not data:
        return Array((1,))
    first, last = asked.axis("start_dim", len(data)), asked.axis("end_dim", len(data))
    if first is None or last is None or first > last:
        return None
    return Array((*data[:first], product(data[first : last + 1]), *data[last + 1 :]))


def _unflatten(asked: Asked) -> Known:
    found, sizes = data_and_axis(asked), asked.sizes("sizes")
    if found is None or sizes is None:
        return None
    data, axis = found
    return Array(with_sizes(data, axis, *_inferred(sizes, data[axis])))


def _permute(asked: Asked) -> Known:
    order = asked.sizes("dims")
    if order is None or not all(isinstance(axis, int) for axis in order):
        return None
    axes = [int(axis or 0) % len(order) for axis in order]
    data = asked.shape() or asked.prove((None,) * len(order))
    alike = data is not None and sorted(axes) == list(range(len(data)))
    return Array(tuple(data[axis] for axis in axes)) if data and alike else None


def _transpose(asked: Asked) -> Known:
    data = asked.shape()
    names = ("dim0", "dim1") if "dim0" in asked.call.arguments else ("axis0", "axis1")
    if data is None:
        return None
    one, other = (asked.axis(name, len(data)) for name in names)
    if one is None or other is None:
        return None
    swapped = list(data)
    swapped[one], swapped[other] = data[other], data[one]
    return Array(tuple(swapped))


def _turned(asked: Asked) -> Known:
    data = asked.shape()
    return Array(data[::-1]) if data is not None else None


def _unsqueeze(asked: Asked) -> Known:
    data = asked.shape()
    axis = None if data is None else asked.axis("dim", len(data) + 1)
    return Array((*data[:axis], 1, *data[axis:])) if data is not None and axis is not None else None


def _squeeze(asked: Asked) -> Known:
    """A symbol may be 1, so that the rank is unknown where one is asked about."""
    data = asked.shape()
    if data is None or "input" not in asked.call.arguments:
        return None
    given = asked.call["dim"]
    axes = tuple(range(len(data))) if given is None else asked.axes("dim", len(data))
    if axes is None or any(not isinstance(data[axis], int) for axis in axes):
        return None
    return Array(tuple(s for k, s in enumerate(data) if k not in axes or s != 1))


# ---- repeated ----


def _expand(asked: Asked) -> Known:
    data, sizes = asked.shape(), asked.sizes("size")
    data = data or ()
    if sizes is None or len(data) > len(sizes):
        return None
    old = (None,) * (len(sizes) - len(data)) + data
    return Array(tuple(o if s == -1 else s for o, s in zip(old, sizes, strict=True)))


def _repeat(asked: Asked) -> Known:
    tiled = "dims" in asked.call.arguments
    data, times = asked.shape(), asked.sizes("dims" if tiled else "repeats")
    if times is None or data is None or (len(times) < len(data) and not tiled):
        return None
    rank = max(len(times), len(data))
    pairs = zip((1,) * (rank - len(data)) + data, (1,) * (rank - len(times)) + times, strict=True)
    return Array(tuple(map(product, pairs)))


def _repeat_interleave(asked: Asked) -> Known:
    found, times = data_and_axis(asked), asked.size("repeats")
    if found is None:
        return None
    data, axis = found
    return Array(with_sizes(data, axis, product((data[axis], times))))


def _new(asked: Asked) -> Known:
    sizes = asked.sizes("size")
    return None if sizes is None else Array(sizes)


def _sequence(asked: Asked) -> Known:
    return Array((None,)) if asked.call.nodes else None


def _unfold(asked: Asked) -> Known:
    """Windows as an axis of their own, or those of images as rows."""
    if "kernel_size" in asked.call.arguments:
        data, kernel = asked.shape(), asked.each("kernel_size", 2, (None,))
        rows = None if data is None or len(data) < 3 else product((data[-3], *kernel))
        return None if data is None else Array((*data[:-3], rows, None))
    found = data_and_axis(asked, "dimension")
    if found is None:
        return None
    data, axis = found
    size = asked.size("size")
    stops = Window(size, asked.size("step")).over(data[axis])
    return Array((*with_sizes(data, axis, stops), size))


# ---- together ----


def _cat(asked: Asked) -> Known:
    listed = asked.known("tensors")
    if not isinstance(listed, tuple):
        return None
    # A tensor of shape (0,) may stand among tensors of any rank; it adds nothing.
    shapes = [v.shape for v in listed if isinstance(v, Array) and len(v.shape) > 1]
    if not shapes:
        return None
    axis = asked.axis("dim", len(shapes[0]))
    if axis is None:
        return None
    for shape in shapes[1:]:
        asked.state.equate(with_sizes(shapes[0], axis, None), with_sizes(shape, axis, None))
    whole: Dim = 0 if len(shapes) == len(listed) else None
    for shape in shapes if whole == 0 else ():
        whole = added(whole, shape[axis])
    return Array(with_sizes(shapes[0], axis, whole))


def _stack(asked: Asked) -> Known:
    tensors = asked.call["tensors"]
    listed = asked.known("tensors")
    if not isinstance(listed, tuple):
        return None
    shape = next((v.shape for v in listed if isinstance(v, Array)), None)
    axis = None if shape is None else asked.axis("dim", len(shape) + 1)
    if shape is None or axis is None:
        return None
    for tensor in tensors if isinstance(tensors, list | tuple) else ():
        asked.state.prove(tensor, shape)
    return Array((*shape[:axis], len(listed), *shape[axis:]))


# ---- apart ----


def _chunk(asked: Asked) -> Known:
    found, count = data_and_axis(asked), asked.size("chunks")
    if found is None or not isinstance(count, int) or count < 1:
        return None
    data, axis = found
    size, even = data[axis], quotient(data[axis], count)
    if even is not None:
        return (Array(with_sizes(data, axis, even)),) * count
    return _pieces(data, axis, -(-size // count) if isinstance(size, int) else None)


def _split(asked: Asked) -> Known:
    found = data_and_axis(asked)
    name = "split_sizes" if "split_sizes" in asked.call.arguments else "split_size"
    step, sizes = asked.known(name), asked.sizes(name)
    if found is None or (isinstance(step, tuple) and sizes is None):
        return None
    data, axis = found
    if isinstance(step, tuple):
        return tuple(Array(with_sizes(data, axis, size)) for size in sizes or ())
    return _pieces(data, axis, step if isinstance(step, int) else None)


def _pieces(data: Shape, axis: int, step: int | None) -> Known:
    size = data[axis]
    if not isinstance(size, int) or not step or size < 1:
        return Pieces(with_sizes(data, axis, None))
    sizes = (min(step, size - start) for start in range(0, size, step))
    return tuple(Array(with_sizes(data, axis, piece)) for piece in sizes)


def _tensor_split(asked: Asked) -> Known:
    found = data_and_axis(asked)
    return Pieces(with_sizes(*found, None)) if found else None


def _unbind(asked: Asked) -> Known:
    found = data_and_axis(asked)
    if found is None:
        return None
    data, axis = found
    size, piece = data[axis], with_sizes(data, axis)
    return (Array(piece),) * size if isinstance(size, int) else Pieces(piece)


MOVES: Mapping[str, Rule] = {
    "view": _view, "reshape": _view, "_unsafe_view": _view,
    "flatten": _flatten, "unflatten": _unflatten,
    "permute": _permute, "transpose": _transpose, "swapaxes": _transpose, "swapdims": _transpose,
    "t": _turned, "unsqueeze": _unsqueeze, "squeeze": _squeeze,
    "expand": _expand, "repeat": _repeat, "tile": _repeat,
    "repeat_interleave": _repeat_interleave,
    "new_zeros": _new, "new_ones": _new, "new_full": _new, "new_empty": _new,
    "zeros": _new, "ones": _new, "full": _new, "empty": _new, "rand": _new, "randn": _new,
    "arange": _sequence, "linspace": _sequence, "unfold": _unfold,
    "cat": _cat, "concat": _cat, "concatenate": _cat, "stack": _stack,
    "chunk": _chunk, "unsafe_chunk": _chunk,
    "split": _split, "unsafe_split": _split, "split_with_sizes": _split,
    "tensor_split": _tensor_split, "unbind": _unbind,
}  # fmt: skip
