"""Latency of ONNX models side by side, on a runtime that may do with them what it can.

`bnfold.verify.paired` has whose turn it is and what is noise; here the sessions are made and fed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from bnfold.channel_graph import Affine
from bnfold.errors import BnfoldError, InvalidModelError, UsageError
from bnfold.onnx_describe import describe
from bnfold.onnx_model import size_of
from bnfold.onnx_read import from_proto, read_model
from bnfold.onnx_shapes import infer_shapes
from bnfold.report.bench import BenchModel, BenchResult, Setting, Speed, Timing
from bnfold.verify.ends import Progress
from bnfold.verify.environment import environment
from bnfold.verify.inputs import user_samples
from bnfold.verify.interface import require_same_inputs
from bnfold.verify.machine import cores, cpu_name, nvidia_device
from bnfold.verify.memory import memory_guard
from bnfold.verify.models import LoadedModel, load_model
from bnfold.verify.onnx_inputs import drawn_for
from bnfold.verify.onnx_subject import OnnxSubject
from bnfold.verify.paired import F64, Compared, Player, compared, noise_of, take_turns
from bnfold.verify.providers import (
    CPU,
    NVIDIA,
    full_name,
    import_onnxruntime,
    require_available,
    runtime_name,
)
from bnfold.verify.result import ProviderRun
from bnfold.verify.runner import OrtRunner
from bnfold.verify.samples import Samples
from bnfold.verify.subject import Feeds, RunOptions


@dataclass(frozen=True, slots=True)
class _Entry:
    """A model that is to be timed: what is said of it, and what a session is made from."""

    model: BenchModel
    source: onnx.ModelProto | Path


def time_models(
    models: Sequence[Any], *, provider: str = "cpu", threads: Sequence[int] = (), runs: int = 30,
    inputs: Any = None, seed: int = 0, allow_tf32: bool = False, on_progress: Progress,
) -> BenchResult:  # fmt: skip
    """Times models in turn; arguments, result and errors are those of `bnfold.bench`."""
    place, numbers = full_name(provider), _threads(threads, provider, runs)
    if not models:
        raise UsageError("there is no model to time", todo="give one or more")
    ort = import_onnxruntime()
    require_available(ort, place)
    entries, samples = _entered(models, inputs, seed)
    options = RunOptions(tf32=allow_tf32, profile=False, optimise=True)
    with memory_guard(entries[0].model.file):
        certificates = _certificates(entries, place, options, samples.feeds[0])
        settings = []
        for number in numbers:
            chosen = replace(options, threads=number)
            stage = f"on {number} thread{'s' * (number > 1)}"
            with _sessions(entries, place, chosen, samples.feeds) as players:
                seconds, calls = take_turns(players, runs, partial(on_progress, stage))
            settings.append(setting_of(number, calls, seconds))
    return BenchResult(
        tuple(entry.model for entry in entries), tuple(settings), place, _device(place),
        runtime_name(ort), runs, samples.seed, samples.uses(), certificates, environment(),
    )  # fmt: skip


def _threads(threads: Sequence[int], provider: str, runs: int) -> tuple[int, ...]:
    """The numbers of threads that were asked for; else one, and on the CPU all cores as well."""
    if runs < 1:
        raise UsageError(f"{runs} runs measure nothing", todo="take 30")
    for number in threads:
        if number < 1:
            raise UsageError(f"nothing runs on {number} threads", todo="take 1 or more")
    usual = (1, cores()) if full_name(provider) == CPU else (1,)
    return tuple(dict.fromkeys(threads or usual))


def setting_of(threads: int, calls: int, seconds: F64) -> Setting:
    """What was measured on one number of threads.

    Args:
        threads: Their number.
        calls: How many calls in a row are a turn.
        seconds: Of a call, of shape (sessions, rounds): each model, then the baseline again.
    """
    baseline, noise = np.sqrt(seconds[0] * seconds[-1]), noise_of(seconds[0], seconds[-1])
    times = [baseline, *seconds[1:-1]]
    timings = [_timing(row, baseline, noise, first=not index) for index, row in enumerate(times)]
    return Setting(threads, calls, noise, tuple(timings))


def _timing(seconds: F64, baseline: F64, noise: float, *, first: bool) -> Timing:
    found = compared(seconds, baseline)
    lower, median, upper = (float(q) * 1e3 for q in np.quantile(seconds, (0.25, 0.5, 0.75)))
    milliseconds = tuple(float(one) * 1e3 for one in seconds)
    if first:
        return Timing(median, (lower, upper), 1.0, None, Speed.BASELINE, milliseconds)
    speed = _speed(found, noise)
    return Timing(median, (lower, upper), found.ratio, found.interval, speed, milliseconds)


def _speed(found: Compared, noise: float) -> Speed:
    beyond = found.beyond(noise)
    if beyond:
        return Speed.SLOWER if beyond > 0 else Speed.FASTER
    return Speed.SAME if found.is_same else Speed.UNCLEAR


# ---- what is timed, and on what ----


def _entered(models: Sequence[Any], inputs: Any, seed: int) -> tuple[list[_Entry], Samples]:
    """Each model, and what all of them are fed; only the first one's weights are looked at."""
    first, entries = None, []
    samples = Samples(())
    for number, model in enumerate(models):
        loaded = load_model(model, f"<model {number + 1}>")
        subject = OnnxSubject(loaded)
        entries.append(_Entry(_described(model, loaded), loaded.session_source))
        if first is None:
            first = OnnxSubject(LoadedModel(loaded.name, _without_weights(loaded.proto)))
            given = inputs is not None
            samples = user_samples(subject.inputs, inputs) if given else drawn(loaded, seed)
        require_same_inputs(first, subject)
    return entries, samples


def drawn(model: LoadedModel, seed: int) -> Samples:
    """One ordinary sample, as `bnfold.check` would draw it."""
    try:
        return drawn_for(model.proto, 1, seed)
    except UsageError as error:
        raise error.at(model.name) from error


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A model that has the same inputs and outputs."""
    kept = onnx.ModelProto()
    stored = {tensor.name for tensor in proto.graph.initializer}
    kept.graph.input.extend(value for value in proto.graph.input if value.name not in stored)
    kept.graph.output.extend(proto.graph.output)
    return kept


def _described(model: Any, loaded: LoadedModel) -> BenchModel:
    graph, shapes = _graph(model, loaded)
    try:
        operators = describe(graph, shapes).graph.operators
    except InvalidModelError as error:
        raise error.at(loaded.name) from error
    steps = sum(isinstance(operator, Affine) for operator in operators)
    return BenchModel(loaded.name, size_of(graph), steps)


def _graph(model: Any, loaded: LoadedModel) -> tuple[ir.Model, Mapping[str, Any]]:
    if loaded.path is not None:
        file = read_model(loaded.path)
        return file.model, file.shapes
    graph = model if isinstance(model, ir.Model) else from_proto(loaded.proto, loaded.name)
    return graph, infer_shapes(graph)


def _certificates(
    entries: Sequence[_Entry], provider: str, options: RunOptions, feeds: Feeds
) -> tuple[ProviderRun, ...]:
    """Where each model ran, in a session of its own: recording it would take time."""
    if provider == CPU:
        return ()
    recorded = replace(options, profile=True)
    found = []
    for entry in entries:
        with _named(entry):
            runner = OrtRunner(entry.source, provider, recorded)
            runner.run(feeds)
            found.append(runner.certificate())
    return tuple(found)


@contextmanager
def _sessions(
    entries: Sequence[_Entry], provider: str, options: RunOptions, feeds: Sequence[Feeds]
) -> Iterator[list[Player]]:
    """A session of each model, and a second one of the first; gone afterwards."""
    players: list[Player] = []
    for entry in (*entries, entries[0]):
        with _named(entry):
            players.append(_player(entry, OrtRunner(entry.source, provider, options), feeds))
    yield players
    players.clear()


def _player(entry: _Entry, runner: OrtRunner, feeds: Sequence[Feeds]) -> Player:
    def play(number: int, calls: int) -> float:
        with _named(entry):
            return runner.seconds(feeds[number % len(feeds)], calls)

    return play


@contextmanager
def _named(entry: _Entry) -> Iterator[None]:
    """Errors name the model that they are about."""
    try:
        yield
    except BnfoldError as error:
        raise error if error.file else error.at(entry.model.file) from error


def _device(provider: str) -> str:
    if provider == CPU:
        return cpu_name()
    return nvidia_device() if provider in NVIDIA else ""
