"""Judges the judge: right folds must pass the check, and wrong ones must not.

    python -m tools.sabotage [MODEL.onnx|FOLDER ...] [--models] [--provider NAME ...] [--tiers ABCD]
                             [--samples N] [--seed N] [--repeat N] [--only NAME ...]
                             [--save FOLDER] [--json FILE]

For each model, right folds by bnfold, onnxsim, onnxslim, onnxruntime and torch, and rewrites that
change nothing: a "fail" is a false alarm. Then wrong folds: each defect is planted in a fold by
bnfold and in one by another tool, at a place drawn at random, where the float64 oracle says that
the outputs change by 32 times what half an ulp on the same weights does: a "pass" is a miss.
Inconclusive is counted apart and is not good either; a peer's fold that the oracle finds wrong
counts as a defect. Without models, or with --models, these are the nets of models/.

Exits with 1 unless all are told apart. Not needed by the test suite: pip install onnxruntime
onnxsim onnxslim.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

import bnfold
from tools.sabotage_cases import Judge, Sabotage, Subject
from tools.sabotage_matrix import Case, Matrix, Said, Skipped

ROOT = Path(__file__).parent.parent


# ---- the judge under test ----


def by_check(**options: Any) -> Judge:
    """`bnfold.check` with these options."""

    def judge(reference: onnx.ModelProto, candidate: onnx.ModelProto) -> Said:
        result = bnfold.check(reference, candidate, **options)
        tiers: dict[str, str] = {}
        for tier in result.tiers:
            key = f"{tier.tier} {tier.provider}".strip()
            tiers[key] = tier.verdict.value
        return Said(result.verdict.value, result.message, tiers)

    return judge


# ---- the command line ----


def nets(folder: Path) -> Iterator[Subject]:
    """The nets of models/, all BatchNorms in place, and the one that is trained."""
    from models.export import export_onnx
    from models.registry import NETS

    for name in NETS:
        yield Subject(name, onnx.load(export_onnx(name, folder / f"{name}.onnx")), name)
    yield Subject("digits_resnet", onnx.load(ROOT / "models" / "digits_resnet.onnx"))


def files(paths: list[Path]) -> Iterator[Subject]:
    """ONNX files, and those in folders."""
    for path in paths:
        for file in sorted(path.glob("*.onnx")) if path.is_dir() else [path]:
            yield Subject(file.stem, onnx.load(file))


def _subjects(options: argparse.Namespace, folder: Path) -> Iterator[Subject]:
    yield from files(options.paths)
    if options.models or not options.paths:
        yield from nets(folder)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--models", action="store_true", help="also the nets of models/")
    parser.add_argument("--provider", action="append", default=[])
    parser.add_argument("--tiers", help="as bnfold check has it")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    parser.add_argument("--repeat", type=int, default=1, help="so many seeds")
    parser.add_argument("--only", action="append", default=[], help="a tool, rewrite or defect")
    parser.add_argument("--save", type=Path, help="folder for the pairs that are not told")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def _check_options(options: argparse.Namespace) -> dict[str, Any]:
    given = {"providers": tuple(options.provider) or ("cpu",), "samples": options.samples}
    return given | ({"tiers": options.tiers} if options.tiers else {})


def main(arguments: list[str] | None = None) -> int:
    """Run the matrix and print it."""
    options = _options(arguments)
    judge = by_check(**_check_options(options))
    only = tuple(options.only)
    found: list[Case | Skipped] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bnfold-sabotage-") as folder:
        for subject in _subjects(options, Path(folder)):
            for seed in range(options.seed, options.seed + options.repeat):
                found += Sabotage(subject, judge, seed, only, options.save).run()
            print(f"{subject.name}: done", file=sys.stderr, flush=True)
    matrix = Matrix.of(found)
    print(matrix.text())
    print(f"{time.perf_counter() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(asdict(matrix), indent=1))
    return 1 if matrix.bad else 0


if __name__ == "__main__":
    sys.exit(main())
