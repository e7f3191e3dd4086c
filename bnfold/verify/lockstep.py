"""The reference's tensors in float64, computed while a candidate is walked through, and kept.

A `Tape` computes a tensor when it is first asked for, and lets go of it when it was held against
one of the candidate's. A `Pairing` says which of them a tensor of the candidate may hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from bnfold.verify.bounds import F64, LINEAR, Operation, fitting
from bnfold.verify.expected import Held
from bnfold.verify.oracle import Oracle, lift
from bnfold.verify.subject import Feeds

# Behind an operator, a tool may have taken so many of these into it.
REACH = 6
AFFINE = frozenset(
    {"BatchNormalization", "Mul", "Add", "Sub", "Div", "Neg", "Identity", "Cast", "Dropout"}
)

# These neither mix channels nor move them, and leave none out.
ELEMENTWISE = AFFINE | {
    "Relu", "LeakyRelu", "PRelu", "Clip", "Sum", "Max", "Sigmoid", "HardSigmoid", "HardSwish",
    "Tanh", "Gelu",
}  # fmt: skip


class Tape:
    """One run of the reference in float64.

    Args:
        oracle: The reference.
        feeds: What it is fed.
        wanted: Tensors that will be asked for; others are forgotten once they are read.
    """

    def __init__(self, oracle: Oracle, feeds: Feeds, wanted: Iterable[str]) -> None:
        self._values: dict[str, Any] = {}
        self._steps = oracle.walk(feeds, self._values)
        self._wanted = set(wanted)
        self._kept: dict[str, Any] = {}
        self._fixed = set(oracle.constants) | {""}
        self._made: set[str] = set()
        self.nodes: dict[str, Any] = {}
        self.constants: dict[str, Any] = dict(oracle.constants)

    def value(self, name: str) -> Any:
        """The tensor ``name``; None if there is none, or it was let go."""
        while name not in self._made and self._advance():
            pass
        return self._kept.get(name)

    def finish(self) -> None:
        """Computes what is left."""
        while self._advance():
            pass

    def forget(self, name: str) -> None:
        """Lets go of a tensor."""
        self._kept.pop(name, None)
        self._wanted.discard(name)

    def _advance(self) -> bool:
        node = next(self._steps, None)
        if node is None:
            return False
        fixed = self._fixed.issuperset(node.input) and not node.need_context()
        for name in node.output:
            self._made.add(name)
            self.nodes[name] = node
            if fixed:
                self._fixed.add(name)
                self.constants[name] = self._values[name]
            if name in self._wanted:
                self._kept[name] = self._values[name]
        return True


class Pairing:
    """Which tensors of the reference a tensor of the candidate may hold.

    Args:
        reference: The reference's graph.
        candidate: The candidate's graph.
        held: What each tensor holds, if bnfold made the candidate; then nothing is guessed.
    """

    def __init__(
        self, reference: onnx.GraphProto, candidate: onnx.GraphProto,
        held: Mapping[str, Held] | None,
    ) -> None:  # fmt: skip
        self._held = held
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        self._by_node = {node.name: node for node in reference.node if node.name}
        self._made = {name for node in reference.node for name in node.output if name}
        self._outputs = {value.name for value in reference.output}
        for node in reference.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._partner: dict[str, str] = {value.name: value.name for value in reference.input}
        own = [name for node in candidate.node for name in node.output]
        self._strange = held is None and any(name not in self._made for name in own)
        self._names = set(own)
        self._inner = set() if held is not None else set(_without_bias(candidate))

    def wanted(self) -> set[str]:
        """The tensors of the reference that may be asked for."""
        if self._held is not None:
            return {held.reference for held in self._held.values()}
        if self._strange:
            return self._made
        return {a for name in self._names & self._made for a in self._behind(name)}

    def alternatives(self, node: Any, name: str) -> list[Held]:
        """What ``name``, an output of the candidate's ``node``, may hold; likely ones first."""
        if self._held is not None:
            return [self._held[name]] if name in self._held else []
        if name in self._inner:
            # What the Add behind it makes is still computed from what this is computed from.
            before = (self._partner[n] for n in node.input if n in self._partner)
            self._partner[name] = next(before, "")
            return []
        found: dict[str, None] = {}
        if name in self._outputs:
            return [Held(name)]  # whoever reads the model's outputs knows them by their names
        if name in self._made:
            found.update(dict.fromkeys(self._behind(name)))
        elif node.onnx_node.name in self._by_node:
            twin = self._by_node[node.onnx_node.name]
            found.update((n, None) for output in twin.output for n in self._behind(output))
        else:
            for source in node.input:
                if source in self._partner:
                    found.update(dict.fromkeys(self._computed_from(self._partner[source])))
        return [Held(reference) for reference in found]

    def paired(self, name: str, reference: str) -> None:
        """Remembers what ``name`` holds, for the operators behind it."""
        self._partner[name] = reference

    def is_inner(self, name: str) -> bool:
        """Whether ``name`` is what a MatMul makes before its bias is added to it.

        In other units the two share a shift in another way, so that it stands for no value.
        """
        return name in self._inner

    def is_known(self, name: str) -> bool:
        """Whether the reference computes a tensor of this name."""
        return name in self._made

    def does_the_same(self, node: Any, twin: Any, fixed: set[str]) -> bool:
        """Whether ``node`` of the candidate reads what ``twin`` of the reference does, likewise."""
        if twin is None or node.onnx_node.op_type != twin.onnx_node.op_type:
            return False
        pairs = zip(node.input, twin.input, strict=False)
        return all(own in fixed or self._partner.get(own) == other for own, other in pairs)

    def settled(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that no tensor of the candidate is called."""
        return [name for name in names if name not in self._names]

    def _behind(self, name: str) -> Iterator[str]:
        """``name``, and what is computed from it by operators that a tool may fold."""
        seen, frontier = {name}, [name]
        for _ in range(REACH):
            yield from frontier
            nodes = [node for n in frontier for node in self._readers.get(n, ())]
            reached = [o for node in nodes if node.op_type in AFFINE for o in node.output if o]
            frontier = [n for n in dict.fromkeys(reached) if n not in seen]
            seen.update(frontier)

    def _computed_from(self, name: str) -> Iterator[str]:
        """What any operator makes of ``name``, or of what is behind it."""
        for start in self._behind(name):
            for node in self._readers.get(start, ()):
                for output in filter(None, node.output):
                    yield from self._behind(output)


def _without_bias(graph: onnx.GraphProto) -> Iterator[str]:
    """What MatMuls make that only an Add of a constant reads."""
    fixed = {tensor.name for tensor in graph.initializer}
    fixed |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        if node.op_type != "MatMul" or node.output[0] in outputs:
            continue
        behind = readers.get(node.output[0], [])
        if len(behind) == 1 and behind[0].op_type == "Add":
            yield from () if fixed.isdisjoint(behind[0].input) else node.output[:1]


def operation(node: Any, values: Mapping[str, Any], fixed: set[str]) -> Operation:
    """An operator of the evaluator with the values of its inputs."""
    attributes = {
        name: getattr(node, name)
        for name in ("alpha", "beta", "transA", "transB", "group", "epsilon")
        if hasattr(node, name)
    }
    return Operation(
        node.onnx_node.op_type,
        [values.get(name) if name else None for name in node.input],
        [bool(name) and name in fixed for name in node.input],
        {name: value for name, value in attributes.items() if value is not None},
    )


def offset_norms(tape: Tape, name: str, axis: int | None, count: float, depth: int = REACH) -> F64:
    """How large the constants are that the reference adds up on the way to its tensor ``name``.

    A tool that folds in the stored type rounds each of them, though their sum may be small.

    Args:
        tape: The reference, run as far as ``name``.
        name: The tensor.
        axis: Its channel axis.
        count: The square root of the number of elements of a channel.
        depth: How many operators to go back.
    """
    node = tape.nodes.get(name)
    if node is None or not depth or axis is None:
        return np.zeros(1)
    constants: list[Any] = [lift(tape.constants.get(n)) for n in node.input]
    data = next((n for n in node.input if n not in tape.constants), "")
    before = offset_norms(tape, data, axis, count, depth - 1)
    kind = node.onnx_node.op_type
    if kind == "BatchNormalization" and all(c is not None for c in constants[1:5]):
        gamma, beta, mean, variance = constants[1:5]
        scale = np.abs(gamma) / np.sqrt(variance + float(node.epsilon))
        before = fitting(before, scale.size)
        moved: F64 = scale * (before + np.abs(mean) * count) + np.abs(beta) * count
        return moved
    if kind in LINEAR:
        added = constants[2] if len(constants) > 2 else None
        return np.zeros(1) if added is None else np.abs(np.asarray(added)).reshape(-1) * count
    other = next((c for c in constants if isinstance(c, np.ndarray)), None)
    if kind in ("Add", "Sub", "Mul", "Div") and other is not None and other.dtype.kind == "f":
        return _stepped(kind, before, other, count)
    return before if kind in ("Identity", "Cast", "Dropout") else np.zeros(1)


def _stepped(kind: str, before: F64, constant: F64, count: float) -> F64:
    size = np.abs(constant)
    along = size.size == max(size.shape, default=1)
    flat = size.reshape(-1) if along else np.full(1, size.max())
    before = fitting(before, flat.size) if flat.size > 1 else before
    if kind in ("Add", "Sub"):
        return before + flat * count
    with np.errstate(divide="ignore"):
        return before * (flat if kind == "Mul" else 1 / flat)


def relative(channels: F64, size: float) -> float:
    """The norm of a difference, from those of its channels, over ``size``; infinite over zero."""
    far = float(np.linalg.norm(channels))
    return far / size if size else (np.inf if far else 0.0)


def floats(value: Any) -> NDArray[np.float64] | None:
    """``value`` if it is a tensor of floats with something in it."""
    if isinstance(value, np.ndarray) and value.dtype == np.float64 and value.size:
        return value
    return None
