"""The public functions: fold, explain, optimize, check, bench."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import onnx
import onnx_ir as ir

from bnfold.errors import UsageError
from bnfold.folding import Options
from bnfold.onnx_model import fold_model, plan_model, size_of
from bnfold.onnx_read import from_proto, read_model
from bnfold.onnx_shapes import copy_of, infer_shapes
from bnfold.onnx_write import Staging, refuse_overwriting
from bnfold.report.model import Report
from bnfold.report.text import render_report
from bnfold.report.text_check import render_check
from bnfold.rollback import Checked, fold_file
from bnfold.verify.ends import Progress
from bnfold.verify.providers import CPU
from bnfold.verify.subjects import is_torch

if TYPE_CHECKING:
    from bnfold.report.bench import BenchResult
    from bnfold.verify.check import CheckResult
    from bnfold.verify.expected import Expected


class OnnxProgram(Protocol):
    """A ``torch.onnx.ONNXProgram``, which ``torch.onnx.export`` returns."""

    model: ir.Model


OnnxModel = onnx.ModelProto | ir.Model | OnnxProgram


@dataclass(frozen=True, slots=True)
class FoldResult:
    """A folded model of the kind that was given, and what was done to it.

    Printed, it is the table that `bnfold optimize` prints, and why each step stays that does.
    """

    model: Any
    report: Report

    def __str__(self) -> str:
        return render_report(self.report)


@dataclass(frozen=True, slots=True)
class OptimizeResult:
    """What `optimize` did: the report, the check (None when it was not asked for), the file.

    Nothing is at ``target`` unless the check passed or was not asked for. ``dropped`` names the
    steps whose fold was taken back since the check failed with it, and ``reproducer`` is the
    folder in which that can be seen again.
    """

    report: Report
    check: CheckResult | None
    target: str
    dropped: tuple[str, ...] = ()
    reproducer: str | None = None

    def __str__(self) -> str:
        check = [] if self.check is None else [render_check(self.check)]
        return "\n\n".join([render_report(self.report), *check])

    @property
    def written(self) -> bool:
        """Whether the folded model is at ``target``."""
        return self.check is None or self.check.exit_code == 0


def fold(
    model: Any,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    inplace: bool = False,
    level: str = "max",
    *,
    dynamic_shapes: Any = None,
    trust_initializers: bool = False,
    unshare: bool | int = False,
    leftover: str = "keep",
    horizontal: bool = False,
) -> FoldResult:
    """Fold every affine step that can be folded; the given model is left as it is.

    A ``torch.nn.Module`` is captured to see what it does: with example inputs by
    ``torch.export`` (which follows the path through its code that these inputs take), else by
    tracing it as a whole or part by part. The graph only proves what may be folded: what is
    returned is the module itself, with weights under the names that they have. Its forward says
    the same as before; tensors inside may hold other units (level ``"max"``), so that other
    methods that return some of them may not. A fold that does not fit the module tree, since it
    is written in code, is kept with that reason, and done in an ``ExportedProgram`` or an
    ``fx.GraphModule``. Without example inputs convolutions are taken to read batches.

    Args:
        model: The path of an ONNX file, an ``onnx.ModelProto``, an ``onnx_ir.Model``, the
            ``torch.onnx.ONNXProgram`` that ``torch.onnx.export`` returns, a ``torch.nn.Module``,
            a ``torch.fx.GraphModule`` or a ``torch.export.ExportedProgram``.
        example_inputs: Of a module: a tuple of positional arguments, or one tensor. Only their
            shapes and types matter.
        example_kwargs: Of a module: further arguments by name.
        inplace: Change the given ``nn.Module`` or ``GraphModule`` itself.
        level: ``"max"`` folds whatever can be folded, however far; ``"local"`` stays between
            direct neighbours.
        dynamic_shapes: Of a module: which sizes of its inputs vary, as ``torch.export.export``
            has it.
        trust_initializers: Take initializers that are also graph inputs as constants (from IR
            version 4 on a caller may override them, so that by default they are not folded).
        unshare: A weight that several operators read is scaled only where all of them agree. With
            True each may get a weight of its own where that frees a fold, as long as no more than
            64 MiB are stored again; a number is another such limit, in bytes.
        leftover: How a BatchNormalization that stays is written: ``"keep"`` as it is,
            ``"affine"`` as a multiplication and an addition, ``"depthwise"`` as a convolution
            of 1x1 with a group for each channel. It stays as it is where its rank, its number of
            channels or its type does not allow the other form. In a ``torch.nn.Module`` only
            ``"depthwise"`` does anything: a module of its own takes the place of the old one.
        horizontal: Of an ONNX model: convolutions (MatMuls, Gemms) that read one tensor at the same
            positions become one where a Concat puts their outputs together. Without it that is
            done where nothing has to be copied for it; with it, parts that others read, or that
            lie apart in the Concat, are cut from the output of the one.

    Returns:
        The folded model of the same kind (for a path, an ``onnx_ir.Model`` that holds its weights)
        and the report.

    Raises:
        ReadError: The file can't be read.
        InvalidModelError: The model is not valid, or a BatchNormalization's parameters mean
            nothing (a negative or NaN variance, a wrong length).
        UsageError: There is no such level or form, ``model`` is of a kind that is not supported,
            or an option is for models of another kind.
    """
    options = Options.of(level, trust_initializers, unshare, leftover, horizontal)
    if is_torch(model):
        _refuse_for_torch(options)
        from bnfold.torch_api import fold_torch, given

        inputs = given(example_inputs, example_kwargs, dynamic_shapes)
        return FoldResult(*fold_torch(model, inputs, options, inplace=inplace))
    _refuse_for_onnx(example_inputs, example_kwargs, inplace, dynamic_shapes)
    if _is_program(model):
        result = fold(
            _model_of(model),
            level=level,
            trust_initializers=trust_initializers,
            unshare=unshare,
            leftover=leftover,
            horizontal=horizontal,
        )
        return FoldResult(_program_of(model, result.model), result.report)
    source, graph, inferred = _given(model)
    if isinstance(model, ir.Model):
        graph = copy_of(model)
    planned, _ = fold_model(graph, inferred, options, source)
    if not isinstance(model, onnx.ModelProto | ir.Model):
        ir.external_data.load_to_model(graph)  # a reference into the given file would be a trap
    report = planned.report(source, size_of(graph))
    return FoldResult(ir.to_proto(graph) if isinstance(model, onnx.ModelProto) else graph, report)


def explain(
    model: Any,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    level: str = "max",
    *,
    dynamic_shapes: Any = None,
    trust_initializers: bool = False,
    unshare: bool | int = False,
    leftover: str = "keep",
    horizontal: bool = False,
) -> Report:
    """Say of every affine step what `fold` would do with it and why; nothing is changed.

    Whether a folded weight leaves the range of its type is known only once it is computed: such
    a step is listed as folded here, and as kept by `fold`.

    Args:
        model: As for `fold`.
        example_inputs: As for `fold`.
        example_kwargs: As for `fold`.
        level: As for `fold`.
        dynamic_shapes: As for `fold`.
        trust_initializers: As for `fold`.
        unshare: As for `fold`.
        leftover: As for `fold`.
        horizontal: As for `fold`.

    Raises:
        As `fold`.
    """
    options = Options.of(level, trust_initializers, unshare, leftover, horizontal)
    if is_torch(model):
        _refuse_for_torch(options)
        from bnfold.torch_api import explain_torch, given

        inputs = given(example_inputs, example_kwargs, dynamic_shapes)
        return explain_torch(model, inputs, options)
    _refuse_for_onnx(example_inputs, example_kwargs, False, dynamic_shapes)
    source, graph, inferred = _given(model)
    return plan_model(graph, inferred, options, {}, source).report(source)


def optimize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    check: bool = True,
    providers: Sequence[str] = ("cpu",),
    level: str = "max",
    simplify: bool = False,
    trust_initializers: bool = False,
    unshare: bool | int = False,
    leftover: str = "keep",
    horizontal: bool = False,
    samples: int = 8,
    seed: int = 0,
    inputs: Any = None,
    tiers: str = "ABCD",
    rtol: float | None = None,
    atol: float | None = None,
    allow_tf32: bool = False,
    reproducer: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
) -> OptimizeResult:
    """Fold the model at ``source``, check it against the unfolded one, and write it to ``target``.

    Nothing is written to ``target`` unless the check passes, and then at once as a whole. A model
    with external data is written with external data, in ``<target>.data``. Where the check fails,
    the fold that is wrong is taken back (``BNF026``), the rest is kept and checked again.

    Args:
        source: An ONNX file; it is never changed.
        target: Where to write the folded model.
        check: Whether to check before writing.
        providers: The execution providers to check on: ``"cpu"``, ``"cuda"``, ...
        level: As for `fold`.
        simplify: Run onnxsim first (the extra ``bnfold[simplify]``).
        trust_initializers: As for `fold`.
        unshare: As for `fold`.
        leftover: As for `fold`.
        horizontal: As for `fold`.
        samples: How many input samples the check draws.
        seed: Of the drawn samples.
        inputs: Inputs to check on instead of drawn ones; as for `check`.
        tiers: As for `check`.
        rtol: As for `check`.
        atol: As for `check`.
        allow_tf32: As for `check`.
        reproducer: The folder to write a reproducer to, should a check fail; by default
            ``<stem of target>.reproducer`` beside ``target``.
        on_progress: Called with the stage and the fraction of it that is done, if known.

    Raises:
        ReadError: ``source`` can't be read.
        InvalidModelError: The model is not valid.
        WriteError: ``target`` can't be written.
        UsageError: ``target`` is ``source``, or an option is wrong.
        ProviderError: The check was asked for and onnxruntime or a provider is not there.
        InconclusiveError: The model has operators that can't be run, or memory does not suffice.
    """
    from bnfold.verify.check import Plan
    from bnfold.verify.check import check as run

    options = Options.of(level, trust_initializers, unshare, leftover, horizontal)
    plan = Plan.of(providers, tiers, rtol, atol, allow_tf32)
    if check:
        plan.require_providers()  # also where nothing folds, so that nothing is run there
    elif plan.providers != (CPU,):
        met = f"without a check nothing runs on {', '.join(plan.providers)}"
        raise UsageError(met, todo="check, or ask for no provider")
    source, target = Path(source), Path(target)
    tell = on_progress or _silent
    with _simplified(source, target, simplify, tell) as start:
        if not check:
            report = fold_file(start, target, target, options, tell).report
            return OptimizeResult(_named(report, source), None, str(target))

        def judge(
            folded: Path, expected: Expected, wanted: str, folder: Path | None
        ) -> CheckResult:
            both = "".join(tier for tier in plan.tiers if tier in wanted)
            places = plan.providers if replace(plan, tiers=both).runs else (CPU,)
            verdict = run(
                source, folded, providers=places, inputs=inputs, samples=samples,
                seed=seed, tiers=both, rtol=rtol, atol=atol, allow_tf32=allow_tf32,
                expected=replace(expected, held=None) if simplify else expected,
                reproducer=folder, on_progress=tell,
            )  # fmt: skip
            return verdict.named(str(source), str(target))

        with Staging(target) as staging:
            place = Path(reproducer or target.parent / f"{target.stem}.reproducer")
            outcome = Checked(
                start, target, staging.model, options, judge, tell, place, always=simplify
            ).run()
            if outcome.check is None or outcome.check.exit_code == 0:
                staging.publish()
    return OptimizeResult(
        _named(outcome.folded.report, source), outcome.check, str(target), outcome.dropped,
        None if outcome.reproducer is None else str(outcome.reproducer),
    )  # fmt: skip


def check(
    reference: Any,
    candidate: Any,
    *,
    providers: Sequence[str] = ("cpu",),
    inputs: Any = None,
    samples: int = 8,
    seed: int = 0,
    tiers: str = "ABCD",
    rtol: float | None = None,
    atol: float | None = None,
    allow_tf32: bool = False,
    example_inputs: Any = None,
    reproducer: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
) -> CheckResult:
    """Check that ``candidate`` says the same as ``reference`` on each of ``providers``.

    Args:
        reference: The unfolded model: a path, an ONNX model in memory, or a torch model.
        candidate: The folded model, by whatever tool; of the other framework if need be.
        providers: The execution providers to run both on: ``"cpu"``, ``"cuda"``, ...
        inputs: Inputs to check on instead of drawn ones: a path or several (``.npz``, ``.npy``,
            folders of ``test_data_set_*``), arrays by name, a tuple with an array or tensor for
            each input, or a sequence of such samples.
        samples: How many input samples to draw.
        seed: Their seed.
        tiers: Which tiers, by their letters: ``A`` compares stored weights, ``B`` each site in
            float64, ``C`` runs both models on each provider, ``D`` compares decisions there.
        rtol: A limit of your own, beside the noise floor: no element of an output may differ from
            the unfolded model's by more than ``atol + rtol * |its size|``.
        atol: See ``rtol``; 0 where only that is given.
        allow_tf32: Whether products of float32 may be rounded to TF32 on NVIDIA devices.
        example_inputs: Of a torch module: a tuple of positional arguments, or one tensor.
        reproducer: A folder to write a reproducer to, should the check fail (ONNX only).
        on_progress: Called with the stage and the fraction of it that is done, if known.

    Returns:
        The verdict with its figures; ``raise_for_status()`` raises unless it is a pass.

    Raises:
        ReadError: A file can't be read.
        UsageError: The two models have other inputs or outputs, or an option is wrong.
        ProviderError: A runtime or a provider is not there, or did not run all of a model.
        InconclusiveError: A model has operators that can't be run, or memory does not suffice.
    """
    from bnfold.verify.check import check as run

    return run(
        _readable(reference), _readable(candidate), providers=providers, inputs=inputs,
        samples=samples, seed=seed, tiers=tiers, rtol=rtol, atol=atol, allow_tf32=allow_tf32,
        example_inputs=example_inputs, on_progress=on_progress,
        reproducer=None if reproducer is None else Path(reproducer),
    )  # fmt: skip


def bench(
    *models: Any,
    provider: str = "cpu",
    threads: Sequence[int] = (),
    runs: int = 30,
    inputs: Any = None,
    seed: int = 0,
    allow_tf32: bool = False,
    on_progress: Progress | None = None,
) -> BenchResult:
    """Time ``models`` side by side on ONNX Runtime, with all of its optimisations on.

    All models are fed the same and take turns in one process. What is compared is their times
    within a round, so that a change of the machine's load meets all of them alike; a difference is
    told from noise by a sign test, and by a second session of the first model.

    Args:
        models: ONNX models: paths or models in memory. The first one is the baseline.
        provider: The execution provider to run on: ``"cpu"``, ``"cuda"``, ...
        threads: Numbers of threads to measure on, each by itself; by default 1 and, on the CPU,
            all cores.
        runs: How often each model has its turn; it takes at least 8 to tell a difference.
        inputs: Inputs to run on instead of a drawn sample, one sample a turn; as for `check`.
        seed: Of the drawn sample.
        allow_tf32: Whether products of float32 may be rounded to TF32 on NVIDIA devices.
        on_progress: Called with the stage and the fraction of it that is done, if known.

    Returns:
        Sizes, times and ratios; printed, it is the table that `bnfold bench` prints.

    Raises:
        ReadError: A file can't be read.
        UsageError: The models have different inputs, or an option is wrong.
        ProviderError: The runtime or the provider is not there, or did not run all of a model.
        InvalidModelError: The runtime refuses a model.
        InconclusiveError: A model can't be run on these inputs, or memory does not suffice.
    """
    from bnfold.latency import time_models

    return time_models(
        [_readable(model) for model in models], provider=provider, threads=threads, runs=runs,
        inputs=inputs, seed=seed, allow_tf32=allow_tf32, on_progress=on_progress or _silent,
    )  # fmt: skip


# ---- options of torch models ----


def _refuse_for_onnx(inputs: Any, kwargs: Any, inplace: bool, dynamic_shapes: Any) -> None:
    options = {"example_inputs": inputs, "example_kwargs": kwargs, "inplace": inplace or None,
               "dynamic_shapes": dynamic_shapes}  # fmt: skip
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{given[0]} is for torch models", todo=f"leave {given[0]} out")


def _refuse_for_torch(options: Options) -> None:
    if options.horizontal:
        raise UsageError("horizontal is for ONNX models", todo="leave horizontal out")


# ---- reading ----


def _given(model: str | os.PathLike[str] | OnnxModel) -> tuple[str, ir.Model, Any]:
    """The name, the model as onnx-ir has it, and its inferred shapes."""
    if _is_program(model):
        model = _model_of(model)
    if isinstance(model, str | os.PathLike):
        file = read_model(model)
        return str(model), file.model, file.shapes
    if isinstance(model, onnx.ModelProto):
        model = from_proto(model, "<model>")
    if not isinstance(model, ir.Model):
        met = f"a {type(model).__module__}.{type(model).__name__} can't be folded"
        raise UsageError(met, todo="give a path, an ONNX model or a torch model")
    return model.graph.name or "model", model, infer_shapes(model)


def _readable(model: Any) -> Any:
    """Refuse a file that is not a valid model with the same words as everywhere."""
    if _is_program(model):
        return _model_of(model)
    if isinstance(model, str | os.PathLike):
        read_model(model)
    return model


def _silent(stage: str, fraction: float | None) -> None:
    """Tell nobody."""


# ---- what torch.onnx.export returns ----


def _is_program(model: object) -> TypeGuard[OnnxProgram]:
    """Whether ``model`` is a ``torch.onnx.ONNXProgram``; known by name, as torch is not loaded."""
    return any(
        kind.__name__ == "ONNXProgram" and kind.__module__.startswith("torch.onnx")
        for kind in type(model).__mro__
    )


def _model_of(program: OnnxProgram) -> ir.Model:
    """The model of ``program``; one that was exported without weights is refused."""
    for name, value in program.model.graph.initializers.items():
        if type(getattr(value.const_value, "raw", None)).__name__ == "FakeTensor":
            met = "it was exported with fake tensors: the weight has no values"
            raise UsageError(met, node=name, todo="call apply_weights(state_dict) first")
    return program.model


def _program_of(program: OnnxProgram, model: ir.Model) -> OnnxProgram:
    """``program`` with another model; an inference session of the old one does not go with it."""
    result = copy.copy(program)
    result.model = model
    for name in ("_inference_session", "_tempdir"):
        if hasattr(result, name):
            setattr(result, name, None)
    return result


# ---- file to file ----


def _named(report: Report, source: Path) -> Report:
    return replace(report, source=str(source))


@contextmanager
def _simplified(source: Path, target: Path, wanted: bool, tell: Progress) -> Iterator[Path]:
    """``source``, or what onnxsim makes of it in a folder that is gone afterwards."""
    if not wanted:
        yield source
        return
    from bnfold.simplify import simplify_file

    refuse_overwriting(read_model(source), target)
    with tempfile.TemporaryDirectory(prefix="bnfold-") as folder:
        tell("simplifying", None)
        simple = Path(folder) / source.name
        simplify_file(source, simple)
        yield simple
