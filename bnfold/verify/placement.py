"""Where every node ran: what the runtime promised when it loaded the model, and what it then did.

The promise is the session's own graph assignment (ONNX Runtime since 1.23), the fact its profile.
Operators that only compute shapes may run on the CPU, where ONNX Runtime puts them on purpose;
they are listed. Any other node that ran elsewhere is an error.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfold.errors import ProviderError
from bnfold.verify.providers import CPU

NAMED = 5  # nodes that an error names; it says how many more there are
TINY = 1024  # elements of a tensor of whole numbers that may be a shape or an index
RANK = 8  # numbers in a float tensor that may be one scale for each axis
_MOVES = ("MemcpyFromHost", "MemcpyToHost")
_ASKS_A_SHAPE = ("Shape", "Size")
_SHAPE_OPERATORS = frozenset(
    (
        *_ASKS_A_SHAPE,
        "Add", "And", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal",
        "Expand", "Floor", "Gather", "GatherElements", "GatherND", "Greater", "Identity", "Less",
        "Max", "Min", "Mod", "Mul", "Neg", "NonZero", "Not", "Or", "Range", "ReduceMax",
        "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Round", "ScatterElements", "ScatterND",
        "SequenceAt", "Slice", "Split", "SplitToSequence", "Squeeze", "Sub", "Tile", "Transpose",
        "Unsqueeze", "Where",
    )
)  # fmt: skip

Tensors = tuple[tuple[str, tuple[int, ...]], ...]  # element type and shape of each


@dataclass(frozen=True, slots=True)
class Placed:
    """A node on a provider.

    Attributes:
        name: The node's name; its operator's type where it has none.
        op_type: The operator's type; of a part that a provider compiled, what it calls it.
        provider: Where it is.
        inputs: Element type and shape of each input; None where that is not known.
        outputs: The same of each output.
    """

    name: str
    op_type: str
    provider: str
    inputs: Tensors | None = None
    outputs: Tensors | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.op_type})"


def promised(session: Any) -> tuple[Placed, ...]:
    """The nodes as the runtime assigned them; empty where it does not say."""
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    if ask is None:
        return ()
    try:
        parts = ask()
    except Exception:  # it was not recorded: an older runtime that does not know the setting
        return ()
    return tuple(
        Placed(node.name or node.op_type, node.op_type, part.ep_name)
        for part in parts
        for node in part.get_nodes()
    )


def read_profile(path: Path) -> tuple[Placed, ...]:
    """The nodes that ran, each once, from a profile that ONNX Runtime wrote.

    Raises:
        ProviderError: It is no such profile.
    """
    try:
        events = json.loads(path.read_bytes())
        nodes = {
            (event["name"], event["args"]["node_index"], event["args"]["provider"]): event
            for event in events
            if event.get("cat") == "Node" and "provider" in event.get("args", {})
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProviderError(
            f"the profile of ONNX Runtime can't be read ({type(error).__name__}: {error}), "
            "so nothing shows where the nodes ran"
        ) from error
    placed = (_placed(event["name"], event["args"]) for event in nodes.values())
    return tuple(node for node in placed if node.op_type not in _MOVES)


def _placed(event: str, facts: Mapping[str, Any]) -> Placed:
    return Placed(
        event.removesuffix("_kernel_time"), facts.get("op_name", ""), facts["provider"],
        _tensors(facts.get("input_type_shape")), _tensors(facts.get("output_type_shape")),
    )  # fmt: skip


def _tensors(listed: Sequence[Mapping[str, Sequence[int]]] | None) -> Tensors | None:
    if listed is None:
        return None
    return tuple((kind, tuple(dims)) for one in listed for kind, dims in one.items())


def count(nodes: Iterable[Placed]) -> dict[str, int]:
    """How many nodes each provider has."""
    return dict(Counter(node.provider for node in nodes))


def require_promise(nodes: Sequence[Placed], provider: str) -> None:
    """Refuses a session, before anything runs, that leaves more than shapes to another provider.

    Raises:
        ProviderError: It does; names the nodes.
    """
    if provider != CPU:
        _refuse([n for n in nodes if n.provider != provider and not _may_be_shape(n)],
                provider, len(nodes), "would run")  # fmt: skip


def require_fact(nodes: Sequence[Placed], provider: str) -> tuple[str, ...]:
    """Refuses a run of which more than the shapes took place on another provider.

    Returns:
        The nodes that ran elsewhere all the same, with their operator type.

    Raises:
        ProviderError: It did, or nothing ran on the provider at all; names the nodes.
    """
    elsewhere = [node for node in nodes if node.provider != provider]
    if provider == CPU and not elsewhere:
        return ()
    _refuse([node for node in elsewhere if not is_shape_work(node)], provider, len(nodes), "ran")
    if len(elsewhere) == len(nodes):
        raise ProviderError(
            f"no node ran on {provider}" + (f", {len(nodes)} ran elsewhere" if nodes else ""),
            todo="check on the provider that will run the model, or with --provider cpu",
        )
    return tuple(str(node) for node in elsewhere)


def _refuse(wrong: Sequence[Placed], provider: str, total: int, verb: str) -> None:
    if not wrong:
        return
    named = ", ".join(str(node) for node in wrong[:NAMED])
    more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    where = " and ".join(sorted({node.provider for node in wrong}))
    raise ProviderError(
        f"{provider} was asked for, but {len(wrong)} of {total} nodes {verb} on {where}: "
        f"{named}{more}",
        todo="check on the provider that will run the model, or with --provider cpu",
    )


def _may_be_shape(node: Placed) -> bool:
    return node.op_type in _SHAPE_OPERATORS


def is_shape_work(node: Placed) -> bool:
    """Whether a node that ran only computed a shape, an index or a scale for each axis."""
    if not _may_be_shape(node) or node.outputs is None or node.inputs is None:
        return False
    read = () if node.op_type in _ASKS_A_SHAPE else node.inputs
    return all(_is_tiny(kind, dims) for kind, dims in (*read, *node.outputs))


def _is_tiny(kind: str, dims: tuple[int, ...]) -> bool:
    if kind.startswith(("int", "uint", "bool")):
        return math.prod(dims) <= TINY
    return len(dims) <= 1 and math.prod(dims) <= RANK
