"""Fold and check real models, and look at the results with other eyes than bnfold's.

    python -m tools.sweep FOLDER|MODEL.onnx ... [--no-check] [--samples N]

For each model: its steps, how many folded, the verdict of the check and the smallest error that its
tiers would have caught, and the linear operators that are still directly followed by a step that
could go into them, by a count of its own on the written file. Exits with 1 if a check fails or such
a pair is left.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx

import bnfold
from bnfold.errors import BnfoldError

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
ARITHMETIC = ("Mul", "Add", "Sub", "Div")


def followed(model: onnx.ModelProto) -> Iterator[str]:
    """Linear operators with a constant weight whose one reader is a step they could absorb."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    uses: Counter[str] = Counter()
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
            uses[name] += 1
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        made = node.output[0]
        if node.op_type not in LINEAR or len(readers.get(made, ())) != 1 or made in outputs:
            continue
        weight = weights.get(node.input[1])
        if weight is not None and uses[node.input[1]] == 1:
            step = readers[made][0]
            if _absorbable(node, step, made, weights):
                yield f"{node.op_type} {node.name} -> {step.op_type} {step.name}"


def _absorbable(
    node: onnx.NodeProto, step: onnx.NodeProto, made: str, weights: dict[str, tuple[int, ...]]
) -> bool:
    if step.op_type == "BatchNormalization":
        training = any(a.name == "training_mode" and a.i for a in step.attribute)
        constant = all(name in weights for name in step.input[1:])
        return constant and not training and node.op_type != "MatMul"
    if step.op_type not in ARITHMETIC or (node.op_type == "MatMul" and step.op_type == "Add"):
        return False
    other = [name for name in step.input if name != made]
    if len(other) != 1 or other[0] not in weights or (step.op_type, step.input[1]) == ("Div", made):
        return False
    shape, weight = weights[other[0]], weights[node.input[1]]
    behind = len(weight) - 2 if node.op_type in ("Conv", "ConvTranspose") else 0
    along = [1] * len(shape)
    if len(shape) > behind:
        along[len(shape) - 1 - behind] = _channels(node, weight)
    return all(size == 1 for size in shape) or list(shape) == along


def _channels(node: onnx.NodeProto, weight: tuple[int, ...]) -> int:
    integers = {a.name: int(a.i) for a in node.attribute}
    if node.op_type == "ConvTranspose":
        return weight[1] * integers.get("group", 1)
    if node.op_type == "Conv" or integers.get("transB"):
        return weight[0]
    return weight[-1]


def sweep(path: Path, check: bool, samples: int) -> bool:
    """Fold one model and print its row; True if all is well."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bnfold-sweep-") as folder:
        target = Path(folder) / "out.onnx"
        try:
            result = bnfold.optimize(path, target, check=check, samples=samples)
        except BnfoldError as error:
            print(f"{path.stem:36} {type(error).__name__}: {error}", flush=True)
            return False
        seconds = time.perf_counter() - start
        written = onnx.load(target, load_external_data=False) if result.written else None
        left = list(followed(written)) if written is not None else []
    report = result.report
    norms = sum(step.op_type == "BatchNormalization" for step in report.kept)
    verdict = "unchecked" if result.check is None else result.check.verdict.value
    tiers = () if result.check is None else result.check.tiers
    caught = ", ".join(f"{t.tier} {t.caught:.1e}" for t in tiers if t.caught is not None)
    print(f"{path.stem:36} {len(report.steps):5} steps {len(report.folded):5} folded "
          f"{len(report.kept):4} kept ({norms} BatchNormalization) {verdict:12} {seconds:6.1f} s"
          f"{' caught ' if caught else ''}{caught}", flush=True)  # fmt: skip
    if verdict not in ("pass", "unchecked") and result.check is not None:
        print(f"    {result.check.message}")
    for pair in left:
        print(f"    left: {pair}")
    return verdict in ("pass", "unchecked") and not left


def main() -> int:
    """Sweep over all the models that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    models = [m for p in options.paths for m in (sorted(p.glob("*.onnx")) if p.is_dir() else [p])]
    good = [sweep(model, not options.no_check, options.samples) for model in models]
    print(f"{sum(good)} of {len(good)} models are well")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
