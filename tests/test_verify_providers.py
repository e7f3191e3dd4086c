"""A provider has one full name, the options that make it exact, and a line that brings it."""

from __future__ import annotations

import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from bnfold.errors import ProviderError, UsageError
from bnfold.verify import providers, tf32
from bnfold.verify.providers import (
    CPU,
    CUDA,
    NVIDIA,
    PROVIDERS,
    TENSORRT,
    full_name,
    import_onnxruntime,
    install_hint,
    library_hint,
    options_for,
    require_available,
)
from bnfold.verify.subject import RunOptions


@pytest.mark.parametrize("short", PROVIDERS)
def test_short_names_become_full_ones(short: str) -> None:
    assert full_name(short) == full_name(short.upper()) == PROVIDERS[short]
    assert full_name(PROVIDERS[short]) == PROVIDERS[short]


def test_a_provider_that_means_nothing_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no execution provider 'gpu0'; use one of cpu, cuda"):
        full_name("gpu0")


def test_tf32_is_off_unless_it_is_asked_for() -> None:
    assert options_for(CUDA, RunOptions())["use_tf32"] == "0"
    assert options_for(CUDA, RunOptions(tf32=True))["use_tf32"] == "1"


@pytest.mark.parametrize("provider", sorted(set(PROVIDERS.values())))
def test_options_are_strings_that_the_provider_knows(provider: str) -> None:
    known = {
        CUDA: {"use_tf32", "cudnn_conv_algo_search"},
        PROVIDERS["openvino"]: {"precision"},
    }
    assert set(options_for(provider, RunOptions())) == known.get(provider, set())


# ---- what to install ----


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def version(name: str) -> str:
        if name not in names:
            raise metadata.PackageNotFoundError(name)
        return "1.31.1"

    monkeypatch.setattr(providers, "version", version)


@pytest.mark.parametrize(
    ("short", "have", "line"),
    [
        ("cpu", (), "pip install onnxruntime"),
        ("cuda", (), "pip install 'onnxruntime-gpu[cuda,cudnn]'"),
        ("cuda", ("onnxruntime-gpu",), "pip install 'onnxruntime-gpu[cuda,cudnn]'"),
        (
            "cuda", ("onnxruntime",),
            "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'",
        ),
        (
            "cuda", ("onnxruntime", "onnxruntime-gpu"),
            "pip uninstall -y onnxruntime onnxruntime-gpu && "
            "pip install 'onnxruntime-gpu[cuda,cudnn]'",
        ),
        (
            "tensorrt", ("onnxruntime-gpu",),
            "pip install 'onnxruntime-gpu[cuda,cudnn]' 'tensorrt-cu13<11'",
        ),
        ("openvino", (), "pip install onnxruntime-openvino"),
        ("migraphx", (), "pip install onnxruntime-migraphx"),
        ("dml", (), "pip install onnxruntime-directml (on Windows)"),
        ("coreml", ("onnxruntime",), "pip install onnxruntime (on macOS)"),
        ("acl", (), "install a build of ONNX Runtime with ACLExecutionProvider"),
    ],
)  # fmt: skip
def test_the_line_that_brings_a_provider_replaces_what_is_there(
    monkeypatch: pytest.MonkeyPatch, short: str, have: tuple[str, ...], line: str
) -> None:
    installed(monkeypatch, *have)
    assert install_hint(PROVIDERS[short]) == line


@pytest.mark.parametrize(
    ("reason", "todo"),
    [
        ("libcublasLt.so.13: cannot open", "pip install 'onnxruntime-gpu[cuda,cudnn]'"),
        ("libcudnn.so.9: cannot open", "pip install 'onnxruntime-gpu[cuda,cudnn]'"),
        ("libcuda.so.1: cannot open", "install the NVIDIA driver"),
        ("libnvinfer.so.10: cannot open", "pip install 'tensorrt-cu13<11'"),
        ("something else", "run `bnfold doctor`"),
    ],
)
def test_a_library_that_is_missing_has_a_line_of_its_own(reason: str, todo: str) -> None:
    assert library_hint(reason).startswith(todo)


def test_a_provider_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(ProviderError, match=r"CUDAExecutionProvider was asked for.*has only CPUEx"):
        require_available(onnxruntime, CUDA)
    require_available(onnxruntime, CPU)


def test_two_flavours_at_once_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(
        ProviderError, match="onnxruntime and onnxruntime-gpu are installed at once and share one"
    ):
        require_available(onnxruntime, CUDA)


def test_without_onnxruntime_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ProviderError, match=r"pip install 'bnfold\[cpu\]'") as caught:
        import_onnxruntime()
    assert caught.value.exit_code == 4


def test_a_runtime_that_cannot_be_loaded_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> Any:
            if name == "onnxruntime":
                raise ImportError("libcudart.so: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ProviderError, match="can't be loaded: libcudart"):
        import_onnxruntime()


@pytest.mark.parametrize(
    ("flavour", "name"),
    [("onnxruntime-gpu", "onnxruntime-gpu 1.31.1"), ("", "onnxruntime 1.31.1")],
)
def test_the_runtime_is_named_with_its_flavour(flavour: str, name: str) -> None:
    runtime = SimpleNamespace(package_name=flavour, __version__="1.31.1")
    assert providers.runtime_name(runtime) == name


# ---- TF32 ----


class Products:
    """A session that multiplies as a device would, its factors rounded to ``bits`` of mantissa."""

    bits = 23

    def __init__(self, source: bytes, *_: Any, **__: Any) -> None:
        self.inner = REAL(source, providers=[CPU])
        self.model = source

    def get_providers(self) -> list[str]:
        return [CUDA]

    def run(self, names: Any, feeds: Any) -> Any:
        rounded = {name: mantissa(array, self.bits) for name, array in feeds.items()}
        return self.inner.run(names, rounded)


REAL = onnxruntime.InferenceSession


def mantissa(array: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    fraction, exponent = np.frexp(array)
    scale = 2.0 ** (bits + 1)
    rounded: np.ndarray[Any, Any] = np.ldexp(np.round(fraction * scale) / scale, exponent)
    return rounded.astype(np.float32)


@pytest.mark.parametrize(
    ("bits", "low", "high"), [(23, 1e-8, 2e-6), (10, 1e-4, 1e-3), (7, 1e-3, 1e-2)]
)
def test_products_tell_how_many_bits_a_device_keeps(
    monkeypatch: pytest.MonkeyPatch, bits: int, low: float, high: float
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", Products)
    monkeypatch.setattr(Products, "bits", bits)
    tf32._measured.cache_clear()
    error = tf32.measured(onnxruntime, CUDA, RunOptions())
    tf32._measured.cache_clear()
    assert error is not None and low < error < high


def test_the_cpu_has_no_tf32_to_measure() -> None:
    assert tf32.measured(onnxruntime, CPU, RunOptions()) is None


@pytest.mark.parametrize(
    ("provider", "allowed", "error", "label"),
    [
        (CUDA, False, 2e-7, "off"), (CUDA, True, 2e-7, "off"), (CUDA, True, 3e-4, "on"),
        (TENSORRT, True, 3e-4, "on"), (CUDA, False, None, ""),
        (PROVIDERS["openvino"], False, 3e-4, ""), (CPU, False, None, ""),
    ],
)  # fmt: skip
def test_tf32_is_labelled_as_measured(
    provider: str, allowed: bool, error: float | None, label: str
) -> None:
    assert tf32.judged(provider, allowed, error) == label


@pytest.mark.parametrize("provider", NVIDIA)
def test_tf32_that_was_to_be_off_and_is_on_is_an_error(
    monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    monkeypatch.setenv(tf32.OVERRIDE, "1")
    with pytest.raises(ProviderError, match=r"3.0e-04 .*TF32 \(NVIDIA_TF32_OVERRIDE=1\); set NVI"):
        tf32.judged(provider, False, 3e-4)


def test_the_override_in_the_environment_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tf32.OVERRIDE, "0")
    assert tf32.override(CUDA) == {tf32.OVERRIDE: "0"}
    assert tf32.override(CPU) == {}
    monkeypatch.delenv(tf32.OVERRIDE)
    assert tf32.override(CUDA) == {}
