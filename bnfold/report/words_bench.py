"""What a benchmark says, in the words that all formats share. Names are left as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bnfold.report.lines import counted, human_bytes
from bnfold.report.words import certificate, fed

if TYPE_CHECKING:
    from bnfold.report.bench import BenchModel, BenchResult, Setting, Timing

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SIZES = ("weights", "operators", "Conv/Gemm/MatMul", "BatchNorm", "affine steps")


def sizes(model: BenchModel) -> tuple[str, ...]:
    """How large a model is: a cell for each of `SIZES`."""
    operators = model.size.operators
    linear = sum(operators.get(name, 0) for name in LINEAR)
    norms = operators.get("BatchNormalization", 0)
    counts = (model.size.nodes, linear, norms, model.steps)
    return (human_bytes(model.size.parameter_bytes), *(f"{number:,}" for number in counts))


def milliseconds(value: float) -> str:
    """At least three digits that count: ``66.7``, ``0.0312``."""
    return f"{value:#.3g}" if value < 100 else f"{value:.0f}"


def ratio(timing: Timing) -> str:
    """``0.898``."""
    return f"{timing.ratio:.3f}"


def interval(timing: Timing) -> str:
    """``0.890 .. 0.905``; a dash where there is none."""
    return "-" if timing.interval is None else "{:.3f} .. {:.3f}".format(*timing.interval)


def title(setting: Setting) -> str:
    """``1 thread``."""
    return counted(setting.threads, "thread")


def noise(setting: Setting) -> str:
    """What counts as a difference."""
    together = f"; {setting.calls:,} calls in a row timed at once" if setting.calls > 1 else ""
    return f"noise {100 * setting.noise:.1f} %: what counts is an interval beyond it{together}"


def conditions(result: BenchResult) -> Iterator[str]:
    """What was run, where, and on what."""
    where = f"{result.provider} ({result.device})" if result.device else result.provider
    yield f"{result.runtime}, all optimisations on, on {where}"
    yield (
        f"{counted(result.rounds, 'round')} in which every model has its turn, medians; ratios "
        "within a round, with 99 % intervals (sign test); noise is what two sessions of the first "
        "model differ by, at least 2 %; unclear is what could hide a difference of 5 %"
    )
    yield from (f"input {fed(use)}" for use in result.inputs)
    yield from dict.fromkeys(certificate(run) for run in result.certificates)
