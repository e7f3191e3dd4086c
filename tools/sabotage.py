"""Judges the judge: right folds must pass the check, and wrong ones must not.

    python -m tools.sabotage [MODEL.onnx|FOLDER ...] [--models] [--provider NAME ...] [--tiers ABCD]
                             [--samples N] [--seed N] [--repeat N] [--only NAME ...] [--hard]
                             [--jobs N] [--save FOLDER] [--json FILE]

For each model, right folds by bnfold, onnxsim, onnxslim, onnxruntime and torch, and rewrites that
change nothing: a "fail" is a false alarm. Then wrong folds: each defect is planted in a fold by
bnfold and in one by another tool, at a place drawn at random, where the float64 oracle says that
the outputs change by 32 times what half an ulp on the same weights does: a "pass" is a miss.
Inconclusive is counted apart and is not good either; a peer's fold that the oracle finds wrong
counts as a defect. --hard adds what the check does not promise to tell. Without models, or with
--models, these are the nets of models/.

Exits with 1 unless all are told apart. Not needed by the test suite: pip install onnxruntime
onnxsim onnxslim.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True, slots=True)
class Work:
    """One model and one seed, as it is handed to a process.

    Attributes:
        path: The model's file.
        net: Its name in ``models``, if it is one of these.
        seed: For the places of the defects.
        only: As `Sabotage` has it.
        save: As `Sabotage` has it.
        hard: As `Sabotage` has it.
        options: Of the check.
    """

    path: Path
    net: str
    seed: int
    only: tuple[str, ...]
    save: Path | None
    hard: bool
    options: Mapping[str, Any]

    def run(self) -> list[Case | Skipped]:
        """All cases of it."""
        subject = Subject(self.path.stem, onnx.load(self.path), self.net)
        judge = by_check(**self.options)
        found = list(Sabotage(subject, judge, self.seed, self.only, self.save, self.hard).run())
        print(f"{subject.name}, seed {self.seed}: done", file=sys.stderr, flush=True)
        return found


def nets(folder: Path) -> Iterator[tuple[Path, str]]:
    """The nets of models/ with all BatchNorms in place, and the one that is trained."""
    from models.export import export_onnx
    from models.registry import BRANCHED, NETS

    every = (*NETS, *BRANCHED)
    yield from ((export_onnx(name, folder / f"{name}.onnx"), name) for name in every)
    yield ROOT / "models" / "digits_resnet.onnx", ""


def files(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """ONNX files, and those in folders."""
    for path in paths:
        yield from ((file, "") for file in (sorted(path.glob("*.onnx")) or [path]))


def _work(options: argparse.Namespace, folder: Path) -> Iterator[Work]:
    every = list(files(options.paths))
    if options.models or not options.paths:
        every += nets(folder)
    for path, net in every:
        for seed in range(options.seed, options.seed + options.repeat):
            yield Work(
                path, net, seed, tuple(options.only), options.save, options.hard,
                _check_options(options),
            )  # fmt: skip


def _run(work: list[Work], jobs: int) -> list[Case | Skipped]:
    if jobs == 1:
        return [found for one in work for found in one.run()]
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # processes that also split their products wait for one another
    # A new process for each: what a model took is given back.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        return [found for result in pool.map(Work.run, work) for found in result]


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
    parser.add_argument("--hard", action="store_true", help="also what is not promised to be told")
    parser.add_argument("--jobs", type=int, default=1, help="so many models at a time")
    parser.add_argument("--save", type=Path, help="folder for the pairs that are not told")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def _check_options(options: argparse.Namespace) -> dict[str, Any]:
    given = {"providers": tuple(options.provider) or ("cpu",), "samples": options.samples}
    return given | ({"tiers": options.tiers} if options.tiers else {})


def main(arguments: list[str] | None = None) -> int:
    """Run the matrix and print it."""
    options = _options(arguments)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bnfold-sabotage-") as folder:
        matrix = Matrix.of(_run(list(_work(options, Path(folder))), options.jobs))
    print(matrix.text())
    print(f"{len(matrix.cases)} cases, {time.perf_counter() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(asdict(matrix), indent=1))
    return 1 if matrix.bad else 0


if __name__ == "__main__":
    sys.exit(main())
