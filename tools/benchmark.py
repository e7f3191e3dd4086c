"""How long folding takes, file to file, side by side with the other tools.

    python -m tools.benchmark MODEL.onnx ... [--repeat N] [--tool NAME ...] [--json FILE]

Every run is a process of its own that imports its tool first and starts the clock then. Tools take
turns on each model, each turn beginning with another one, so that a change in the machine's load or
in what its page cache holds meets all of them; medians are shown, and the ratios are what to quote.
Not needed by the test suite: pip install onnxruntime onnxsim.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

TOOLS = ("bnfold", "onnxruntime", "onnxsim", "cp")


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one tool on one model."""

    tool: str
    model: str
    seconds: float
    peak_bytes: int
    batch_norms_left: int


# ---- in the process of one run ----


def _bnfold() -> Callable[[Path, Path], None]:
    import bnfold

    fold = bnfold.optimize

    def run(source: Path, target: Path) -> None:
        fold(source, target, check=False)

    return run


def _onnxruntime() -> Callable[[Path, Path], None]:
    import onnxruntime as ort

    def run(source: Path, target: Path) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 4
        # Weights are not prepared for running: only the optimised file is wanted.
        options.add_session_config_entry("session.disable_prepacking", "1")
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])

    return run


def _onnxsim() -> Callable[[Path, Path], None]:
    import onnx
    import onnxsim

    def run(source: Path, target: Path) -> None:
        simple, _ = onnxsim.simplify(str(source))
        onnx.save(simple, target)

    return run


def _cp() -> Callable[[Path, Path], None]:
    def run(source: Path, target: Path) -> None:
        data = Path(f"{source}.data")
        files = [str(p) for p in (source, data) if p.exists()]
        subprocess.run(["cp", "--reflink=never", *files, str(target.parent)], check=True)
        (target.parent / source.name).rename(target)

    return run


_LOADERS: Mapping[str, Callable[[], Callable[[Path, Path], None]]] = {
    "bnfold": _bnfold,
    "onnxruntime": _onnxruntime,
    "onnxsim": _onnxsim,
    "cp": _cp,
}


def _worker(tool: str, source: Path, target: Path) -> None:
    run = _LOADERS[tool]()
    start = time.perf_counter()
    run(source, target)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_bytes": _peak_bytes()}))


def _peak_bytes() -> int:
    """Peak resident memory of this process alone (getrusage would remember the parent's)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- in the process that compares ----


def measure(tool: str, source: Path) -> Run:
    """One run of ``tool`` on ``source`` in a process of its own."""
    os.sync()  # or the run before it pays for its pages with the time of this one
    with tempfile.TemporaryDirectory(prefix="bnfold-benchmark-", dir=source.parent) as folder:
        target = Path(folder) / "out.onnx"
        command = [
            sys.executable,
            "-m",
            "tools.benchmark",
            "--worker",
            tool,
            str(source),
            str(target),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        left = -1 if tool == "cp" else _batch_norms(target)
    return Run(tool, source.stem, figures["seconds"], figures["peak_bytes"], left)


def _batch_norms(path: Path) -> int:
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    return sum(node.op_type == "BatchNormalization" for node in nodes)


def machine() -> str:
    """The processor and how many cores of it there are."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines()
                 if line.startswith("model name")]  # fmt: skip
        name = found[0] if found else name
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def table(runs: list[Run], tools: list[str]) -> str:
    """Medians in seconds and peak memory, a row for each model and one for the sum."""
    models = list(dict.fromkeys(run.model for run in runs))
    lines = ["| model | " + " | ".join(f"{tool}, s (peak MB)" for tool in tools) + " |",
             "|---|" + "---:|" * len(tools)]  # fmt: skip
    total = dict.fromkeys(tools, 0.0)
    for model in models:
        cells = []
        for tool in tools:
            own = [run for run in runs if (run.model, run.tool) == (model, tool)]
            seconds = statistics.median(run.seconds for run in own)
            peak = statistics.median(run.peak_bytes for run in own)
            total[tool] += seconds
            cells.append(f"{seconds:.2f} ({peak / 1e6:.0f})")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    sums = [f"{total[tool]:.2f}" for tool in tools]
    lines.append("| **sum** | " + " | ".join(sums) + " |")
    base = total[tools[0]]
    ratios = [f"{base / total[tool]:.2f}" for tool in tools]
    lines.append(f"| {tools[0]} / this | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--worker"]:
        _worker(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tool", action="append", choices=TOOLS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tools = options.tool or list(TOOLS)
    runs: list[Run] = []
    for model in options.models:
        shutil.copyfile(model, os.devnull)  # into the page cache, for all alike
        for turn in range(options.repeat):
            # Who runs second finds the pages that the first gave back: nobody is always second.
            start = turn % len(tools)
            runs.extend(measure(tool, model) for tool in tools[start:] + tools[:start])
        print(f"{model.stem}: done", file=sys.stderr)
    print(f"median of {options.repeat}, {machine()}\n")
    print(table(runs, tools))
    if options.json:
        options.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))


if __name__ == "__main__":
    main()
