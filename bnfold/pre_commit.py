"""The pre-commit hook: every committed pair of a model and its fold still belongs together.

A pair is ``net.onnx`` and ``net.folded.onnx`` in one folder, as `bnfold optimize` writes them;
whichever of the two changed, both are compared. Tiers A and B only, which need no runtime.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bnfold.errors import BnfoldError, ReadError
from bnfold.report.lines import encodable, one_line

FOLDED, MODEL = ".folded.onnx", ".onnx"
DATA = (".data", "_data")  # what exporters add to the name of a model for its external data
# What speaks where pairs differ in their exit codes: a proved mismatch first, a pass last.
WORST_FIRST = (1, 5, 4, 2, 3, 0)


@dataclass(frozen=True, slots=True)
class Pair:
    """A model and what it was folded to."""

    reference: Path
    candidate: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks the pairs that the named files belong to; the exit code of the worst."""
    options = _parser().parse_args(arguments)
    codes = [checked(pair, options.samples, options.seed) for pair in pairs(options.files)]
    return min(codes, key=WORST_FIRST.index, default=0)


def pairs(files: Iterable[str]) -> tuple[Pair, ...]:
    """The pairs that ``files`` belong to, each once; a model that has no fold is in none."""
    found = (_pair(Path(file)) for file in files)
    return tuple(dict.fromkeys(pair for pair in found if pair is not None))


def checked(pair: Pair, samples: int, seed: int) -> int:
    """Checks one pair and prints what was found; its exit code."""
    try:
        return _checked(pair, samples, seed)
    except BnfoldError as error:
        _say(one_line(f"bnfold: error: {error}"))
        return error.exit_code


def _checked(pair: Pair, samples: int, seed: int) -> int:
    if not pair.reference.exists():
        raise ReadError(
            f"there is no {pair.reference.name} beside it to check it against",
            file=str(pair.candidate), todo="commit it too, or exclude this file from the hook",
        )  # fmt: skip
    import bnfold
    from bnfold.report.text_check import render_check

    check = bnfold.check(pair.reference, pair.candidate, tiers="AB", samples=samples, seed=seed)
    _say(one_line(f"{pair.candidate}: {check.verdict.value}: {check.message}"))
    if check.exit_code:
        _say(render_check(check))
    return check.exit_code


def _say(text: str) -> None:
    print(encodable(text, sys.stdout))


def _pair(file: Path) -> Pair | None:
    """The pair of a model, of its fold, or of the external data of either."""
    name = next((file.name.removesuffix(d) for d in DATA if file.name.endswith(d)), file.name)
    if name.endswith(FOLDED):
        stem = name.removesuffix(FOLDED)
        return Pair(file.with_name(stem + MODEL), file.with_name(name))
    candidate = file.with_name(name.removesuffix(MODEL) + FOLDED)
    return Pair(file.with_name(name), candidate) if candidate.exists() else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bnfold.pre_commit", description=main.__doc__)
    parser.add_argument("files", metavar="FILE", nargs="*", help="changed files")
    parser.add_argument("--samples", metavar="N", type=int, default=4, help="samples of tier B")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="their seed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
