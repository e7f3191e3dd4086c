"""The sweep over torch modules counts what is left, and says no to a fold that is wrong."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import bnfold
from bnfold.api import FoldResult
from tools import torch_zoo

ZOO = """
from models import build as net
SIZES = {"here:levit": 32}
def build(name):
    return net(name.split(":")[1])
"""


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    path = tmp_path / "export.py"
    path.write_text(ZOO)
    return path


def swept(zoo: Path) -> tuple[int, dict[str, object]]:
    target = zoo.parent / "rows.json"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as the tool does: torch's own fuser warns
        code = torch_zoo.main([str(zoo), "--json", str(target)])
    (row,) = json.loads(target.read_text())
    return code, row


def test_each_way_is_counted_and_judged(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, row = swept(zoo)
    assert code == 0
    assert (row["norms"], row["module_norms"], row["traced_norms"]) == (8, 0, 0)
    assert row["program"] == 0
    assert row["module_reasons"] == ["BNF023"]  # the scale of its attention is written in code
    assert "here:levit" in capsys.readouterr().out


def test_a_wrong_fold_is_named(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bnfold.fold

    def wrong(model: object, *args: object) -> FoldResult:
        result = right(model, *args)  # type: ignore[arg-type]
        if isinstance(result.model, nn.Module):
            bias = next(p for n, p in result.model.named_parameters() if n.endswith("bias"))
            with torch.no_grad():
                bias.add_(1e-6)
        return result

    monkeypatch.setattr(bnfold, "fold", wrong)
    code, row = swept(zoo)
    assert code == 1
    assert row["wrong"] == ["module", "traced"]
