"""A merge with which the check fails is taken back alone: the others, and the folds, are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import bnfold
from bnfold import onnx_merge, rollback
from bnfold.cli import main
from bnfold.merged import MergedTensors, merged_tensors
from bnfold.onnx_write import write_model
from bnfold.verify.judge import Verdict
from tests import nets
from tests.test_rollback import Sabotage, listed, names, wrong_for

CHANNELS = {1: 4, 2: 5, 3: 6}  # no two merged weights have one shape
SUMS = ("a1", "a2", "a3")


def write_branches(folder: Path) -> Path:
    """Three times Conv 3x3 and BatchNormalization, plus Conv 1x1, and a Relu."""
    rng = np.random.default_rng(0)
    weights: dict[str, nets.Array] = {}
    lines, before, data = [], 3, "x"
    for i, channels in CHANNELS.items():
        weights |= {f"w{i}": nets.weight(rng, channels, before, 3, 3)}
        weights |= {f"v{i}": nets.weight(rng, channels, before, 1, 1)}
        weights |= {f"d{i}": rng.normal(size=channels).astype(np.float32)}
        weights |= nets.batch_norm(rng, f"n{i}", channels)
        statistics = ", ".join(f"n{i}_{part}" for part in ("g", "b", "m", "v"))
        made = "y" if i == len(CHANNELS) else f"t{i}"
        lines += [
            f"[c{i}] p{i} = Conv <pads = [1, 1, 1, 1]> ({data}, w{i})",
            f"[b{i}] q{i} = BatchNormalization (p{i}, {statistics})",
            f"[k{i}] r{i} = Conv ({data}, v{i}, d{i})",
            f"[a{i}] s{i} = Add (q{i}, r{i})",
            f"[r{i}] {made} = Relu (s{i})",
        ]
        data, before = made, channels
    graph = f"g (float[1,3,9,9] x) => (float[1,6,9,9] y) {{ {' '.join(lines)} }}"
    onnx.save(nets.model(graph, weights), folder / "net.onnx")
    return folder / "net.onnx"


# ---- what can be wrong ----

Change = Callable[[MergedTensors], MergedTensors]


def _times(made: MergedTensors) -> MergedTensors:
    return MergedTensors(made.weight * made.weight.dtype.type(1.01), made.bias)


def _shifted(made: MergedTensors) -> MergedTensors:
    return MergedTensors(np.roll(made.weight, 1, -1), made.bias)


def _no_bias(made: MergedTensors) -> MergedTensors:
    return MergedTensors(made.weight, np.zeros_like(made.bias))


def merged_wrong(change: Change, *convs: int) -> Sabotage:
    """What is stored for these merges is not what it should be."""
    outs = {CHANNELS[i] for i in convs}

    def off(*args: Any) -> MergedTensors:
        right = merged_tensors(*args)
        return change(right) if len(right.weight) in outs else right

    return lambda patch: patch.setattr(onnx_merge, "merged_tensors", off)


def stored_wrong(conv: int) -> Sabotage:
    """One number of a merged weight is its neighbour in the file; only tier A sees that."""

    def write(model: Any, target: Path, **given: Any) -> None:
        write_model(model, target, **given)
        proto = onnx.load(target)
        if f"a{conv}" not in {node.name for node in proto.graph.node}:
            (weight,) = [t for t in proto.graph.initializer if t.name == f"w{conv}"]
            bits = np.frombuffer(weight.raw_data, np.int32).copy()
            bits[-1] += 1
            weight.raw_data = bits.tobytes()
            onnx.save(proto, target)

    return lambda patch: patch.setattr(rollback, "write_model", write)


def without(*sums: str) -> Sabotage:
    """The provider is wrong where one of these sums is gone."""
    return wrong_for(lambda found: not found.issuperset(sums))


CASES: dict[str, tuple[Sabotage, tuple[str, ...]]] = {
    "a weight": (merged_wrong(_times, 2), ("a2",)),
    "the first weight": (merged_wrong(_times, 1), ("a1",)),
    "a weight that is shifted": (merged_wrong(_shifted, 3), ("a3",)),
    "a bias that is forgotten": (merged_wrong(_no_bias, 2), ("a2",)),
    "two weights": (merged_wrong(_times, 1, 3), ("a1", "a3")),
    "a bit in the file": (stored_wrong(2), ("a2",)),
    "the provider, with the first merge": (without("a1"), ("a1",)),
    "the provider, with the second merge": (without("a2"), ("a2",)),
    "the provider, with two merges": (without("a2", "a3"), ("a2", "a3")),
}


@pytest.mark.parametrize(("sabotage", "dropped"), CASES.values(), ids=CASES)
def test_only_the_wrong_merges_are_taken_back_and_the_rest_is_proved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sabotage: Sabotage, dropped: tuple[str, ...]
) -> None:
    net, target = write_branches(tmp_path), tmp_path / "out.onnx"
    before = net.read_bytes()
    sabotage(monkeypatch)
    result = bnfold.optimize(net, target, samples=3)
    assert sorted(result.dropped) == sorted(dropped)
    apart = {step.name: (step.code, step.witness) for step in result.report.apart}
    assert apart == {name: ("BNF026", (f"c{name[1]}",)) for name in dropped}
    assert {joint.into for joint in result.report.joints} == {
        f"c{name[1]}" for name in {*SUMS} - {*dropped}
    }
    assert not result.report.kept
    assert result.check is not None
    assert result.check.verdict is Verdict.PASS
    assert names(target).intersection(SUMS) == set(dropped)
    assert result.reproducer == str(tmp_path / "out.reproducer")
    assert names(tmp_path / "out.reproducer" / "candidate.onnx").isdisjoint(SUMS)
    assert net.read_bytes() == before
    assert listed(tmp_path) == ["net.onnx", "out.onnx", "out.reproducer"]


def test_where_all_merges_are_right_none_is_taken_back(tmp_path: Path) -> None:
    result = bnfold.optimize(write_branches(tmp_path), tmp_path / "out.onnx", samples=3)
    assert (result.dropped, result.reproducer, result.report.apart) == ((), None, ())
    assert len(result.report.joints) == len(SUMS)
    assert listed(tmp_path) == ["net.onnx", "out.onnx"]


def test_where_every_merge_is_wrong_the_folds_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged_wrong(_times, *CHANNELS)(monkeypatch)
    result = bnfold.optimize(write_branches(tmp_path), tmp_path / "out.onnx", samples=3)
    assert (result.written, sorted(result.dropped)) == (True, [*SUMS])
    assert {step.how for step in result.report.folded} == {"backward"}
    assert not result.report.joints


def test_the_command_line_tells_which_merge_was_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_branches(tmp_path)
    monkeypatch.chdir(tmp_path)
    merged_wrong(_shifted, 2)(monkeypatch)
    call = ["optimize", "net.onnx", "-o", "out.onnx", "--samples", "3"]
    result = CliRunner().invoke(main, call)
    lines = result.stdout.splitlines()
    assert (result.exit_code, result.stderr) == (0, "")
    assert "joined: 8 operators became 2 linear operators (2 parallel)" in lines
    stay = "linear operators next to each other that stay apart: 1 (1 for BNF026 rolled-back)"
    assert stay in lines
    told = lines.index("the check failed with 1 fold, which was taken back: a2")
    assert lines[told + 1] == "to see it fail: python out.reproducer/reproduce.py"
    assert lines[told + 2] == "check: pass (3 samples, seed 0)"


# ---- terms of a sum between which others stand, and operators one after the other ----


def write_terms(folder: Path) -> Path:
    """Two sums of a Conv 3x3, the Relu of another, and a Conv 1x1; then two Convs, two Gemms."""
    rng = np.random.default_rng(0)
    weights: dict[str, nets.Array] = {}
    lines, before, data = [], 3, "x"
    for i, channels in ((1, 4), (2, 5)):
        weights |= {f"{name}{i}": nets.weight(rng, channels, before, size, size)
                    for name, size in (("u", 3), ("v", 1), ("w", 1))}  # fmt: skip
        lines += [
            f"[c{i}] p{i} = Conv <pads = [1, 1, 1, 1]> ({data}, u{i})",
            f"[o{i}] q{i} = Conv ({data}, v{i})",
            f"[r{i}] r{i} = Relu (q{i})",
            f"[a{i}] s{i} = Add (p{i}, r{i})",
            f"[k{i}] t{i} = Conv ({data}, w{i})",
            f"[b{i}] y{i} = Add (s{i}, t{i})",
        ]
        data, before = f"y{i}", channels
    weights |= {"u3": nets.weight(rng, 6, 5, 1, 1), "v3": nets.weight(rng, 7, 6, 3, 3)}
    weights |= {"u4": nets.weight(rng, 7, 8), "v4": nets.weight(rng, 8, 3)}
    lines += [
        "[e3] p3 = Relu (y2)", "[c3] q3 = Conv (p3, u3)", "[k3] r3 = Conv (q3, v3)",
        "[e4] s3 = Relu (r3)", "[g4] t3 = GlobalAveragePool (s3)", "[f4] u = Flatten (t3)",
        "[c4] p4 = Gemm (u, u4)", "[k4] y = Gemm (p4, v4)",
    ]  # fmt: skip
    graph = f"g (float[1,3,9,9] x) => (float[1,3] y) {{ {' '.join(lines)} }}"
    onnx.save(nets.model(graph, weights), folder / "net.onnx")
    return folder / "net.onnx"


def into_wrong(*names: str) -> Sabotage:
    """What is stored for the merges into these operators is not what it should be."""

    def off(graph: Any, merge: Any, *args: Any) -> MergedTensors:
        right = merged_tensors(graph, merge, *args)
        return _times(right) if graph.operators[merge.into].name in names else right

    return lambda patch: patch.setattr(onnx_merge, "merged_tensors", off)


# The sum that is the first to have all of the terms, or the last of the operators.
ENDS = {"c1": "b1", "c2": "b2", "k3": "k3", "c4": "k4"}


@pytest.mark.parametrize("wrong", [("c1",), ("c2",), ("k3",), ("c4",), ("c1", "c2")], ids="+".join)
def test_wrong_merges_of_other_kinds_are_taken_back_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: tuple[str, ...]
) -> None:
    net = write_terms(tmp_path)
    into_wrong(*wrong)(monkeypatch)
    result = bnfold.optimize(net, tmp_path / "out.onnx", samples=3)
    assert {joint.into for joint in result.report.joints} == {*ENDS} - {*wrong}
    assert sorted(result.dropped) == sorted(ENDS[name] for name in wrong)
    assert {step.name for step in result.report.apart if step.code == "BNF026"} == {
        ENDS[name] for name in wrong
    }
    assert result.written
    assert result.check is not None
    assert result.check.verdict is Verdict.PASS
