"""onnxsim first: it removes what is in the way, and leaves the folds, and their rounding, to us."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import bnfold
from bnfold.errors import InvalidModelError, UsageError
from bnfold.verify.judge import Verdict
from tests import nets

# Between the Conv and the BatchNormalization stands a power that changes nothing.
TEXT = """g (float[2,3,8,8] x) => (float[2,6,8,8] y) {
    c = Conv<pads = [1,1,1,1]>(x, w) r = Pow(c, one)
    y = BatchNormalization(r, bn_g, bn_b, bn_m, bn_v)
}"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    target = tmp_path / "net.onnx"
    constants = {
        "w": nets.weight(rng, 6, 3, 3, 3),
        "one": np.ones((), np.float32),
        **nets.batch_norm(rng, "bn", 6),
    }
    onnx.save(nets.model(TEXT, constants), target)
    return target


def test_what_onnxsim_clears_away_folds_and_is_checked_against_the_original(
    path: Path, tmp_path: Path
) -> None:
    before = path.read_bytes()
    assert not bnfold.explain(path).folded
    result = bnfold.optimize(path, tmp_path / "out.onnx", simplify=True)
    assert [step.how for step in result.report.folded] == ["backward"]
    assert result.report.source == str(path)
    assert result.check is not None
    assert result.check.verdict is Verdict.PASS
    assert nets.operators(onnx.load(tmp_path / "out.onnx")) == {"Conv": 1}
    assert path.read_bytes() == before


def test_without_onnxsim_the_line_says_what_to_install(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxsim", None)
    with pytest.raises(UsageError, match=r"pip install 'bnfold\[simplify\]'"):
        bnfold.optimize(path, tmp_path / "out.onnx", simplify=True)
    assert not (tmp_path / "out.onnx").exists()


def test_what_onnxsim_can_not_take_is_told(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxsim

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("something\nlong")

    monkeypatch.setattr(onnxsim, "simplify", broken)
    with pytest.raises(InvalidModelError, match="onnxsim can't simplify it: something long"):
        bnfold.optimize(path, tmp_path / "out.onnx", simplify=True)
