"""Shapes of what layers make: convolutions, normalisations, pooling, resampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bnfold.channel_graph import Dim
from bnfold.torch_shape_asked import Array, Asked, Known, Rule, Shape, spread
from bnfold.torch_sizes import Window, added, product, quotient, transposed_window

# ---- layers ----


def _conv(asked: Asked) -> Known:
    n = int(asked.call.op[-2])
    transposed = "transpose" in asked.call.op
    weight = asked.shape("weight") or (None,) * (n + 2)
    grouped = product((weight[1], asked.size("groups")))
    in_channels, out_channels = (weight[0], grouped) if transposed else (grouped, weight[0])
    data = asked.shape() or asked.prove((None, in_channels, *(None,) * n))
    if data is None or len(data) not in (n + 1, n + 2):
        return None
    asked.state.equate(data[-n - 1 : -n], (in_channels,))
    space = (_transposed if transposed else _windowed)(asked, data[-n:], weight[2:])
    return Array((*data[: -n - 1], out_channels, *space))


def _windowed(asked: Asked, space: Shape, kernel: Shape) -> Shape:
    n, given = len(space), asked.call["padding"]
    if asked.call["padding_mode"] not in (None, "zeros"):
        given = getattr(asked.call.module, "padding", None)  # padded before it is convolved
    if given == "same":
        return space
    pads = spread((0,) if given == "valid" else asked.sizes_of(given), n)
    strides, dilations = asked.each("stride", n, (1,)), asked.each("dilation", n, (1,))
    return tuple(
        Window(k, stride, product((2, pad)), dilation).over(size)
        for size, k, stride, pad, dilation in zip(
            space, kernel, strides, pads, dilations, strict=True
        )
    )


def _transposed(asked: Asked, space: Shape, kernel: Shape) -> Shape:
    n = len(space)
    strides, dilations = asked.each("stride", n, (1,)), asked.each("dilation", n, (1,))
    pads, extras = asked.each("padding", n, (0,)), asked.each("output_padding", n, (0,))
    return tuple(
        transposed_window(size, Window(k, stride, product((2, pad)), dilation), extra)
        for size, k, stride, pad, dilation, extra in zip(
            space, kernel, strides, pads, dilations, extras, strict=True
        )
    )


def _batch_norm(asked: Asked) -> Known:
    held = (asked.shape(n) for n in ("running_mean", "running_var", "weight", "bias"))
    channels = next((shape[0] for shape in held if shape), None)
    rank = asked.call["rank"]
    if rank is not None:
        asked.prove((None, channels, *(None,) * (rank - 2)))
    found = asked.same()
    if isinstance(found, Array) and len(found.shape) > 1:
        asked.state.equate(found.shape[1:2], (channels,))
    return found


def _group_norm(asked: Asked) -> Known:
    found, weight = asked.same(), asked.shape("weight")
    if isinstance(found, Array) and len(found.shape) > 1 and weight:
        asked.state.equate(found.shape[1:2], weight)
    return found


def _layer_norm(asked: Asked) -> Known:
    found, normalized = asked.same(), asked.sizes("normalized_shape")
    if isinstance(found, Array) and normalized and len(normalized) <= len(found.shape):
        asked.state.equate(found.shape[-len(normalized) :], normalized)
    return found


def _linear(asked: Asked) -> Known:
    data, weight = asked.shape(), asked.shape("weight")
    if not data:
        return None
    if weight is None:
        return Array((*data[:-1], None)) if asked.call.module is not None else None
    asked.state.equate(data[-1:], weight[-1:])
    return Array((*data[:-1], *weight[:-1]))


def _embedding(asked: Asked) -> Known:
    name = "indices" if "indices" in asked.call.arguments else "input"
    module, weight = asked.call.module, asked.shape("weight")
    data = asked.state.known(asked.data) if module is not None else asked.known(name)
    if isinstance(module, nn.Embedding):
        weight = tuple(module.weight.shape)
    return Array((*data.shape, weight[-1])) if isinstance(data, Array) and weight else None


# ---- pooling and resampling ----


def _pool(asked: Asked) -> Known:
    n = int(asked.call.op[-2])
    data = asked.shape()
    if data is None or len(data) not in (n + 1, n + 2):
        return None
    kernels = asked.each("kernel_size", n, (None,))
    strides = asked.each("stride", n, kernels)
    pads, dilations = asked.each("padding", n, (0,)), asked.each("dilation", n, (1,))
    space = (
        Window(k, stride, product((2, pad)), dilation, bool(asked.call["ceil_mode"])).over(size)
        for size, k, stride, pad, dilation in zip(
            data[-n:], kernels, strides, pads, dilations, strict=True
        )
    )
    return _with_indices(asked, Array((*data[:-n], *space)))


def _adaptive_pool(asked: Asked) -> Known:
    n = int(asked.call.op[-2])
    data, output = asked.shape(), asked.call["output_size"]
    if data is None or len(data) not in (n + 1, n + 2):
        return None
    made = asked.each("output_size", n, (None,))
    wanted = list(output) if isinstance(output, list | tuple) else [output]
    kept = [k for k, want in enumerate(wanted * (n // len(wanted))) if want is None]
    space = (size if k in kept else made[k] for k, size in enumerate(data[-n:]))
    return _with_indices(asked, Array((*data[:-n], *space)))


def _with_indices(asked: Asked, found: Array) -> Known:
    several = asked.call["return_indices"]
    return (found, found) if several else found


def _interpolate(asked: Asked) -> Known:
    wanted = asked.known("size")
    data = asked.shape()
    if data is None and isinstance(wanted, tuple):
        data = asked.prove((None,) * (len(wanted) + 2))
    if data is None or len(data) < 3:
        return None
    space = data[2:]
    if asked.call["size"] is not None:
        return Array((*data[:2], *asked.each("size", len(space), (None,))))
    scale = asked.call["scale_factor"]
    scales = scale if isinstance(scale, list | tuple) else (scale,) * len(space)
    if len(scales) != len(space):
        return None
    return Array((*data[:2], *map(_scaled, space, scales)))


def _scaled(size: Dim, scale: Any) -> Dim:
    whole = isinstance(scale, int | float) and scale == int(scale)
    return product((size, int(scale))) if whole else None


def _pad(asked: Asked) -> Known:
    data, pads = asked.shape(), asked.sizes("pad")
    if data is None or pads is None or len(pads) % 2 or len(pads) > 2 * len(data):
        return None
    made = list(data)
    for k in range(len(pads) // 2):
        made[-1 - k] = added(made[-1 - k], added(pads[2 * k], pads[2 * k + 1]))
    return Array(tuple(made))


def _shuffle(asked: Asked) -> Known:
    data, factor = asked.shape(), asked.size("upscale_factor")
    if data is None or len(data) < 3 or not isinstance(factor, int):
        return None
    space = (product((size, factor)) for size in data[-2:])
    return Array((*data[:-3], quotient(data[-3], factor * factor), *space))


def _unshuffle(asked: Asked) -> Known:
    data, factor = asked.shape(), asked.size("downscale_factor")
    if data is None or len(data) < 3 or not isinstance(factor, int):
        return None
    space = (quotient(size, factor) for size in data[-2:])
    return Array((*data[:-3], product((data[-3], factor * factor)), *space))


def _grid_sample(asked: Asked) -> Known:
    data, grid = asked.shape(), asked.shape("grid")
    if grid is None:
        return None if data is None else Array((*data[:2], *(None,) * (len(data) - 2)))
    data = data or asked.prove((None,) * len(grid))
    return Array((*data[:2], *grid[1:-1])) if data and len(data) == len(grid) else None


def _by_rank(name: str, rule: Rule) -> dict[str, Rule]:
    return {f"{name}{n}d": rule for n in (1, 2, 3)}


LAYERS: Mapping[str, Rule] = {
    **_by_rank("conv", _conv), **_by_rank("conv_transpose", _conv),
    **_by_rank("max_pool", _pool), **_by_rank("avg_pool", _pool), **_by_rank("lp_pool", _pool),
    **_by_rank("adaptive_avg_pool", _adaptive_pool),
    **_by_rank("adaptive_max_pool", _adaptive_pool),
    "batch_norm": _batch_norm, "group_norm": _group_norm, "layer_norm": _layer_norm,
    "linear": _linear, "embedding": _embedding, "Embedding": _embedding,
    "interpolate": _interpolate, "upsample": _interpolate, "upsample_nearest": _interpolate,
    "upsample_bilinear": _interpolate,
    "pad": _pad, "constant_pad_nd": _pad,
    "pixel_shuffle": _shuffle, "pixel_unshuffle": _unshuffle,
    "grid_sample": _grid_sample, "grid_sampler": _grid_sample,
}  # fmt: skip
