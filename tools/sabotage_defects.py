"""Wrong folds: each defect is planted in a right fold, at a place drawn at random.

Those of `sabotage_statistics`, and most of `sabotage_joined`, go into the unfolded model before it
is folded; these here change the folded one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.random import Generator
from onnx import helper

from tools.sabotage_graph import (
    F64,
    Draft,
    NoSiteError,
    attribute,
    label,
    pick,
)
from tools.sabotage_joined import FOLDED, UNFOLDED
from tools.sabotage_statistics import STATISTICS, Step

# Changes a draft at a place that it draws, and says where.
Plant = Callable[[Draft, Generator], str]
Change = Callable[[F64, Generator], F64]


@dataclass(frozen=True, slots=True)
class Defect:
    """A way to be wrong.

    Attributes:
        name: What it is called on the command line.
        plant: Plants it.
        before_folding: Whether it goes into the unfolded model.
    """

    name: str
    plant: Plant
    before_folding: bool = False


# ---- in a weight or a bias ----


def _bias(change: Change) -> Plant:
    def plant(draft: Draft, rng: Generator) -> str:
        site = pick(rng, [linear for linear in draft.linears() if linear.bias])
        draft.store(site.bias, change(draft.array(site.bias), rng))
        return f"bias '{site.bias}' of {label(site.node)}"

    return plant


def _weight(change: Change, *, inputs: bool = False) -> Plant:
    """``change`` sees the output channels (or the input channels) on axis 0."""

    def plant(draft: Draft, rng: Generator) -> str:
        site = pick(rng, draft.linears())
        axis = site.in_axis if inputs else site.out_axis
        turned = np.moveaxis(draft.array(site.weight), axis, 0)
        draft.store(site.weight, np.moveaxis(change(turned, rng), 0, axis))
        return f"weight '{site.weight}' of {label(site.node)}"

    return plant


def _times(factor: float) -> Change:
    return lambda array, _: array * factor


def _one_channel(factor: float) -> Change:
    def change(array: F64, rng: Generator) -> F64:
        changed = array.copy()
        changed[int(rng.integers(len(array)))] *= factor
        return changed

    return change


def _swapped(array: F64, rng: Generator) -> F64:
    one, other = _two(len(array), rng)
    changed = array.copy()
    changed[[one, other]] = array[[other, one]]
    return changed


def _two(count: int, rng: Generator) -> tuple[int, int]:
    if count < 2:
        raise NoSiteError("only one channel")
    one, other = rng.choice(count, 2, replace=False)
    return int(one), int(other)


def _one_zero(array: F64, rng: Generator) -> F64:
    changed = array.copy()
    changed.ravel()[int(rng.integers(array.size))] = 0.0
    return changed


def _to_bits(bits: int) -> Change:
    """Rounded to so many bits of mantissa, the leading one included."""

    def change(array: F64, _: Generator) -> F64:
        mantissa, exponent = np.frexp(array)
        rounded: F64 = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
        return rounded

    return change


def _to_half(array: F64, _: Generator) -> F64:
    return array.astype(np.float16).astype(np.float64)


def _outputs_swapped(draft: Draft, rng: Generator) -> str:
    """Two output channels with all that is theirs: a permutation that nobody undoes."""
    site = pick(rng, [linear for linear in draft.linears() if linear.groups == 1])
    turned = np.moveaxis(draft.array(site.weight), site.out_axis, 0).copy()
    one, other = _two(len(turned), rng)
    turned[[one, other]] = turned[[other, one]]
    draft.store(site.weight, np.moveaxis(turned, 0, site.out_axis))
    if site.bias:
        bias = draft.array(site.bias)
        flat = bias.reshape(-1)
        if len(flat) == len(turned):
            flat[[one, other]] = flat[[other, one]]
            draft.store(site.bias, bias)
    return f"channels {one} and {other} of {label(site.node)}"


def _groups_rolled(draft: Draft, rng: Generator) -> str:
    site = pick(rng, [linear for linear in draft.linears() if linear.groups > 1])
    weight = draft.array(site.weight)
    rows = len(weight) // site.groups
    draft.store(site.weight, np.roll(weight, rows, axis=0))
    return f"weight '{site.weight}' of {label(site.node)}"


def _exchanged(draft: Draft, rng: Generator) -> str:
    one = pick(rng, draft.floats())
    shape = draft.array(one).shape
    other = pick(rng, [n for n in draft.floats() if n != one and draft.array(n).shape == shape])
    first, second = draft.array(one), draft.array(other)
    draft.store(one, second)
    draft.store(other, first)
    return f"'{one}' and '{other}'"


# ---- in the graph ----


def _relu_dropped(draft: Draft, rng: Generator) -> str:
    node = pick(rng, draft.inner("Relu"))
    site = label(node)
    draft.redirect(node.output[0], node.input[0])
    draft.remove(node)
    return site


def _relu_clipped(draft: Draft, rng: Generator) -> str:
    node = pick(rng, [n for n in draft.graph.node if n.op_type == "Relu"])
    if draft.model.opset_import[0].version < 11:
        raise NoSiteError("Clip has no inputs in this opset")
    draft.store("sabotage.low", np.zeros(()))
    draft.store("sabotage.high", np.asarray(6.0))
    node.op_type = "Clip"
    node.input.extend(["sabotage.low", "sabotage.high"])
    return label(node)


def _padding_moved(draft: Draft, rng: Generator) -> str:
    padded = [n for n in draft.graph.node if any(attribute(n, "pads", [0])) and n.op_type != "Pad"]
    node = pick(rng, padded)
    pads = list(attribute(node, "pads", [0]))
    rank = len(pads) // 2
    axis = pick(rng, [i for i in range(rank) if pads[i]])
    pads[axis] -= 1
    pads[axis + rank] += 1
    held = next(a for a in node.attribute if a.name == "pads")
    held.CopyFrom(helper.make_attribute("pads", pads))
    return f"axis {axis} of {label(node)}"


def _activation_moved(draft: Draft, rng: Generator) -> str:
    """``act(op(x))`` becomes ``op(act(x))``."""
    reads, makers = draft.readers(), draft.makers()
    sites = [n for n in draft.inner("Relu", "LeakyRelu", "HardSwish", "Clip")
             if n.input[0] in makers and reads[n.input[0]] == 1
             and not draft.holds(makers[n.input[0]].input[0])]  # fmt: skip
    node = pick(rng, sites)
    before = makers[node.input[0]]
    site, made, source = label(node), node.output[0], before.input[0]
    draft.redirect(made, before.output[0])
    place = draft.index(before)
    node.input[0] = source
    before.input[0] = made
    own = draft.index(node)
    nodes = [other for i, other in enumerate(draft.graph.node) if i != own]
    draft.reorder([*nodes[:place], draft.graph.node[own], *nodes[place:]])
    return site


def _output_scaled(draft: Draft, rng: Generator) -> str:
    makers = draft.makers()
    value = pick(rng, [v for v in draft.graph.output if v.name in makers])
    inner = f"{value.name}.sabotaged"
    maker = makers[value.name]
    maker.output[:] = [inner if name == value.name else name for name in maker.output]
    draft.redirect(value.name, inner)
    draft.store("sabotage.factor", np.asarray(1.001), value.type.tensor_type.elem_type)
    draft.graph.node.append(helper.make_node("Mul", [inner, "sabotage.factor"], [value.name]))
    return f"output '{value.name}'"


def _another_read(draft: Draft, rng: Generator) -> str:
    """An Add of two activations reads a third of the same shape."""
    inferred = onnx.shape_inference.infer_shapes(draft.model).graph
    shapes = {v.name: v.type.SerializeToString() for v in [*inferred.value_info, *inferred.input]}
    made: list[str] = [value.name for value in draft.graph.input]
    sites = []
    for node in draft.graph.node:
        if node.op_type == "Add" and not any(map(draft.holds, node.input)):
            sites += [(node, side, other) for side in (0, 1) for other in made
                      if other not in node.input and shapes.get(node.input[side])
                      and shapes.get(other) == shapes[node.input[side]]]  # fmt: skip
        made += [name for name in node.output if name]
    node, side, other = pick(rng, sites)
    site = f"{label(node)} reads '{other}' for '{node.input[side]}'"
    node.input[side] = other
    return site


# ---- in the statistics ----


def _refolded(change: Callable[[Step, Generator], str]) -> Plant:
    def plant(draft: Draft, rng: Generator) -> str:
        step = pick(rng, Step.all_of(draft))
        said = change(step, rng)
        return f"{label(step.node)}{said}"

    return plant


DEFECTS: tuple[Defect, ...] = (
    Defect("bias-off-by-1e-3", _bias(_times(1.001))),
    Defect("bias-off-by-1e-3-in-one-channel", _bias(_one_channel(1.001))),
    Defect("bias-forgotten", _bias(_times(0.0))),
    Defect("bias-sign", _bias(_times(-1.0))),
    Defect("bias-channels-swapped", _bias(_swapped)),
    Defect("channel-times-1.001", _weight(_one_channel(1.001))),
    Defect("channel-times-1.0001", _weight(_one_channel(1.0001))),
    Defect("input-channel-times-1.001", _weight(_one_channel(1.001), inputs=True)),
    Defect("weight-times-1.0005", _weight(_times(1.0005))),
    Defect("output-channels-swapped", _outputs_swapped),
    Defect("weight-channels-swapped", _weight(_swapped)),
    Defect("input-channels-swapped", _weight(_swapped, inputs=True)),
    Defect("sign-of-a-channel", _weight(_one_channel(-1.0))),
    Defect("one-weight-zero", _weight(_one_zero)),
    Defect("rounded-to-fp16", _weight(_to_half)),
    Defect("rounded-to-bf16", _weight(_to_bits(8))),
    Defect("rounded-to-tf32", _weight(_to_bits(11))),
    Defect("groups-rolled", _groups_rolled),
    Defect("initializers-exchanged", _exchanged),
    Defect("relu-dropped", _relu_dropped),
    Defect("relu-clipped-at-6", _relu_clipped),
    Defect("padding-moved", _padding_moved),
    Defect("activation-moved", _activation_moved),
    Defect("output-times-1.001", _output_scaled),
    Defect("add-reads-another", _another_read),
    *(Defect(name, _refolded(change), True) for name, change in STATISTICS.items()),
    *(Defect(name, plant) for name, plant in FOLDED.items()),
    *(Defect(name, plant, True) for name, plant in UNFOLDED.items()),
)
# Smaller than what the check promises to see.
HARD_DEFECTS: tuple[Defect, ...] = (
    Defect("bias-off-by-1e-5", _bias(_times(1.00001))),
    Defect("channel-times-1.00001", _weight(_one_channel(1.00001))),
    Defect("weight-times-1.00001", _weight(_times(1.00001))),
)
