"""Which form is the fastest for the steps that stay: one BatchNormalization, Mul + Add, or a Conv.

    python -m tools.leftover MODEL.onnx ... [--threads 1 2] [--rounds 30] [--level max|local]

Each model is folded in the three forms of ``--leftover`` and run by ONNX Runtime with all of its
optimisations on. The three take turns, each round beginning with another one, so that a change in
the machine's load meets all of them. A ratio is the median over rounds of a form's time by that of
``keep`` in the same round; below 1 it is faster. The spread is that of the middle half.
Not needed by the test suite.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

import bnfold
from bnfold.folding import LEFTOVERS

_WARM = 3  # runs before the clock is looked at
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


@dataclass(frozen=True, slots=True)
class Row:
    """How one model fared with one number of threads.

    Attributes:
        model: Its name.
        threads: How many threads ran it.
        rewritten: How many steps each form was given to.
        keep: The median time of the model with its steps as they were, in seconds.
        ratios: For each other form its time by that of ``keep``, round by round.
    """

    model: str
    threads: int
    rewritten: Mapping[str, int]
    keep: float
    ratios: Mapping[str, Sequence[float]]


def measure(source: Path, threads: Sequence[int], rounds: int, level: str) -> Iterator[Row]:
    """Fold a model in all forms and run them side by side."""
    with tempfile.TemporaryDirectory(prefix="bnfold-leftover-") as folder:
        files, rewritten = _forms(source, Path(folder), level)
        for count in threads:
            runs = {form: _runner(path, count) for form, path in files.items()}
            times = take_turns(runs, rounds)
            ratios = {
                form: [t / keep for t, keep in zip(times[form], times["keep"], strict=True)]
                for form in runs if form != "keep"
            }  # fmt: skip
            yield Row(source.stem, count, rewritten, statistics.median(times["keep"]), ratios)


def _forms(source: Path, folder: Path, level: str) -> tuple[dict[str, Path], dict[str, int]]:
    """The files by form, and how many steps took it; one that no step can take is left out."""
    files: dict[str, Path] = {}
    rewritten: dict[str, int] = {}
    for form in LEFTOVERS:
        target = folder / f"{form}.onnx"
        done = bnfold.optimize(source, target, check=False, level=level, leftover=form)
        found = Counter(step.form for step in done.report.kept)[form]
        if form == "keep" or found:
            files[form] = target
        rewritten[form] = found
    rewritten["keep"] = len(done.report.kept)
    return files, rewritten


def take_turns(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """The time of each run, round by round, each round beginning with another one."""
    order = list(runs)
    for name in order * _WARM:
        runs[name]()
    times: dict[str, list[float]] = {name: [] for name in order}
    for turn in range(rounds):
        first = turn % len(order)
        for name in (*order[first:], *order[:first]):
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return times


def _runner(path: Path, threads: int) -> Callable[[], object]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # Threads of sessions that wait for their turn would take the time of the one that runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {given.name: _sample(given.shape, given.type) for given in session.get_inputs()}
    return lambda: session.run(None, feeds)


def _sample(shape: Sequence[int | str | None], kind: str) -> NDArray[np.floating]:
    sizes = [size if isinstance(size, int) else 1 for size in shape]
    return np.random.default_rng(0).normal(size=sizes).astype(_TYPES[kind])


def render(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    forms = [form for form in LEFTOVERS if form != "keep"]
    lines = [
        "| " + " | ".join(["model", "threads", "kept", "keep", *forms]) + " |",
        "|---|---:|---:|---:|" + "---:|" * len(forms),
    ]
    for row in rows:
        cells = [
            row.model,
            str(row.threads),
            str(row.rewritten["keep"]),
            f"{1e3 * row.keep:.1f} ms",
        ]
        cells += [_said(row, form) for form in forms]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _said(row: Row, form: str) -> str:
    ratios = row.ratios.get(form)
    if ratios is None:
        return "as keep"
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f}), {row.rewritten[form]} steps"


def main() -> None:
    """What the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--level", choices=("local", "max"), default="max")
    options = parser.parse_args()
    rows: list[Row] = []
    for model in options.models:
        for row in measure(model, options.threads, options.rounds, options.level):
            rows.append(row)
            print(render([row]).splitlines()[-1], flush=True)
    print("\n" + render(rows))


if __name__ == "__main__":
    main()
