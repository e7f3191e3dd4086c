"""python -m models.demo BEFORE.onnx AFTER.onnx: do both label the held-back digits alike?

Needs numpy and onnxruntime only. Exits with 1 if a label differs on any image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

HOLDOUT = Path(__file__).parent / "digits_holdout.npz"
WHITE = 16  # the images' brightest value

Labels = NDArray[np.int64]


def held_back() -> tuple[NDArray[np.float32], Labels]:
    """The held-back images ``(N, 1, 8, 8)`` in 0 .. 1, and their labels ``(N,)``."""
    with np.load(HOLDOUT) as kept:
        return kept["images"].astype(np.float32) / WHITE, kept["labels"].astype(np.int64)


def predict(path: Path, images: NDArray[np.float32]) -> Labels:
    """The labels ``(N,)`` that the model at ``path`` gives ``images``."""
    options = onnxruntime.SessionOptions()
    # Off, or ONNX Runtime folds the BatchNorms of the first file itself and two equal nets run.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    logits = session.run(None, {session.get_inputs()[0].name: images})[0]
    labels: Labels = np.argmax(logits, axis=1)
    return labels


def summary(before: Labels, after: Labels, truth: Labels) -> str:
    """What the two models said, in two lines."""
    shares = [f"{(said == truth).mean():.1%}" for said in (before, after)]
    differ = int((before != after).sum())
    return (
        f"accuracy on {len(truth)} held-back digits: before {shares[0]}, after {shares[1]}\n"
        f"predicted labels that differ: {differ} of {len(truth)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the two files; the exit code is 1 if a label differs, 2 if a model does not run."""
    parser = argparse.ArgumentParser(prog="python -m models.demo", description=__doc__)
    parser.add_argument("before", type=Path, metavar="BEFORE.onnx")
    parser.add_argument("after", type=Path, metavar="AFTER.onnx")
    given = parser.parse_args(arguments)
    images, truth = held_back()
    try:
        before, after = (predict(path, images) for path in (given.before, given.after))
    except Exception as error:  # All that ONNX Runtime's errors have in common.
        parser.error(str(error))  # Exits with 2: a crash would exit with 1, as different labels do.
    print(summary(before, after, truth))
    return int((before != after).any())


if __name__ == "__main__":
    sys.exit(main())
