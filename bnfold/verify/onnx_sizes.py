"""Sizes that an ONNX graph can take, tried by shape inference before anything is run.

A net whose head flattens an image takes one size of image only, though its inputs may leave the
size open; one that carries positions takes multiples of its patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import onnx

from bnfold.verify.sizes import BATCH, IMAGE, Pair, sized, usual_size
from bnfold.verify.subject import TensorSpec

# In place of the usual size of an image, in this order.
OTHER_IMAGES = (224, 32, 128, 256, 28, 299, 384, 512)
_SMALL = 1024


def possible_sizes(model: onnx.ModelProto, specs: Sequence[TensorSpec]) -> dict[str, Pair]:
    """Two sizes for the symbols whose usual ones the graph does not take.

    Returns:
        Empty where the usual sizes will do, where inference can't tell, or nothing is open. A
        symbol that takes one size only has it twice.
    """
    usual = _symbols(specs)
    if not usual:
        return {}
    graph = _Skeleton(model, specs)
    first = next((sizes for sizes in _firsts(usual) if graph.takes(sizes)), None)
    if first is None:
        return {}
    second = next((sizes for sizes in _seconds(usual, first) if graph.takes(sizes)), first)
    found = {symbol: (first[symbol], second[symbol]) for symbol in usual}
    return {} if found == usual else found


def _symbols(specs: Sequence[TensorSpec]) -> dict[str, Pair]:
    found: dict[str, Pair] = {}
    for spec in specs:
        for axis, size in enumerate(spec.shape or ()):
            if isinstance(size, str) and size.isidentifier():
                found.setdefault(size, usual_size(spec, axis))
    return found


def _firsts(usual: Mapping[str, Pair]) -> Iterator[dict[str, int]]:
    yield {symbol: pair[0] for symbol, pair in usual.items()}
    if IMAGE not in usual.values():
        return
    for side in OTHER_IMAGES:
        yield {symbol: side if pair == IMAGE else pair[0] for symbol, pair in usual.items()}


def _seconds(usual: Mapping[str, Pair], first: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """All in another size, then all but the batch, then the batch alone."""
    other = {
        symbol: pair[1] if pair[0] == first[symbol] else first[symbol] + 32
        for symbol, pair in usual.items()
    }
    yield other
    yield {symbol: first[symbol] if usual[symbol] == BATCH else other[symbol] for symbol in usual}
    yield {symbol: other[symbol] if usual[symbol] == BATCH else first[symbol] for symbol in usual}


class _Skeleton:
    """The model without its large weights, for inference."""

    def __init__(self, model: onnx.ModelProto, specs: Sequence[TensorSpec]) -> None:
        self._specs = specs
        self._model = onnx.ModelProto(ir_version=max(model.ir_version, 4))
        self._model.opset_import.extend(model.opset_import)
        self._model.functions.extend(model.functions)
        graph = self._model.graph
        graph.name = model.graph.name
        graph.node.extend(model.graph.node)
        stored = {tensor.name for tensor in model.graph.initializer}
        graph.input.extend(value for value in model.graph.input if value.name not in stored)
        for tensor in model.graph.initializer:
            if prod(tensor.dims) > _SMALL:
                graph.input.append(onnx.helper.make_tensor_value_info(
                    tensor.name, tensor.data_type, tensor.dims
                ))  # fmt: skip
            else:
                graph.initializer.append(tensor)
        # What the outputs state may be of another size than the inputs are.
        graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in model.graph.output)

    def takes(self, sizes: Mapping[str, int]) -> bool:
        shapes = sized(self._specs, {symbol: (size, size) for symbol, size in sizes.items()})
        for value in self._model.graph.input:
            if value.name not in shapes:
                continue
            for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
                dim.dim_value = size
        try:
            onnx.shape_inference.infer_shapes(self._model, strict_mode=True, data_prop=True)
        except Exception:  # whatever it stumbles over
            return False
        return True
