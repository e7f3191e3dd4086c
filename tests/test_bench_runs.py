"""`bnfold bench` on real sessions: what it runs, what it refuses, what comes out."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result

import bnfold
import bnfold.report
from bnfold import api, latency
from bnfold.cli import main
from bnfold.errors import InconclusiveError, ProviderError, UsageError
from bnfold.report.bench import BenchResult
from bnfold.verify.machine import cores
from bnfold.verify.ort_session import open_session
from bnfold.verify.providers import CPU, CUDA, options_for
from bnfold.verify.runner import OrtRunner
from bnfold.verify.subject import RunOptions
from tests.test_bench import result as injected
from tests.verify_nets import FOLDED, UNFOLDED, fold, net, statistics

WIDE = "agraph (float[N, 3, H, W] x) => (float[N, 3, H, W] y) {{y = Relu(x)}}"
HELP = """\
Usage: bnfold bench [OPTIONS] MODELS...

  Time MODELS side by side on ONNX Runtime, with all of its optimisations on.

  The first one is the baseline. All get the same inputs and take turns in one
  process; what is compared is their times within a round, so that a change of
  the machine's load meets all alike.

Options:
  --provider NAME           Execution provider to run on: cpu, cuda, tensorrt,
                            migraphx, openvino, dml, coreml or its full name.
                            [default: cpu]
  --threads N,...           Numbers of threads to measure on, each by itself.
                            [default: 1 and, on cpu, all cores]
  --runs N                  How often each model has its turn.  [default: 30;
                            x>=1]
  --seed N                  Seed of the inputs.  [default: 0; x>=0]
  --inputs PATH             Run on these inputs instead, one sample a turn: .npz
                            (arrays by input name), .npy, a test_data_set_0
                            folder or a folder of such; may be given several
                            times.
  --allow-tf32              Let NVIDIA devices round products of float32 to
                            TF32.
  --report FILE|-           Write what was measured, in the form that the ending
                            asks for: .json, .md or .txt; with - as JSON to
                            stdout, and any text to stderr. May be given several
                            times.
  --fail-if-slower PERCENT  Exit with 1 when a model is slower than the first by
                            more than so much, beyond noise.  [x>=0]
  --debug                   Show the traceback of an error.
  -h, --help                Show this message and exit.
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, weights = tmp_path_factory.mktemp("bench"), statistics()
    paths = folder / "net.onnx", folder / "folded.onnx"
    onnx.save(net(UNFOLDED, weights), paths[0])
    onnx.save(net(FOLDED, fold(weights)), paths[1])
    return paths


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, words)], prog_name="bnfold")


def test_models_are_timed_side_by_side(nets: tuple[Path, Path]) -> None:
    found = bnfold.bench(*nets, runs=3, threads=(1, 2, 1))
    assert [model.file for model in found.models] == [str(path) for path in nets]
    assert [(model.size.nodes, model.steps) for model in found.models] == [(8, 2), (6, 0)]
    assert [setting.threads for setting in found.settings] == [1, 2]
    for setting in found.settings:
        assert [len(timing.milliseconds) for timing in setting.timings] == [3, 3]
        assert all(time > 0 for timing in setting.timings for time in timing.milliseconds)
    assert (found.provider, found.rounds, found.seed) == (CPU, 3, 0)
    assert (found.inputs[0].name, found.inputs[0].shapes) == ("x", ((1, 3, 8, 8),))
    assert found.runtime.endswith(onnxruntime.__version__) and found.environment["onnx"]
    assert str(found).startswith("bench: 2 models side by side")


def test_models_in_memory_are_timed() -> None:
    found = bnfold.bench(net(UNFOLDED, statistics()), runs=1, threads=(1,))
    assert [model.file for model in found.models] == ["<model 1>"]


def test_by_default_one_thread_and_all_cores(nets: tuple[Path, Path]) -> None:
    settings = bnfold.bench(nets[0], runs=1).settings
    assert [setting.threads for setting in settings] == list(dict.fromkeys((1, cores())))
    assert latency._threads((), "cuda", 1) == (1,)


def test_all_optimisations_are_on_and_no_session_keeps_its_threads_busy(
    nets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, Any]] = []
    real = onnxruntime.InferenceSession

    def session(source: str, options: Any, **given: Any) -> Any:
        made.append((source, options))
        return real(source, options, **given)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    bnfold.bench(*nets, runs=1, threads=(2,))
    assert [source for source, _ in made] == [str(nets[0]), str(nets[1]), str(nets[0])]
    for _, options in made:
        assert options.graph_optimization_level == (
            onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        )
        assert options.intra_op_num_threads == 2
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"
        assert not options.enable_profiling


def test_a_check_still_runs_without_optimisations(nets: tuple[Path, Path]) -> None:
    session = open_session(onnxruntime, nets[0], CPU, RunOptions())
    level = session.get_session_options().graph_optimization_level
    assert level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL


def test_a_device_may_choose_its_algorithm_when_it_is_timed() -> None:
    assert options_for(CUDA, RunOptions(optimise=True)) == {"use_tf32": "0"}
    assert "cudnn_conv_algo_search" in options_for(CUDA, RunOptions())


def test_all_get_the_same_inputs_one_sample_a_turn(
    nets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[Any] = []

    def seconds(self: OrtRunner, feeds: Any, calls: int) -> float:
        fed.append(feeds["x"])
        return 1.0

    monkeypatch.setattr(OrtRunner, "seconds", seconds)
    samples = np.random.default_rng(0).normal(size=(3, 1, 3, 8, 8)).astype(np.float32)
    bnfold.bench(*nets, runs=4, threads=(1,), inputs={"x": samples})
    timed = fed[-12:]  # of two models and the first again
    assert all(np.array_equal(timed[i], samples[i // 3 % 3]) for i in range(12))


@pytest.mark.parametrize(
    ("old", "new", "n", "said"),
    [
        ("", "", "2", r"input 'x' is float32\[2, 3, 8, 8\], not float32\[1, 3, 8, 8\]"),
        (" x) ", " z) ", "1", "input 'x' is missing"),
        (" x) ", " x, float[1] q) ", "1", "input 'q' is not in the reference"),
    ],
)
def test_models_with_other_inputs_are_refused(
    nets: tuple[Path, Path], tmp_path: Path, old: str, new: str, n: str, said: str
) -> None:
    text = FOLDED.replace(old, new).replace("(x,", "(z," if "z" in new else "(x,")
    other = tmp_path / "other.onnx"
    onnx.save(net(text, fold(statistics()), n=n), other)
    with pytest.raises(UsageError, match=f"other.onnx: .*{said}.*take the same inputs"):
        latency._entered([nets[0], other], None, 0)


def test_outputs_may_differ() -> None:
    models = [net(WIDE, {}), net(WIDE.replace("] y)", "] z)").replace("{y =", "{z ="), {})]
    assert len(bnfold.bench(*models, runs=1, threads=(1,)).models) == 2


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"provider": "abacus"}, UsageError, "no execution provider 'abacus'"),
        ({"provider": "dml"}, ProviderError, "DmlExecutionProvider was asked for"),
        ({"threads": (0,)}, UsageError, "nothing runs on 0 threads"),
        ({"runs": 0}, UsageError, "0 runs measure nothing"),
        ({"inputs": {"q": np.zeros(3)}}, UsageError, "input 'q' is no input"),
    ],
)
def test_what_can_not_be_timed_is_an_error(
    nets: tuple[Path, Path], given: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        bnfold.bench(nets[0], **given)


def test_nothing_to_time_is_an_error() -> None:
    with pytest.raises(UsageError, match="there is no model to time"):
        bnfold.bench()


def test_a_model_that_can_not_run_is_named(tmp_path: Path) -> None:
    fixed = WIDE.replace("N, 3, H, W] x", "1, 3, 5, 5] x")
    for name, text in (("wide.onnx", WIDE), ("fixed.onnx", fixed)):
        onnx.save(net(text, {}), tmp_path / name)
    with pytest.raises(InconclusiveError, match=r"fixed.onnx: ONNX Runtime can't run the model"):
        bnfold.bench(tmp_path / "wide.onnx", tmp_path / "fixed.onnx", runs=1, threads=(1,))


# ---- the command ----


def test_the_help_is() -> None:
    assert run("-h").stdout == HELP


def test_the_command_prints_a_table_and_writes_reports(
    nets: tuple[Path, Path], tmp_path: Path
) -> None:
    paths = [tmp_path / f"bench{ending}" for ending in (".json", ".md", ".txt")]
    asked = [word for path in paths for word in ("--report", path)]
    done = run(*nets, "--runs", 3, "--threads", "1", *asked)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("bench: 2 models side by side")
    assert paths[2].read_text() == done.stdout
    assert paths[1].read_text().startswith("### bnfold: latency")
    found = json.loads(paths[0].read_text())
    jsonschema.Draft202012Validator(bnfold.report.schema()).validate(found)
    assert (found["report"], found["check"]) == (None, None)
    assert [len(t["milliseconds"]) for t in found["bench"]["settings"][0]["timings"]] == [3, 3]


def test_json_on_stdout_is_alone_there(nets: tuple[Path, Path]) -> None:
    done = run(nets[0], "--runs", 1, "--threads", "1", "--report", "-")
    assert json.loads(done.stdout)["bench"]["rounds"] == 1
    assert done.stderr.startswith("bench: 1 model side by side")


def test_the_defaults_are_the_apis(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    signature = inspect.signature(api.bench).parameters

    def bench(*models: str, **given: Any) -> BenchResult:
        seen.update(given)
        return injected(0.9)

    monkeypatch.setattr(api, "bench", bench)
    assert run("a.onnx").exit_code == 0
    assert seen == {name: p.default for name, p in signature.items() if p.default is not p.empty}
    run("a.onnx", "--threads", " 1, 4", "--inputs", "x.npz", "--allow-tf32")
    assert (seen["threads"], seen["inputs"], seen["allow_tf32"]) == ((1, 4), ["x.npz"], True)


@pytest.mark.parametrize(
    ("factor", "words", "code"),
    [(1.2, (), 0), (1.2, ("--fail-if-slower", "5"), 1), (1.2, ("--fail-if-slower", "50"), 0),
     (0.9, ("--fail-if-slower", "0"), 0)],
)  # fmt: skip
def test_only_what_is_slower_than_allowed_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, factor: float, words: Any, code: int
) -> None:
    monkeypatch.setattr(api, "bench", lambda *models, **given: injected(factor))
    report = tmp_path / "bench.json"
    done = run("a", "b", *words, "--report", report)
    assert done.exit_code == code
    assert ("slower than net.onnx" in done.stderr) == bool(code)
    assert report.exists()  # whatever the outcome


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--report", "r.xml"), "r.xml: its ending asks for no format"),
        (("--report", "r.sarif"), "r.sarif: its ending asks for no format"),
        (("--threads", "two"), "--threads: 'two' is no list of numbers; write it as 1,2"),
        (("--threads", "1,,2"), "is no list of numbers"),
        (("--fail-if-slower", "3", "--runs", "7"), "7 runs can't tell whether a model is slower"),
        (("--report", "a.onnx"), "the report would overwrite what it is about"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(words: tuple[str, ...], said: str) -> None:
    done = run("a.onnx", "b.onnx", *words)
    assert (done.exit_code, said in done.stderr) == (2, True), done.stderr


def test_a_file_that_is_not_there_is_named() -> None:
    done = run("nowhere.onnx")
    assert done.exit_code == 5 and "nowhere.onnx" in done.stderr
