"""An ExportedProgram folds as a whole: a valid program in every form, with the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as mapped
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.export import Dim, ExportedProgram

import bnfold
from tests.test_torch_program import all_nodes, assert_unchanged, norms, saved_and_loaded, snapshot
from tests.torch_nets import (
    Shape,
    decomposed,
    error,
    exported,
    lively,
    made,
    one_thread,
    outputs,
    random,
    tensors_in,
    verdicts,
)

pytestmark = [
    # torch copies its own tree specs in a way that it deprecates,
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\):FutureWarning"),
    # unflatten reads attributes before it sets them,
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
    # a branch of a cond is asked for gradients that are none of a leaf,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # and scan makes a script of its own.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
threads = pytest.fixture(autouse=True)(one_thread)

IMAGE: Shape = (2, 3, 6, 6)
OTHER: Shape = (3, 3, 5, 7)
TRAINING, FUNCTIONAL, CORE = "training", "functional", "core"


@dataclass(frozen=True, slots=True)
class Row:
    """A net and what becomes of it.

    ``decided`` has the verdicts in the order of the graph, ``core`` those of the other forms where
    they differ; ``gone`` are the paths whose tensors go, ``new`` the names of those that come.
    A net without ``others``, shapes of other inputs, is exported for fixed sizes.
    """

    net: Callable[[], nn.Module]
    decided: str
    gone: str = ""
    new: str = ""
    inputs: tuple[Shape, ...] = (IMAGE,)
    others: tuple[Shape, ...] = (OTHER,)
    core: str = ""
    positive: bool = False


def conv(inputs: int = 3, size: int = 3, **options: Any) -> nn.Conv2d:
    """A Conv of 4 channels without a bias."""
    return nn.Conv2d(inputs, 4, size, bias=False, **options)


def norm(channels: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def parts(**more: Any) -> dict[str, Any]:
    """Two layers, each with its BatchNorm."""
    return {"a": conv(), "n": norm(), "b": nn.Conv2d(4, 4, 1), "o": norm()} | more


# ---- nets of operators of the outermost graph ----


def _attributes(m: Any, x: Tensor) -> Tensor:
    y = (m.n(m.a(x)) * m.plain + m.kept).relu()
    result: Tensor = m.o(m.b(y)) - m.unkept
    return result


def attributes() -> nn.Module:
    """Constants of all kinds: a plain tensor, a buffer, one that is not saved."""
    model = made(_attributes, **parts(kept=random(4, 1, 1)))
    model.plain = random(4, 1, 1, seed=8)
    model.register_buffer("unkept", random(4, 1, 1, seed=9), persistent=False)
    return model


def _tied(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return m.n(m.a(x)), m.n(m.b(x.relu()))


def _tied_and_raw(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return m.n(m.a(x)), m.b(x.relu())


def tied(run: Callable[..., Any]) -> nn.Module:
    """Two layers with one weight between them."""
    first, second = conv(), conv()
    second.weight = first.weight
    return made(run, a=first, b=second, n=norm())


def _counting(m: Any, x: Tensor) -> Tensor:
    m.count.add_(1)
    y = m.n(m.a(x))
    result: Tensor = m.o(m.b(y.relu())) * m.count
    return result


def _rescaling(m: Any, x: Tensor) -> Tensor:
    y = m.n(m.a(x)) * m.k
    m.k.mul_(2)
    result: Tensor = m.o(m.b(y))
    return result


def _into_inputs(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = m.n(m.a(x))
    y.add_(z)
    x.mul_(2)
    return m.o(m.b(y)), z


def _one_output(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = m.n(m.a(x))
    return y, y - 0.0, y * 1.0, y.relu()


def _input_as_output(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    return x - 0.0, x / 1.0, m.n(m.a(x)), x


def _there_and_back(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return (x * 2.0) * 0.5, m.n(m.a(x))


ORDINARY = {
    "sequential": Row(
        lambda: nn.Sequential(conv(), norm(), nn.ReLU(), nn.Conv2d(4, 5, 1), norm(5)),
        "backward backward", "1 4", "0.bias",
    ),
    "forward": Row(
        lambda: nn.Sequential(norm(3), conv(3), nn.ReLU()), "forward", "0", "1.bias"
    ),
    "attributes": Row(
        attributes, "backward backward backward backward backward", "n o kept plain unkept",
        "a.bias",
    ),
    "tied": Row(lambda: tied(_tied), "backward backward", "n", "a.bias b.bias", positive=True),
    "tied, one raw": Row(lambda: tied(_tied_and_raw), "BNF005"),
}  # fmt: skip
CHANGING = {
    "counter": Row(
        lambda: made(_counting, **parts(count=torch.zeros(()))),
        "backward backward", "n o", "a.bias",
        core="BNF017 backward backward",
    ),
    "step that changes": Row(
        lambda: made(_rescaling, **parts(k=random(4, 1, 1))), "backward backward", "n o", "a.bias",
        core="backward BNF018 backward",
    ),
    "inputs": Row(
        lambda: made(_into_inputs, **parts(a=conv(size=1))), "backward backward", "n o", "a.bias",
        (IMAGE, (2, 4, 6, 6)), (OTHER, (3, 4, 5, 7)), "backward BNF018 backward",
    ),
}  # fmt: skip
OUTPUTS = {
    "one output": Row(
        lambda: made(_one_output, a=conv(), n=norm()), "backward BNF008 BNF008", "n", "a.bias",
    ),
    "input as output": Row(
        lambda: made(_input_as_output, a=conv(), n=norm()), "BNF008 BNF008 backward", "n", "a.bias",
    ),
    "there and back": Row(
        lambda: made(_there_and_back, a=conv(), n=norm()),
        "merged BNF008 backward", "n", "a.bias mul_1_merged",
    ),
}  # fmt: skip

# ---- nets with bodies ----


def _cond(m: Any, x: Tensor) -> Tensor:
    result: Tensor = torch.cond(x.sum() > 0, lambda x: m.n(m.a(x)), lambda x: m.o(m.b(x)), (x,))
    return result


def _cond_one_weight(m: Any, x: Tensor) -> Tensor:
    def same(x: Tensor) -> Tensor:
        result: Tensor = m.n(m.a(x)).relu()
        return result

    result: Tensor = torch.cond(x.sum() > 0, lambda x: m.n(m.a(x)), same, (x,))
    return result


def _cond_other_norm(m: Any, x: Tensor) -> Tensor:
    result: Tensor = torch.cond(x.sum() > 0, lambda x: m.n(m.a(x)), lambda x: m.o(m.a(x)), (x,))
    return result


def _cond_raw(m: Any, x: Tensor) -> Tensor:
    result: Tensor = torch.cond(x.sum() > 0, lambda x: m.n(m.a(x)), lambda x: m.a(x) * 1.0, (x,))
    return result


def _captured(m: Any, x: Tensor) -> Tensor:
    """A BatchNorm before, whose output a branch reads; another behind both branches."""
    y = m.n(m.a(x))
    z = torch.cond(x.sum() > 0, lambda y: m.b(y), lambda y: m.d(y.sin()), (y,))
    result: Tensor = m.e(m.o(z))
    return result


def _reaching_in(m: Any, x: Tensor) -> Tensor:
    """A conv outside whose BatchNorm is in a branch."""
    y = m.a(x)
    result: Tensor = torch.cond(x.sum() > 0, lambda y: m.n(y), lambda y: m.b(y), (y,))
    return result


def _no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.n(m.a(x))
    result: Tensor = m.o(m.b(y.relu()))
    return result


def _autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.n(m.a(x))
    result: Tensor = m.o(m.b(y.to(x.dtype).relu()))
    return result


def around(body: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A loop of ``body`` between two layers with their BatchNorms."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = body(m, m.n(m.a(x)))
        result: Tensor = m.o(m.b(y))
        return result

    return run


def _step(m: Any, y: Tensor) -> Tensor:
    result: Tensor = m.p(m.c(y))
    return result


def _while(m: Any, y: Tensor) -> Tensor:
    def go_on(i: Tensor, y: Tensor) -> Tensor:
        return i < 2

    found: Any = loop(go_on, lambda i, y: (i + 1, _step(m, y)), (torch.tensor(0), y))
    result: Tensor = found[1]
    return result


def _map(m: Any, y: Tensor) -> Tensor:
    result: Tensor = over_batch(lambda z: _step(m, z[None])[0], y)
    return result


def _scan(m: Any, y: Tensor) -> Tensor:
    def step(carry: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        z = _step(m, z[None])[0]
        return carry + z, z * 2

    carry, made = scan(step, torch.zeros_like(y[0]), y)
    result: Tensor = made + carry
    return result


# Torch says less of the types of these than they take.
loop, over_batch = cast(Any, while_loop), cast(Any, mapped)


def looping(body: Callable[[Any, Tensor], Tensor]) -> Row:
    return Row(
        lambda: made(around(body), **parts(c=nn.Conv2d(4, 4, 1), p=norm())),
        "backward backward", "n o", "a.bias", others=(),
    )  # fmt: skip


BODIES = {
    "cond": Row(
        lambda: made(_cond, **parts(a=conv(size=1), b=conv(size=1))),
        "backward backward", "n o", "a.bias b.bias",
    ),
    "one weight in both branches": Row(
        lambda: made(_cond_one_weight, a=conv(size=1), n=norm()),
        "backward backward", "n", "a.bias a.bias_1",
        positive=True,
    ),
    "one weight, two norms": Row(
        lambda: made(_cond_other_norm, a=conv(size=1), n=norm(), o=norm()),
        "around BNF020", "n", "a.bias",
        positive=True,
    ),
    "one weight, one norm": Row(
        lambda: made(_cond_raw, a=conv(size=1), n=norm()), "BNF005 backward"
    ),
    "captured by a branch": Row(
        lambda: made(
            _captured, **parts(a=conv(size=1), d=nn.Conv2d(4, 4, 1), e=nn.Conv2d(4, 4, 1))
        ),
        "backward forward", "n o", "a.bias",
    ),
    "a step inside, its conv outside": Row(
        lambda: made(_reaching_in, a=conv(size=1), n=norm(), b=nn.Conv2d(4, 4, 1)), "BNF018"
    ),
    "no_grad": Row(lambda: made(_no_grad, **parts()), "backward backward", "n o", "a.bias"),
    "autocast": Row(lambda: made(_autocast, **parts()), "backward backward", "n o", "a.bias"),
    "while_loop": looping(_while),
    "map": looping(_map),
    "scan": looping(_scan),
}  # fmt: skip
ROWS = ORDINARY | CHANGING | OUTPUTS | BODIES
# To decompose takes torch longer than all the rest.
ALSO_CORE = ("sequential", "attributes", "tied", "counter", "inputs", "one output", "cond",
             "captured by a branch", "no_grad", "autocast")  # fmt: skip
CASES = [
    *((name, TRAINING) for name in ROWS),
    *((name, CORE) for name in ALSO_CORE),
    *((name, FUNCTIONAL) for name in ("step that changes", "one weight in both branches")),
]


# ---- making and running ----


@cache
def given(name: str, form: str) -> ExportedProgram:
    """The program of a row, which nobody may change."""
    if form == FUNCTIONAL:
        functional: ExportedProgram = given(name, TRAINING).run_decompositions({})
        return functional
    if form == CORE:
        core: ExportedProgram = decomposed(given(name, TRAINING))
        return core
    row = ROWS[name]
    net = lively(row.net(), positive=row.positive)
    sizes = tuple({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC} for _ in row.inputs)
    dynamic = sizes if row.others else None
    program: ExportedProgram = exported(net, feeds(row.inputs), dynamic_shapes=dynamic)
    return program


@cache
def folded(name: str, form: str) -> Any:
    return bnfold.fold(given(name, form))


@cache
def reference(name: str) -> list[list[Tensor]]:
    """What the unfolded program of a row gives."""
    return all_runs(given(name, TRAINING), ROWS[name])


def feeds(shapes: tuple[Shape, ...], seed: int = 0) -> list[Tensor]:
    return [random(*shape, seed=seed + k) for k, shape in enumerate(shapes)]


def all_feeds(row: Row) -> Iterator[list[Tensor]]:
    """Inputs that take either branch of a cond, of all sizes."""
    for sign, shapes in enumerate(filter(None, (row.inputs, row.others, row.inputs))):
        yield [value.abs() * (-1) ** sign for value in feeds(shapes, sign)]


def all_runs(program: ExportedProgram, row: Row) -> list[list[Tensor]]:
    # A program shares its tensors with its module, which changes some.
    module, changes = program.module(), row in CHANGING.values()
    return [ran(copy.deepcopy(module) if changes else module, inputs) for inputs in all_feeds(row)]


def ran(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """What a module gives when it is run twice, and what its inputs are then."""
    values = [value.clone() for value in inputs]
    with torch.no_grad():
        made = [value.clone() for _ in range(2) for value in tensors_in(module(*values))]
    return made + values


def assert_runs_alike(program: ExportedProgram, name: str) -> None:
    for expected, got in zip(reference(name), all_runs(program, ROWS[name]), strict=True):
        assert error(expected, got) < 1e-9


# ---- what holds for every program ----


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_folded_program_is_valid_and_says_the_same(name: str, form: str) -> None:
    row, result = ROWS[name], folded(name, form)
    decided = row.decided if form == TRAINING else row.core or row.decided
    assert " ".join(verdicts(result.report).values()) == decided
    result.model.validate()
    assert_runs_alike(result.model, name)


LATER = ("sequential", "attributes", "counter", "cond", "no_grad")


@pytest.mark.parametrize("name", ROWS)
def test_a_folded_program_can_do_what_a_program_can(name: str) -> None:
    result = folded(name, TRAINING).model
    assert_runs_alike(saved_and_loaded(result), name)
    apart = torch.export.unflatten(saved_and_loaded(result))
    assert error(reference(name)[0], ran(apart, next(all_feeds(ROWS[name])))) < 1e-9
    if name in LATER:
        core = decomposed(result)
        core.validate()
        assert_runs_alike(core, name)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_given_program_is_left_as_it_was(name: str, form: str) -> None:
    program = given(name, form)
    before = snapshot(program)
    result = bnfold.fold(program).model
    assert bnfold.explain(program).steps == folded(name, form).report.steps
    assert_unchanged(program, before)
    assert result.example_inputs is program.example_inputs
    assert result.range_constraints == program.range_constraints
    assert result.call_spec == program.call_spec


@pytest.mark.parametrize(("name", "form"), CASES)
def test_names_stay_but_for_norms_that_are_gone_and_new_biases(name: str, form: str) -> None:
    row = ROWS[name]
    before, after = tensors_of(given(name, form)), tensors_of(folded(name, form).model)
    lost = {n for n in before if any(n == g or n.startswith(f"{g}.") for g in row.gone.split())}
    assert before.keys() - after.keys() == lost
    assert after.keys() - before.keys() == set(row.new.split())
    assert [n for n in after if n in before] == [n for n in before if n in after]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_tensor_that_did_not_change_is_the_one_that_was_given(name: str, form: str) -> None:
    before, after = tensors_of(given(name, form)), tensors_of(folded(name, form).model)
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        assert new is old or not torch.equal(new, old)
        assert isinstance(new, nn.Parameter) is isinstance(old, nn.Parameter)
        assert (new.requires_grad, new.dtype) == (old.requires_grad, old.dtype)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_nothing_in_a_folded_program_is_dead(name: str, form: str) -> None:
    program, result = given(name, form), folded(name, form).model
    assert unread(result) <= unread(program)
    held = {str(n.target) for n in result.graph.nodes if n.op == "get_attr"}
    children = {key for key, _ in result.graph_module.named_children()}
    assert children == held & children


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_second_fold_finds_nothing_more(name: str, form: str) -> None:
    result = folded(name, form)
    again = bnfold.fold(result.model)
    assert not again.report.folded
    assert len(again.report.kept) == len(result.report.kept)
    assert str(again.model.graph) == str(result.model.graph)


@pytest.mark.parametrize("name", ROWS)
def test_level_local_says_the_same(name: str) -> None:
    result = bnfold.fold(given(name, TRAINING), level="local")
    result.model.validate()
    assert result.report.level == "local"
    assert len(result.report.folded) <= len(folded(name, TRAINING).report.folded)
    assert_runs_alike(result.model, name)


def tensors_of(program: ExportedProgram) -> dict[str, Tensor]:
    return {**program.state_dict, **program.constants}


def unread(program: ExportedProgram) -> set[str]:
    """Nodes that nobody reads; of the inputs of a branch some are for the other one."""
    nodes = [node for node in all_nodes(program.graph_module) if not node.users]
    outer = {
        node.name for node in nodes if node.op == "placeholder" and node.graph is program.graph
    }
    return outer | {node.name for node in nodes if node.op not in ("placeholder", "output")}


# ---- bodies ----


@pytest.mark.parametrize("form", [TRAINING, CORE])
def test_a_new_bias_is_an_operand_of_both_branches(form: str) -> None:
    program = folded("cond", form).model
    choice = next(
        node for node in program.graph.nodes if node.target is torch.ops.higher_order.cond
    )
    operands = [operand.name for operand in choice.args[3]]
    assert {"p_a_bias", "p_b_bias"} <= set(operands)
    bodies = [program.graph_module.get_submodule(str(each.target)) for each in choice.args[1:3]]
    entries = [body.graph.find_nodes(op="placeholder") for body in bodies]
    assert all(one.users or other.users for one, other in zip(*entries, strict=True))
    for inputs in entries:
        assert [node.meta["val"].shape for node in inputs[1:]] == [
            program.state_dict[name].shape for name in map(parameter_of(program), operands[1:])
        ]


def parameter_of(program: ExportedProgram) -> Callable[[str], str]:
    signature = program.graph_signature
    return {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.__getitem__


def test_norms_in_bodies_of_loops_stay() -> None:
    for name in ("while_loop", "map", "scan"):
        program, result = given(name, TRAINING), folded(name, TRAINING).model
        assert (norms(program), norms(result)) == (3, 1)
        loop = "p.running_mean", "c.weight"
        assert all(result.state_dict[key] is program.state_dict[key] for key in loop)


def test_what_runs_in_bfloat16_is_no_worse_than_before() -> None:
    net = lively(made(_autocast, **parts()), positive=True)
    x = random(*IMAGE)
    expected = [value.double() for value in outputs(net, [x])]
    program = exported(copy.deepcopy(net).float(), [x.float()])
    result = bnfold.fold(program)
    assert norms(result.model) == 0
    assert {t.dtype for t in result.model.state_dict.values()} == {torch.float32}
    before, after = (
        error(expected, [value.double() for value in outputs(each, [x.float()])])
        for each in (program, result.model)
    )
    assert 1e-4 < after < 2 * before


# ---- parameters ----


@pytest.mark.parametrize("frozen", ["a.weight", "b.weight", "b.bias"])
def test_a_frozen_parameter_stays_frozen_and_its_new_bias_is_frozen(frozen: str) -> None:
    net = lively(made(_no_grad, **parts()))
    net.get_parameter(frozen).requires_grad_(False)
    result = bnfold.fold(exported(net, [random(*IMAGE)])).model
    trained = {name for name, value in result.named_parameters() if value.requires_grad}
    lost = {frozen, "a.bias"} if frozen == "a.weight" else {frozen}
    assert trained == {"a.weight", "a.bias", "b.weight", "b.bias"} - lost


@pytest.mark.parametrize(("unshare", "stay"), [(False, 1), (95, 1), (96, 0), (True, 0)])
def test_a_tied_weight_is_unshared_where_that_is_asked_for(unshare: bool | int, stay: int) -> None:
    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.n(m.a(x)), m.o(m.b(x.relu()))

    first, second = conv(size=1), conv(size=1)
    second.weight = first.weight
    net = lively(made(run, a=first, b=second, n=norm(), o=norm()), positive=True)
    x = random(*IMAGE)
    program = exported(net, [x])
    result = bnfold.fold(program, unshare=unshare)
    result.model.validate()
    assert len(result.report.kept) == stay == norms(result.model)
    assert error(outputs(net, [x]), outputs(result.model, [x])) < 1e-9
    assert error(outputs(net, [x]), outputs(saved_and_loaded(result.model), [x])) < 1e-9


def test_tied_names_that_agree_are_still_one_tensor() -> None:
    result = folded("tied", TRAINING).model
    state = result.state_dict
    assert state["a.weight"].data_ptr() == state["b.weight"].data_ptr()
    assert not torch.equal(state["a.weight"], given("tied", TRAINING).state_dict["a.weight"])


# ---- buffers that change ----


def _training(m: Any, x: Tensor) -> Tensor:
    y = m.t(m.a(x))
    result: Tensor = m.o(m.b(y.relu()))
    return result


@pytest.mark.parametrize("form", [TRAINING, CORE])
def test_a_norm_in_training_mode_goes_on_counting_among_others(form: str) -> None:
    net = lively(made(_training, **parts(t=norm())))
    del net.n
    net.t.train()
    program = exported(net, [random(*IMAGE)])
    program = decomposed(program) if form == CORE else program
    result = bnfold.fold(program)
    assert list(verdicts(result.report).values()) == ["BNF001", "backward"]
    result.model.validate()
    counted = []
    for each in (program, result.model):
        module = saved_and_loaded(each).module()
        made_ = ran(module, [random(*IMAGE, seed=3)])
        buffers = dict(module.named_buffers())
        counted.append([*made_, *(buffers[f"t.{n}"] for n in ("running_mean", "running_var"))])
        assert buffers["t.num_batches_tracked"] == 2
    assert error(*counted) < 1e-9


def test_a_counter_goes_on_where_it_stood() -> None:
    counts = []
    for program in (given("counter", TRAINING), folded("counter", TRAINING).model):
        module = saved_and_loaded(program).module()
        ran(module, [random(*IMAGE)])
        counts.append(module.get_buffer("count").item())
    assert counts == [2, 2]


# ---- how a program was made ----


def _structured(m: Any, x: Tensor, *, more: dict[str, Tensor]) -> dict[str, Any]:
    return {"y": m.n(m.a(x)), "z": [m.o(m.b(more["u"])), (more["v"],)]}


def test_arguments_and_results_keep_their_structure() -> None:
    net = lively(made(_structured, **parts()))
    x, u, v = random(*IMAGE), random(2, 4, 3, 3), random(2)
    more = {"more": {"u": u, "v": v}}
    program = torch.export.export(net, (x,), more, strict=False)
    result = bnfold.fold(program).model
    assert norms(result) == 0
    for each in (result, saved_and_loaded(result), decomposed(result)):
        got = each.module()(x, **more)
        assert isinstance(got["z"][1], tuple)
        assert error(list(tensors_in(net(x, **more))), list(tensors_in(got))) < 1e-9
    assert result.example_inputs == program.example_inputs


def test_a_program_of_the_strict_capture_folds_like_the_other() -> None:
    row = ROWS["attributes"]
    net, x = lively(row.net()), feeds(row.inputs)
    program = torch.export.export(net, tuple(x), strict=True)
    result = bnfold.fold(program)
    assert " ".join(verdicts(result.report).values()) == row.decided
    result.model.validate()
    assert error(outputs(net, x), outputs(result.model, x)) < 1e-9
    other = folded("attributes", TRAINING).model
    assert list(result.model.state_dict) == list(other.state_dict)


@pytest.mark.parametrize("name", ["sequential", "attributes", "no_grad"])
def test_a_program_from_a_file_folds_like_the_one_that_was_saved(name: str) -> None:
    result = bnfold.fold(saved_and_loaded(given(name, TRAINING)))
    expected = folded(name, TRAINING)
    assert verdicts(result.report) == verdicts(expected.report)
    found, other = tensors_of(result.model), tensors_of(expected.model)
    assert list(found) == list(other)
    assert all(torch.equal(found[key], other[key]) for key in found)


class Block(nn.Module):
    """A Conv and its BatchNorm."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv, self.bn = conv(inputs), norm()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.bn(self.conv(x))
        return result


@pytest.mark.parametrize("kept", [("0",), ("0.bn", "2"), ("0", "0.conv", "0.bn", "1", "2")])
def test_calls_of_modules_that_are_to_be_kept_can_be_unflattened(kept: tuple[str, ...]) -> None:
    net, x = lively(nn.Sequential(Block(3), nn.ReLU(), Block(4))), random(2, 3, 8, 8)
    program = torch.export.export(net, (x,), preserve_module_call_signature=kept, strict=False)
    result = bnfold.fold(program).model
    assert norms(result) == 0
    result.validate()
    apart = torch.export.unflatten(result)
    assert error(outputs(net, [x]), outputs(apart, [x])) < 1e-9
    calls = {entry.fqn for entry in result.module_call_graph if entry.signature is not None}
    assert calls - {""} == {path for path in kept if not path.endswith("bn")}


def test_a_state_dict_goes_into_the_module_of_another_fold() -> None:
    other = exported(lively(ROWS["sequential"].net(), seed=5), feeds((IMAGE,)))
    module = bnfold.fold(other).model.module()
    expected = folded("sequential", TRAINING).model
    module.load_state_dict(expected.state_dict)
    x = [random(*IMAGE)]
    assert error(outputs(expected, x), outputs(module, x)) < 1e-12


def test_what_a_fold_returns_takes_other_constants() -> None:
    program = folded("attributes", TRAINING).model
    bias = random(5, seed=2)
    result = bnfold.rewrite_constants(program, {"b.bias": bias[:4]})
    x = [random(*IMAGE)]
    shift = (bias[:4] - program.state_dict["b.bias"]).detach().reshape(-1, 1, 1)
    assert error([outputs(program, x)[0] + shift], outputs(result, x)) < 1e-9
