"""How many affine steps bnfold and the other tools leave in real models.

    python -m tools.compare FOLDER|MODEL.onnx ... [--tool NAME ...] [--level max|local]
                            [--json FILE [--only NAME ...]] [--limit SECONDS]

Every tool runs in a process of its own under a time limit; one that fails is shown as failed and
counts as having left the model as it was. --json keeps all results as they come; --only then runs
the named tools again and takes what the file has of the others. The counter is this file's own and
reads nothing but the written models. Exits with 1 if bnfold leaves more than the best peer in any
model. Not needed by the test suite: pip install onnxruntime onnxsim onnxslim.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx

ROOT = Path(__file__).parent.parent
PEERS = ("onnxsim", "onnxslim", "onnxruntime")
TOOLS = ("bnfold", *PEERS)
STANDARD = ("", "ai.onnx")
ARITHMETIC = ("Mul", "Add", "Sub", "Div")
FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16,
          onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}  # fmt: skip
DRAWN = {"RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}

# ---- the counter ----


@dataclass(frozen=True, slots=True)
class Steps:
    """The affine steps of a model; BatchNormalizations are per-channel steps too."""

    batch_norm: int = 0
    per_channel: int = 0
    scalar: int = 0

    @property
    def total(self) -> int:
        """Per-channel and scalar steps together."""
        return self.per_channel + self.scalar


@dataclass(frozen=True, slots=True)
class Tensor:
    """What is known of a tensor; ``shape`` is None unless every size is."""

    shape: tuple[int, ...] | None
    is_float: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """What the counter looks up: who makes and reads a value, and which values are constant."""

    makers: dict[str, onnx.NodeProto]
    readers: Counter[str]
    known: dict[str, Tensor]
    constants: set[str]


def count(model: onnx.ModelProto) -> Steps:
    """The affine steps of the main graph; drops large weights from ``model`` while counting."""
    facts = _facts(model)
    kinds = Counter(_kind(node, facts) for node in model.graph.node if node.domain in STANDARD)
    norms = kinds["batch norm"]
    return Steps(norms, norms + kinds["per channel"], kinds["scalar"])


def _facts(model: onnx.ModelProto) -> Facts:
    graph = model.graph
    for tensor in graph.initializer:
        if len(tensor.raw_data) > 2**15:  # no shape hangs on it, and inference copies the model
            tensor.ClearField("raw_data")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    known = {value.name: _typed(value.type.tensor_type) for value in values}
    known |= {t.name: Tensor(tuple(t.dims), t.data_type in FLOATS) for t in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    inputs = {value.name for value in graph.input} if model.ir_version >= 4 else set()
    constants = {tensor.name for tensor in graph.initializer} - inputs
    for node in graph.node:
        if _is_constant(node, constants, known):
            constants.update(node.output)
    makers = {name: node for node in graph.node for name in node.output}
    return Facts(makers, readers, known, constants)


def _typed(tensor: onnx.TypeProto.Tensor) -> Tensor:
    sizes = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
    whole = tensor.HasField("shape") and min(sizes, default=0) >= 0
    return Tensor(tuple(sizes) if whole else None, tensor.elem_type in FLOATS)


def _is_constant(node: onnx.NodeProto, constants: set[str], known: dict[str, Tensor]) -> bool:
    """Whether a simplifier could replace the node by a constant (or has left one there)."""
    inner = any(a.HasField("g") or a.graphs for a in node.attribute)
    if inner or node.op_type in DRAWN or node.domain not in STANDARD:
        return False
    if node.op_type == "Shape":
        source = known.get(node.input[0])
        return source is not None and source.shape is not None
    if not node.input:
        return node.op_type == "Constant"
    return all(name in constants for name in node.input if name)


def _kind(node: onnx.NodeProto, facts: Facts) -> str:
    """``batch norm``, ``per channel``, ``scalar``, or nothing where it is no affine step."""
    if any(name in facts.constants for name in node.output):
        return ""
    if node.op_type == "BatchNormalization":
        training = any(a.name == "training_mode" and a.i for a in node.attribute)
        return "" if training or len([o for o in node.output if o]) > 1 else "batch norm"
    if node.op_type == "Neg":
        source = facts.known.get(node.input[0])
        return "scalar" if source is None or source.is_float else ""
    if node.op_type not in ARITHMETIC:
        return ""
    return _arithmetic_kind(node, facts)


def _arithmetic_kind(node: onnx.NodeProto, facts: Facts) -> str:
    side = 0 if node.input[0] in facts.constants else 1
    if node.input[side] not in facts.constants:
        return ""
    found = facts.known.get(node.input[side])
    if found is None or not found.is_float or (node.op_type, side) == ("Div", 0):  # c / x: no map
        return ""
    if found.shape is None:  # nobody gains by leaving a constant that inference gives up on
        found = facts.known.get(node.output[0], found)
    shape = found.shape
    if shape is None:
        return "per channel"
    if node.op_type == "Add" and _is_bias(node.input[1 - side], shape, facts):
        return ""
    return {0: "scalar", 1: "per channel"}.get(sum(size != 1 for size in shape), "")


def _is_bias(made: str, shape: tuple[int, ...], facts: Facts) -> bool:
    """Whether adding a constant of ``shape`` to ``made`` is the bias of a MatMul."""
    maker = facts.makers.get(made)
    if maker is None or maker.op_type != "MatMul" or facts.readers[made] != 1:
        return False
    for operand, axis in ((1, 1), (0, 2)):  # where the output channels are, from the right
        weight = facts.known.get(maker.input[operand])
        if maker.input[operand] not in facts.constants or weight is None or not weight.shape:
            continue
        along = [1] * len(shape)
        if min(len(shape), len(weight.shape)) >= axis:
            along[-axis] = weight.shape[-axis]
            return list(shape) == along
    return False


# ---- in the process of one tool ----


def _bnfold(source: str, target: str, level: str) -> None:
    import bnfold

    bnfold.optimize(source, target, check=False, level=level)


def _onnxsim(source: str, target: str, _: str) -> None:
    simple, _ = importlib.import_module("onnxsim").simplify(source)
    onnx.save(simple, target)


def _onnxslim(source: str, target: str, _: str) -> None:
    onnx.save(importlib.import_module("onnxslim").slim(source), target)


def _onnxruntime(source: str, target: str, _: str) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = target
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


_RUNS: dict[str, Callable[[str, str, str], None]] = {
    "bnfold": _bnfold,
    "onnxsim": _onnxsim,
    "onnxslim": _onnxslim,
    "onnxruntime": _onnxruntime,
}

# ---- in the process that compares ----


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one tool left of one model, or the reason why it left nothing."""

    steps: Steps | None
    failure: str = ""
    seconds: float = 0.0
    level: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One model: its steps before, and what each tool left."""

    model: str
    stamp: list[int]
    before: Steps
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def left(self, tool: str) -> Steps:
        """What ``tool`` left; a tool that failed has left the model as it was."""
        outcome = self.outcomes.get(tool)
        return self.before if outcome is None or outcome.steps is None else outcome.steps

    def best(self, measure: Callable[[Steps], int], peers: Iterable[str]) -> int:
        """The least that any of the ``peers`` left."""
        return min((measure(self.left(tool)) for tool in peers), default=measure(self.before))


MEASURES: dict[str, Callable[[Steps], int]] = {
    "BatchNormalization": lambda steps: steps.batch_norm,
    "per-channel": lambda steps: steps.per_channel,
    "per-channel + scalar": lambda steps: steps.total,
}


def measure(tool: str, source: Path, level: str, limit: float) -> Outcome:
    """One run of ``tool`` on ``source``, whose result is thrown away."""
    with tempfile.TemporaryDirectory(prefix="bnfold-compare-") as folder:
        return made(tool, source, Path(folder) / "out.onnx", level, limit)


def made(tool: str, source: Path, target: Path, level: str, limit: float) -> Outcome:
    """One run of ``tool`` from ``source`` to ``target`` in a process of its own."""
    level = level if tool == "bnfold" else ""
    start = time.perf_counter()
    # The worker counts as well: a file that can't be read is a failure of its tool.
    command = [sys.executable, "-m", "tools.compare", "--worker",
               tool, str(source.resolve()), str(target), level]  # fmt: skip
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return Outcome(None, f"not done after {limit:.0f} s", limit, level)
    seconds = round(time.perf_counter() - start, 2)
    if done.returncode:
        words = [f"exit {done.returncode}", *done.stderr.strip().splitlines()[-1:]]
        return Outcome(None, ": ".join(words)[:300], seconds, level)
    return Outcome(Steps(**json.loads(done.stdout.splitlines()[-1])), "", seconds, level)


def _count_file(path: Path) -> Steps:
    return count(onnx.load(path, load_external_data=False))


def _stamp(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]


def load(path: Path | None) -> dict[str, Row]:
    """The rows that an earlier run has kept, by the path of their model."""
    if path is None or not path.exists():
        return {}
    return {name: _row(data) for name, data in json.loads(path.read_text()).items()}


def _row(data: dict[str, Any]) -> Row:
    outcomes = {
        tool: Outcome(**{**found, "steps": found["steps"] and Steps(**found["steps"])})
        for tool, found in data["outcomes"].items()
    }
    return Row(data["model"], data["stamp"], Steps(**data["before"]), outcomes)


def save(path: Path, rows: dict[str, Row]) -> None:
    """Keep ``rows`` for later runs."""
    path.write_text(json.dumps({name: asdict(row) for name, row in rows.items()}, indent=1))


def table(rows: list[Row], tools: list[str]) -> str:
    """A row for each model, the sums, and how bnfold compares with the best peer of each model."""
    peers = [tool for tool in tools if tool != "bnfold"]
    heads = ["model", "before", *tools, "best peer"]
    lines = ["Steps left: BatchNormalization / per-channel (those among them) / scalar; of the best"
             " peer: per-channel / per-channel + scalar.", "",
             "| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]  # fmt: skip
    for row in rows:
        best = " / ".join(str(row.best(MEASURES[name], peers)) for name in list(MEASURES)[1:])
        cells = [row.model, _cell(row.before), *(_tool_cell(row, t, peers) for t in tools), best]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_sums(rows, tools, peers)])


def _cell(steps: Steps) -> str:
    return f"{steps.batch_norm} / {steps.per_channel} / {steps.scalar}"


def _tool_cell(row: Row, tool: str, peers: list[str]) -> str:
    mark = " *" if tool == "bnfold" and leaves_more(row, peers) else ""
    outcome = row.outcomes[tool]
    return (_cell(outcome.steps) if outcome.steps is not None else "failed") + mark


def leaves_more(row: Row, peers: Iterable[str]) -> bool:
    """Whether bnfold leaves more steps of ``row``'s model than the best of ``peers``, or fails."""
    if row.outcomes["bnfold"].steps is None:
        return True
    names = list(peers)
    checked = [MEASURES["per-channel"], MEASURES["per-channel + scalar"]]
    return any(of(row.left("bnfold")) > row.best(of, names) for of in checked)


def _sums(rows: list[Row], tools: list[str], peers: list[str]) -> list[str]:
    heads = ["sum of steps", "before", *tools, "best peer", "bnfold / best peer"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, of in MEASURES.items():
        best = sum(row.best(of, peers) for row in rows)
        left = sum(of(row.left("bnfold")) for row in rows)
        sums = [sum(of(row.before) for row in rows),
                *(sum(of(row.left(tool)) for row in rows) for tool in tools), best]  # fmt: skip
        ratio = f"{left / best:.3f}" if best else "-"
        lines.append("| " + " | ".join([name, *map(str, sums), ratio]) + " |")
    return lines


def compare(models: list[Path], options: argparse.Namespace) -> list[Row]:
    """The rows of ``models``, keeping each result as it comes."""
    kept = load(options.json)
    rows: list[Row] = []
    for path in models:
        key = str(path.resolve())
        row = kept.get(key)
        if row is None or row.stamp != _stamp(path):
            row = Row(path.stem, _stamp(path), _count_file(path))
        kept[key] = row
        for tool in options.tool:
            if _is_due(row, tool, options):
                row.outcomes[tool] = outcome = measure(tool, path, options.level, options.limit)
                print(f"{path.stem}: {tool} {outcome}", file=sys.stderr, flush=True)
                if options.json:
                    save(options.json, kept)
        rows.append(row)
    return rows


def _is_due(row: Row, tool: str, options: argparse.Namespace) -> bool:
    found = row.outcomes.get(tool)
    stale = found is None or (tool == "bnfold" and found.level != options.level)
    return stale or not options.only or tool in options.only


def arguments(words: list[str]) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--tool", action="append", choices=TOOLS)
    parser.add_argument("--only", action="append", choices=TOOLS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--level", choices=("local", "max"), default="max")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one tool and model")
    options = parser.parse_args(words)
    if options.only and not options.json:
        parser.error("--only needs --json, where the results of the other tools are")
    options.tool = options.tool or list(TOOLS)
    return options


def main() -> int:
    """Compare and print."""
    if sys.argv[1:2] == ["--worker"]:
        tool, source, target, level = sys.argv[2:6]
        _RUNS[tool](source, target, level)
        print(json.dumps(asdict(_count_file(Path(target)))))
        return 0
    options = arguments(sys.argv[1:])
    models = [m for p in options.paths for m in (sorted(p.glob("*.onnx")) if p.is_dir() else [p])]
    rows = compare(models, options)
    print(table(rows, options.tool))
    peers = [tool for tool in options.tool if tool != "bnfold"]
    more = sum(leaves_more(row, peers) for row in rows) if "bnfold" in options.tool else 0
    print(f"\n{more} of {len(rows)} models where bnfold leaves more than the best peer")
    return 1 if more else 0


if __name__ == "__main__":
    sys.exit(main())
