"""What the modules of torch.nn compute, as one operation on their input and their own tensors.

A module counts as what its class says only while its forward is that class's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True, slots=True)
class Leaf:
    """One module as an operation.

    Attributes:
        op: The operation in ATen's words.
        arguments: What is no tensor, by name.
        held: Arguments that are tensors of the module, by name: the attribute.
        reads: The arguments that a caller gives, in order.
        inplace: Whether the first of these is changed in place.
    """

    op: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    held: Mapping[str, str] = field(default_factory=dict)
    reads: tuple[str, ...] = ("input",)
    inplace: bool = False


_WEIGHT_AND_BIAS = {"weight": "weight", "bias": "bias"}
_NORM = {**_WEIGHT_AND_BIAS, "running_mean": "running_mean", "running_var": "running_var"}
_PARTS_OF_FORWARD = (
    "forward", "_conv_forward", "_check_input_dim", "_output_padding", "_apply_instance_norm",
    "_handle_no_batch_input", "_get_no_batch_dim",
)  # fmt: skip


def leaf_arguments(module: nn.Module) -> Leaf | None:
    """``module`` as an operation; None when it is not known, or does something of its own."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    own = (*module._parameters.values(), *module._buffers.values())
    if any(tensor is not None and is_lazy(tensor) for tensor in own):
        return None
    for cls in type(module).__mro__:
        if cls in _TABLE:
            return _TABLE[cls](module) if is_unmodified(module, cls) else None
    return None


def is_unmodified(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether ``module`` computes what ``cls`` computes: nothing of its forward was replaced."""
    for name in _PARTS_OF_FORWARD:
        if name in vars(module):
            return False
        if getattr(type(module), name, None) is not getattr(cls, name, None):
            return False
    return type(module).__call__ is cls.__call__


# ---- linear operators ----


def _conv(module: Any) -> Leaf:
    zeros = module.padding_mode == "zeros"
    arguments = {
        "stride": list(module.stride), "dilation": list(module.dilation), "groups": module.groups,
        # Other modes pad with entries of the input, before a convolution that does not pad.
        "padding": module.padding if zeros else [0] * len(module.kernel_size),
        "padding_mode": module.padding_mode,
    }  # fmt: skip
    return Leaf(f"conv{len(module.kernel_size)}d", arguments, _WEIGHT_AND_BIAS)


def _conv_transpose(module: Any) -> Leaf:
    names = ("stride", "padding", "output_padding", "dilation", "groups")
    arguments = {name: getattr(module, name) for name in names}
    return Leaf(f"conv_transpose{len(module.kernel_size)}d", arguments, _WEIGHT_AND_BIAS)


def _linear(_: nn.Module) -> Leaf:
    return Leaf("linear", {}, _WEIGHT_AND_BIAS)


# ---- normalisations ----


def _batch_norm(module: Any) -> Leaf:
    counts = module.running_mean is None and module.running_var is None
    arguments = {
        "training": module.training or counts,
        "eps": module.eps,
        "rank": _asked_rank(module),
    }
    return Leaf("batch_norm", arguments, _NORM)


def _asked_rank(module: nn.Module) -> int | None:
    """The rank that a module asks of its input, where it asks for one."""
    for cls, rank in ((nn.BatchNorm2d, 4), (nn.BatchNorm3d, 5)):
        if isinstance(module, cls):
            return rank
    return None


def _instance_norm(module: Any) -> Leaf:
    own = module.training or not module.track_running_stats
    arguments = {"use_input_stats": own, "eps": module.eps}
    return Leaf("instance_norm", arguments, _NORM)


def _layer_norm(module: Any) -> Leaf:
    arguments = {"normalized_shape": list(module.normalized_shape), "eps": module.eps}
    return Leaf("layer_norm", arguments, _WEIGHT_AND_BIAS)


def _rms_norm(module: Any) -> Leaf:
    arguments = {"normalized_shape": list(module.normalized_shape), "eps": module.eps}
    return Leaf("rms_norm", arguments, {"weight": "weight"})


def _group_norm(module: Any) -> Leaf:
    arguments = {"num_groups": module.num_groups, "eps": module.eps}
    return Leaf("group_norm", arguments, _WEIGHT_AND_BIAS)


# ---- the rest ----


def _copied(op: str, *names: str, **held: str) -> Callable[[Any], Leaf]:
    """An operation whose arguments are attributes of the same name."""

    def leaf(module: Any) -> Leaf:
        arguments = {name: getattr(module, name) for name in names}
        return Leaf(op, arguments, held, inplace=bool(getattr(module, "inplace", False)))

    return leaf


def _dropout(module: Any) -> Leaf:
    return Leaf("dropout", {"p": module.p, "train": module.training}, inplace=module.inplace)


def _hardtanh(module: Any) -> Leaf:
    arguments = {"min_val": module.min_val, "max_val": module.max_val}
    return Leaf("hardtanh", arguments, inplace=module.inplace)


def _pad(mode: str) -> Callable[[Any], Leaf]:
    def leaf(module: Any) -> Leaf:
        value = getattr(module, "value", 0.0 if mode == "constant" else None)
        return Leaf("pad", {"pad": list(module.padding), "mode": mode, "value": value})

    return leaf


def _unflatten(module: Any) -> Leaf:
    return Leaf("unflatten", {"dim": module.dim, "sizes": list(module.unflattened_size)})


_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_MEAN_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_DIVISOR = ("divisor_override",)  # not along one axis
_BY_RANK: Mapping[str, Callable[[int], Callable[[Any], Leaf]]] = {
    "Conv": lambda _: _conv,
    "ConvTranspose": lambda _: _conv_transpose,
    "MaxPool": lambda n: _copied(f"max_pool{n}d", *_POOL),
    "AvgPool": lambda n: _copied(f"avg_pool{n}d", *_MEAN_POOL, *_DIVISOR[: n - 1]),
    "LPPool": lambda n: _copied(f"lp_pool{n}d", "norm_type", "kernel_size", "stride", "ceil_mode"),
    "AdaptiveAvgPool": lambda n: _copied(f"adaptive_avg_pool{n}d", "output_size"),
    "AdaptiveMaxPool": lambda n: _copied(f"adaptive_max_pool{n}d", "output_size", "return_indices"),
    "ConstantPad": lambda _: _pad("constant"),
    "ReflectionPad": lambda _: _pad("reflect"),
    "ReplicationPad": lambda _: _pad("replicate"),
    "CircularPad": lambda _: _pad("circular"),
    "ZeroPad": lambda _: _pad("constant"),
}

_TABLE: Mapping[type[nn.Module], Callable[[Any], Leaf]] = {
    **{getattr(nn, f"{name}{n}d"): of(n) for name, of in _BY_RANK.items() for n in (1, 2, 3)},
    nn.Linear: _linear,
    nn.BatchNorm1d: _batch_norm, nn.BatchNorm2d: _batch_norm, nn.BatchNorm3d: _batch_norm,
    nn.SyncBatchNorm: _batch_norm,
    nn.InstanceNorm1d: _instance_norm, nn.InstanceNorm2d: _instance_norm,
    nn.InstanceNorm3d: _instance_norm,
    nn.LayerNorm: _layer_norm, nn.RMSNorm: _rms_norm, nn.GroupNorm: _group_norm,
    nn.Identity: _copied("alias"),
    nn.Dropout: _dropout, nn.Dropout1d: _dropout, nn.Dropout2d: _dropout, nn.Dropout3d: _dropout,
    nn.AlphaDropout: _dropout, nn.FeatureAlphaDropout: _dropout,
    nn.ReLU: _copied("relu"), nn.ReLU6: _hardtanh, nn.Hardtanh: _hardtanh,
    nn.LeakyReLU: _copied("leaky_relu", "negative_slope"),
    nn.PReLU: _copied("prelu", weight="weight"),
    nn.Threshold: _copied("threshold", "threshold", "value"),
    nn.Flatten: _copied("flatten", "start_dim", "end_dim"), nn.Unflatten: _unflatten,
    nn.Upsample: _copied("interpolate", "size", "scale_factor", "mode", "align_corners"),
    nn.UpsamplingNearest2d: _copied("interpolate", "size", "scale_factor", "mode"),
    nn.UpsamplingBilinear2d: _copied("interpolate", "size", "scale_factor", "mode"),
    nn.PixelShuffle: _copied("pixel_shuffle", "upscale_factor"),
    nn.PixelUnshuffle: _copied("pixel_unshuffle", "downscale_factor"),
    nn.ChannelShuffle: _copied("channel_shuffle", "groups"),
}  # fmt: skip
