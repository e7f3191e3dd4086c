"""Wrong merges: what goes wrong where several linear operators become one.

A merge that forgets a branch is a right merge of the model without it: so most of these change the
unfolded model, and any tool's fold of that is wrong. The others change what is stored in a fold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx
from numpy.random import Generator
from onnx import helper

from tools.sabotage_graph import (
    F64,
    Draft,
    Linear,
    NoSiteError,
    attribute,
    copied,
    label,
    pick,
)
from tools.sabotage_statistics import Step

LINEAR = {"Conv", "Gemm", "BatchNormalization", "AveragePool", "Identity", "Add", "Sub", "Mul"}
SHAPED = ("GlobalAveragePool", "Flatten", "Identity")


@dataclass(frozen=True, slots=True)
class Branch:
    """An operand of a sum of which another operand is linear over the same tensor.

    Attributes:
        draft: The model it is in.
        total: The Add or Sub.
        position: Which operand.
        steps: The affine steps of the branch, the last one first.
        conv: The Conv before them; None where there is none.
        siblings: The Convs of the other operand that read what this branch reads.
        is_identity: Whether it is what the other operand reads, with these steps at most.
    """

    draft: Draft
    total: onnx.NodeProto
    position: int
    steps: tuple[onnx.NodeProto, ...]
    conv: onnx.NodeProto | None
    siblings: tuple[onnx.NodeProto, ...]
    is_identity: bool

    @classmethod
    def all_of(cls, draft: Draft) -> list[Branch]:
        """The branches of all sums."""
        return [branch for node in draft.graph.node for branch in cls._of(draft, node)]

    @classmethod
    def _of(cls, draft: Draft, total: onnx.NodeProto) -> Iterator[Branch]:
        if total.op_type not in ("Add", "Sub") or any(map(draft.holds, total.input)):
            return
        walks = [_walk(draft, name) for name in total.input]
        if not walks[0].keys() & walks[1].keys():
            return
        for position, name in enumerate(total.input):
            steps, value = _steps(draft, name)
            maker = draft.makers().get(value)
            conv = maker if maker is not None and maker.op_type == "Conv" else None
            there = walks[1 - position]
            source = value if conv is None or value in there else conv.input[0]
            convs = tuple(node for node in there.values()
                          if node is not None and node.op_type == "Conv"
                          and node.input[0] == source)  # fmt: skip
            identity = bool(convs) and source == value
            yield cls(draft, total, position, steps, conv, convs, identity)

    @property
    def name(self) -> str:
        """What it adds to its sum."""
        return str(self.total.input[self.position])

    @property
    def site(self) -> str:
        """For the table."""
        return f"'{self.name}' in {label(self.total)}"

    def norm(self) -> Step:
        """The BatchNormalization of the branch.

        Raises:
            NoSiteError: It has none.
        """
        own = {node.output[0] for node in self.steps}
        norms = [step for step in Step.all_of(self.draft)
                 if step.known is not None and step.node.output[0] in own]  # fmt: skip
        if not norms:
            raise NoSiteError("no BatchNormalization in the branch")
        return norms[0]


def _walk(draft: Draft, name: str) -> dict[str, onnx.NodeProto | None]:
    """What a value is linear over, itself included, and what made each."""
    makers, found, queue = draft.makers(), dict[str, onnx.NodeProto | None](), [name]
    while queue:
        value = queue.pop()
        if value in found or draft.holds(value):
            continue
        node = makers.get(value)
        found[value] = node
        if node is None or node.op_type not in LINEAR:
            continue
        if node.op_type == "Mul" and not any(map(draft.holds, node.input)):
            continue
        queue += node.input if node.op_type in ("Add", "Sub", "Mul") else node.input[:1]
    return found


def _steps(draft: Draft, name: str) -> tuple[tuple[onnx.NodeProto, ...], str]:
    """The affine steps that end in a value, and what the first of them reads."""
    reads, makers = draft.readers(), draft.makers()
    steps: list[onnx.NodeProto] = []
    while (node := makers.get(name)) is not None and reads[name] == 1 and _is_step(draft, node):
        steps.append(node)
        name = next(value for value in node.input if not draft.holds(value))
    return tuple(steps), name


def _is_step(draft: Draft, node: onnx.NodeProto) -> bool:
    if node.op_type == "BatchNormalization":
        return True
    return node.op_type in ("Add", "Sub", "Mul") and any(map(draft.holds, node.input))


def _pick(draft: Draft, rng: Generator, wanted: Callable[[Branch], bool]) -> Branch:
    return pick(rng, [branch for branch in Branch.all_of(draft) if wanted(branch)])


def _insert(draft: Draft, node: onnx.NodeProto, before: onnx.NodeProto) -> None:
    place = draft.index(before)
    nodes = [*draft.graph.node]
    draft.reorder([*nodes[:place], node, *nodes[place:]])


# ---- branches of the unfolded model ----


def _identity_forgotten(draft: Draft, rng: Generator) -> str:
    ends = draft.outputs()
    branch = _pick(draft, rng, lambda b: b.is_identity and b.total.output[0] not in ends
                   and (b.total.op_type == "Add" or b.position == 1))  # fmt: skip
    site, total = branch.site, branch.total
    draft.redirect(total.output[0], total.input[1 - branch.position])
    draft.remove(total)
    return site


def _identity_twice(draft: Draft, rng: Generator) -> str:
    branch = _pick(draft, rng, lambda b: b.is_identity
                   and (b.total.op_type == "Add" or b.position == 1))  # fmt: skip
    site, name, once = branch.site, branch.name, copied(branch.total)
    once.name, once.output[0] = "sabotaged.once", "sabotaged.once"
    branch.total.input[:] = ["sabotaged.once", name]
    _insert(draft, once, branch.total)
    return site


def _identity_of_another(draft: Draft, rng: Generator) -> str:
    """Output ``c`` gets channel ``c + 1`` of the input."""
    branch = _pick(draft, rng, lambda b: b.is_identity)
    conv, site = branch.siblings[0], branch.site
    if attribute(conv, "group", 1) > 1:
        norm = branch.norm()
        norm.set(np.roll(norm.scale, -1), np.roll(norm.shift, -1))
        return site
    rank, channels = draft.array(conv.input[1]).ndim, len(draft.array(conv.input[1]))
    turned = np.roll(np.eye(channels), 1, axis=1)
    draft.store("sabotaged.turn", turned.reshape(turned.shape + (1,) * (rank - 2)))
    names = [branch.name, "sabotaged.turn"]
    branch.total.input[branch.position] = "sabotaged.turned"
    node = helper.make_node("Conv", names, ["sabotaged.turned"], "sabotaged.turned")
    _insert(draft, node, branch.total)
    return site


def _branch_epsilon(draft: Draft, rng: Generator) -> str:
    branch = _pick(draft, rng, lambda b: bool(b.steps))
    branch.norm().restate(epsilon=0.0)
    return branch.site


def _branch_shift(draft: Draft, rng: Generator) -> str:
    """The bias that a branch brings is left out of the sum of the biases."""
    branch = _pick(draft, rng, lambda b: bool(b.steps) or b.conv is not None)
    if branch.conv is not None and not branch.steps:
        if len(branch.conv.input) < 3:
            raise NoSiteError("no bias")
        draft.store(branch.conv.input[2], 0 * draft.array(branch.conv.input[2]))
    else:
        norm = branch.norm()
        norm.set(shift=np.zeros_like(norm.shift))
    return branch.site


def _branch_sign(draft: Draft, rng: Generator) -> str:
    branch = _pick(draft, rng, lambda b: b.total.op_type == "Sub")
    branch.total.op_type = "Add"
    return branch.site


def _branch_scale(draft: Draft, rng: Generator) -> str:
    """The Mul around a sum, or in a branch, is forgotten."""
    muls = [node for node in draft.graph.node
            if node.op_type == "Mul" and any(map(draft.holds, node.input))]  # fmt: skip
    node = pick(rng, muls)
    name = next(name for name in node.input if draft.holds(name))
    draft.store(name, np.ones_like(draft.array(name)))
    return label(node)


def _kernel_in_the_corner(draft: Draft, rng: Generator) -> str:
    """A smaller kernel is put at the first positions of the larger one, not in its middle."""
    pairs = [(branch, branch.conv, sibling) for branch in Branch.all_of(draft) if branch.conv
             for sibling in branch.siblings
             if _counts(draft, sibling) > _counts(draft, branch.conv)]  # fmt: skip
    branch, conv, sibling = pick(rng, pairs)
    small, large = draft.array(conv.input[1]), draft.array(sibling.input[1])
    wide = np.zeros(small.shape[:2] + large.shape[2:])
    corner = tuple(map(slice, small.shape))
    wide[corner] = small
    draft.store(conv.input[1], wide)
    _set(conv, "kernel_shape", wide.shape[2:])
    _set(conv, "pads", attribute(sibling, "pads", [0] * 2 * (wide.ndim - 2)))
    return branch.site


def _counts(draft: Draft, conv: onnx.NodeProto) -> int:
    return int(np.prod(draft.array(conv.input[1]).shape[2:]))


def _set(node: onnx.NodeProto, name: str, numbers: Sequence[int]) -> None:
    for place, held in reversed([*enumerate(node.attribute)]):
        if held.name == name:
            del node.attribute[place]
    node.attribute.append(helper.make_attribute(name, [*numbers]))


def _branch_taps(draft: Draft, rng: Generator) -> str:
    """The kernel of one branch is shifted by one position against the others."""
    branch = _pick(draft, rng, lambda b: b.conv is not None and bool(b.siblings)
                   and _counts(draft, b.conv) > 1)  # fmt: skip
    assert branch.conv is not None
    _roll(draft, branch.conv.input[1], rng)
    return branch.site


def _roll(draft: Draft, name: str, rng: Generator) -> None:
    weight = draft.array(name)
    axis = pick(rng, [axis for axis in range(2, weight.ndim) if weight.shape[axis] > 1])
    draft.store(name, np.roll(weight, int(rng.choice((-1, 1))), axis))


# ---- operators one after the other, unfolded ----


def _first_shift_lost(draft: Draft, rng: Generator) -> str:
    """What the first of two adds does not go through the second one."""
    first, steps = pick(rng, [*_chained(draft)])
    norms = [step for step in Step.all_of(draft)
             if step.known is not None and step.node.output[0] in steps]  # fmt: skip
    if norms:
        norms[0].set(shift=np.zeros_like(norms[0].shift))
    elif first.bias:
        draft.store(first.bias, 0 * draft.array(first.bias))
    else:
        raise NoSiteError("nothing is added")
    return label(first.node)


def _chained(draft: Draft) -> Iterator[tuple[Linear, set[str]]]:
    """Operators before one that pads nothing, and the values between the two."""
    makers = {linear.node.output[0]: linear for linear in draft.linears()}
    nodes = draft.makers()
    for second in makers.values():
        if any(attribute(second.node, "pads", [0])):
            continue
        steps, name = _steps(draft, second.node.input[0])
        if name in nodes and nodes[name].op_type in SHAPED:
            name = nodes[name].input[0]
        if name in makers:
            yield makers[name], {node.output[0] for node in steps}


# ---- in a fold ----


def _taps_shifted(draft: Draft, rng: Generator) -> str:
    """A whole kernel reads one position too far."""
    sites = [linear for linear in draft.linears() if linear.node.op_type == "Conv"
             and _counts(draft, linear.node) > 1]  # fmt: skip
    site = pick(rng, sites)
    _roll(draft, site.weight, rng)
    return f"weight '{site.weight}' of {label(site.node)}"


def _pad_off_by_one(draft: Draft, rng: Generator) -> str:
    padded = [n for n in draft.graph.node if n.op_type == "Conv" and any(attribute(n, "pads", [0]))]
    node = pick(rng, padded)
    pads = list(attribute(node, "pads", [0]))
    side = pick(rng, [i for i, count in enumerate(pads) if count])
    pads[side] -= 1
    _set(node, "pads", pads)
    return f"side {side} of {label(node)}"


def _merged_across_padding(draft: Draft, rng: Generator) -> str:
    """A 1x1 with a bias goes into a Conv that pads zeros, where that bias is not."""
    reads = draft.readers()
    found = {linear.node.output[0]: linear for linear in draft.linears()}
    pairs = [(found[second.node.input[0]], second) for second in found.values()
             if any(attribute(second.node, "pads", [0])) and second.groups == 1 and second.bias
             and second.node.input[0] in found and reads[second.node.input[0]] == 1
             and _is_pointwise(draft, found[second.node.input[0]])]  # fmt: skip
    first, second = pick(rng, pairs)
    outer = draft.array(second.weight)
    inner = draft.array(first.weight).reshape(outer.shape[1], -1)
    bias: F64 = outer.reshape(*outer.shape[:2], -1).sum(2) @ draft.array(first.bias)
    draft.store(second.weight, np.moveaxis(np.tensordot(outer, inner, ([1], [0])), -1, 1))
    draft.store(second.bias, draft.array(second.bias) + bias)
    site = f"{label(first.node)} in {label(second.node)}"
    second.node.input[0] = first.node.input[0]
    draft.remove(first.node)
    return site


def _is_pointwise(draft: Draft, linear: Linear) -> bool:
    plain = linear.groups == 1 and bool(linear.bias) and _counts(draft, linear.node) == 1
    still = not any(attribute(linear.node, "pads", [0]))
    return plain and still and set(attribute(linear.node, "strides", [1])) == {1}


Plant = Callable[[Draft, Generator], str]

UNFOLDED: Mapping[str, Plant] = MappingProxyType(
    {
        "identity-forgotten": _identity_forgotten,
        "identity-added-twice": _identity_twice,
        "identity-of-another-channel": _identity_of_another,
        "branch-epsilon-forgotten": _branch_epsilon,
        "branch-bias-left-out": _branch_shift,
        "branch-added-for-subtracted": _branch_sign,
        "branch-scale-forgotten": _branch_scale,
        "branch-kernel-in-the-corner": _kernel_in_the_corner,
        "branch-taps-shifted": _branch_taps,
        "first-bias-not-passed-on": _first_shift_lost,
    }
)
FOLDED: Mapping[str, Plant] = MappingProxyType(
    {
        "taps-shifted": _taps_shifted,
        "pad-off-by-one": _pad_off_by_one,
        "merged-across-padding": _merged_across_padding,
    }
)
