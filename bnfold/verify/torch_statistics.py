"""What a torch model says of its inputs: running statistics behind the first layer, lookup tables.

The model is run a few times on constant inputs, and its operators are watched. A tensor that goes
from ``b`` to ``a + b`` on each channel when the input goes from 0 to 1 is ``a x + b``; where a
convolution or a product takes it and a BatchNorm takes the result, the two say what the input
looked like in training. Indices that go from 0 to 1 are the input itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnfold.verify.dtypes import family
from bnfold.verify.statistics import FirstLayer, InputStatistics, fit, seen_directly
from bnfold.verify.subject import Feeds, TensorSpec
from bnfold.verify.synthetic import Limit
from bnfold.verify.torch_copies import Replica
from bnfold.verify.torch_subject import TorchSubject, tensors_in

F64 = NDArray[np.float64]

_CPU = torch.device("cpu")
# Layers of one input are among the first that are run.
_MOST_SITES = 16
_MOST_VALUES = 1 << 24


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """What is known of the inputs of a torch model, by name, as `synthetic` takes it."""

    statistics: Mapping[str, InputStatistics]
    limits: Mapping[str, Limit]


@dataclass(frozen=True, slots=True, eq=False)
class _Site:
    """A BatchNorm behind a linear operator, or alone, and what came in; still without scale."""

    taken: F64
    layer: FirstLayer


@dataclass(slots=True, eq=False)
class _Seen:
    sites: list[_Site] = field(default_factory=list)
    lookups: list[tuple[int, NDArray[Any]]] = field(default_factory=list)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first BatchNorms and every lookup."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = _Seen()
        self._made: dict[int, tuple[Tensor, Tensor, FirstLayer]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "embedding":
            self.seen.lookups.append((len(args[0]), args[1].cpu().numpy().copy()))
        elif "batch_norm" in name and len(self.seen.sites) < _MOST_SITES:
            self._norm(args)
        elif len(self._made) < _MOST_SITES and isinstance(result, Tensor):
            layer = _linear(name, args)
            if layer is not None:  # with the result, whose id stays its own so
                self._made[id(result)] = (result, layer[0], layer[1])
        return result

    def _norm(self, args: tuple[Any, ...]) -> None:
        if len(args) < 5 or not all(isinstance(a, Tensor) for a in args[3:5]):
            return
        mean, variance = _wide(args[3]), _wide(args[4])
        made = self._made.get(id(args[0]))
        if made is None:
            own = np.zeros((0, 0))
            bare = FirstLayer(own, own, 1, own, own, mean, variance)
            self._note(args[0], bare)
        else:
            self._note(made[1], replace(made[2], mean=mean, variance=variance))

    def _note(self, taken: Tensor, layer: FirstLayer) -> None:
        if taken.numel() <= _MOST_VALUES:
            self.seen.sites.append(_Site(_wide(taken), layer))


def _linear(name: str, args: tuple[Any, ...]) -> tuple[Tensor, FirstLayer] | None:
    """What a linear operator takes, and its weights."""
    none = np.zeros(0)
    if name == "convolution" and not args[6] and args[1].numel() <= _MOST_VALUES:
        weight = _wide(args[1])
        bias = np.zeros(len(weight)) if args[2] is None else _wide(args[2])
        layer = FirstLayer(
            weight, bias, args[8], none, none, none, none, tuple(args[5]),
            tuple(args[0].shape[2:]),
        )  # fmt: skip
        return args[0], layer
    if name in ("addmm", "mm") and args[-1].numel() <= _MOST_VALUES:
        weight = _wide(args[-1]).T
        bias = np.zeros(len(weight)) if name == "mm" else _wide(args[0])
        if weight.ndim == 2 and bias.shape == (len(weight),):
            return args[-2], FirstLayer(weight, bias, 1, none, none, none, none)
    return None


def _wide(tensor: Tensor) -> F64:
    return np.asarray(tensor.detach().cpu().double().numpy()).copy()


# ---- probing ----


def torch_facts(subject: TorchSubject) -> TorchFacts:
    """What a torch model says of its inputs.

    Args:
        subject: The unfolded model; run a few times, and left as it is.

    Returns:
        Nothing of an input that has no BatchNorm in reach, or where the model can't be run on
        constants.
    """
    statistics: dict[str, InputStatistics] = {}
    limits: dict[str, Limit] = {}
    with suppress(Exception):  # facts are a help: whatever is wrong with the model shows later
        probe = _Probe(subject)
        for spec in subject.inputs:
            one = probe.seen(spec, 1)
            if spec.dtype is not None and family(spec.dtype) == "float":
                known = _statistics(spec, probe.zero, one, probe.seen(spec, 2))
                statistics |= {} if known is None else {spec.name: known}
            else:
                rows = _rows(probe.zero, one)
                limits |= {} if rows is None else {spec.name: Limit(0, rows)}
    return TorchFacts(statistics, limits)


class _Probe:
    def __init__(self, subject: TorchSubject) -> None:
        self._subject = subject
        self._device = next((t.device for t in tensors_in(subject.model)), _CPU)
        self._replica = Replica(subject.model, subject.name, lambda tensor: tensor, self._device)
        self.zero = self._run(self._constants())

    def seen(self, spec: TensorSpec, value: int) -> _Seen:
        """With ``value`` all over one input, and zero over the others."""
        return self._run(self._constants() | {spec.name: _filled(spec, value)})

    def _constants(self) -> dict[str, NDArray[Any]]:
        return {spec.name: _filled(spec, 0) for spec in self._subject.inputs}

    def _run(self, feeds: Feeds) -> _Seen:
        args, kwargs = self._subject.call.arguments(feeds, self._device)
        watch = _Watch()
        with torch.no_grad(), watch:
            self._replica.run(args, kwargs)
        return watch.seen


def _filled(spec: TensorSpec, value: int) -> NDArray[Any]:
    sizes = [size if isinstance(size, int) else 2 for size in spec.shape or ()]
    return np.full(sizes, value).astype(spec.dtype)


def _rows(zero: _Seen, one: _Seen) -> int | None:
    """The rows of the smallest table that the input is looked up in."""
    found = [
        rows for (rows, before), (_, after) in zip(zero.lookups, one.lookups, strict=True)
        if before.size and not before.any() and (after == 1).all()
    ]  # fmt: skip
    return min(found, default=None)


def _statistics(spec: TensorSpec, zero: _Seen, one: _Seen, two: _Seen) -> InputStatistics | None:
    for before, after, further in zip(zero.sites, one.sites, two.sites, strict=True):
        units = _units(spec, before.taken, after.taken, further.taken)
        if units is None:
            continue
        scale, shift = units
        layer = replace(before.layer, scale=scale, shift=shift)
        if not layer.weight.size:
            return seen_directly(layer, 1, spatial=len(spec.shape or ()) > 2)
        if layer.weight.shape[1] * layer.groups == scale.size:
            return fit(layer, 1)
    return None


def _units(spec: TensorSpec, zero: F64, one: F64, two: F64) -> tuple[F64, F64] | None:
    """``a`` and ``b`` of each channel where a value is ``a x + b`` of the input, else None."""
    shape = tuple(spec.shape or ())
    if len(shape) < 2 or zero.shape != one.shape or zero.ndim != len(shape):
        return None
    if any(isinstance(n, int) and n != m for n, m in zip(shape, zero.shape, strict=True)):
        return None
    scale, shift = (np.moveaxis(v, 1, 0).reshape(v.shape[1], -1) for v in (one - zero, zero))
    straight = np.allclose(two - one, one - zero, rtol=1e-2, atol=1e-3 * float(abs(scale).max()))
    alike = all(np.allclose(v, v[:, :1], rtol=1e-3, atol=1e-5) for v in (scale, shift))
    return (scale[:, 0], shift[:, 0]) if straight and alike and scale.all() else None
