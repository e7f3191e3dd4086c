"""Runs a torch model on the CPU or on CUDA, in its own types, or says that it can't."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnfold.errors import ProviderError
from bnfold.verify.result import ProviderRun
from bnfold.verify.subject import Feeds, Outputs, RunOptions
from bnfold.verify.torch_calling import Call, outputs_of
from bnfold.verify.torch_copies import Replica
from bnfold.verify.torch_devices import (
    device_name,
    device_of,
    measured_tf32,
    options_read_back,
    provider_of,
    settled,
)
from bnfold.verify.torch_lift import graph_called


class TorchRunner:
    """A copy of a model on one device.

    Args:
        model: A module or a program.
        name: What messages call it.
        call: How it is called.
        provider: ``CPUExecutionProvider`` or ``CUDAExecutionProvider``.
        options: How to run it.

    Raises:
        UsageError: Torch has no such provider.
        ProviderError: The device is missing.
    """

    def __init__(
        self, model: Any, name: str, call: Call, provider: str, options: RunOptions
    ) -> None:
        self.provider = provider
        self._device = device_of(provider)
        self._name, self._call, self._options = name, call, options
        self._replica = Replica(model, name, lambda t: t.to(self._device), self._device)
        self._placed: Placement | None = None

    def run(self, feeds: Feeds) -> Outputs:
        """Computes every output, by name.

        Raises:
            InconclusiveError: Torch could not run the model on these inputs.
        """
        with settled(self._device, self._options):
            args, kwargs = self._call.arguments(feeds, self._device)
            if self._placed is not None or not self._options.profile:
                return outputs_of(self._replica.run(args, kwargs))
            # Once: what is asked of every operator takes its time.
            self._placed = Placement(self._device)
            with self._placed:
                result = self._replica.run(args, kwargs)
            return outputs_of(result)

    def certificate(self) -> ProviderRun:
        """Where every operator ran in the first run.

        Raises:
            ProviderError: One ran elsewhere; names it.
        """
        placed = self._placed or Placement(self._device)
        if placed.strays:
            raise ProviderError(
                f"{self.provider} was asked for, but torch computed elsewhere: "
                f"{', '.join(placed.strays)}", file=self._name,
                todo="create tensors on the device of the inputs",
            )  # fmt: skip
        with settled(self._device, self._options):
            tf32, error = measured_tf32(self._device, self._options.tf32)
            return ProviderRun(
                self.provider, f"torch {torch.__version__}", device_name(self._device),
                options_read_back(self._device),
                ran={provider_of(kind): count for kind, count in placed.counts.items()},
                elsewhere=tuple(placed.elsewhere), tf32=tf32, tf32_error=error,
            )  # fmt: skip


class Placement(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run on each kind of device.

    Attributes:
        counts: How many, by kind of device.
        elsewhere: Operators that ran on another kind than the one that was asked for.
        strays: Those of them that computed with floats, and not only with a number or with sizes.
    """

    supports_higher_order_operators = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kind = device.type
        self.counts: Counter[str] = Counter()
        self.elsewhere: list[str] = []
        self.strays: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        if isinstance(func, torch._ops.HigherOrderOperator):
            called = graph_called(func, args)
            if called is None:
                return func(*args, **(kwargs or {}))
            with self:
                return called[0](*called[1], **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        if made and not _is_copy_between_devices(func):
            self.counts[made[0].device.type] += 1
            self._note(str(func), made)
        return result

    def _note(self, operator: str, made: list[Tensor]) -> None:
        others = [value for value in made if value.device.type != self._kind]
        if not others:
            return
        label = f"{operator} ({others[0].device.type})"
        if label not in self.elsewhere:
            self.elsewhere.append(label)
        if label not in self.strays and any(_counts(value) for value in others):
            self.strays.append(label)


def _counts(value: Tensor) -> bool:
    """Whether it is more than a number or a list of sizes."""
    return value.is_floating_point() and value.dim() > 0


def _is_copy_between_devices(func: Any) -> bool:
    return str(func) in ("aten._to_copy.default", "aten.copy_.default")
