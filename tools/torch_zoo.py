"""Fold torch modules in every way that bnfold has, beside their ONNX twins and torch's own fuser.

usage: python -m tools.torch_zoo EXPORT.py [NAME ...] [--onnx FOLDER] [--json FILE]

EXPORT.py has ``SIZES`` (architectures by name) and ``build(name)``, which gives a module in
evaluation mode and one input batch. ONNX twins are ``<name with _ for :>.onnx`` in FOLDER. For each
architecture, in float64: how many steps stay in an ExportedProgram, in the module with and without
example inputs, how many BatchNorms stay, the largest relative error, and how long planning and
commit take beyond the capture. An error is wrong from 1e-9 on, and from 4 times what one unit in
the last place of the input does to the unfolded model (its noise). The same for
`torch.fx.experimental.optimization.fuse`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import bnfold
from bnfold.report.model import Report

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Print one line for each architecture, and the sums."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("export", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--onnx", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    zoo = _loaded(options.export)
    rows = []
    print(_HEADER)
    for name in options.names or zoo.SIZES:
        rows.append(_row(zoo, name, options.onnx))
        print(_line(rows[-1]), flush=True)
    print(_line(_sums(rows)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return int(any(row["wrong"] for row in rows))


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("zoo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _row(zoo: ModuleType, name: str, onnx: Path | None) -> Row:
    model, example = zoo.build(name)
    model, example = model.double(), example.double()
    with torch.no_grad():
        expected = model(example)
    row: Row = {"name": name, "norms": _norms(model), "wrong": []}
    row["noise"] = max(_error(_nudged(model, example, seed), expected) for seed in range(2))
    _program(row, model, example, expected)
    for way, inputs in (("module", (example,)), ("traced", None)):
        _module(row, way, model, inputs, example, expected)
    row["fuse"] = _fused(model)
    twin = None if onnx is None else onnx / f"{name.replace(':', '_')}.onnx"
    if twin is not None and twin.exists():
        row["onnx"] = len(bnfold.explain(str(twin)).kept)
    return row


def _program(row: Row, model: nn.Module, example: Tensor, expected: Any) -> None:
    with torch.no_grad():
        program, captured = _timed(lambda: torch.export.export(model, (example,), strict=False))
        result, took = _timed(lambda: bnfold.fold(program))
        row["program_error"] = _error(result.model.module()(example), expected)
    row.update(program=len(result.report.kept), capture_s=captured, fold_s=took)
    _judge(row, "program", result.report)


def _module(
    row: Row, way: str, model: nn.Module, inputs: Any, example: Tensor, expected: Any
) -> None:
    result, took = _timed(lambda: bnfold.fold(model, inputs))
    with torch.no_grad():
        row[f"{way}_error"] = _error(result.model(example), expected)
    row.update({way: len(result.report.kept), f"{way}_norms": _norms(result.model)})
    row[f"{way}_s"] = took
    _judge(row, way, result.report)


def _nudged(model: nn.Module, example: Tensor, seed: int) -> Any:
    """What the model says when every number of its input is off by one unit in the last place."""
    side = torch.rand(example.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    with torch.no_grad():
        return model(torch.nextafter(example, torch.where(side, torch.inf, -torch.inf).double()))


def _judge(row: Row, way: str, report: Report) -> None:
    if not row[f"{way}_error"] < max(1e-9, 4 * row["noise"]):
        row["wrong"].append(way)
    row[f"{way}_reasons"] = sorted(step.code for step in report.kept)


def _fused(model: nn.Module) -> int | None:
    """How many BatchNorms stay after torch's own fuser; None where it fails.

    What is left of them may be functions in its graph.
    """
    from torch.fx.experimental.optimization import fuse

    try:
        fused = fuse(copy.deepcopy(model))
    except Exception:
        return None
    assert isinstance(fused, torch.fx.GraphModule)
    batch_norm = torch.nn.functional.batch_norm
    nodes = fused.graph.find_nodes(op="call_function", target=batch_norm)
    return _norms(fused) + len(nodes)


def _norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def _error(got: Any, expected: Any) -> float:
    pairs = zip(tree_leaves(got), tree_leaves(expected), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _timed(what: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return what(), time.perf_counter() - start


# ---- text ----

_COLUMNS = ("norms", "onnx", "program", "module", "module_norms", "traced", "traced_norms", "fuse")
_HEADER = f"{'':30}" + "".join(f"{n:>13}" for n in _COLUMNS) + "  capture    fold  error noise"


def _line(row: Row) -> str:
    cells = "".join(
        f"{row.get(name) if row.get(name) is not None else '-':>13}" for name in _COLUMNS
    )
    worst = max(row[f"{way}_error"] for way in ("program", "module", "traced"))
    wrong = f"  WRONG: {', '.join(row['wrong'])}" if row["wrong"] else ""
    times = f"{row['capture_s']:7.2f}s {row['fold_s']:6.2f}s"
    return f"{row['name']:30}{cells} {times} {worst:.0e} {row['noise']:.0e}{wrong}"


def _sums(rows: list[Row]) -> Row:
    """All rows added up; where torch's fuser failed, all BatchNorms stayed."""
    filled = [{**row, "fuse": row["norms"] if row["fuse"] is None else row["fuse"]} for row in rows]
    keys = (*_COLUMNS, "capture_s", "fold_s")
    total: Row = {key: sum(row.get(key) or 0 for row in filled) for key in keys}
    worst = {f"{way}_error": max(row[f"{way}_error"] for row in rows)
             for way in ("program", "module", "traced")}  # fmt: skip
    noise = max(row["noise"] for row in rows)
    return {"name": "all", "wrong": [], "noise": noise, **total, **worst}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
