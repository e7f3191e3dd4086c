"""Inputs drawn for an ONNX model, with all that its graph says of them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from bnfold.verify.models import tensors, user_inputs
from bnfold.verify.onnx_limits import limits_of
from bnfold.verify.onnx_sizes import possible_sizes
from bnfold.verify.onnx_statistics import statistics_of
from bnfold.verify.onnx_subject import tensor_specs
from bnfold.verify.onnx_walk import all_nodes
from bnfold.verify.samples import SAMPLES, Samples
from bnfold.verify.sizes import Pair, sized
from bnfold.verify.subject import TensorSpec
from bnfold.verify.synthetic import EXTREMES, LARGE, LARGE_IN_HALF, synthetic

# They divide by the deviation within each image, which an even one does not have.
_OVER_THE_IMAGE = frozenset({
    "InstanceNormalization", "GroupNormalization", "MeanVarianceNormalization",
})  # fmt: skip
_HALF = onnx.TensorProto.FLOAT16


def input_specs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """The inputs that must be fed, in order."""
    return tensor_specs(user_inputs(model))


def drawn_for(
    model: onnx.ModelProto, samples: int = SAMPLES, seed: int = 0, *,
    sizes: Mapping[str, Pair] | None = None,
) -> Samples:  # fmt: skip
    """Draws samples for an ONNX model's inputs.

    Floats follow the running statistics of the first BatchNorm that an input reaches; integers stay
    below the size of the table that they are looked up in; see `synthetic.synthetic`.

    Args:
        model: The unfolded model, whose graph is looked at.
        samples: How many.
        seed: Recorded in the result; the same seed gives the same samples.
        sizes: Two sizes for each of these symbols; those that the graph can take where None.

    Raises:
        UsageError: An input is no tensor of known rank, or of a type that can't be drawn.
    """
    specs = input_specs(model)
    sizes = possible_sizes(model, specs) if sizes is None else sizes
    even_image = not any(node.op_type in _OVER_THE_IMAGE for node in all_nodes(model.graph))
    half = any(tensor.data_type == _HALF for tensor in tensors(model.graph))
    return synthetic(
        specs, samples, seed,
        limits=limits_of(model, specs),
        statistics=statistics_of(model, specs, sized(specs, sizes)),
        sizes=sizes,
        large=LARGE_IN_HALF if half else LARGE,
        extremes=[name for name in EXTREMES if even_image or name != "even"],
    )  # fmt: skip
