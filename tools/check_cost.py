"""What a check costs, held against the float64 oracle that it rests on.

    python -m tools.check_cost MODEL.onnx ... [--runs N]

For each model, folded by bnfold: seconds for one oracle run (set up, weights lifted, one sample),
for the oracle on all samples of a check, for tiers A and B, and for the whole check on the CPU
provider; and the check's ratio to both. Side by side in one run, each the median of N; the file is
in the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bnfold
from bnfold.verify.models import load_model
from bnfold.verify.onnx_inputs import drawn_for
from bnfold.verify.oracle import Oracle


def seconds(run: Callable[[], object]) -> float:
    """How long ``run`` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(model: Path, folded: Path, runs: int) -> dict[str, float]:
    """The medians, in seconds, by what was done."""
    proto = load_model(model, "").proto
    feeds = drawn_for(proto).feeds

    def oracle(count: int) -> Callable[[], object]:
        def run() -> None:
            made = Oracle(proto)
            for feed in feeds[:count]:
                made.run(feed)

        return run

    def check(tiers: str) -> Callable[[], object]:
        return lambda: bnfold.check(model, folded, tiers=tiers).raise_for_status()

    work = {"oracle, 1 sample": oracle(1), f"oracle, {len(feeds)} samples": oracle(len(feeds)),
            "tiers A and B": check("AB"), "check": check("ABCD")}  # fmt: skip
    # In turns, so that what else the machine does falls on all of them alike.
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(runs):
        for name, run in work.items():
            taken[name].append(seconds(run))
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    """Measure the models that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    for model in options.models:
        with tempfile.TemporaryDirectory(prefix="bnfold-cost-") as folder:
            folded = Path(folder) / "folded.onnx"
            bnfold.optimize(model, folded, check=False)
            found = measure(model, folded, options.runs)
        one, several, sites, whole = found.values()
        said = ", ".join(f"{name} {value:.2f} s" for name, value in found.items())
        print(f"{model.stem}: {said}; tiers A and B {sites / one:.1f} times one oracle run, "
              f"check {whole / one:.1f} times it and {whole / several:.1f} times the oracle on all "
              f"samples", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
