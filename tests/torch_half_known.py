"""What is stated of an operation where of some sizes only a name is known, or not even that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from bnfold.channel_graph import Dim, Operator, Tie
from bnfold.torch_constants import Constants
from bnfold.torch_facts import Facts
from bnfold.torch_ties import find_tie
from bnfold.torch_walk import walk
from tests.torch_forms import Row, capture

Axes = tuple[tuple[int, ...], tuple[int, ...]]


def half_known(
    run: Callable[..., Any], *shapes: tuple[Dim, ...], made: tuple[Dim, ...] | None = None
) -> Operator | None:
    """The statement about the last operation of a function, whose inputs have these shapes.

    Args:
        run: The function; it is traced, not run.
        shapes: The shapes of its inputs.
        made: The shape of its result, where that is known.
    """
    captured = capture(Row(run, 0, inputs=tuple((1,) for _ in shapes)), "bare")
    walked = walk(captured.graph_module, captured.held)
    last = walked.calls[-1]
    known = dict(zip(captured.inputs, shapes, strict=True))
    if made is not None:
        known[last.node] = made
    constants = Constants(walked, captured.held, captured.tensors)
    facts = Facts(captured.graph_module, walked, constants, known)
    numbers: dict[fx.Node, int] = {}

    def number(node: fx.Node) -> int:
        return numbers.setdefault(node, len(numbers))

    return find_tie(facts, last, number, lambda value: (str(value),), {0: last.node})


def axes_of(operator: Operator | None) -> list[Axes]:
    """The axes that the one route of a tie joins."""
    assert isinstance(operator, Tie)
    (route,) = operator.routes
    return [(link.source, link.target) for link in route.links or ()]
