"""Merges in torch models: one operator in programs, in GraphModules and in module trees."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import bnfold
from tests.torch_merge_nets import CASES, Averaged, Functional, Net, RepMixer, RepVgg, conv_norm
from tests.torch_nets import (
    BARE,
    GRAPH,
    KINDS,
    MODULE,
    PROGRAM,
    TRACED,
    decomposed,
    error,
    exported,
    folded,
    lively,
    made,
    one_thread,
    outputs,
    random,
)

EXACT = 1e-12

threads = pytest.fixture(autouse=True)(one_thread)
every = pytest.mark.parametrize("kind", KINDS)
in_trees = pytest.mark.parametrize("kind", [MODULE, TRACED])


def layers_of(model: Any) -> list[str]:
    """What convolutions and linear layers are called in a model of any kind."""
    if isinstance(model, ExportedProgram):
        nodes = [n for n in model.graph.nodes if n.op == "call_function"]
        return [n.name for n in nodes if str(n.target).split(".")[1] in _LINEAR]
    if not isinstance(model, fx.GraphModule):
        kept = (_ConvNd, nn.Linear)
        return [name for name, module in model.named_modules() if isinstance(module, kept)]
    leaves = [n for n in model.graph.nodes if n.op == "call_module"]
    kinds = [type(model.get_submodule(str(n.target))) for n in leaves]
    called = [k.__name__ for k in kinds if issubclass(k, (_ConvNd, nn.Linear))]
    functions = [n for n in model.graph.nodes if n.op == "call_function"]
    return called + [n.name for n in functions if "conv" in str(n.target)]


_LINEAR = frozenset({"conv1d", "conv2d", "conv3d", "convolution", "linear", "addmm", "mm"})


def merged(kind: str, model: nn.Module, x: Tensor) -> Any:
    """The model folded, the same as before as far as float64 can say."""
    before = outputs(model, [x])
    result = folded(kind, model, [x])
    assert error(before, outputs(result.model, [x])) < EXACT
    assert error(before, outputs(model, [x])) == 0
    return result


def case_of(name: str) -> tuple[Any, Tensor]:
    case = CASES[name]
    return lively(case.build()), random(*case.shape)


# ---- what becomes one ----


@every
@pytest.mark.parametrize("name", CASES)
def test_branches_and_chains_become_one_layer(name: str, kind: str) -> None:
    model, x = case_of(name)
    result = merged(kind, model, x)
    if CASES[name].sized and kind in (TRACED, BARE):
        assert not result.report.joints
        return
    assert len(layers_of(result.model)) == CASES[name].layers
    assert len(result.report.joints) == CASES[name].joints
    assert not result.report.kept
    assert not any(isinstance(m, _BatchNorm) for m in getattr(result.model, "modules", list)())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.views])
def test_programs_in_core_aten_are_merged_too(name: str) -> None:
    model, x = case_of(name)
    program = decomposed(exported(model, [x]))
    result = bnfold.fold(program)
    assert error(outputs(model, [x]), outputs(result.model, [x])) < EXACT
    assert len(layers_of(result.model)) == CASES[name].layers


@in_trees
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.classes])
def test_a_block_becomes_a_layer_or_a_sequence(name: str, kind: str) -> None:
    model, x = case_of(name)
    result = merged(kind if not CASES[name].sized else MODULE, model, x)
    assert type(result.model) is type(model)
    assert [type(stage) for stage in result.model.stages] == list(CASES[name].classes)


def test_children_that_stay_keep_their_names() -> None:
    model, x = case_of("mobileone")
    stage = merged(MODULE, model, x).model.stages[0]
    assert [name for name, _ in stage.named_children()] == ["branches", "se", "act"]
    assert sorted(dict(stage.named_parameters())) == [
        "branches.bias", "branches.weight", "se.fc.bias", "se.fc.weight",
    ]  # fmt: skip


@every
def test_what_is_gone_leaves_no_tensor_behind(kind: str) -> None:
    model, x = case_of("repvgg")
    result = merged(kind, model, x).model
    state = result.state_dict if isinstance(result, ExportedProgram) else result.state_dict()
    assert len(state) == 2 * CASES["repvgg"].layers
    assert {tuple(t.shape) for t in state.values()} == {
        (8, 3, 3, 3), (8, 8, 3, 3), (6, 8, 3, 3), (8,), (6,),
    }  # fmt: skip


@every
def test_a_flattening_between_stays(kind: str) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        made: Tensor = self.head(torch.flatten(self.conv(self.pool(x)), 1))
        return made

    layers = {"conv": nn.Conv2d(3, 6, 1), "head": nn.Linear(6, 4), "pool": nn.AdaptiveAvgPool2d(1)}
    result = merged(kind, lively(made(run, **layers)), random(2, 3, 5, 5))
    assert len(layers_of(result.model)) == (1 if result.report.joints else 2)
    assert result.report.joints or kind in (TRACED, BARE)  # sizes are not known there


@pytest.mark.parametrize("flattened", [
    lambda x: x.squeeze(), lambda x: x.squeeze((1, 2, 3)), lambda x: x.view(-1, 4),
    lambda x: x.reshape(2, 4),
])  # fmt: skip
@pytest.mark.parametrize("kind", [MODULE, GRAPH, PROGRAM])
def test_one_channel_behind_a_flattening_is_still_an_axis(
    kind: str, flattened: Callable[[Tensor], Tensor]
) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        made: Tensor = self.head(flattened(self.conv(x)))
        return made

    model = lively(made(run, conv=nn.Conv2d(3, 4, 1), head=nn.Linear(4, 1)))
    merged(kind, model, random(2, 3, 1, 1))


@every
def test_a_step_before_the_flattening_goes(kind: str) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        made: Tensor = self.head(torch.flatten(self.norm(self.conv(x)), 1))
        return made

    layers = {"conv": nn.Conv2d(3, 6, 1), "norm": nn.BatchNorm2d(6), "head": nn.Linear(6, 4)}
    result = merged(kind, lively(made(run, **layers)), random(2, 3, 1, 1))
    assert not result.report.kept


# ---- tensors stay what they were ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@every
def test_types_and_gradients_are_kept(kind: str, dtype: torch.dtype) -> None:
    model = lively(Net(RepVgg(3, 4), RepMixer(4)), positive=True).to(dtype)
    model.requires_grad_(False)
    x = random(2, 3, 6, 6).to(dtype)
    result = folded(kind, model, [x]).model
    state = result.state_dict if isinstance(result, ExportedProgram) else result.state_dict()
    assert {t.dtype for t in state.values()} == {dtype}
    assert error(outputs(model, [x]), outputs(result, [x])) < 16 * torch.finfo(dtype).eps
    if not isinstance(result, ExportedProgram):
        assert not any(p.requires_grad for p in result.parameters())


@pytest.mark.parametrize("kind", [MODULE, GRAPH, PROGRAM])
def test_weights_stay_in_their_memory_format(kind: str) -> None:
    model = lively(Net(RepVgg(3, 4))).to(memory_format=torch.channels_last)
    result = merged(kind, model, random(2, 3, 6, 6)).model
    state = result.state_dict if isinstance(result, ExportedProgram) else result.state_dict()
    (weight,) = (t for t in state.values() if t.dim() == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", [MODULE, GRAPH])
def test_the_result_is_a_model_like_any_other(kind: str) -> None:
    model, x = case_of("repvgg")
    result = merged(kind, model, x).model
    expected = outputs(result, [x])
    ways: list[Callable[[], Any]] = [
        lambda: copy.deepcopy(result),
        lambda: exported(result, [x]),
        lambda: fx.symbolic_trace(result),
    ]
    for way in ways:
        assert error(expected, outputs(way(), [x])) < EXACT
    assert not bnfold.fold(result, (x,)).report.joints


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_merged_block_can_be_pickled_and_scripted() -> None:
    model = nn.Sequential(RepVgg(3, 4), RepMixer(4))
    x = random(2, 3, 6, 6)
    result = merged(MODULE, lively(model), x).model
    for again in (pickle.loads(pickle.dumps(result)), torch.jit.script(result)):
        assert error(outputs(result, [x]), outputs(again, [x])) < EXACT


def test_in_place_it_is_the_same_object() -> None:
    model, x = case_of("repvgg")
    before = outputs(model, [x])
    stages = list(model.stages)
    result = bnfold.fold(model, (x,), inplace=True).model
    assert result is model
    assert all(one is other for one, other in zip(stages, model.stages, strict=True))
    assert error(before, outputs(model, [x])) < EXACT


def test_the_users_own_modules_stay_as_they_are_behind_a_trace() -> None:
    model, x = case_of("repvgg")
    graph = fx.symbolic_trace(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    bnfold.fold(graph, (x,))
    assert model.stages[0].conv[0].kernel_size == (3, 3)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_sizes_that_vary_stay_open() -> None:
    model, x = case_of("repvgg")
    sizes = {0: torch.export.Dim("n", min=2), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(model, (x,), dynamic_shapes=({**sizes},), strict=False)
    result = bnfold.fold(program).model
    other = random(3, 3, 11, 7)
    assert len(layers_of(result)) == 3
    assert error(outputs(model, [other]), outputs(result, [other])) < EXACT


# ---- what stays apart ----


def _reused(self: Any, x: Tensor) -> Tensor:
    near = self.conv(x)
    made: Tensor = (near + self.point(x)) * torch.sigmoid(near)
    return made


def _twice(self: Any, x: Tensor) -> Tensor:
    made: Tensor = self.conv(torch.relu(self.conv(x) + self.point(x)))
    return made


def _with_size(self: Any, x: Tensor) -> Tensor:
    near = self.first(x)
    made: Tensor = self.second(near).flatten(1)[:, : near.shape[1]]
    return made


def pair() -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(4, 4, 3, padding=1), "point": nn.Conv2d(4, 4, 1)}


APART: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a branch that somebody else reads": (lambda: made(_reused, **pair()), ""),
    "a layer called twice": (lambda: made(_twice, **pair()), ""),
    "windows that do not line up": (lambda: RepStrides(), "BNF029"),
    "a border that is not zero": (lambda: nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)), "BNF028"),
    "other paddings": (lambda: nn.Sequential(
        nn.Conv2d(4, 4, 1, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), ""),
    "a bottleneck": (lambda: nn.Sequential(nn.Conv2d(4, 1, 1), nn.Conv2d(1, 4, 1)), "BNF027"),
}  # fmt: skip


class RepStrides(nn.Module):
    """A sum whose branches read other places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv(x) + self.point(x)
        return made


@every
@pytest.mark.parametrize("name", APART)
def test_what_can_not_be_one_stays(name: str, kind: str) -> None:
    build, code = APART[name]
    result = merged(kind, lively(Net(build())), random(2, 4, 6, 6))
    assert not result.report.joints
    assert {step.code for step in result.report.apart} == {code} - {""}


def test_normalisation_by_the_batch_stays() -> None:
    model = lively(Net(RepVgg(4, 4)))
    model.stages[0].identity.train()
    result = bnfold.fold(model, (random(2, 4, 6, 6),))
    assert "BNF001" in {step.code for step in result.report.kept}
    assert isinstance(result.model.stages[0], RepVgg)


# ---- modules that can't go ----


def _hooked(model: Any) -> None:
    model.stages[0].register_forward_hook(lambda *_: None)


def _hooked_inside(model: Any) -> None:
    model.stages[0].point.register_forward_hook(lambda *_: None)


def _hooked_nothing(model: Any) -> None:
    model.stages[0].act = nn.Identity()
    model.stages[0].act.register_forward_hook(lambda *_: None)


def _own_forward(model: Any) -> None:
    stage = model.stages[0]
    stage.forward = lambda x: type(stage).forward(stage, x)


class Asking(Net):
    """Code that looks at a class."""

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x) if isinstance(stage, RepVgg) else -stage(x)
        return x


class Taking(Net):
    """Code that takes an attribute of a block."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.first = blocks[0]

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.first
        made: Tensor = first(x) * len(first.conv)
        return made


class Again(Net):
    """A block that is called twice."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.stages[0](self.stages[0](x))
        return made


KEPT_MODULES: dict[str, tuple[type[Net], Callable[[Any], None]]] = {
    "a hook on the block": (Net, _hooked),
    "a hook inside": (Net, _hooked_inside),
    "a hook on what does nothing": (Net, _hooked_nothing),
    "a forward of its own": (Net, _own_forward),
    "a class that is asked for": (Asking, lambda _: None),
    "an attribute that is taken": (Taking, lambda _: None),
    "two calls": (Again, lambda _: None),
}


@pytest.mark.parametrize("name", KEPT_MODULES)
def test_a_module_that_others_need_is_not_replaced(name: str) -> None:
    kind, change = KEPT_MODULES[name]
    model = lively(kind(RepVgg(4, 4)))
    change(model)
    x = random(2, 4, 6, 6)
    before = outputs(model, [x])
    result = bnfold.fold(model, (x,))
    assert isinstance(result.model.stages[0], RepVgg)
    assert error(before, outputs(result.model, [x])) < EXACT


def test_the_model_itself_keeps_its_class_and_its_code() -> None:
    result = merged(MODULE, lively(RepVgg(4, 4)), random(2, 4, 6, 6))
    assert type(result.model) is RepVgg
    assert not result.report.joints
    assert {step.code for step in result.report.apart} == {"BNF023"}


def test_a_block_with_code_behind_the_branches_stays() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        made: Tensor = torch.sigmoid(self.conv(x) + self.point(x) + x)
        return made

    model = lively(Net(made(run, **pair())))
    result = merged(MODULE, model, random(2, 4, 6, 6))
    assert not result.report.joints
    assert [step.code for step in result.report.apart] == ["BNF023"] * 2


def test_a_step_in_the_code_of_a_block_goes_with_it() -> None:
    model, x = lively(Net(Averaged(8, 5))), random(3, 8)
    result = merged(MODULE, model, x)
    assert isinstance(result.model.stages[0], nn.Linear)
    steps = {step.op_type: step.how for step in result.report.steps}
    assert steps["div"] == "backward"


def test_a_step_in_the_code_of_a_block_that_stays_is_kept() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        made: Tensor = torch.sigmoid((self.conv(x) + self.point(x)) / 2)
        return made

    result = merged(MODULE, lively(Net(made(run, **pair()))), random(2, 4, 6, 6))
    assert [step.code for step in result.report.kept] == ["BNF023"]


def test_every_merge_without_a_place_is_refused_at_once() -> None:
    class Sigmoid(RepVgg):
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = torch.sigmoid(super().forward(x))
            return made

    model = lively(Net(*(Sigmoid(4, 4) for _ in range(3)), RepVgg(4, 4)))
    result = merged(MODULE, model, random(2, 4, 6, 6))
    assert len(result.report.joints) == 1
    assert isinstance(result.model.stages[3], nn.Sequential)


def test_a_module_in_two_places_is_one_afterwards_too() -> None:
    model = lively(Net(RepVgg(4, 4)))
    model.same = model.stages[0]
    result = merged(MODULE, model, random(2, 4, 6, 6)).model
    assert result.same is result.stages[0]
    assert isinstance(result.same, nn.Sequential)


def test_a_tensor_that_is_also_a_weight_elsewhere_is_left_alone() -> None:
    model = lively(Net(RepVgg(4, 4), nn.Conv2d(4, 4, 3, padding=1, bias=False)))
    model.stages[1].weight = model.stages[0].conv[0].weight
    result = merged(MODULE, model, random(2, 4, 6, 6))
    assert not result.report.joints


def test_a_block_made_of_computed_weights_is_merged() -> None:
    model = Net(Functional(), nn.Sequential(nn.utils.parametrizations.weight_norm(
        nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 4, 3)))  # fmt: skip
    result = merged(MODULE, lively(model), random(2, 3, 8, 8))
    assert len(layers_of(result.model)) == 2


# ---- in place ----


def _scaled_in_place(self: Any, x: Tensor) -> Tensor:
    x = torch.relu(x)
    near: Tensor = self.conv(x)
    near += self.point(x)
    near.mul_(0.5)
    near += x
    return near


def _changed_between(self: Any, x: Tensor) -> Tensor:
    x = torch.sigmoid(x)
    near = self.point(x)
    other = x.relu_() + 1
    made: Tensor = self.conv(near) * other
    return made


@every
@pytest.mark.parametrize("run", [_scaled_in_place, _changed_between])
def test_changes_in_place_stay_harmless(run: Any, kind: str) -> None:
    layers = {"conv": nn.Conv2d(4, 4, 3, padding=1), "point": nn.Conv2d(4, 4, 1, bias=False)}
    merged(kind, lively(Net(made(run, **layers))), random(2, 4, 6, 6))


# ---- terms between which others stand ----


def _with_a_skip(self: Any, x: Tensor) -> Tensor:
    near, skip = torch.relu(x), torch.sigmoid(x)
    made: Tensor = skip - self.conv(near) - self.point(near) + near
    return made


def _with_a_skip_in_place(self: Any, x: Tensor) -> Tensor:
    near, skip = torch.relu(x), torch.sigmoid(x)
    made: Tensor = skip - self.conv(near)
    made += self.point(near)
    return made * skip


@pytest.mark.parametrize("kind", [GRAPH, BARE, PROGRAM])
@pytest.mark.parametrize(
    ("run", "layers"), [(_with_a_skip, 1), (_with_a_skip_in_place, {GRAPH: 1, BARE: 1, PROGRAM: 2})]
)
def test_terms_over_one_tensor_become_one(run: Any, layers: Any, kind: str) -> None:
    parts = {"conv": nn.Conv2d(4, 4, 3, padding=1), "point": nn.Conv2d(4, 4, 1, bias=False)}
    result = merged(kind, lively(made(run, **parts)), random(2, 4, 6, 6))
    wanted = layers if isinstance(layers, int) else layers[kind]
    assert len(layers_of(result.model)) == wanted
    # A sum that is changed in place keeps its operands: what would be changed instead has readers.
    assert [step.code for step in result.report.apart] == ["BNF022"] * (wanted - 1)


# ---- sizes that are asked for ----


def _asked_for_rank(self: Any, x: Tensor) -> Tensor:
    near = self.conv(x)
    torch._assert(near.ndim == 4, "an image")  # type: ignore[no-untyped-call]
    made: Tensor = near + self.point(x)
    return made


def _asked_for_sizes(self: Any, x: Tensor) -> Tensor:
    near = self.conv(x)
    made: Tensor = self.point(near).reshape(near.shape[0], -1, near.shape[2] * near.shape[3])
    return made


@pytest.mark.parametrize("kind", [GRAPH, BARE])
def test_who_asks_for_the_rank_between_asks_the_source(kind: str) -> None:
    result = merged(kind, lively(Net(made(_asked_for_rank, **pair()))), random(2, 4, 6, 6))
    assert len(layers_of(result.model)) == 1


@every
def test_who_asks_for_sizes_between_gets_those_that_were_there(kind: str) -> None:
    layers = {"conv": nn.Conv2d(4, 5, 3), "point": nn.Conv2d(5, 3, 1)}
    merged(kind, lively(Net(made(_asked_for_sizes, **layers))), random(2, 4, 6, 6))


def _times_size(self: Any, x: Tensor) -> Tensor:
    near = self.first(x)
    made: Tensor = self.second(near) * near.shape[-1]
    return made


def _times_size_of(self: Any, x: Tensor) -> Tensor:
    near = self.first(x)
    made: Tensor = self.second(near) * _last_size(near)
    return made


def _last_size(x: Tensor) -> int:
    return x.shape[-1]


@every
@pytest.mark.parametrize("run", [_times_size, _times_size_of])
def test_numbers_that_code_makes_of_sizes_between_stay(kind: str, run: Any) -> None:
    layers = {"first": nn.Linear(4, 6), "second": nn.Linear(6, 4)}
    merged(kind, lively(Net(made(run, **layers))), random(3, 4))


def _padded_as_needed(self: Any, x: Tensor) -> Tensor:
    more = (x.shape[-1] + 1) % 2
    made: Tensor = self.conv(functional.pad(x, (more, more, more, more)))
    return made


def test_code_that_depends_on_sizes_stays() -> None:
    model = lively(Net(made(_padded_as_needed, conv=nn.Conv2d(3, 4, 3))))
    done = merged(MODULE, model, random(2, 3, 8, 8)).model
    x = random(2, 3, 9, 9)
    torch.testing.assert_close(done(x), model(x))


class _Keeping(nn.Module):
    """Keeps what it made."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = pair().values()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv(x) + self.point(x)
        self.made = made
        return made


def _reads_what_is_kept(self: Any, x: Tensor) -> Tensor:
    made: Tensor = self.block(x) + self.block.made.mean()
    return made


@in_trees
def test_what_code_leaves_behind_is_there(kind: str) -> None:
    model, x = lively(made(_reads_what_is_kept, block=_Keeping())), random(2, 4, 6, 6)
    done = folded(kind, model, [x]).model  # nothing is kept yet
    assert error(outputs(model, [x]), outputs(done, [x])) < EXACT


# ---- the check ----


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch copies its own so
@pytest.mark.parametrize("kind", [MODULE, GRAPH, PROGRAM])
def test_the_check_passes_and_sees_a_channel_that_is_off(kind: str) -> None:
    model = lively(Net(RepVgg(3, 4), RepVgg(4, 4), conv_norm(4, 6, 1)), positive=True).float()
    x = random(4, 3, 9, 9).float()
    reference: Any = model
    if kind == PROGRAM:
        reference = exported(model, [x])
    elif kind == GRAPH:
        reference = fx.symbolic_trace(model)
    given: dict[str, Any] = {} if kind == PROGRAM else {"example_inputs": (x,)}
    result = bnfold.fold(reference, **given)
    assert len(result.report.joints) >= 2
    said = bnfold.check(reference, result.model, **given)
    assert said.verdict.value == "pass", said
    assert {"A", "B"} <= {tier.tier for tier in said.tiers}
    wrong = copy.deepcopy(result.model)
    state = wrong.state_dict if kind == PROGRAM else wrong.state_dict()
    weight = next(t for name, t in state.items() if t.dim() == 4 and "stages" in name)
    with torch.no_grad():
        weight.data[1] *= 1.001
    said = bnfold.check(reference, wrong, **given)
    failed = {tier.tier for tier in said.tiers if tier.verdict.value == "fail"}
    assert {"A", "B"} <= failed
