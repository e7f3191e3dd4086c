"""A fold with which the check fails is taken back; the rest is kept, and proved once more."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

import bnfold
from bnfold import onnx_commit, rollback
from bnfold.cli import main
from bnfold.onnx_fold import FoldedWeight, folded_bias
from bnfold.onnx_write import write_model
from bnfold.planning import Reason
from bnfold.verify.judge import Verdict
from bnfold.verify.onnx_subject import OnnxSubject
from bnfold.verify.result import ProviderRun
from bnfold.verify.runner import OrtRunner
from bnfold.verify.subject import Feeds, Outputs, RunOptions
from tests import nets

CHANNELS = {1: 4, 2: 5, 3: 6, 4: 7}
ALL = ("b1", "b2", "b3", "b4")
WRITTEN = ["net.onnx", "out.onnx", "out.reproducer"]


def write_chain(folder: Path, *, named: bool = True) -> Path:
    """Four times Conv, BatchNormalization, Relu; no two Convs have weights of one shape."""
    rng = np.random.default_rng(0)
    weights: dict[str, nets.Array] = {}
    lines, before, data = [], 3, "x"
    for i, channels in CHANNELS.items():
        weights |= {f"w{i}": nets.weight(rng, channels, before, 3, 3)}
        weights |= nets.batch_norm(rng, f"n{i}", channels)
        labels = [f"[{kind}{i}]" if named else "" for kind in "cbr"]
        statistics = ", ".join(f"n{i}_{part}" for part in ("g", "b", "m", "v"))
        made = "y" if i == len(CHANNELS) else f"t{i}"
        lines += [
            f"{labels[0]} s{i} = Conv ({data}, w{i})",
            f"{labels[1]} u{i} = BatchNormalization (s{i}, {statistics})",
            f"{labels[2]} {made} = Relu (u{i})",
        ]
        data, before = made, channels
    graph = f"g (float[1,3,12,12] x) => (float[1,7,4,4] y) {{ {' '.join(lines)} }}"
    onnx.save(nets.model(graph, weights), folder / "net.onnx")
    return folder / "net.onnx"


# ---- what can be wrong ----

Sabotage = Callable[[pytest.MonkeyPatch], None]


def weights_off(*convs: int) -> Sabotage:
    """The folded weights of these Convs are 1.01 times what they should be."""
    shapes = {CHANNELS[i] for i in convs}

    class Off(FoldedWeight):
        def array(self) -> NDArray[Any]:
            right = super().array()
            return right * right.dtype.type(1.01) if right.shape[0] in shapes else right

    return lambda patch: patch.setattr(onnx_commit, "FoldedWeight", Off)


def bias_off(conv: int) -> Sabotage:
    """One element of the folded bias of a Conv is 1.01 times what it should be."""

    def off(*args: Any) -> NDArray[Any] | None:
        right = folded_bias(*args)
        if right is not None and right.shape[-1] == CHANNELS[conv]:
            right[..., -1] *= 1.01
        return right

    return lambda patch: patch.setattr(onnx_commit, "folded_bias", off)


def stored_wrong(conv: int) -> Sabotage:
    """One number of the folded weight of a Conv is its neighbour; only tier A sees that."""

    def write(model: Any, target: Path, **given: Any) -> None:
        write_model(model, target, **given)
        proto = onnx.load(target)
        if f"b{conv}" not in {node.name for node in proto.graph.node}:
            (weight,) = [t for t in proto.graph.initializer if t.dims[0] == CHANNELS[conv]
                         and len(t.dims) == 4]  # fmt: skip
            bits = np.frombuffer(weight.raw_data, np.int32).copy()
            bits[-1] += 1
            weight.raw_data = bits.tobytes()
            onnx.save(proto, target)

    return lambda patch: patch.setattr(rollback, "write_model", write)


class Wrong:
    """A provider whose outputs are off by a thousandth for some models."""

    def __init__(self, runner: OrtRunner) -> None:
        self.runner = runner

    def run(self, feeds: Feeds) -> Outputs:
        return {name: y * np.float32(1.001) for name, y in self.runner.run(feeds).items()}

    def certificate(self) -> ProviderRun:
        return self.runner.certificate()


def wrong_for(is_wrong: Callable[[set[str]], bool]) -> Sabotage:
    """The provider computes models wrongly, by the names of their nodes; tiers A and B are blind.

    As a runtime would with a bug in its kernel for a Conv that has a bias.
    """
    right = OnnxSubject.runner

    def runner(self: OnnxSubject, provider: str, options: RunOptions) -> Any:
        made = right(self, provider, options)
        return Wrong(made) if is_wrong({n.name for n in self.model.proto.graph.node}) else made

    return lambda patch: patch.setattr(OnnxSubject, "runner", runner)


def without(*steps: str) -> Sabotage:
    """The provider is wrong where one of these steps is folded."""
    return wrong_for(lambda names: not names.issuperset(steps))


# ---- one wrong fold of four ----


def names(path: Path) -> set[str]:
    return {node.name for node in onnx.load(path).graph.node}


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


CASES: dict[str, tuple[Sabotage, tuple[str, ...], str]] = {
    "a weight": (weights_off(2), ("b2",), "B"),
    "the first weight": (weights_off(1), ("b1",), "B"),
    "the last weight": (weights_off(4), ("b4",), "B"),
    "a bias": (bias_off(3), ("b3",), "B"),
    "a bit in the file": (stored_wrong(2), ("b2",), "A"),
    "two weights": (weights_off(1, 3), ("b1", "b3"), "B"),
    "the provider, with the first fold": (without("b1"), ("b1",), "C"),
    "the provider, with the second fold": (without("b2"), ("b2",), "C"),
    "the provider, with the last fold": (without("b4"), ("b4",), "C"),
    "the provider, with two folds": (without("b2", "b3"), ("b2", "b3"), "C"),
}
each_case = pytest.mark.parametrize(("sabotage", "dropped", "tier"), CASES.values(), ids=CASES)


@each_case
def test_only_the_wrong_folds_are_taken_back_and_the_rest_is_proved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sabotage: Sabotage, dropped: tuple[str, ...],
    tier: str,
) -> None:  # fmt: skip
    net, target = write_chain(tmp_path), tmp_path / "out.onnx"
    before = net.read_bytes()
    sabotage(monkeypatch)
    result = bnfold.optimize(net, target, samples=3)
    assert sorted(result.dropped) == sorted(dropped)
    kept = {step.name: (step.code, step.witness) for step in result.report.kept}
    assert kept == {name: ("BNF026", (f"c{name[1]}",)) for name in dropped}
    assert {step.name for step in result.report.folded} == set(ALL) - set(dropped)
    assert result.check is not None
    assert result.check.verdict is Verdict.PASS
    assert names(target).intersection(ALL) == set(dropped)
    assert result.reproducer == str(tmp_path / "out.reproducer")
    assert names(tmp_path / "out.reproducer" / "candidate.onnx").isdisjoint(ALL)
    assert net.read_bytes() == before
    assert listed(tmp_path) == WRITTEN


@each_case
def test_the_check_alone_says_no(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sabotage: Sabotage, dropped: tuple[str, ...],
    tier: str,
) -> None:  # fmt: skip
    net, target = write_chain(tmp_path), tmp_path / "out.onnx"
    with monkeypatch.context() as patch:
        sabotage(patch)
        bnfold.optimize(net, target, check=False)
        said = bnfold.check(net, target, samples=3) if tier == "C" else None
    said = said or bnfold.check(net, target, samples=3)
    assert said.verdict is Verdict.FAIL
    assert next(t.tier for t in said.tiers if t.verdict is Verdict.FAIL) in (tier, "A")


def test_nodes_without_a_name_are_found_by_what_they_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = write_chain(tmp_path, named=False)
    weights_off(2)(monkeypatch)
    result = bnfold.optimize(net, tmp_path / "out.onnx", samples=3)
    assert result.dropped == ("BatchNormalization(u2)",)
    assert result.written


@pytest.mark.parametrize("tiers", ["A", "B", "AB", "ABCD"])
def test_only_the_tiers_that_are_asked_for_look_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiers: str
) -> None:
    net = write_chain(tmp_path)
    (stored_wrong(2) if tiers == "A" else weights_off(2))(monkeypatch)
    result = bnfold.optimize(net, tmp_path / "out.onnx", samples=3, tiers=tiers)
    assert result.dropped == ("b2",)
    assert result.check is not None
    assert {tier.tier for tier in result.check.tiers} == set(tiers)


def test_nothing_is_taken_back_where_all_folds_are_right(tmp_path: Path) -> None:
    net = write_chain(tmp_path)
    result = bnfold.optimize(net, tmp_path / "out.onnx", samples=3)
    assert (result.dropped, result.reproducer) == ((), None)
    assert not result.report.kept
    assert listed(tmp_path) == ["net.onnx", "out.onnx"]


def test_the_reproducer_goes_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = write_chain(tmp_path)
    weights_off(2)(monkeypatch)
    place = tmp_path / "deep" / "er"
    result = bnfold.optimize(net, tmp_path / "out.onnx", samples=3, reproducer=place)
    assert result.reproducer == str(place)
    assert "reproduce.py" in listed(place)
    assert "out.reproducer" not in listed(tmp_path)


# ---- nothing to be mended ----


UNMENDED: dict[str, Sabotage] = {
    "every weight": weights_off(1, 2, 3, 4),
    "the provider, with any fold": without(*ALL),
}


@pytest.mark.parametrize("sabotage", UNMENDED.values(), ids=UNMENDED)
def test_where_every_fold_is_wrong_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sabotage: Sabotage
) -> None:
    net = write_chain(tmp_path)
    before, target = net.read_bytes(), tmp_path / "out.onnx"
    target.write_bytes(b"old")
    sabotage(monkeypatch)
    result = bnfold.optimize(net, target, samples=3)
    assert not result.written
    assert result.check is not None
    assert result.check.exit_code == 1
    assert sorted(result.dropped) == list(ALL)
    assert (net.read_bytes(), target.read_bytes()) == (before, b"old")
    assert listed(tmp_path) == WRITTEN


def test_a_model_that_fails_whatever_is_folded_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollback, "MOST", 2)
    net, target = write_chain(tmp_path), tmp_path / "out.onnx"
    without(*ALL)(monkeypatch)
    result = bnfold.optimize(net, target, samples=3)
    assert (result.written, len(result.dropped)) == (False, 2)
    assert result.check is not None
    assert result.check.exit_code == 1
    assert listed(tmp_path) == ["net.onnx", "out.reproducer"]


def test_what_is_inconclusive_is_nobodys_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = write_chain(tmp_path)
    result = bnfold.optimize(net, tmp_path / "out.onnx", samples=1, tiers="CD")
    assert result.check is not None
    assert result.check.verdict is Verdict.INCONCLUSIVE
    assert (result.dropped, result.reproducer, result.written) == ((), None, False)
    assert listed(tmp_path) == ["net.onnx"]


# ---- what the user sees ----


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Runs the command line in the folder of the net, as its user would."""
    write_chain(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield lambda *args: CliRunner().invoke(main, list(args))


def test_the_command_line_tells_what_was_taken_back_and_where_to_see_it(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_off(2)(monkeypatch)
    result = cli("optimize", "net.onnx", "-o", "out.onnx", "--samples", "3")
    lines = result.stdout.splitlines()
    assert (result.exit_code, result.stderr) == (0, "")
    assert "4 affine steps: 3 folded (3 backward), 1 kept" in lines
    assert (
        "  b2 (BatchNormalization): its fold was taken back, because the check did not pass "
        "with it: c2" in lines
    )
    told = lines.index("the check failed with 1 fold, which was taken back: b2")
    assert lines[told + 1] == "to see it fail: python out.reproducer/reproduce.py"
    assert lines[told + 2] == "check: pass (3 samples, seed 0)"
    assert lines[-1] == "written to out.onnx"


def test_the_command_line_tells_that_nothing_could_be_mended(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_off(1, 2, 3, 4)(monkeypatch)
    result = cli("optimize", "net.onnx", "-o", "out.onnx", "--samples", "3")
    assert result.exit_code == 1
    assert result.stderr.startswith("bnfold: error: out.onnx: Conv 'c1' is wrong: ")
    assert result.stderr.count("\n") == 1
    lines = result.stdout.splitlines()
    told = lines.index("the check failed with 4 folds, which were taken back: b1, b2, b3, b4")
    assert lines[told + 1] == "to see it fail: python out.reproducer/reproduce.py"
    assert lines[told + 2] == "check: fail (3 samples, seed 0)"
    assert lines[-1] == "nothing was written to out.onnx: the check did not pass"


def test_a_gate_may_ask_for_a_step_that_was_rolled_back(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_off(2)(monkeypatch)
    call = ("optimize", "net.onnx", "--samples", "3", "--fail-on-kept")
    assert cli(*call, Reason.ROLLED_BACK.slug).exit_code == 1
    assert cli(*call, Reason.ZERO_PADDING.slug).exit_code == 0


# ---- the reproducer of a rollback ----


def test_the_reproducer_shows_the_error_without_bnfold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_off(2)(monkeypatch)
    bnfold.optimize(write_chain(tmp_path), tmp_path / "out.onnx", samples=3)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "out.reproducer", elsewhere)
    code = (
        "import runpy, sys; runpy.run_path('reproduce.py');"
        "print([name for name in sys.modules if name.split('.')[0] in ('bnfold', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=elsewhere, capture_output=True,
                          text=True, check=True)  # fmt: skip
    provider, before, after, loaded = done.stdout.splitlines()
    assert (provider, loaded, done.stderr) == ("CPUExecutionProvider", "[]", "")
    errors = [[float(e) for e in line.split("errors ")[1].split()] for line in (before, after)]
    assert all(len(each) == 3 for each in errors)
    assert max(errors[0]) < 1e-5 < 1e-3 < min(errors[1])


def test_a_gate_below_rounding_takes_no_fold_back(tmp_path: Path) -> None:
    source = Path(__file__).parent.parent / "models" / "digits_resnet.onnx"
    result = bnfold.optimize(source, tmp_path / "out.onnx", rtol=1e-12, samples=4)
    assert result.check is not None
    assert result.check.exit_code == 1
    assert "atol" in result.check.message
    assert (result.dropped, result.written) == ((), False)
    assert not (tmp_path / "out.onnx").exists()
