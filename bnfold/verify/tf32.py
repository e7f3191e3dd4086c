"""Whether a provider really multiplies float32 as float32, found by multiplying.

(a + δ)(b + ε): TF32 keeps 10 bits of each factor, so that a sum of random products is about
3e-4 of its size off; float32 keeps 23 and is about 2e-7 off.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bnfold.errors import ProviderError
from bnfold.verify.ort_session import open_session
from bnfold.verify.providers import CPU, NVIDIA
from bnfold.verify.subject import RunOptions

LIMIT = 1e-5  # far from both: float32 with its sums is below 2e-6, TF32 above 1e-4
OVERRIDE = "NVIDIA_TF32_OVERRIDE"  # of NVIDIA's libraries: 0 forbids TF32 whatever a program asks

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def measured(ort: Any, provider: str, options: RunOptions) -> float | None:
    """The relative error of a Conv and a MatMul on the provider, the larger of the two.

    Args:
        ort: The module ``onnxruntime``.
        provider: Its full name.
        options: As the models are run.

    Returns:
        None on the CPU, and where the provider can't run the two.
    """
    if provider == CPU:
        return None
    return _measured(ort, provider, options.tf32)


@cache
def _measured(ort: Any, provider: str, tf32: bool) -> float | None:
    x, kernel, matrix = _factors()
    try:
        session = open_session(ort, _model(x, kernel, matrix), provider, RunOptions(tf32))
        conv, product = session.run(None, {"x": x})
    except Exception:  # what ONNX Runtime raises has no class of its own in common
        return None
    exact = x.astype(np.float64)
    return max(
        _relative(conv, _conv(exact, kernel.astype(np.float64))),
        _relative(product, exact @ matrix.astype(np.float64)),
    )


def judged(provider: str, allowed: bool, error: float | None) -> str:
    """``on`` or ``off`` as measured; empty where the device has no such mode.

    Raises:
        ProviderError: It was to be off, and is on.
    """
    if provider not in NVIDIA or error is None:
        return ""
    if error < LIMIT:
        return "off"
    if allowed:
        return "on"
    raise ProviderError(
        f"{provider} was to compute in float32, but a product is {error:.1e} of its size off, as "
        f"with TF32{_noticed()}",
        todo=f"set {OVERRIDE}=0 or allow it with --allow-tf32",
    )


def override(provider: str) -> dict[str, str]:
    """What the environment says of TF32, if the provider listens to it."""
    value = os.environ.get(OVERRIDE)
    return {} if value is None or provider not in NVIDIA else {OVERRIDE: value}


def _noticed() -> str:
    return f" ({OVERRIDE}={os.environ[OVERRIDE]})" if OVERRIDE in os.environ else ""


def _factors() -> tuple[F32, F32, F32]:
    """So large, and in multiples of 8, that NVIDIA's libraries would use tensor cores."""
    rng = np.random.default_rng(32)
    shapes = ((2, 64, 32, 64), (64, 64, 3, 3), (64, 128))
    x, kernel, matrix = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x, kernel, matrix


def _model(x: F32, kernel: F32, matrix: F32) -> onnx.ModelProto:
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "kernel"], ["conv"]),
            helper.make_node("MatMul", ["x", "matrix"], ["product"]),
        ],
        "products",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info(name, kind, [None] * 4) for name in ("conv", "product")],
        [numpy_helper.from_array(kernel, "kernel"), numpy_helper.from_array(matrix, "matrix")],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def _conv(x: F64, kernel: F64) -> F64:
    """Without padding, as one product for each place in the kernel."""
    high, wide = x.shape[2] - 2, x.shape[3] - 2
    parts = (
        np.einsum("nchw,oc->nohw", x[:, :, i : i + high, j : j + wide], kernel[:, :, i, j])
        for i in range(3)
        for j in range(3)
    )
    total: F64 = np.sum(list(parts), axis=0)
    return total


def _relative(y: NDArray[Any], exact: F64) -> float:
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))
