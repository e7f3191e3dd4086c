"""Functions and modules as torch graphs, in the forms in which such graphs come.

exported      by torch.export, as it is for training
decomposed    the same in core ATen
traced, bare  by fx, to be read with the shapes of a run or without any
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnfold.channel_graph import ShiftRule, Sign

EXPORTED, DECOMPOSED, TRACED, BARE = "exported", "decomposed", "traced", "bare"
FORMS = (EXPORTED, DECOMPOSED, TRACED, BARE)
FX = (TRACED, BARE)

P, Z = Sign.POSITIVE, ShiftRule.ZERO
A, E = Sign.ANY, ShiftRule.EQUAL
IMAGE = (2, 4, 4, 6)
ONE, TWO = (IMAGE,), (IMAGE, IMAGE)


@dataclass(frozen=True, slots=True)
class Row:
    """A function or a module, and what its statements come to.

    Attributes:
        run: A function of tensors, or a module of one input.
        free: How many scales can be chosen.
        sign: What the statements let through all in all.
        shift: The same.
        inputs: The shapes of the inputs, which are random.
        given: Inputs that are something else, by position.
        dynamic: For each input the axes of which torch.export is not told the size.
        loses: Forms in which less may be stated, or nothing.
        skips: Forms in which it can't be captured.
        tolerance: Wider where a result is rounded to less than float64.
    """

    run: Callable[..., Any]
    free: int
    sign: Sign = A
    shift: ShiftRule = E
    inputs: tuple[tuple[int, ...], ...] = ONE
    given: Mapping[int, Tensor] = field(default_factory=dict)
    dynamic: tuple[tuple[int, ...], ...] = ()
    loses: tuple[str, ...] = ()
    skips: tuple[str, ...] = ()
    tolerance: float = 1e-9


def random(*shape: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def feeds(row: Row) -> list[Tensor]:
    """The true inputs of a row."""
    drawn = [random(*shape, seed=k + 1) for k, shape in enumerate(row.inputs)]
    return [row.given.get(k, value).clone() for k, value in enumerate(drawn)]


# ---- capture ----


class _Rows(nn.Module):
    """All functions and modules of some rows, each on inputs of its own."""

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__()
        self.rows = rows
        self.parts = nn.ModuleList(row.run for row in rows if isinstance(row.run, nn.Module))

    def forward(self, *args: Tensor) -> list[Any]:
        rest = iter(args)
        return [row.run(*(next(rest) for _ in row.inputs)) for row in self.rows]


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, the tensors that it holds, and its inputs."""

    graph_module: fx.GraphModule
    held: Mapping[fx.Node, str]
    tensors: Mapping[str, Tensor]
    inputs: tuple[fx.Node, ...]

    def values(self, given: list[Tensor]) -> dict[fx.Node, Any]:
        """What every node holds when the graph runs on ``given``."""
        recorder = _Recorder(self.graph_module)
        by_node = dict(zip(self.inputs, given, strict=True))
        nodes = [n for n in self.graph_module.graph.nodes if n.op == "placeholder"]
        tensors = [by_node[n] if n in by_node else self.tensors[self.held[n]] for n in nodes]
        with torch.no_grad():
            recorder.run(*(tensor.clone() for tensor in tensors))
        return recorder.seen


class _Recorder(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        # A later operation may write to it.
        self.seen[n] = fx.node.map_aggregate(
            result, lambda v: v.clone() if isinstance(v, Tensor) else v
        )
        return result


def capture(row: Row, form: str) -> Captured:
    """``row`` in one of the four forms."""
    kind = TRACED if form in FX else form
    if (id(row), kind) not in _KNOWN:
        found = (
            _traced(row) if form in FX
            else _of_program(_program([row], decompose=form == DECOMPOSED))
        )  # fmt: skip
        _KNOWN[id(row), kind] = row, found
    return _KNOWN[id(row), kind][1]


_KNOWN: dict[tuple[int, str], tuple[Row, Captured]] = {}


def _program(rows: Sequence[Row], *, decompose: bool) -> torch.export.ExportedProgram:
    given = tuple(value for row in rows for value in feeds(row))
    axes = [axes for row in rows for axes in row.dynamic or ((),) * len(row.inputs)]
    dynamic = tuple(dict.fromkeys(own, torch.export.Dim.AUTO) for own in axes)
    with warnings.catch_warnings():
        # torch 2.13 copies its own specs in a way that it calls deprecated.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        program = torch.export.export(_Rows(rows), given, dynamic_shapes=(dynamic,), strict=False)
        if decompose and not _is_core(program):
            program = program.run_decompositions()
    return program


def _is_core(program: torch.export.ExportedProgram) -> bool:
    """Whether nothing is left to decompose, which is quicker to see than to try."""
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    return all(torch.Tag.core in getattr(target, "tags", ()) for target in called)


def _of_program(program: torch.export.ExportedProgram) -> Captured:
    held, inputs = {}, []
    nodes = [n for n in program.graph.nodes if n.op == "placeholder"]
    for node, spec in zip(nodes, program.graph_signature.input_specs, strict=True):
        if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT:
            inputs.append(node)
        else:
            held[node] = str(spec.target)
    tensors = {**program.state_dict, **program.constants}
    return Captured(program.graph_module, held, tensors, tuple(inputs))


def _traced(row: Row) -> Captured:
    run = row.run
    root = nn.Sequential(run) if isinstance(run, nn.Module) else _with_names(row)
    graph_module = fx.symbolic_trace(root)
    nodes = list(graph_module.graph.nodes)
    held = {n: str(n.target) for n in nodes if n.op == "get_attr"}
    tensors = {name: _attribute(graph_module, name) for name in held.values()}
    tensors |= dict(graph_module.named_parameters(remove_duplicate=False))
    tensors |= dict(graph_module.named_buffers(remove_duplicate=False))
    inputs = tuple(n for n in nodes if n.op == "placeholder")
    return Captured(graph_module, held, tensors, inputs)


def _with_names(row: Row) -> Callable[..., Any]:
    """The function of a row with no more parameters than it has inputs, as fx needs it."""
    run = row.run
    by_count: Mapping[int, Callable[..., Any]] = {
        1: lambda x: run(x), 2: lambda x, y: run(x, y), 3: lambda x, y, z: run(x, y, z),
        4: lambda x, y, z, w: run(x, y, z, w),
    }  # fmt: skip
    return by_count[len(row.inputs)]


def _attribute(graph_module: fx.GraphModule, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    found = getattr(graph_module.get_submodule(path), attribute)
    assert isinstance(found, Tensor)
    return found


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors among results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_in(entry)


# ---- many at once ----


def together(*tables: Mapping[str, Row]) -> None:
    """Decompose all rows of ``tables`` as one program, because torch takes long to begin."""
    rows = [row for table in tables for row in table.values() if DECOMPOSED not in row.skips]
    whole = _of_program(_program(rows, decompose=True))
    made = iter(whole.graph_module.graph.output_node().args[0])  # type: ignore[arg-type]
    inputs = iter(whole.inputs)
    for row in rows:
        own = [next(inputs) for _ in row.inputs]
        count = len(list(tensors_in(row.run(*feeds(row)))))
        _KNOWN[id(row), DECOMPOSED] = row, _part(whole, own, [next(made) for _ in range(count)])


def _part(whole: Captured, inputs: list[fx.Node], made: list[fx.Node]) -> Captured:
    """What leads from some inputs to some results."""
    needed, open_ = set(inputs), list(made)
    while open_:
        node = open_.pop()
        if node not in needed or node in made:
            needed.add(node)
            open_ += [n for n in node.all_input_nodes if n not in needed]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in whole.graph_module.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in made))
    held = {copies[n]: name for n, name in whole.held.items() if n in needed}
    graph_module = fx.GraphModule(whole.graph_module, graph)
    return Captured(graph_module, held, whole.tensors, tuple(copies[n] for n in inputs))
