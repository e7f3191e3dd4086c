"""The runner runs on what was asked for, or says why it can't; never quietly on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from bnfold.errors import InconclusiveError, InvalidModelError, ProviderError, UsageError
from bnfold.verify import ort_session, tf32
from bnfold.verify.oracle import Oracle
from bnfold.verify.ort_log import Heard, heard
from bnfold.verify.runner import CPU, PROVIDERS, OrtRunner
from bnfold.verify.subject import RunOptions
from tests.verify_nets import UNFOLDED, net, statistics

MODEL = net(UNFOLDED, statistics())
FEEDS = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}
NO_FALLBACK = "session.disable_cpu_ep_fallback"
CUDA, OPENVINO = PROVIDERS["cuda"], PROVIDERS["openvino"]


def parsed(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17, "odd" : 1]> {text}')


# ---- on the CPU ----


def test_a_proto_and_a_path_give_what_the_oracle_gives(tmp_path: Path) -> None:
    onnx.save(MODEL, tmp_path / "m.onnx")
    expected = Oracle(MODEL).run(FEEDS)["y"]
    for source in (MODEL, tmp_path / "m.onnx"):
        y = OrtRunner(source, "cpu", RunOptions(threads=1)).run(FEEDS)["y"]
        assert y.dtype == np.float32
        assert np.linalg.norm(y - expected) < 1e-5 * np.linalg.norm(expected)


def test_external_data_is_found_beside_the_path(tmp_path: Path) -> None:
    external = onnx.ModelProto.FromString(MODEL.SerializeToString())
    onnx.save(external, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    assert (
        OrtRunner(tmp_path / "m.onnx").run(FEEDS)["y"] == OrtRunner(MODEL).run(FEEDS)["y"]
    ).all()


def test_a_proto_above_two_gigabytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_session, "TWO_GIGABYTES", 100)
    with pytest.raises(UsageError, match="pass it as a path"):
        OrtRunner(MODEL)


def test_the_runtime_folds_nothing_itself_and_never_changes_the_provider(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    session = onnxruntime.InferenceSession

    def spy(source: Any, options: Any, **rest: Any) -> Any:
        seen.append((options.graph_optimization_level, rest["enable_fallback"]))
        return session(source, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    OrtRunner(MODEL)
    assert seen == [(onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, 0)]


def test_a_model_that_the_runtime_refuses_is_a_bad_model(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidModelError, match="ONNX Runtime refuses the model") as caught:
        OrtRunner(parsed("g (float[2] x) => (float[2] y) { y = odd.Twist(x) }"))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_run_that_breaks_is_inconclusive(capfd: pytest.CaptureFixture[str]) -> None:
    model = parsed("g (float[2] x) => (float[N] y) <int64[1] s = {3}> { y = Reshape(x, s) }")
    with pytest.raises(InconclusiveError, match="can't run the model on CPUExecutionProvider"):
        OrtRunner(model).run({"x": np.ones(2, np.float32)})
    assert capfd.readouterr().err == ""


def test_the_certificate_of_the_cpu_counts_the_nodes_promised_and_run() -> None:
    runner = OrtRunner(MODEL, "cpu")
    runner.run(FEEDS)
    runner.run(FEEDS)
    said = runner.certificate()
    assert said.provider == CPU
    assert said.runtime == f"onnxruntime {onnxruntime.__version__}"
    assert dict(said.promised) == dict(said.ran) == {CPU: 8}
    assert (said.elsewhere, said.tf32, said.tf32_error) == ((), "", None)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runner = OrtRunner(MODEL)
    assert len(list(tmp_path.iterdir())) == 1
    runner.run(FEEDS)
    assert not list(tmp_path.iterdir())
    unused = OrtRunner(MODEL)
    del unused
    assert not list(tmp_path.iterdir())
    with pytest.raises(InvalidModelError):
        OrtRunner(parsed("g (float[2] x) => (float[2] y) { y = odd.Twist(x) }"))
    assert not list(tmp_path.iterdir())


def test_without_a_profile_the_promise_alone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runner = OrtRunner(MODEL, "cpu", RunOptions(profile=False))
    runner.run(FEEDS)
    assert dict(runner.certificate().ran) == {}
    assert not list(tmp_path.iterdir())


# ---- another provider, which is not there: a session that tells what it is told to ----


def refuses_fallback(options: Any) -> bool:
    try:
        return bool(options.get_session_config_entry(NO_FALLBACK) == "1")
    except RuntimeError:  # it was never set
        return False


class Device:
    """A fake of ONNX Runtime's session on another provider: its nodes, and where they are.

    The profile is one that the runtime wrote on the CPU, with the providers changed.
    """

    placed: tuple[tuple[str, str], ...] = ()  # operator type -> provider, the first that fits
    starts: str | None = None  # the provider that comes first, if not the one asked for
    alone: bool = True  # whether it takes all nodes
    says: str = ""  # on stderr, while it starts
    made: ClassVar[list[Any]]
    real = onnxruntime.InferenceSession

    def __init__(self, source: Any, options: Any, providers: Any, **_: Any) -> None:
        type(self).made.append(options)
        self.provider: str
        self.provider, self.options = providers[0]
        os.write(2, self.says.encode())
        if not self.alone and refuses_fallback(options):
            raise RuntimeError("This session contains graph nodes that are assigned to the CPU EP")
        plain = onnxruntime.SessionOptions()
        plain.graph_optimization_level = options.graph_optimization_level
        plain.enable_profiling = options.enable_profiling
        plain.profile_file_prefix = options.profile_file_prefix
        self.inner = self.real(source, plain, providers=[CPU])

    def where(self, op_type: str) -> str:
        return dict(self.placed).get(op_type, self.provider)

    def get_providers(self) -> list[str]:
        return [self.starts or self.provider, CPU]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return {self.provider: {**self.options, "device_id": "0", "unset": ""}, CPU: {}}

    def get_outputs(self) -> Any:
        return self.inner.get_outputs()

    def run(self, names: Any, feeds: Any) -> Any:
        return self.inner.run(names, feeds)

    def end_profiling(self) -> str:
        file = Path(self.inner.end_profiling())
        events = json.loads(file.read_text())
        for event in events:
            if event["cat"] == "Node":
                event["args"]["provider"] = self.where(event["args"]["op_name"])
        file.write_text(json.dumps(events))
        return str(file)

    def get_provider_graph_assignment_info(self) -> Any:
        nodes = [("c1", "Conv"), ("r1", "Relu"), ("s1", "Shape")]
        return [
            SimpleNamespace(
                ep_name=self.where(op),
                get_nodes=lambda n=name, o=op: [SimpleNamespace(name=n, op_type=o, domain="")],
            )
            for name, op in nodes
        ]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> type[Device]:
    class Fresh(Device):
        made: ClassVar[list[Any]] = []

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, OPENVINO, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("noise"), raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fresh)
    tf32._measured.cache_clear()
    return Fresh


def ran_on(provider: str) -> OrtRunner:
    runner = OrtRunner(MODEL, provider)
    runner.run(FEEDS)
    return runner


def test_a_run_on_another_provider_comes_with_its_certificate(
    device: type[Device], capsys: pytest.CaptureFixture[str]
) -> None:
    said = ran_on("cuda").certificate()
    assert dict(said.ran) == {CUDA: 8}
    assert dict(said.promised) == {CUDA: 3}
    assert dict(said.options) == {
        "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "device_id": "0",
    }  # fmt: skip
    assert said.tf32 == "off"
    assert said.tf32_error is not None and said.tf32_error < 1e-5
    assert refuses_fallback(device.made[0])
    assert capsys.readouterr().out == ""


def test_a_session_that_takes_the_cpu_quietly_is_an_error(device: type[Device]) -> None:
    device.starts = CPU
    with pytest.raises(ProviderError, match="did not start: ONNX Runtime chose CPUExec"):
        OrtRunner(MODEL, "cuda")


@pytest.mark.parametrize(
    ("provider", "said", "told"),
    [
        (
            "cuda",
            "\x1b[1;31m2026 [E:onnxruntime:Default, bridge.cc:1 Get] Failed to load library "
            "/x/libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open shared "
            "object file: No such file or directory\x1b[m\n",
            "did not start: libcublasLt.so.13: cannot open .* pip install 'onnxruntime-gpu",
        ),
        (
            "cuda", "Failed to load library x with error: libcuda.so.1: cannot open shared object",
            "libcuda.so.1: cannot open.*install the NVIDIA driver",
        ),
        (
            "cuda", "2026 [E:onnxruntime:, s.cc:1 f] x.cc:9 CUDA failure 100: no CUDA-capable "
            "device is detected ; GPU=-1 ; hostname=h\n",
            "did not start: CUDA failure 100: no CUDA-capable device is detected",
        ),
        (
            "openvino", "[E:onnxruntime:Default, a.cc:1 C] a.cc:1 f() [ERROR] [OpenVINO] Device "
            "GPU is not available\n",
            "OpenVINOExecutionProvider was asked for, but did not start: Device GPU is not avail",
        ),
    ],
)  # fmt: skip
def test_why_a_provider_did_not_start_is_in_the_runtimes_own_words(
    device: type[Device], provider: str, said: str, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    device.starts, device.says = CPU, said
    with pytest.raises(ProviderError, match=told) as caught:
        OrtRunner(MODEL, provider)
    assert "\x1b" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_nodes_that_only_compute_shapes_may_be_left_to_the_cpu(device: type[Device]) -> None:
    device.alone, device.placed = False, (("Shape", CPU),)
    assert dict(ran_on("cuda").certificate().promised) == {CUDA: 2, CPU: 1}
    assert [refuses_fallback(options) for options in device.made[:2]] == [True, False]


def test_a_node_that_computes_on_the_cpu_is_named_before_anything_runs(
    device: type[Device],
) -> None:
    device.alone, device.placed = False, (("Conv", CPU),)
    with pytest.raises(ProviderError, match=r"1 of 3 nodes would run on CPUEx.*: c1 \(Conv\);"):
        OrtRunner(MODEL, "cuda")


def test_a_node_that_computed_on_the_cpu_against_the_promise_is_named(
    device: type[Device],
) -> None:
    device.placed = (("Gemm", CPU),)
    with pytest.raises(ProviderError, match=r"1 of 8 nodes ran on CPUEx.*Gemm.*\(Gemm\);"):
        ran_on("cuda").certificate()


def test_a_provider_on_which_nothing_was_run_has_no_certificate(device: type[Device]) -> None:
    with pytest.raises(ProviderError, match="nothing was run on CUDAExecutionProvider"):
        OrtRunner(MODEL, "cuda").certificate()


def test_why_a_provider_did_not_start_may_come_as_an_exception(
    device: type[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            "/src/bridge.cc:1988 Get() FAIL : Failed to load library /x/lib_p.so with error: "
            "libmigraphx_c.so.3: cannot open shared object file"
        )

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(ProviderError, match=r"start: libmigraphx_c.so.3: cannot .*AMD's ROCm"):
        OrtRunner(MODEL, "openvino")


def test_a_provider_that_refuses_the_model_is_an_error(
    device: type[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel for Twist")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(ProviderError, match="can't run this model alone: no kernel for Twist"):
        OrtRunner(MODEL, "openvino")


# ---- what is said on stderr ----


def test_what_native_code_says_is_heard_and_stderr_is_given_back(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with heard() as said:
        os.write(2, b"native\n")
    os.write(2, b"after\n")
    assert said.text == "native\n"
    assert said.reason == ""
    assert capfd.readouterr().err == "after\n"


def test_stderr_is_given_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    kept: list[Heard] = []
    with pytest.raises(ValueError, match="broken"), heard() as said:
        kept.append(said)
        os.write(2, b"native\n")
        raise ValueError("broken")
    os.write(2, b"after\n")
    assert (kept[0].text, capfd.readouterr().err) == ("native\n", "after\n")


def test_two_threads_give_stderr_back(capfd: pytest.CaptureFixture[str]) -> None:
    def listen(pause: float) -> None:
        with heard():
            time.sleep(pause)

    threads = [threading.Thread(target=listen, args=(pause,)) for pause in (0.05, 0.1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_a_process_without_stderr_can_check_too() -> None:
    code = (
        "import os; os.close(2)\n"
        "from bnfold.verify.ort_log import heard\n"
        "with heard() as said: pass\n"
        "print(repr(said.text))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "''"
