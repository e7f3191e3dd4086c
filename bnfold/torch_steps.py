"""Which torch operations are affine steps, and what they do per channel.

    batch_norm instance_norm    gamma (x - mean) / sqrt(variance + eps) + beta by running statistics
    mul add sub rsub div neg    by a constant that lies along one axis, or a number
    addcmul                     constant + value * x * constant

A constant lies along an axis when every other dimension of it is 1; that it does not enlarge
what it meets has to be known from the shape of the activation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx, nn

from bnfold.affine import F64, AffineMap
from bnfold.channel_graph import Form
from bnfold.errors import InvalidModelError
from bnfold.found import FoundStep, Placed, placed
from bnfold.torch_calls import Call
from bnfold.torch_constants import UncomputableError
from bnfold.torch_facts import Facts


@dataclass(frozen=True, slots=True, eq=False)
class StepSite:
    """What a commit needs to rewrite or remove one affine step.

    Attributes:
        call: The operation.
        data: Its activation.
        trailing: How many axes stand behind the channels.
        scale: The argument that scales, if it is one; a number or a tensor.
        shift: The argument that shifts, if it is one.
    """

    call: Call
    data: fx.Node
    trailing: int = 0
    scale: str = ""
    shift: str = ""


Found = FoundStep[StepSite]


def find_step(facts: Facts, call: Call) -> Found | None:
    """Recognise ``call`` as an affine step, or None.

    Raises:
        InvalidModelError: A normalisation has parameters that mean nothing.
    """
    finder = _FINDERS.get(call.op)
    return None if finder is None else finder(facts, call)


# ---- normalisations by running statistics ----

_STATISTICS = ("weight", "bias", "running_mean", "running_var")
_DEFAULTS = (1.0, 0.0)  # of the two parameters of a normalisation that has none


def _batch_norm(facts: Facts, call: Call) -> Found | None:
    data = call["input"]
    if not isinstance(data, fx.Node) or facts.constants.is_constant(data):
        return None
    missing = call["running_mean"] is None or call["running_var"] is None
    if missing and facts.place(call).kind.startswith("InstanceNorm"):
        return None  # by statistics of the input: no batch is to blame
    training = call["training"] or call["use_input_stats"] or missing or call.op in _TRAINS
    return _by_statistics(facts, call, data, 1, training=bool(training))


def _instance_norm(facts: Facts, call: Call) -> Found | None:
    data = call["input"]
    if not isinstance(data, fx.Node) or facts.constants.is_constant(data):
        return None
    if call["use_input_stats"] or call["running_mean"] is None or call["running_var"] is None:
        return None  # by statistics of the input: no affine step, and no batch to blame
    return _by_statistics(facts, call, data, _instance_axis(facts, call, data), training=False)


def _instance_axis(facts: Facts, call: Call, data: fx.Node) -> int:
    """The module also takes an input without a batch; then its channels come first."""
    shape = facts.shape(data)
    spatial = next((int(c) for c in type(call.module).__name__ if c.isdigit()), None)
    single = spatial is not None and shape is not None and len(shape) == spatial + 1
    return 0 if single else 1


def _by_statistics(facts: Facts, call: Call, data: fx.Node, axis: int, *, training: bool) -> Found:
    site = StepSite(call, data)
    if training:
        return FoundStep(site, axis, None, Form.BOTH, training_mode=True)
    given = [call[name] for name in _STATISTICS]
    computed = [v for v in given if v is not None and not facts.constants.is_constant(v)]
    if computed:
        named = facts.constants.name(computed[0]) or str(computed[0])
        return FoundStep(site, axis, None, Form.BOTH, unproved=f"'{named}'")
    try:
        parameters = [None if v is None else facts.constants.float64(v) for v in given]
    except UncomputableError:
        named = facts.constants.name(call["running_mean"]) or facts.label(call)
        return FoundStep(site, axis, None, Form.BOTH, unproved=f"whoever loads '{named}'")
    if _is_of_other_rank(facts, call, data):
        unproved = "it reads a tensor without a batch"
        return FoundStep(site, axis, AffineMap.identity(), Form.BOTH, unproved=unproved)
    mean, variance = parameters[2], parameters[3]
    assert mean is not None
    assert variance is not None
    gamma, beta = (
        np.full(mean.size, default) if own is None else own
        for own, default in zip(parameters[:2], _DEFAULTS, strict=True)
    )
    _refuse_bad_parameters(facts, call, axis, (gamma, beta, mean, variance))
    taken = AffineMap.batch_norm(gamma, beta, mean, variance, _epsilon(facts, call))
    return FoundStep(site, axis, taken, Form.BOTH)


_RANKS = {"BatchNorm1d": (2, 3), "BatchNorm2d": (4,), "BatchNorm3d": (5,)}


def _is_of_other_rank(facts: Facts, call: Call, data: fx.Node) -> bool:
    """Whether what was taken to be a batch can't be one, as the module asks for other ranks."""
    shape = facts.shape(data)
    asked = next((r for k, r in _RANKS.items() if isinstance(call.module, getattr(nn, k))), None)
    return shape is not None and asked is not None and len(shape) not in asked


def _epsilon(facts: Facts, call: Call) -> float:
    """A float32 but for doubles: so it is in kernels of GPUs, and in files of ONNX."""
    wide = facts.dtype(call["running_var"]) == "DOUBLE"
    return float(call["eps"] if wide else np.float32(call["eps"]))


def _refuse_bad_parameters(
    facts: Facts, call: Call, axis: int, parameters: tuple[F64, ...]
) -> None:
    shape = facts.shape(call["input"])
    met = shape[axis] if shape is not None and len(shape) > axis else None
    channels = met if isinstance(met, int) else parameters[2].size
    for name, values in zip(_STATISTICS, parameters, strict=True):
        if values.ndim != 1 or values.size != channels:
            what = f"{name} has shape {list(values.shape)} for {channels} channels"
            raise InvalidModelError(what, node=facts.label(call), todo="mend the module")
    bad = np.flatnonzero(~(parameters[3] >= 0))
    if bad.size:
        what = f"the running variance of channel {bad[0]} is {parameters[3][bad[0]]}"
        raise InvalidModelError(
            what, node=facts.label(call), todo="mend the running statistics of the module"
        )


# ---- mul, add, sub, div, neg ----


def _negation(facts: Facts, call: Call) -> Found | None:
    data = call["input"]
    if not isinstance(data, fx.Node) or facts.constants.is_constant(data):
        return None
    if not facts.is_float(data):
        return None
    return FoundStep(StepSite(call, data), None, AffineMap.scaling([-1.0]), Form.EITHER)


def _binary(facts: Facts, call: Call) -> Found | None:
    constant = facts.constants.is_constant
    names = [name for name in ("input", "other") if constant(call[name])]
    if len(names) != 1 or call["rounding_mode"] is not None:
        return None
    own = names[0]
    data = call["other" if own == "input" else "input"]
    if (
        not isinstance(data, fx.Node)
        or not facts.is_tensor(data)
        or not _keeps_type(facts, call, data)
    ):
        return None
    lies = _place(facts, data, facts.shape(call[own]))
    if lies is None:
        return None
    site = StepSite(call, data, lies.trailing, **_role(call.op, own))
    try:
        taken = _binary_map(call, own, _numbers(facts, call[own], data).ravel())
    except UncomputableError as error:
        return FoundStep(site, lies.axis, None, Form.EITHER, unproved=str(error))
    if taken is None:
        return None
    return FoundStep(site, lies.axis, taken, Form.EITHER, unproved=lies.unproved)


def _numbers(facts: Facts, constant: Any, data: fx.Node) -> F64:
    """A constant in float64; a number in code is a float32 beside all but doubles."""
    if not isinstance(constant, int | float) or facts.is_double(data):
        return facts.constants.float64(constant)
    return np.asarray(np.float32(constant), dtype=np.float64)


def _keeps_type(facts: Facts, call: Call, data: fx.Node) -> bool:
    """Whether the result is of the type of the activation, so that the step may vanish."""
    before, after = facts.dtype(data), facts.dtype(call.node)
    return facts.is_float(data) and (None in (before, after) or before == after)


def _role(op: str, own: str) -> dict[str, str]:
    return {"scale": own} if op in ("mul", "div") else {"shift": own}


def _binary_map(call: Call, own: str, constant: F64) -> AffineMap | None:
    alpha = 1.0 if call["alpha"] is None else call["alpha"]
    if not isinstance(alpha, int | float):
        return None
    with np.errstate(all="ignore"):
        if call.op == "mul":
            return AffineMap.scaling(constant)
        if call.op == "div":
            return AffineMap.scaling(1.0 / constant) if own == "other" else None
        sign = {"add": (1.0, 1.0), "sub": (1.0, -1.0), "rsub": (-1.0, 1.0)}[call.op]
        if own == "other":  # rsub: other - alpha * input
            scale = sign[0] * (alpha if call.op == "rsub" else 1.0)
            factor = sign[1] * (1.0 if call.op == "rsub" else alpha)
        else:
            scale = sign[1] * (1.0 if call.op == "rsub" else alpha)
            factor = sign[0] * (alpha if call.op == "rsub" else 1.0)
        return AffineMap.of(np.full_like(constant, scale), factor * constant)


def _addcmul(facts: Facts, call: Call) -> Found | None:
    """``shift + value * x * scale``."""
    constant = facts.constants.is_constant
    factors = [name for name in ("tensor1", "tensor2") if constant(call[name])]
    value = call["value"]
    if len(factors) != 1 or not constant(call["input"]) or not isinstance(value, int | float):
        return None
    data = call["tensor2" if factors[0] == "tensor1" else "tensor1"]
    if not isinstance(data, fx.Node) or not _keeps_type(facts, call, data):
        return None
    scales, shifts = (_place(facts, data, facts.shape(call[n])) for n in (factors[0], "input"))
    if scales is None or shifts is None:
        return None
    axes = {scales.axis, shifts.axis} - {None}
    if len(axes) > 1:
        return None
    scale, shift = (facts.constants.float64(call[n]).ravel() for n in (factors[0], "input"))
    along = scales if scales.axis is not None else shifts
    taken = AffineMap(value * scale, shift)
    site = StepSite(call, data, along.trailing, scale=factors[0], shift="input")
    return FoundStep(site, along.axis, taken, Form.BOTH, unproved=along.unproved)


def _place(facts: Facts, data: fx.Node, constant: tuple[Any, ...] | None) -> Placed | None:
    if constant is None or sum(size != 1 for size in constant) > 1:
        return None
    return placed(facts.shape(data), constant)


_TRAINS = frozenset({"_native_batch_norm_legit_functional", "_batch_norm_with_update"})
_FINDERS: Mapping[str, Callable[[Facts, Call], Found | None]] = {
    "batch_norm": _batch_norm, "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm, "_batch_norm_no_update": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_native_batch_norm_legit_functional": _batch_norm, "_batch_norm_with_update": _batch_norm,
    "instance_norm": _instance_norm,
    "neg": _negation, "negative": _negation,
    "mul": _binary, "add": _binary, "sub": _binary, "rsub": _binary, "div": _binary,
    "multiply": _binary, "subtract": _binary, "divide": _binary, "true_divide": _binary,
    "addcmul": _addcmul,
}  # fmt: skip
