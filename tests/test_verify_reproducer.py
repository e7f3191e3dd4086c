"""A reproducer runs anywhere with onnx and ONNX Runtime, and shows what the check saw."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import bnfold
from bnfold.errors import WriteError
from bnfold.verify import reproducer
from bnfold.verify.judge import Verdict
from bnfold.verify.reproducer import write_reproducer
from bnfold.verify.subject import RunOptions
from tests import nets
from tests.verify_nets import FOLDED, SABOTAGES, UNFOLDED, fold, net, statistics

CPU = "CPUExecutionProvider"
FILES = ["candidate.onnx", "inputs.npz", "oracle.npz", "reference.onnx", "reproduce.py"]
WRONG = "a bias off by a thousandth"
WATCHED = """
import runpy, sys
runpy.run_path("reproduce.py")
print([name for name in sys.modules if name.split(".")[0] in ("bnfold", "torch", "onnx_ir")])
"""


def unfolded() -> onnx.ModelProto:
    return net(UNFOLDED, statistics())


def wrongly_folded() -> onnx.ModelProto:
    return net(FOLDED, SABOTAGES[WRONG](fold(statistics())))


def samples(count: int, *shape: int) -> list[dict[str, NDArray[Any]]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(0, 1, shape).astype(np.float32)} for _ in range(count)]


def written(
    folder: Path, reference: onnx.ModelProto, candidate: onnx.ModelProto,
    feeds: Sequence[Mapping[str, NDArray[Any]]], oracle: Sequence[Mapping[str, Any]] = (),
    providers: Sequence[str] = (CPU,), said: str = "it is wrong", **more: Any,
) -> Path:  # fmt: skip
    write_reproducer(folder, reference, candidate, feeds, oracle, providers, said, **more)
    return folder


def shown(folder: Path, elsewhere: Path) -> list[str]:
    """What the script prints in a copy of the folder, isolated, and that it needs no bnfold."""
    shutil.copytree(folder, elsewhere)
    command = [sys.executable, "-I", "-c", WATCHED]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    return lines


def errors(line: str) -> list[float]:
    return [float(error) for error in line.split("errors ")[1].split()]


# ---- of a check ----


def test_it_shows_the_errors_that_the_check_saw(tmp_path: Path) -> None:
    said = bnfold.check(unfolded(), wrongly_folded(), samples=3, reproducer=tmp_path / "it")
    assert said.verdict is Verdict.FAIL
    assert sorted(path.name for path in (tmp_path / "it").iterdir()) == FILES
    provider, before, after = shown(tmp_path / "it", tmp_path / "elsewhere")
    assert provider == CPU
    assert before.startswith("  reference.onnx: output 'y': errors ")
    assert after.startswith("  candidate.onnx: output 'y': errors ")
    (measured,) = [o.measured for t in said.tiers if t.tier == "C" for o in t.outputs]
    assert measured is not None
    assert errors(before) == pytest.approx(measured.e_unfold, rel=0.5)
    assert errors(after) == pytest.approx(measured.e_fold, rel=0.1)
    assert max(errors(before)) < min(errors(after)) / 50


@pytest.mark.parametrize("verdict", [Verdict.PASS, Verdict.INCONCLUSIVE])
def test_there_is_none_of_a_check_that_does_not_fail(tmp_path: Path, verdict: Verdict) -> None:
    right = net(FOLDED, fold(statistics())) if verdict is Verdict.PASS else unfolded()
    said = bnfold.check(unfolded(), right, samples=3, reproducer=tmp_path / "it")
    assert said.verdict is verdict
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize("tiers", ["A", "B"])
def test_without_the_oracle_the_reference_stands_in_its_place(tmp_path: Path, tiers: str) -> None:
    folded = bnfold.fold(unfolded()).model
    (weight,) = [t for t in folded.graph.initializer if list(t.dims) == [8, 6, 3, 3]]
    weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * np.float32(1.001)).tobytes()
    said = bnfold.check(unfolded(), folded, samples=3, tiers=tiers, reproducer=tmp_path / "it")
    assert said.verdict is Verdict.FAIL
    lines = shown(tmp_path / "it", tmp_path / "elsewhere")
    assert len(errors(lines[-1])) == (3 if tiers == "A" else 1)  # tier B: of the first sample
    assert min(errors(lines[-1])) > 1e-6
    known = "  what the reference says in float64 is not known; against what it says here:"
    assert (known in lines) == (tiers == "A")


def test_a_second_one_replaces_the_first(tmp_path: Path) -> None:
    feeds = samples(2, 1, 3, 8, 8)
    written(tmp_path, unfolded(), wrongly_folded(), feeds, said="the first")
    written(tmp_path, unfolded(), wrongly_folded(), feeds[:1], said="the second")
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert "the second" in (tmp_path / "reproduce.py").read_text()
    assert len(np.load(tmp_path / "inputs.npz").files) == 1


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(WriteError, match=r"taken: .* File exists; choose .* --reproducer DIR"):
        written(tmp_path / "taken", unfolded(), wrongly_folded(), ())


# ---- models and inputs of all kinds ----


def test_weights_beyond_the_limit_of_a_file_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproducer, "TWO_GIGABYTES", 2)
    one, other = unfolded(), wrongly_folded()
    before = one.SerializeToString(), other.SerializeToString()
    folder = written(tmp_path / "it", one, other, samples(2, 1, 3, 8, 8))
    assert {"reference.onnx.data", "candidate.onnx.data"} <= {p.name for p in folder.iterdir()}
    assert (one.SerializeToString(), other.SerializeToString()) == before
    assert min(errors(shown(folder, tmp_path / "elsewhere")[-1])) > 1e-5


TEXT = """g (float[2] a, int64[2] {i}, bool b, string[2] s, float16[2] h)
    => (float[2] y, int64[2] n, string[2] t, float16[2] k, float[2] z) {{
    f = Cast<to = 1>({i}) y = Add(a, f) n = Add({i}, {i}) t = Identity(s) k = {op}(h)
    z = Where(b, a, y)
}}"""


@pytest.mark.parametrize("name", ["i", '"in/0.npy"', '"file"', '"../up"'])
def test_inputs_of_every_kind_and_name_come_back(tmp_path: Path, name: str) -> None:
    feed: dict[str, NDArray[Any]] = {
        "a": np.array([1, 2], np.float32), name.strip('"'): np.array([3, -4]), "b": np.array(True),
        "s": np.array(["é", ""], object), "h": np.array([0.5, -2], np.float16),
    }  # fmt: skip
    one, other = (nets.model(TEXT.format(i="i", op=op)) for op in ("Abs", "Neg"))
    for model in (one, other):
        rename(model, "i", name.strip('"'))
    oracle = [{"y": np.array([4.0, -2.0]), "k": np.array([0.5, 2.0])}]
    lines = shown(written(tmp_path / "it", one, other, [feed], oracle), tmp_path / "elsewhere")
    assert [errors(line) for line in lines[1:]] == [[0], [0], [0], [0.49]]  # of k: 1 / 2.06
    lines = shown(written(tmp_path / "it", one, other, [feed]), tmp_path / "again")
    assert [errors(line)[0] for line in lines[2:]] == [0, 0, 0, 0.49, 0]


def rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for value in model.graph.input:
        value.name = new if value.name == old else value.name
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


# ---- the script ----


@pytest.mark.parametrize(
    ("provider", "options", "settings_", "packages"),
    [
        (CPU, RunOptions(), {}, "onnx numpy onnxruntime"),
        ("CUDAExecutionProvider", RunOptions(),
         {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
         "onnx numpy 'onnxruntime-gpu[cuda,cudnn]'"),
        ("CUDAExecutionProvider", RunOptions(tf32=True),
         {"use_tf32": "1", "cudnn_conv_algo_search": "HEURISTIC"},
         "onnx numpy 'onnxruntime-gpu[cuda,cudnn]'"),
        ("OpenVINOExecutionProvider", RunOptions(), {"precision": "ACCURACY"},
         "onnx numpy and a build of ONNX Runtime with OpenVINOExecutionProvider"),
    ],
)  # fmt: skip
def test_the_provider_computes_as_it_did_in_the_check(
    tmp_path: Path, provider: str, options: RunOptions, settings_: dict[str, str], packages: str
) -> None:
    written(tmp_path, unfolded(), wrongly_folded(), (), providers=[provider], options=options)
    script = (tmp_path / "reproduce.py").read_text()
    assert f"PROVIDERS = {{'{provider}': {settings_}}}\n" in script
    assert f"    pip install {packages}\n    python reproduce.py\n" in script


def test_a_provider_that_is_not_there_is_never_a_quiet_cpu_run(tmp_path: Path) -> None:
    folder = written(tmp_path / "it", unfolded(), wrongly_folded(), samples(1, 1, 3, 8, 8),
                     providers=["DmlExecutionProvider", CPU])  # fmt: skip
    lines = shown(folder, tmp_path / "elsewhere")
    assert lines[:3] == ["DmlExecutionProvider", "  is not there", CPU]
    assert sum("errors" in line for line in lines) == 1


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("\\'\"{}%n \n\ré\x00\u2028abc") | st.characters()))
def test_what_was_said_cannot_break_the_script(said: str) -> None:
    text = reproducer._script(said, [CPU], RunOptions())
    module = ast.parse(text)
    docstring = ast.get_docstring(module, clean=False)
    assert docstring is not None
    assert ast.dump(ast.Module(module.body[1:], [])) == PLAIN
    kept = docstring.split("python reproduce.py\n", 1)[1]
    assert set("abc") & set(said) <= set(kept)


def body() -> str:
    module = ast.parse(reproducer._script("plain", [CPU], RunOptions()))
    return ast.dump(ast.Module(module.body[1:], []))


PLAIN = body()
