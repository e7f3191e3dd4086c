"""Layers with the geometry of a merge: new ones, those that are there, and calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from bnfold.planning import Merge

_LAYERS: tuple[Any, ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layer_of(merge: Merge, weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Module:
    """The module that does what all of ``merge`` did.

    Args:
        merge: What became one operator.
        weight: Its weight, (outs, ins / groups, *positions).
        bias: Its bias, (outs,).
        trained: Whether both require a gradient.
    """
    kind = _LAYERS[len(merge.taps)]
    kernel = [1] * len(merge.taps)
    sizes = (1, 1, kernel) if merge.taps else (1, 1)
    layer: nn.Module = kind(*sizes, bias=bias is not None, device="meta")
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=trained))
    if bias is not None:
        layer.register_parameter("bias", nn.Parameter(bias, requires_grad=trained))
    read_taps(layer, merge, weight.shape[0])
    return layer.eval()


def read_taps(module: nn.Module, merge: Merge, outs: int) -> None:
    """Let a layer read what all of ``merge`` read, and make ``outs`` channels of it."""
    if not merge.taps:
        stated: dict[str, Any] = {"in_features": merge.channels, "out_features": outs}
    else:
        padding = tuple(taps.begin for taps in merge.taps)
        stated = {
            "in_channels": merge.channels, "out_channels": outs, "groups": merge.groups,
            "kernel_size": tuple(taps.count for taps in merge.taps), "padding": padding,
            "stride": tuple(taps.stride for taps in merge.taps),
            "dilation": tuple(taps.step for taps in merge.taps),
            "_reversed_padding_repeated_twice": [p for p in reversed(padding) for _ in (0, 1)],
        }  # fmt: skip
    for name, value in stated.items():
        setattr(module, name, value)


def restated(node: fx.Node, merge: Merge) -> None:
    """Let the call of a convolution, which reads its tensors already, read ``merge.taps``."""
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    tensors = (given["input"], given["weight"], given.get("bias"))
    geometry: list[Any] = [
        [taps.stride for taps in merge.taps],
        [taps.begin for taps in merge.taps],
        [taps.step for taps in merge.taps],
    ]
    name = getattr(node.target, "_opname", getattr(node.target, "__name__", ""))
    if name == "convolution":
        geometry += [False, [0] * len(merge.taps)]
    if isinstance(node.target, torch._ops.OpOverload):  # padding may have been stated as a word
        node.target = getattr(torch.ops.aten, name).default
    node.args = (*tensors, *geometry, merge.groups)
    node.kwargs = {}
