"""What a commit asks of a torch graph that it changes, whatever kind the graph is of.

An editor owns a copy of the graph; tensors are shared with the original until they are written.
Tensors that a graph holds (parameters, buffers, constants) go by their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor, fx, nn

from bnfold.planning import Merge
from bnfold.torch_calls import Call


class Editor(Protocol):
    """A copy of one graph, and its edits."""

    @property
    def edits_nodes(self) -> bool:
        """Whether nodes may be changed; else the graph only proves what a module tree does."""

    def module_of(self, call: Call) -> nn.Module | None:
        """The module whose attributes say what ``call`` does; None when its node says it all."""

    @property
    def graph_module(self) -> fx.GraphModule:
        """The copy that is described and then edited."""

    @property
    def held(self) -> Mapping[fx.Node, str]:
        """The nodes of the outermost graph that stand for a tensor that is held, with its name."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor that is held, by name; leaf modules' own as ``<path>.<attribute>``."""

    def write(self, name: str, tensor: Tensor) -> None:
        """Let the tensor ``name`` be ``tensor`` from now on, for all who read it by this name.

        It stays a parameter if it was one, with its ``requires_grad``. Its shape may change.
        """

    def add(self, name: str, tensor: Tensor, like: str) -> str:
        """A new tensor beside the tensor ``like``, of its kind; returns the name it got.

        The name is ``name`` unless that is taken.
        """

    def set_argument(self, node: fx.Node, argument: str, name: str) -> None:
        """Let ``node`` read the tensor ``name`` as ``argument`` of its schema.

        ``node`` may stand in the body of a higher-order operator. The ``weight`` and ``bias`` of a
        leaf module are its own attributes: there ``name`` becomes its tensor.
        """

    def bypass(self, value: fx.Node, data: fx.Node) -> None:
        """Whoever read ``value`` reads ``data``, of the same graph."""

    def discard(self, nodes: Iterable[fx.Node]) -> None:
        """Let ``nodes`` go as soon as nobody reads them, whatever they do."""

    def hold(self, merge: Merge, layer: nn.Module) -> None:
        """Let ``layer`` do what all of ``merge`` did, in a module tree."""

    def sweep(self) -> None:
        """Remove what the edits left without a reader: nodes, tensors that nothing holds for else.

        Inputs of the graph stay. Of a normalisation that is gone nothing stays, not even the
        counter of its batches.
        """
