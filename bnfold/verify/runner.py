"""Runs a model on the execution provider that was asked for, or says that it can't.

Never a quiet CPU run: the provider must be available, must come first in the session, and the
certificate shows from the runtime's own profile that the nodes ran there.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from bnfold.errors import InconclusiveError, ProviderError
from bnfold.verify import placement, tf32
from bnfold.verify.machine import cpu_name, nvidia_device
from bnfold.verify.ort_session import open_session, words
from bnfold.verify.placement import Placed
from bnfold.verify.providers import (
    CPU,
    NVIDIA,
    PROVIDERS,
    full_name,
    import_onnxruntime,
    require_available,
    runtime_name,
)
from bnfold.verify.result import ProviderRun
from bnfold.verify.subject import RunOptions

__all__ = ["CPU", "PROVIDERS", "OrtRunner", "full_name", "import_onnxruntime"]

_AS_EVER = RunOptions()


class OrtRunner:
    """One ONNX Runtime session.

    Args:
        model: A proto with its weights, or a path; above 2 GB it must be a path.
        provider: A short name (``cpu``, ``cuda``) or a full one (``CUDAExecutionProvider``).
        options: How it is to run.

    Raises:
        ProviderError: ONNX Runtime or the provider is missing, or would not run the model alone.
        InvalidModelError: ONNX Runtime refuses the model.
        InconclusiveError: There is no kernel for an operator.
        UsageError: The provider's name means nothing, or a proto is above 2 GB.
    """

    def __init__(
        self,
        model: onnx.ModelProto | Path,
        provider: str = CPU,
        options: RunOptions = _AS_EVER,
    ) -> None:
        self.provider = full_name(provider)
        self._ort = import_onnxruntime()
        require_available(self._ort, self.provider)
        self._options = options
        self._ran: tuple[Placed, ...] | None = None
        profile = self._folder() / "profile" if options.profile else None
        self._session = open_session(self._ort, model, self.provider, options, profile)
        self._promised = placement.promised(self._session)
        placement.require_promise(self._promised, self.provider)
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Computes every output, by name.

        Args:
            feeds: One array per graph input, of its type and shape.

        Raises:
            InconclusiveError: ONNX Runtime could not run the model on these inputs.
            ProviderError: Where the nodes ran can't be read from the profile.
        """
        try:
            outputs = self._session.run(None, {name: _fed(a) for name, a in feeds.items()})
        except Exception as error:
            raise InconclusiveError(
                f"ONNX Runtime can't run the model on {self.provider}: {words(error)}"
            ) from error
        if self._options.profile and self._ran is None:
            # Of one run: the assignment is fixed, and a profile of all would grow without end.
            self._ran = placement.read_profile(Path(self._session.end_profiling()))
            self._clean()
        return dict(zip(self._names, outputs, strict=True))

    def seconds(self, feeds: Mapping[str, NDArray[Any]], calls: int) -> float:
        """Wall time of one of so many calls in a row, after one that is not timed.

        Raises:
            InconclusiveError: ONNX Runtime could not run the model on these inputs.
        """
        self.run(feeds)
        run, fed = self._session.run, {name: _fed(array) for name, array in feeds.items()}
        start = time.perf_counter()
        for _ in range(calls):
            run(None, fed)
        return (time.perf_counter() - start) / calls

    def certificate(self) -> ProviderRun:
        """Where every node ran, and how exactly.

        Raises:
            ProviderError: A node that computes more than a shape ran elsewhere, nothing was run,
                or products were rounded to TF32 against the options.
        """
        asked = self._session.get_provider_options().get(self.provider, {})
        error = tf32.measured(self._ort, self.provider, self._options)
        return ProviderRun(
            provider=self.provider,
            runtime=runtime_name(self._ort),
            device=self._device(),
            options={k: v for k, v in asked.items() if v} | tf32.override(self.provider),
            promised=placement.count(self._promised),
            ran=placement.count(self._ran or ()),
            elsewhere=self._elsewhere(),
            tf32=tf32.judged(self.provider, self._options.tf32, error),
            tf32_error=error,
        )

    def _elsewhere(self) -> tuple[str, ...]:
        if self._ran is not None:
            return placement.require_fact(self._ran, self.provider)
        if self.provider != CPU and self._options.profile:
            raise ProviderError(f"nothing was run on {self.provider}, so nothing shows it can")
        return ()

    def _device(self) -> str:
        if self.provider == CPU:
            return cpu_name()
        return nvidia_device() if self.provider in NVIDIA else ""

    def _folder(self) -> Path:
        folder = tempfile.mkdtemp(prefix="bnfold-profile-")
        self._clean = weakref.finalize(self, shutil.rmtree, folder, True)
        return Path(folder)


def _fed(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array) if array.ndim else array
