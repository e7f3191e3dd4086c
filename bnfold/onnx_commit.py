"""commit(plan): what was decided, written into an ONNX model.

Folded weights may be lazy tensors: computed when they are written, one at a time, so that a model
larger than memory can be folded. Whoever writes one meets `FoldRefusedError` if it does not fit
its type; then nothing has been made yet, and the plan is made anew without that fold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from bnfold.affine import AffineMap, cast_once
from bnfold.channel_graph import Affine
from bnfold.folding import FoldRefusedError, checked, weight_changes
from bnfold.onnx_beside import with_new_values
from bnfold.onnx_describe import ConstantSite, Described, NormSite, PadSite
from bnfold.onnx_edit import Editor
from bnfold.onnx_evaluate import UncomputableError
from bnfold.onnx_facts import input_at
from bnfold.onnx_fold import FoldedTensor, FoldedWeight, folded_bias
from bnfold.onnx_leftover import rewritten
from bnfold.onnx_linear import LinearSite, Slot, unnamed
from bnfold.onnx_merge import merge_edit
from bnfold.onnx_quantised import Dequantised
from bnfold.onnx_quantised_commit import write_quantised
from bnfold.onnx_quantised_fold import quantised_fold
from bnfold.onnx_steps import StepSite
from bnfold.onnx_tensors import Array
from bnfold.planning import Absorption, How, Plan, Reason, Stored

_LAZY_BYTES = 1 << 16
Edit = Callable[[], None]
Shared = dict[tuple[object, ...], ir.Value]


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit wrote.

    Attributes:
        written: The initializers that were made or changed.
        renamed: Tensors that are stored in other units, by their new names: what they were
            called before. Those that hold something else are not among them.
    """

    written: tuple[ir.Value, ...]
    renamed: Mapping[str, str]


def commit(described: Described, plan: Plan, *, lazy: bool = False) -> Committed:
    """Write ``plan`` into the model that was described.

    Args:
        described: The description that the plan was made from; its model is changed.
        plan: What to do.
        lazy: Compute large folded weights only when they are read. Otherwise everything is
            computed before the first edit.

    Raises:
        FoldRefusedError: A folded tensor leaves the range of its type; nothing was edited.
    """
    editor = Editor(described.facts)
    gone = {fold.step for fold in plan.folds}
    known = range(len(described.values))  # a name that is new says nothing yet
    restored = _named(described.values[value] for value in plan.units if value in known)
    restated = _named(described.values[v] for merge in plan.merges for v in merge.restated)
    described, edits = with_new_values(described, editor, plan)
    made: Shared = {}
    edits.extend(_merges(described, editor, plan))
    joined = plan.joined | {merge.into for merge in plan.merges}
    for index, taken in sorted(plan.absorptions.items()):
        if index not in gone and index not in joined and index not in plan.forms:
            edits.append(_absorb(described, editor, index, taken, lazy, made))
    edits.extend(_leftover(described, editor, index, plan) for index in plan.forms)
    edits.extend(_evaluate(described, editor, plan))
    for edit in edits:
        edit()
    for fold in plan.folds:
        site = described.sites[fold.step]
        if isinstance(site, StepSite) and fold.step not in joined:
            keep = fold.stored is Stored.AFTER
            editor.bypass(site.node, site.data_input, keep_output_name=keep)
    editor.sweep()
    _rename(described, editor, restated, "joined")
    renamed = _rename(described, editor, restored, "stored")
    # What was evaluated for a step that then vanished is gone again.
    written = tuple(v for v in dict.fromkeys(editor.written) if v.is_initializer())
    return Committed(written, renamed)


def _merges(described: Described, editor: Editor, plan: Plan) -> Iterator[Edit]:
    for merge in plan.merges:
        site = described.sites[merge.into]
        assert isinstance(site, LinearSite)
        # Named after the weight as it was: by the time of the edit it is another one.
        name = _bias_name(_stem(described, site))
        set_bias = partial(_set_bias, described, editor, name=name)
        yield merge_edit(
            described, editor, merge, plan.absorptions.get(merge.into, Absorption()), set_bias
        )


def _named(values: Iterable[ir.Value]) -> set[tuple[object, str | None]]:
    return {(value.graph, value.name) for value in values}


def _rename(
    described: Described, editor: Editor, others: Collection[tuple[object, str | None]], how: str
) -> dict[str, str]:
    """A tensor that holds something else, or in other units, gets a name of its own."""
    renamed: dict[str, str] = {}
    if not others:
        return renamed
    for node, _ in described.facts.nodes():
        for value in node.outputs:
            if (value.graph, value.name) in others:
                old = value.name or ""
                value.name = editor.unique(f"{old}_{how}")
                renamed[value.name] = old
    return renamed


def _absorb(
    described: Described, editor: Editor, index: int, taken: Absorption, lazy: bool, made: Shared
) -> Edit:
    site = described.sites[index]
    if isinstance(site, LinearSite):
        return _linear(described, editor, index, site, taken, lazy, made)
    if isinstance(site, NormSite):
        return _norm(described, editor, index, site, taken)
    if isinstance(site, PadSite):
        return _pad(described, editor, index, site, taken)
    assert isinstance(site, StepSite)
    return _step(described, editor, index, site, taken)


# ---- linear operators ----


def _linear(
    described: Described,
    editor: Editor,
    index: int,
    site: LinearSite,
    taken: Absorption,
    lazy: bool,
    made: Shared,
) -> Edit:
    quantised = described.facts.quantised_weight(site.node.inputs[site.weight_input])
    if quantised is not None:
        return _quantised(described, editor, index, site, quantised, taken, lazy, made)
    bias = folded_bias(described.facts, index, site, taken)
    weight = _weight_tensor(described, index, site, taken, lazy) if weight_changes(taken) else None
    root = site.node.inputs[site.weight_input]
    assert root is not None
    stem = _stem(described, site)

    def edit() -> None:
        if bias is not None:
            _set_bias(described, editor, site, bias, _bias_name(stem))
            editor.sweep()  # what computed the old bias may have read the shape of the weight
        if weight is not None:
            key = _what_is_stored(root, site, taken)
            if key in made:
                editor.set_input(site.node, site.weight_input, made[key])
                return
            made[key] = editor.set_constant(
                site.node, site.weight_input, weight, site.graph, f"{stem}_folded"
            )

    return edit


def _quantised(
    described: Described, editor: Editor, index: int, site: LinearSite, found: Dequantised,
    taken: Absorption, lazy: bool, made: Shared,
) -> Edit:  # fmt: skip
    folded = quantised_fold(described.facts, index, site, found, taken, lazy=lazy)
    key = (*_what_is_stored(found.output, site, taken), found.order)
    stem = described.facts.constants.root(found.integers).name or site.node.name or "weight"

    def edit() -> None:
        def set_bias(bias: Array, name: str) -> None:
            _set_bias(described, editor, site, bias, name)

        shared = made.get(key)
        value = write_quantised(described, editor, site, found, folded, shared, set_bias, stem)
        if value is not None:
            made[key] = value

    return edit


def _stem(described: Described, site: LinearSite) -> str:
    """What the tensors of an operator are named after."""
    weight = site.node.inputs[site.weight_input]
    root = None if weight is None else described.facts.constants.root(weight).name
    return root or site.node.name or site.node.op_type


def _what_is_stored(weight: ir.Value, site: LinearSite, taken: Absorption) -> tuple[object, ...]:
    """Operators that agree in this store one weight between them."""
    scales = (None if m is None else m.scale.tobytes() for m in (taken.input, taken.output))
    return (unnamed(weight), site.graph, site.layout, *scales)


def _bias_name(stem: str) -> str:
    return f"{stem.removesuffix('weight')}bias" if stem.endswith("weight") else f"{stem}_bias"


def _weight_tensor(
    described: Described, index: int, site: LinearSite, taken: Absorption, lazy: bool
) -> ir.TensorProtocol:
    facts = described.facts
    value = site.node.inputs[site.weight_input]
    assert value is not None
    shape, dtype = facts.constants.shape(value), facts.constants.dtype(value)
    assert dtype is not None
    # Everything is bound here: when the weight is computed, the graph is another one.
    stored = facts.constants.stored(value)
    source = facts.constants.reader(value) if stored is None else stored
    weight = FoldedWeight(source, shape, dtype, index, site.layout, taken)
    if lazy and int(np.prod(shape)) * dtype.itemsize >= _LAZY_BYTES:
        return FoldedTensor(weight, dtype, shape, value.name)
    return ir.Tensor(weight.array(), dtype=dtype)


def _set_bias(
    described: Described, editor: Editor, site: LinearSite, bias: Array, name: str
) -> None:
    if site.slot is Slot.ADD:
        shaped = bias.reshape(-1, 1) if site.rows else bias
        if site.add is None:
            editor.add_after(site.node, ir.Tensor(shaped), site.graph, name)
            return
        position = next(
            i for i, v in enumerate(site.add.inputs) if described.facts.constants.is_constant(v)
        )
        editor.set_constant(site.add, position, ir.Tensor(shaped), site.graph, name)
        return
    if site.becomes_gemm:
        site.node.op_type = "Gemm"
    if site.node.op_type == "Gemm":
        site.node.attributes.pop("beta", None)
        if described.facts.opset(site.graph) < 7:
            site.node.attributes["broadcast"] = ir.AttrInt64("broadcast", 1)
    editor.set_constant(site.node, site.bias_input, ir.Tensor(bias), site.graph, name)


# ---- normalisations with a scale and shift of their own ----


def _norm(
    described: Described, editor: Editor, index: int, site: NormSite, taken: Absorption
) -> Edit:
    constants = described.facts.constants
    gamma, beta = site.node.inputs[1], input_at(site.node, 2)
    assert gamma is not None
    assert taken.output is not None
    dtype = constants.dtype(gamma)
    assert dtype is not None
    own = AffineMap(
        constants.float64(gamma), np.zeros(1) if beta is None else constants.float64(beta)
    )
    merged = taken.output.after(own)
    scale = ir.Tensor(checked(index, merged.scale, dtype.numpy()), dtype=dtype)
    shift = None
    if beta is not None or not merged.is_scaling:
        shift = ir.Tensor(checked(index, merged.shift, dtype.numpy()), dtype=dtype)

    def edit() -> None:
        editor.set_constant(site.node, 1, scale, site.graph, f"{gamma.name}_folded")
        if shift is not None:
            editor.set_constant(site.node, 2, shift, site.graph, _bias_name(gamma.name or "norm"))

    return edit


def _pad(
    described: Described, editor: Editor, index: int, site: PadSite, taken: Absorption
) -> Edit:
    """What is padded in, in the units of the tensor that it is padded to."""
    assert taken.output is not None
    dtype = described.facts.dtype(site.node.outputs[0]) or ir.DataType.FLOAT
    value = taken.output.scale * site.value + taken.output.shift
    tensor = ir.Tensor(checked(index, value, dtype.numpy()).reshape(()), dtype=dtype)

    def edit() -> None:
        if value[0] == site.value:
            return  # zeros are zeros in any units without a shift
        if described.facts.opset(site.graph) < 11:
            site.node.attributes["value"] = ir.AttrFloat32("value", float(value[0]))
        else:
            editor.set_constant(
                site.node, 2, tensor, site.graph, f"{site.node.name or 'pad'}_value"
            )

    return edit


# ---- steps that took over others ----


def _step(
    described: Described, editor: Editor, index: int, site: StepSite, taken: Absorption
) -> Edit:
    step = described.graph.operators[index]
    assert isinstance(step, Affine)
    assert step.map is not None
    merged = taken.around(step.map)
    if site.node.op_type == "BatchNormalization":
        return _batch_norm(described, editor, index, site, merged)
    values = merged.scale if merged.is_scaling else merged.shift
    dtype = described.facts.dtype(site.node.outputs[0]) or _constant_dtype(described, site)
    shape = (-1,) + (1,) * _trailing(described, site, taken) if merged.channels > 1 else ()
    tensor = ir.Tensor(checked(index, values, dtype.numpy()).reshape(shape))

    def edit() -> None:
        node, graph = site.node, site.graph
        data = node.inputs[site.data_input]
        constant = next((i for i in range(len(node.inputs)) if i != site.data_input), 1)
        old = node.inputs[constant] if constant < len(node.inputs) else None
        node.op_type = "Mul" if merged.is_scaling else "Add"
        node.resize_inputs(2)
        node.replace_input_with(0, data)
        node.replace_input_with(1, old)
        editor.set_constant(node, 1, tensor, graph, f"{node.name or node.op_type}_merged")
        if site.broadcast_axis is not None:
            node.attributes["broadcast"] = ir.AttrInt64("broadcast", 1)
            node.attributes["axis"] = ir.AttrInt64("axis", site.broadcast_axis)

    return edit


def _trailing(described: Described, site: StepSite, taken: Absorption) -> int:
    """How many axes stand behind the channels of a step."""
    if taken.axis is None:
        return site.trailing
    data = site.node.inputs[site.data_input]
    rank = None if data is None else described.facts.rank(data)
    assert rank is not None
    return rank - 1 - taken.axis


def _constant_dtype(described: Described, site: StepSite) -> ir.DataType:
    found = [described.facts.constants.dtype(v) for v in site.node.inputs
             if v is not None and described.facts.constants.is_constant(v)]  # fmt: skip
    return found[0] if found and found[0] is not None else ir.DataType.FLOAT


def _batch_norm(
    described: Described, editor: Editor, index: int, site: StepSite, merged: AffineMap
) -> Edit:
    """Scale and shift alone: mean 0, variance 1, epsilon 0."""
    gamma = site.node.inputs[1]
    assert gamma is not None
    wide = merged.expand(described.facts.constants.shape(gamma)[0])
    zero, one = np.zeros(wide.channels), np.ones(wide.channels)
    arrays = []
    for value, values in zip(
        site.node.inputs[1:5], (wide.scale, wide.shift, zero, one), strict=True
    ):
        assert value is not None
        dtype = described.facts.constants.dtype(value)
        assert dtype is not None
        arrays.append(ir.Tensor(checked(index, values, dtype.numpy()), dtype=dtype))

    def edit() -> None:
        for position, tensor in enumerate(arrays, start=1):
            old = site.node.inputs[position]
            name = f"{old.name if old is not None else site.node.name}_merged"
            editor.set_constant(site.node, position, tensor, site.graph, name)
        site.node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.0)

    return edit


def _leftover(described: Described, editor: Editor, index: int, plan: Plan) -> Edit:
    step, site = described.graph.operators[index], described.sites[index]
    assert isinstance(step, Affine)
    assert isinstance(site, StepSite)
    assert step.map is not None
    merged = plan.absorptions.get(index, Absorption()).around(step.map)
    return rewritten(described.facts, editor, index, site, plan.forms[index], merged)


# ---- steps over constants ----


def _evaluate(described: Described, editor: Editor, plan: Plan) -> Iterator[Edit]:
    constants = described.facts.constants
    frontier: dict[ir.Value, int] = {}
    for fold in plan.folds:
        site = described.sites[fold.step]
        if fold.how is How.EVALUATED and isinstance(site, ConstantSite):
            frontier.update(dict.fromkeys(_frontier(described, site.node.outputs[0]), fold.step))
    for value, step in frontier.items():
        dtype = constants.dtype(value)
        if dtype is None or not constants.is_float(value):
            continue
        try:
            wide = constants.float64(value)
        except UncomputableError as error:
            raise FoldRefusedError(step, Reason.NOT_CONSTANT, str(error)) from error
        tensor = ir.Tensor(cast_once(wide, dtype.numpy()), dtype=dtype)
        yield lambda value=value, tensor=tensor: editor.replace_by_constant(value, tensor)  # type: ignore[misc]


def _frontier(described: Described, value: ir.Value) -> list[ir.Value]:
    """The last constants that ``value`` leads to: those that something not constant reads."""
    constants = described.facts.constants
    found, queue = [], [value]
    while queue:
        value = queue.pop()
        nodes = [use.node for use in value.uses()]
        inner = [n for n in nodes if n.outputs and all(constants.is_constant(v) for v in n.outputs)]
        if len(inner) < len(nodes) or value.is_graph_output():
            found.append(value)
        queue.extend(output for node in inner for output in node.outputs)
    return found
