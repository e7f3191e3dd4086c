"""The runner runs on what was asked for, or says why it can't; never quietly on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from bnfold.errors import InconclusiveError, InvalidModelError, ProviderError, UsageError
from bnfold.verify import runner
from bnfold.verify.oracle import Oracle
from bnfold.verify.runner import CPU, PROVIDERS, OrtRunner, full_name
from tests.verify_nets import UNFOLDED, net, statistics

MODEL = net(UNFOLDED, statistics())
FEEDS = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}


def test_a_proto_and_a_path_give_what_the_oracle_gives(tmp_path: Path) -> None:
    onnx.save(MODEL, tmp_path / "m.onnx")
    expected = Oracle(MODEL).run(FEEDS)["y"]
    for source in (MODEL, tmp_path / "m.onnx"):
        y = OrtRunner(source, "cpu", threads=1).run(FEEDS)["y"]
        assert y.dtype == np.float32
        assert np.linalg.norm(y - expected) < 1e-5 * np.linalg.norm(expected)


def test_external_data_is_found_beside_the_path(tmp_path: Path) -> None:
    external = onnx.ModelProto.FromString(MODEL.SerializeToString())
    onnx.save(external, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    assert (
        OrtRunner(tmp_path / "m.onnx").run(FEEDS)["y"] == OrtRunner(MODEL).run(FEEDS)["y"]
    ).all()


def test_a_proto_above_two_gigabytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "TWO_GIGABYTES", 100)
    with pytest.raises(UsageError, match="pass it as a path"):
        OrtRunner(MODEL)


def test_the_runtime_folds_nothing_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    session = onnxruntime.InferenceSession

    def spy(source: Any, options: Any, **rest: Any) -> Any:
        seen.append(options.graph_optimization_level)
        return session(source, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    OrtRunner(MODEL)
    assert seen == [onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL]


@pytest.mark.parametrize("short", PROVIDERS)
def test_short_names_become_full_ones(short: str) -> None:
    assert full_name(short) == full_name(short.upper()) == PROVIDERS[short]
    assert full_name(PROVIDERS[short]) == PROVIDERS[short]


def test_a_provider_that_means_nothing_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no execution provider 'gpu0'; use one of cpu, cuda"):
        OrtRunner(MODEL, "gpu0")


def test_without_onnxruntime_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ProviderError, match=r"pip install 'bnfold\[cpu\]'") as caught:
        OrtRunner(MODEL)
    assert caught.value.exit_code == 4


def test_a_provider_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(ProviderError, match=r"CUDAExecutionProvider was asked for.*bnfold\[gpu\]"):
        OrtRunner(MODEL, "cuda")


class QuietFallback:
    """A session that takes the CPU when another provider was asked for."""

    options: Any = None

    def __init__(self, _source: Any, options: Any, **_: Any) -> None:
        QuietFallback.options = options

    def get_providers(self) -> list[str]:
        return [CPU]


def test_a_session_that_takes_the_cpu_quietly_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = PROVIDERS["cuda"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [cuda, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", QuietFallback)
    with pytest.raises(
        ProviderError, match="asked for, but ONNX Runtime chose CPUExecutionProvider"
    ):
        OrtRunner(MODEL, "cuda")
    entry = QuietFallback.options.get_session_config_entry("session.disable_cpu_ep_fallback")
    assert entry == "1"


def test_a_provider_that_cannot_run_every_node_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("This session contains graph nodes that are assigned to the CPU EP")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDERS["dml"], CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(ProviderError, match="can't run this model alone: This session contains"):
        OrtRunner(MODEL, "dml")


def parsed(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17, "odd" : 1]> {text}')


def test_a_model_that_the_runtime_refuses_is_a_bad_model() -> None:
    with pytest.raises(InvalidModelError, match="ONNX Runtime refuses the model") as caught:
        OrtRunner(parsed("g (float[2] x) => (float[2] y) { y = odd.Twist(x) }"))
    assert "\n" not in str(caught.value)


def test_a_run_that_breaks_is_inconclusive() -> None:
    model = parsed("g (float[2] x) => (float[N] y) <int64[1] s = {3}> { y = Reshape(x, s) }")
    with pytest.raises(InconclusiveError, match="can't run the model on CPUExecutionProvider"):
        OrtRunner(model).run({"x": np.ones(2, np.float32)})


def test_a_runtime_that_cannot_be_loaded_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> Any:
            if name == "onnxruntime":
                raise ImportError("libcudart.so: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ProviderError, match="can't be loaded: libcudart"):
        runner.import_onnxruntime()
