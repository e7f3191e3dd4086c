"""The tool that measures the forms of what stays: whose turn it is, and what it prints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime")

from tests import nets
from tools.leftover import Row, measure, render, take_turns


def test_each_round_begins_with_another_one() -> None:
    seen: list[str] = []
    runs = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = take_turns(runs, 4)
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys("abc", 4)
    assert "".join(seen).endswith("abcbcacababc")


def test_a_form_that_no_step_takes_is_not_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    proto = nets.model(
        """g (float[2,4] x) => (float[2,4] y) {
            a = Sigmoid(x) b = BatchNormalization(a, n_g, n_b, n_m, n_v) y = Sigmoid(b) }""",
        nets.batch_norm(rng, "n", 4),
    )
    onnx.save(proto, tmp_path / "net.onnx")
    (row,) = measure(tmp_path / "net.onnx", [1], 2, "max")
    assert row.rewritten == {"keep": 1, "affine": 1, "depthwise": 0}
    assert list(row.ratios) == ["affine"]
    assert all(ratio > 0 for ratio in row.ratios["affine"])


def test_the_table_has_the_median_and_the_middle_half() -> None:
    ratios = {"affine": [0.5, 1.0, 1.5, 2.0, 1.0]}
    row = Row("net", 2, {"keep": 3, "affine": 2, "depthwise": 0}, 0.25, ratios)
    assert render([row]).splitlines()[-1] == (
        "| net | 2 | 3 | 250.0 ms | 1.000 (0.750 to 1.750), 2 steps | as keep |"
    )
