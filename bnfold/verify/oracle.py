"""``y*``: what the model says in real arithmetic, as near as float64 comes to it.

The model is lifted while it runs: weights, inputs and every float that a node produces become
float64, and a cast between float types does nothing. So subgraphs, functions and constants of
every form are lifted alike, and the model given is never touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun, RuntimeContextError

from bnfold.errors import InconclusiveError
from bnfold.verify.oracle_fused import FUSED
from bnfold.verify.oracle_ops import LIFTED, OPS

# Two runs of these say two things, and neither is the model's fault or the fold's.
RANDOM_OPS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
     "RandomUniformLike"}
)  # fmt: skip


class Oracle:
    """Runs a model in float64.

    Args:
        model: The unfolded model, with its weights in the proto (no external data).
        keep: Whether lifted weights are kept for the next run; else each is lifted when it is
            read, and let go of after its last use.

    Raises:
        InconclusiveError: An operator has no implementation here.

    Source: the operators of ``onnx.reference``, some replaced (``oracle_ops.OPS``).
    """

    def __init__(self, model: onnx.ModelProto, *, keep: bool = True) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._evaluator = LiftedEvaluator(model)
                self._evaluator.keep = keep
        except InconclusiveError:
            raise
        except Exception as error:
            raise InconclusiveError(
                f"the float64 oracle can't be set up for this model: {_words(error)}"
            ) from error

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Computes every output.

        Args:
            feeds: One array per graph input; floats of any width, already rounded to the type
                that the runtime gets.

        Returns:
            One array per graph output, float64 where the model says float.

        Raises:
            InconclusiveError: An operator could not be computed; names it and its node.
        """
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            # Infinities and NaNs are the judge's business, not this run's.
            warnings.simplefilter("ignore")
            outputs = self._evaluator.run(None, {k: lift(v) for k, v in feeds.items()})
        return dict(zip(self._evaluator.output_names, outputs, strict=True))

    @property
    def constants(self) -> Mapping[str, Any]:
        """The initializers by name, as they are stored or lifted."""
        constants: Mapping[str, Any] = self._evaluator.rt_inits_
        return constants

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the graph's outputs."""
        return tuple(self._evaluator.output_names)

    def walk(
        self,
        feeds: Mapping[str, NDArray[Any]],
        values: dict[str, Any],
        constants: Mapping[str, Any] | None = None,
    ) -> Iterator[OpRun]:
        """Computes node after node into ``values``, and yields each when its outputs are there.

        Whoever looks on may put another value in the place of one; those that nobody reads any
        more are removed before the next node.

        Args:
            feeds: As for `run`.
            values: Filled with all tensors by name.
            constants: Initializers to take in place of the model's.

        Raises:
            InconclusiveError: An operator could not be computed.
        """
        values |= {"": None, **self.constants, **(constants or {})}
        values |= {name: lift(value) for name, value in feeds.items()}
        steps = self._evaluator.walk(values)
        while True:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                node = next(steps, None)
            if node is None:
                return
            yield node


class LiftedEvaluator(ReferenceEvaluator):
    """The reference evaluator in float64, which lets go of a value after its last use.

    Weights are lifted when they are first read, and then kept if ``keep`` is set.
    """

    keep = True

    def __init__(
        self,
        proto: Any,
        opsets: dict[str, int] | None = None,
        functions: list[Any] | None = None,
        verbose: int = 0,
        new_ops: Iterable[type[OpRun]] | None = None,
        **options: Any,
    ) -> None:
        # A function's evaluator is made without new_ops: it needs ours all the same.
        operators = list(new_ops) if new_ops else [*OPS, *FUSED]
        super().__init__(proto, opsets, functions, verbose, operators, **options)

    def _init(self) -> None:
        super()._init()
        self._spent = [tuple(names) for names in spent_after(self.nodes_, self.output_names_)]

    def _load_impl(self, node: onnx.NodeProto, input_types: Any = None) -> Any:
        if node.domain in ("", "ai.onnx") and node.op_type in RANDOM_OPS:
            raise InconclusiveError(
                f"operator '{node.op_type}' draws random numbers", node=label(node)
            )
        try:
            return super()._load_impl(node, input_types)
        except (RuntimeContextError, InconclusiveError):
            raise
        except Exception as error:
            raise InconclusiveError(
                f"the float64 oracle has no operator '{op_name(node)}': {_words(error)}",
                node=label(node),
            ) from error

    def run(  # type: ignore[override]
        self,
        output_names: Any,
        feed_inputs: dict[str, Any],
        attributes: dict[str, Any] | None = None,
        **_: Any,
    ) -> list[Any]:
        """Runs the nodes in order, as the base class does, lifting what they produce."""
        values: dict[str, Any] = {"": None, **self.rt_inits_, **feed_inputs}
        for _ in self.walk(values, attributes):
            pass
        wanted = self.output_names_ if output_names is None else output_names
        return [lift(values[name]) for name in wanted]

    def walk(
        self, values: dict[str, Any], attributes: dict[str, Any] | None = None
    ) -> Iterator[Any]:
        """Runs node after node on ``values``, and yields each when its outputs are there.

        Whoever looks on may put another value in the place of one; those that nobody reads any
        more are removed before the next node.
        """
        for node, spent in zip(self.rt_nodes_, self._spent, strict=True):
            self._lift_inputs(node, values)
            for name, value in zip(node.output, compute(node, values, attributes), strict=False):
                if name:  # "" is an optional output that nobody asked for
                    values[name] = lift(value)
            yield node
            for name in spent:
                values.pop(name, None)

    def _lift_inputs(self, node: Any, values: dict[str, Any]) -> None:
        for name in node.input:
            stored = values.get(name)
            lifted = lift(stored)
            if lifted is stored:
                continue
            values[name] = lifted
            if self.keep and self.rt_inits_.get(name) is stored:
                self.rt_inits_[name] = lifted


def compute(node: Any, values: dict[str, Any], attributes: dict[str, Any] | None = None) -> Any:
    """What one operator of the evaluator makes of its inputs.

    Raises:
        InconclusiveError: It can't be computed; names it and its node.
    """
    options: dict[str, Any] = {"context": values} if node.need_context() else {}
    if node.has_linked_attribute and attributes:
        options["linked_attributes"] = attributes
    try:
        return node.run(*(values[name] for name in node.input), **options)
    except InconclusiveError:
        raise
    except KeyError as error:
        raise InconclusiveError(f"value {error} is not there", node=label(node)) from error
    except Exception as error:
        raise InconclusiveError(
            f"the float64 oracle can't compute operator '{op_name(node.onnx_node)}': "
            f"{_words(error)}",
            node=label(node.onnx_node),
        ) from error


def lift(value: Any) -> Any:
    """The value in float64 if it is a narrower float (or a sequence of them), else itself."""
    if isinstance(value, list):
        return [lift(item) for item in value]
    if isinstance(value, np.ndarray | np.generic) and value.dtype.name in LIFTED:
        return value.astype(np.float64)
    return value


def spent_after(nodes: Iterable[Any], outputs: Iterable[str]) -> Iterator[set[str]]:
    """For each node, the names that no later node, subgraph or graph output reads."""
    needed = {"", *outputs}
    spent: list[set[str]] = []
    for node in reversed(list(nodes)):
        touched = {*names_read(node), *node.output}
        spent.append(touched - needed)
        needed |= touched
    return reversed(spent)


def names_read(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the values that a node reads, itself or inside its subgraphs."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (output.name for output in graph.output)
            for inner in graph.node:
                yield from names_read(inner)


def op_name(node: onnx.NodeProto) -> str:
    """The operator with its domain, as a user would look it up."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def label(node: Any) -> str:
    """The node's name, or its first output where it has none."""
    proto = getattr(node, "onnx_node", node)
    return str(proto.name or next(iter(proto.output), ""))


def _words(error: BaseException) -> str:
    """The first line of the innermost cause: the evaluator wraps errors in longer ones."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
