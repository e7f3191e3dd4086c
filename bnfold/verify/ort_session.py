"""Makes a session of ONNX Runtime on one provider, or says why it can't be made."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import onnx

from bnfold.errors import InconclusiveError, InvalidModelError, ProviderError, UsageError
from bnfold.verify.models import TWO_GIGABYTES, nbytes
from bnfold.verify.ort_log import Heard, heard, reason_in
from bnfold.verify.providers import CPU, NVIDIA, library_hint, options_for
from bnfold.verify.subject import RunOptions

_NO_FALLBACK = "session.disable_cpu_ep_fallback"
_STOP_SPINNING = "session.force_spinning_stop"
_RECORD = "session.record_ep_graph_assignment_info"


def open_session(
    ort: Any,
    model: onnx.ModelProto | Path,
    provider: str,
    options: RunOptions,
    profile: Path | None = None,
) -> Any:
    """A session on ``provider``, which comes first in it.

    Where the provider leaves nodes to the CPU the session is made all the same: its profile tells
    which, and `bnfold.verify.placement` judges them.

    Args:
        ort: The module ``onnxruntime``.
        model: A proto with its weights, or a path; above 2 GB it must be a path.
        provider: Its full name; it must be among the available ones.
        options: How it is to run.
        profile: Where to write the profile: the beginning of a file's path.

    Raises:
        ProviderError: The provider did not start.
        InvalidModelError: ONNX Runtime refuses the model.
        InconclusiveError: There is no kernel for an operator.
        UsageError: A proto is above 2 GB.
    """
    source, file = _source(model), str(model) if isinstance(model, Path) else ""
    if provider in NVIDIA and hasattr(ort, "preload_dlls"):
        with redirect_stdout(StringIO()):  # it prints what it misses; the session says it again
            ort.preload_dlls()
    said = Heard()
    try:
        with heard() as said:
            session = _made(ort, source, provider, options, profile)
    except Exception as error:
        raise _refusal(error, said, provider, file) from error
    listed = session.get_providers()
    if listed[:1] != [provider]:
        why = said.reason or f"ONNX Runtime chose {', '.join(listed)}"
        raise _did_not_start(provider, why)
    return session


def _made(
    ort: Any, source: str | bytes, provider: str, options: RunOptions, profile: Path | None
) -> Any:
    """First with every node on the provider; where ONNX Runtime refuses that, without."""

    def make(alone: bool) -> Any:
        return ort.InferenceSession(
            source,
            _session_options(ort, options, profile, alone=alone),
            providers=[(provider, options_for(provider, options))],
            # Else a provider that fails is replaced by the CPU, here and in the middle of a run.
            enable_fallback=0,
        )

    if provider == CPU:
        return make(False)
    try:
        return make(True)
    except Exception as error:
        if "CPU EP" not in str(error):
            raise
    return make(False)


def _session_options(ort: Any, options: RunOptions, profile: Path | None, *, alone: bool) -> Any:
    made = ort.SessionOptions()
    # Off, or ORT folds the reference's BatchNorm for us and the test proves nothing.
    level = "ORT_ENABLE_ALL" if options.optimise else "ORT_DISABLE_ALL"
    made.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    made.log_severity_level = 4  # what it would say comes as an exception too
    if options.threads is not None:
        made.intra_op_num_threads = options.threads
    if options.optimise:
        # Else the threads of one session wait in a loop while the next one is timed.
        made.add_session_config_entry(_STOP_SPINNING, "1")
    if alone:
        made.add_session_config_entry(_NO_FALLBACK, "1")
    if profile is not None:
        made.add_session_config_entry(_RECORD, "1")
        made.enable_profiling = True
        made.profile_file_prefix = str(profile)
    return made


def _refusal(error: Exception, said: Heard, provider: str, file: str) -> Exception:
    met = words(error)
    kind = type(error).__name__
    if kind in ("InvalidGraph", "InvalidProtobuf", "NoSuchFile"):
        return InvalidModelError(f"ONNX Runtime refuses the model: {met}", file=file)
    if provider != CPU and (why := said.reason or reason_in(str(error))):
        return _did_not_start(provider, why)
    if provider != CPU:
        return ProviderError(
            f"{provider} can't run this model alone: {met}", file=file,
            todo="check on the provider that will run it, or with --provider cpu",
        )  # fmt: skip
    if kind == "NotImplemented":
        return InconclusiveError(f"ONNX Runtime has no kernel on {provider}: {met}", file=file)
    return InvalidModelError(f"ONNX Runtime refuses the model: {met}", file=file)


def _did_not_start(provider: str, why: str) -> ProviderError:
    return ProviderError(
        f"{provider} was asked for, but did not start: {why}", todo=library_hint(why)
    )


def _source(model: onnx.ModelProto | Path) -> str | bytes:
    if isinstance(model, Path):
        return str(model)
    if nbytes(model) > TWO_GIGABYTES:
        raise UsageError("a model above 2 GB can't be run from memory", todo="pass it as a path")
    content: bytes = model.SerializeToString()
    return content


def words(error: Exception) -> str:
    """The first line of an error of ONNX Runtime."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
