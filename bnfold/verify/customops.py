"""Operators that neither ONNX Runtime, nor the model itself, nor this package defines."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from bnfold.errors import InconclusiveError
from bnfold.verify.onnx_walk import all_nodes

# Whose operators every build of ONNX Runtime has; a missing one of these is said by the runtime.
KNOWN_DOMAINS = frozenset({
    "", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview", "ai.onnx.preview.training",
    "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc", "com.microsoft.experimental",
    "com.microsoft.dml",
})  # fmt: skip


def custom_operators(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Nodes whose operators must come from a library of the user's."""
    own = {(function.domain, function.name) for function in model.functions}
    nodes = [*all_nodes(model.graph), *(n for f in model.functions for n in all_nodes(f))]
    for node in nodes:
        if node.domain not in KNOWN_DOMAINS and (node.domain, node.op_type) not in own:
            yield node


def require_known_operators(model: onnx.ModelProto, file: str) -> None:
    """Every operator is one that can be run here.

    Args:
        model: The model.
        file: What messages call it.

    Raises:
        InconclusiveError: One is not; names the first, its domain, and its node.
    """
    unknown = list(custom_operators(model))
    if not unknown:
        return
    first = unknown[0]
    kinds = {(node.domain, node.op_type) for node in unknown}
    others = f" and {len(kinds) - 1} more" if len(kinds) > 1 else ""
    raise InconclusiveError(
        f"operator '{first.op_type}' of domain '{first.domain}'{others} is a custom one, and "
        "bnfold loads no operator libraries, so the model can't be run", file=file,
        node=first.name or next(iter(first.output), ""),
        todo="define it in the model as a function, or check the stored weights alone with "
        "--tiers A",
    )  # fmt: skip
