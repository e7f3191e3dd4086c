"""A normalisation by running statistics that stays, as other operations.

    affine      mul and add, or one of the two
    depthwise   a convolution of 1x1 with a group for each channel; in a module tree a module

New nodes stand beside the old one, which is bypassed then and swept as what vanishes is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from bnfold.channel_graph import Affine, Leftover
from bnfold.folding import FoldRefusedError, leftover_numbers
from bnfold.planning import Absorption, Plan, Reason
from bnfold.torch_arrays import as_tensor, numpy_type
from bnfold.torch_constants import UncomputableError
from bnfold.torch_describe import Described
from bnfold.torch_edit import Editor
from bnfold.torch_facts import DTYPES
from bnfold.torch_module_editor import ModuleEditor
from bnfold.torch_steps import StepSite
from bnfold.torch_writes import Edit, Writer

_TORCH = {name: dtype for dtype, name in DTYPES.items()}
_MODULES: dict[int, Callable[..., nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def rewritten(described: Described, editor: Editor, writer: Writer, index: int, plan: Plan) -> Edit:
    """The edit that writes step ``index`` in the form that ``plan`` has for it, all computed.

    Args:
        described: The graph.
        editor: Of the graph, or of the module tree that it was described from.
        writer: Through that editor.
        index: The index of the step in the channel graph: a normalisation.
        plan: What was decided.

    Raises:
        FoldRefusedError: The numbers of the step can't be had, or do not fit their type.
    """
    site = described.sites[index]
    assert isinstance(site, StepSite)
    given = site.call["running_mean" if site.call["weight"] is None else "weight"]
    try:
        like = described.facts.constants.tensor(given)
    except UncomputableError as error:
        raise FoldRefusedError(index, Reason.NOT_CONSTANT, str(error)) from error
    scale, shift = _numbers(described, index, plan, like.detach())
    if isinstance(editor, ModuleEditor):
        assert scale is not None
        made = _module(scale, shift, trained=like.requires_grad)
        return lambda: editor.replace(site.call.node, made)
    value = described.values[described.graph.operators[index].outputs[0]]
    resolve, node = described.facts.walk.resolve, site.call.node
    position = next(k for k, n in enumerate(node.all_input_nodes) if resolve(n) is site.data)
    nodes = _Nodes(editor, node, position, value, writer.like(given))
    if plan.forms[index] is Leftover.AFFINE:
        return lambda: nodes.multiply_and_add(scale, shift)
    assert scale is not None
    return lambda: nodes.convolve(scale, shift)


def _numbers(
    described: Described, index: int, plan: Plan, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The scale and the shift, shaped as the operations of the form take them."""
    step, form = described.graph.operators[index], plan.forms[index]
    assert isinstance(step, Affine)
    assert step.map is not None
    read = described.graph.values[step.inputs[0]]
    assert read.shape is not None
    assert step.axis is not None
    channels = read.shape[step.axis]
    assert isinstance(channels, int)
    merged = plan.absorptions.get(index, Absorption()).around(step.map)
    dtype = numpy_type(_TORCH[read.dtype])
    numbers = leftover_numbers(index, form, merged, channels, dtype)
    scale, shift = (None if v is None else as_tensor(v, like) for v in numbers)
    behind = (1,) * (len(read.shape) - 1 - step.axis)
    if form is Leftover.DEPTHWISE:
        assert scale is not None
        return scale.reshape(-1, 1, *behind), shift
    return (
        None if scale is None else scale.reshape(-1, *behind),
        None if shift is None else shift.reshape(-1, *behind),
    )


def _module(weight: Tensor, bias: Tensor | None, *, trained: bool) -> nn.Module:
    channels = weight.shape[0]
    made = _MODULES[weight.dim()](
        channels, channels, 1, groups=channels, bias=bias is not None, device="meta"
    )
    made.weight = nn.Parameter(weight, trained)
    if bias is not None:
        made.bias = nn.Parameter(bias, trained)
    return made


@dataclass(frozen=True, slots=True)
class _Nodes:
    """Nodes in the place of a step.

    Attributes:
        editor: Of the graph.
        node: The step.
        position: Which of the nodes that it reads is its data.
        value: The node of its output.
        like: The tensor that new ones are of the kind of, and stand beside.
    """

    editor: Editor
    node: fx.Node
    position: int
    value: fx.Node
    like: str

    def multiply_and_add(self, scale: Tensor | None, shift: Tensor | None) -> None:
        """``scale * x + shift``, without what is None."""
        made, aten = self._data, torch.ops.aten
        for tensor, target, name in ((scale, aten.mul.Tensor, "scale"),
                                     (shift, aten.add.Tensor, "shift")):  # fmt: skip
            if tensor is not None:
                made = self._made(target, made, made)
                self._reads(made, "other", name, tensor)
        self.editor.bypass(self.value, made)

    def convolve(self, weight: Tensor, bias: Tensor | None) -> None:
        """A depthwise convolution of 1x1."""
        data, spatial = self._data, weight.dim() - 2
        one, zero = [1] * spatial, [0] * spatial
        made = self._made(
            torch.ops.aten.convolution.default, data, data, None, one, zero, one, False, zero,
            weight.shape[0],
        )  # fmt: skip
        self._reads(made, "weight", "weight", weight)
        if bias is not None:
            self._reads(made, "bias", "bias", bias)
        self.editor.bypass(self.value, made)

    @property
    def _data(self) -> fx.Node:
        return self.node.all_input_nodes[self.position]

    def _made(self, target: torch._ops.OpOverload, data: fx.Node, *others: object) -> fx.Node:
        after = self.value if data is self._data else data
        with after.graph.inserting_after(after):
            made = after.graph.call_function(target, (data, *others))  # type: ignore[arg-type]
        made.meta = dict(self.value.meta)
        return made

    def _reads(self, node: fx.Node, argument: str, name: str, tensor: Tensor) -> None:
        added = self.editor.add(f"{self.node.name}_{name}", tensor, self.like)
        self.editor.set_argument(node, argument, added)
