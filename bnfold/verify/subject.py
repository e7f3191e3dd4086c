"""What the checker asks of a model, whichever framework it comes from.

Two implementations: `bnfold.verify.onnx_subject` and `bnfold.verify.torch_subject`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bnfold.verify.result import ProviderRun

Feeds = Mapping[str, NDArray[Any]]
Outputs = dict[str, Any]
Size = int | str | None  # of an axis: a number, a symbol, or unknown


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a model.

    Attributes:
        name: Its name; outputs of torch models are called ``output0``, ``output1`` ...
        dtype: Its numpy type (``ml_dtypes`` for bfloat16); None where it is no tensor or not known.
        shape: A number, a symbol or None for each axis; None where the rank is not known.
        kind: ``tensor``, or what else it is (``sequence``, ``optional`` ...).
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[Size, ...] | None
    kind: str = "tensor"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a provider is to run a model.

    Attributes:
        tf32: Whether products of float32 may be rounded to TF32 (10 bits) on NVIDIA devices.
        threads: Threads within an operator on the CPU; the runtime's default where None.
        profile: Whether to record where every node really ran, so that `Runner.certificate` can
            tell the fact beside the promise.
        optimise: Whether the runtime may rewrite the graph and choose the fastest kernels: to time
            a model, never to check it.
    """

    tf32: bool = False
    threads: int | None = None
    profile: bool = True
    optimise: bool = False


class Runner(Protocol):
    """A model made ready on a provider."""

    def run(self, feeds: Feeds) -> Outputs:
        """Computes every output, by name.

        Raises:
            InconclusiveError: The provider could not run the model on these inputs.
        """
        ...

    def certificate(self) -> ProviderRun:
        """Where every node ran, once; the runner can't be used afterwards.

        Raises:
            ProviderError: A node ran elsewhere; names it.
        """
        ...


class Subject(Protocol):
    """A model under check."""

    @property
    def name(self) -> str:
        """What messages call it: its path, or ``<reference>`` and the like."""
        ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs that a caller must feed, in order."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs, in order."""
        ...

    @property
    def unit(self) -> float:
        """Half an ulp, relative, of the coarsest float type that it takes, stores or returns."""
        ...

    def oracle(self) -> Callable[[Feeds], Outputs]:
        """A function that computes the outputs in float64.

        Raises:
            InconclusiveError: An operator can't be computed.
        """
        ...

    def runner(self, provider: str, options: RunOptions) -> Runner:
        """The model on a provider, given by its full name.

        Raises:
            ProviderError: The provider is missing, or would not run the model alone.
            InvalidModelError: The runtime refuses the model.
        """
        ...
