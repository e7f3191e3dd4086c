"""How fast models are on ONNX Runtime: as they are, and as bnfold and its peers make them.

    python -m tools.latency FOLDER|MODEL.onnx ... --json FILE [--runs 30] [--threads 1,2]
                            [--only TOOL ...] [--limit SECONDS] [--table FILE.md] [--unclear]

Every tool runs in a process of its own under a time limit. What they made is timed side by side in
one process by `bnfold bench`, with all optimisations of the runtime on. A model of which bnfold's
version is slower than the original beyond noise is timed once more, in new sessions: only what is
slower both times counts, for of some two hundred comparisons one or two are wrong by chance. A tool
that fails is shown as failed and counts as having left the model as it was.

--json keeps every model as it comes, and another run with the same options goes on from there; with
another file, or after deleting it, all is measured anew. --unclear measures those again of which it
could not be told how bnfold's version compares, on a machine that is quieter by now. Not needed by
the test suite: pip install onnxruntime onnxsim onnxslim.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bnfold.report.bench import BenchResult
from bnfold.report.envelope import envelope_from_json
from bnfold.verify.plain import plain, restored
from tools.compare import ROOT, made
from tools.latency_table import Row, report, told

TOOLS = ("onnxsim", "onnxslim", "bnfold")


# ---- measuring ----


def measured(path: Path, options: argparse.Namespace) -> Row:
    """What every tool makes of the model at ``path``, timed side by side."""
    known = _known_by(path, options)
    with tempfile.TemporaryDirectory(prefix="bnfold-latency-") as folder:
        results, failures = _made(path, Path(folder), options)
        bench = timed([path, *results.values()], options)
        if isinstance(bench, str):  # whose fault it is takes a run for each to tell
            failures |= _unusable(path, results, options)
            results = {tool: file for tool, file in results.items() if tool not in failures}
            bench = timed([path, *results.values()], options)
        if isinstance(bench, str):
            return Row(path.stem, known, (), {**failures, "original": bench})
        row = Row(path.stem, known, tuple(results), failures, bench)
        if not row.slower("bnfold"):
            return row
        again = timed([path, *results.values()], options)
        return row if isinstance(again, str) else replace(row, again=again)


def _made(
    path: Path, folder: Path, options: argparse.Namespace
) -> tuple[dict[str, Path], dict[str, str]]:
    """The file that each tool makes, or why it makes none."""
    results, failures = {}, {}
    for tool in options.only:
        target = folder / tool / path.name
        target.parent.mkdir()
        outcome = made(tool, path, target, "max", options.limit)
        if outcome.failure:
            failures[tool] = outcome.failure
        else:
            results[tool] = target
    return results, failures


def _unusable(
    path: Path, results: Mapping[str, Path], options: argparse.Namespace
) -> dict[str, str]:
    """Which files can't stand in for the original, and why."""
    once = argparse.Namespace(runs=1, threads="1", limit=options.limit)
    found = {tool: timed([path, file], once) for tool, file in results.items()}
    return {tool: why for tool, why in found.items() if isinstance(why, str)}


def timed(files: Sequence[Path], options: argparse.Namespace) -> BenchResult | str:
    """`bnfold bench` in a process of its own, or why it gives nothing."""
    names = [str(file.resolve()) for file in files]
    given = ["--runs", str(options.runs), "--threads", options.threads, "--report", "-"]
    command = [sys.executable, "-m", "bnfold.cli", "bench", *names, *given]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=options.limit
        )
    except subprocess.TimeoutExpired:
        return f"not timed after {options.limit:.0f} s"
    if done.returncode:
        return ": ".join([f"exit {done.returncode}", *done.stderr.strip().splitlines()[-1:]])[:300]
    found = envelope_from_json(done.stdout).bench
    return "no result" if found is None else found


def _known_by(path: Path, options: argparse.Namespace) -> tuple[str, ...]:
    stat = path.stat()
    return (str(stat.st_size), str(stat.st_mtime_ns), str(options.runs), options.threads,
            *options.only)  # fmt: skip


# ---- what is kept ----


def load(path: Path) -> dict[str, Row]:
    """The rows that an earlier run has kept, by the path of their model."""
    if not path.exists():
        return {}
    return {name: restored(Row, data) for name, data in json.loads(path.read_text()).items()}


def save(path: Path, rows: Mapping[str, Row]) -> None:
    """Keep ``rows`` for later runs, as a whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(plain(rows), indent=1))
    beside.replace(path)


def all_measured(models: Sequence[Path], options: argparse.Namespace) -> list[Row]:
    """A row for each model, those that are kept already taken from there."""
    kept = load(options.json)
    rows = []
    for path in models:
        key = str(path.resolve())
        row = kept.get(key)
        stale = row is None or row.options != _known_by(path, options)
        if row is None or stale or (options.unclear and row.unclear("bnfold")):
            row = kept[key] = measured(path, options)
            save(options.json, kept)
            print(f"{row.model}: {told(row, options.only)}", file=sys.stderr, flush=True)
        rows.append(row)
    return rows


# ---- the command ----


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only", action="append", choices=TOOLS)
    parser.add_argument("--unclear", action="store_true")
    parser.add_argument("--limit", type=float, default=900, help="seconds for a tool or a timing")
    options = parser.parse_args(words)
    options.only = [tool for tool in TOOLS if not options.only or tool in options.only]
    return options


def main(words: Sequence[str]) -> int:
    """Measure and print; 1 where bnfold's version of a model is slower than the original."""
    options = arguments(words)
    models = [m for p in options.paths for m in (sorted(p.glob("*.onnx")) if p.is_dir() else [p])]
    rows = all_measured(models, options)
    text = report(rows, options.only)
    print(text)
    if options.table:
        options.table.write_text(text + "\n", encoding="utf-8")
    return 1 if any(row.slower("bnfold") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
