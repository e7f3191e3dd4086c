"""A normalisation that stays in a torch model, written in another form, in every kind of model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn import functional

import bnfold
from bnfold.torch_arrays import as_array
from bnfold.torch_program import rewrite_constants
from bnfold.verify.judge import Verdict
from bnfold.verify.torch_weights_expected import named_tensors
from tests.torch_nets import (
    GRAPH,
    MODULE,
    PROGRAM,
    TRACED,
    decomposed,
    exported,
    folded,
    lively,
    made,
    one_thread,
    random,
)

single = pytest.fixture(autouse=True, scope="module")(one_thread)

DECOMPOSED = "decomposed"
EDITED = (GRAPH, PROGRAM, DECOMPOSED)  # whose nodes are edited
FORMS = {"affine": ("mul", "add"), "depthwise": ("convolution",)}
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(4), (2, 4, 5)),
    "2d": (lambda: nn.BatchNorm2d(4), (2, 4, 5, 3)),
    "3d": (lambda: nn.BatchNorm3d(4), (2, 4, 5, 3, 2)),
    "of an instance": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
                       (2, 4, 5, 3)),
    "without parameters": (lambda: nn.BatchNorm2d(4, affine=False), (2, 4, 5, 3)),
}  # fmt: skip


def fenced(norm: nn.Module) -> Any:
    """A normalisation between operators that let no units through."""
    return lively(made(lambda m, x: m.n(x.sigmoid()).sigmoid(), n=norm))


def of_kind(kind: str, model: nn.Module, x: Tensor, **options: Any) -> Any:
    if kind == DECOMPOSED:
        return bnfold.fold(decomposed(exported(model, (x,))), **options)
    return folded(kind, model, [x], **options)


def called(model: Any) -> Callable[[Tensor], Tensor]:
    result: Callable[[Tensor], Tensor]
    result = model.module() if isinstance(model, ExportedProgram) else model
    return result


def forms(report: Any) -> list[str]:
    return [step.form for step in report.kept]


GRAPHS = [*((name, kind) for name in NORMS for kind in (GRAPH, PROGRAM)),
          ("2d", DECOMPOSED), ("of an instance", DECOMPOSED)]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "kind"), GRAPHS)
def test_graphs_take_both_forms(name: str, kind: str, form: str) -> None:
    norm, shape = NORMS[name]
    model, x = fenced(norm()), random(*shape)
    result = of_kind(kind, model, x, leftover=form)
    assert forms(result.report) == [form]
    operators = Counter(result.report.after.operators)
    del operators["view"]  # an InstanceNorm is decomposed with two
    assert operators == Counter(["sigmoid", "sigmoid", *FORMS[form]])
    torch.testing.assert_close(called(result.model)(x), model(x))
    names = {name.rpartition("_")[2] for name, _ in named_tensors(result.model)}
    assert names == ({"scale", "shift"} if form == "affine" else {"weight", "bias"})


@pytest.mark.parametrize("kind", [MODULE, TRACED])
@pytest.mark.parametrize("name", NORMS)
def test_a_module_becomes_a_convolution(name: str, kind: str) -> None:
    norm, shape = NORMS[name]
    model, x = fenced(norm()), random(*shape)
    result = of_kind(kind, model, x, leftover="depthwise")
    if kind == TRACED and name in ("1d", "of an instance"):  # they take inputs of other ranks too
        assert forms(result.report) == [""]
        return
    assert forms(result.report) == ["depthwise"]
    new = result.model.n
    assert type(new) is {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
    assert (new.groups, new.in_channels, new.out_channels, new.training) == (4, 4, 4, False)
    torch.testing.assert_close(result.model(x), model(x))
    assert not any(isinstance(inner, nn.Conv2d) for inner in model.modules())


@pytest.mark.parametrize("kind", [MODULE, TRACED])
def test_a_module_tree_has_no_place_for_a_multiplication(kind: str) -> None:
    model, x = fenced(nn.BatchNorm2d(4)), random(2, 4, 5, 3)
    result = of_kind(kind, model, x, leftover="affine")
    assert forms(result.report) == [""]
    assert type(result.model.n) is nn.BatchNorm2d


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", [MODULE, *EDITED])
def test_what_was_trained_is_and_what_was_not_is_not(kind: str, trained: bool) -> None:
    model, x = fenced(nn.BatchNorm2d(4)).requires_grad_(trained), random(2, 4, 5, 3)
    result = of_kind(kind, model, x, leftover="depthwise")
    tensors = dict(named_tensors(result.model))
    assert len(tensors) == 2
    assert {isinstance(tensor, nn.Parameter) for tensor in tensors.values()} == {True}
    assert {tensor.requires_grad for tensor in tensors.values()} == {trained}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_the_numbers_are_computed_in_float64_and_cast_once(form: str, dtype: torch.dtype) -> None:
    model = lively(fenced(nn.BatchNorm2d(4)), positive=True).to(dtype)
    x = random(2, 4, 5, 3).to(dtype)
    norm = model.n
    g, b, m, v = (
        as_array(t).astype(np.float64)
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    scale = g / np.sqrt(v + float(np.float32(norm.eps)))
    result = of_kind(GRAPH, model, x, leftover=form)
    stored = {name: t.detach().double().flatten() for name, t in named_tensors(result.model)}
    wanted = {
        "n_scale": scale,
        "n_weight": scale,
        "n_shift": b - m * scale,
        "n_bias": b - m * scale,
    }
    assert len(stored) == 2
    for name, found in stored.items():
        exact = torch.from_numpy(wanted[name]).to(dtype).double()
        torch.testing.assert_close(found, exact, rtol=0, atol=0)


def test_all_that_a_module_does_beside_the_step_is_kept() -> None:
    class Activated(nn.BatchNorm2d):
        """As timm has it."""

        def __init__(self) -> None:
            super().__init__(4)
            self.act = nn.GELU()

        def forward(self, input: Tensor) -> Tensor:
            return self.act(super().forward(input))  # type: ignore[no-any-return]

    model, x = fenced(Activated()), random(2, 4, 5, 3)
    result = of_kind(MODULE, model, x, leftover="depthwise")
    assert forms(result.report) == ["depthwise"]
    assert [type(inner) for inner in result.model.n] == [nn.Conv2d, nn.GELU]
    torch.testing.assert_close(result.model(x), model(x))


def _twice(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.n(m.n(x.sigmoid()).sigmoid()).sigmoid()
    return result


def _asked(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.n(x.sigmoid()).sigmoid() * m.n.momentum
    return result


def _in_code(m: Any, x: Tensor) -> Tensor:
    n = m.n
    return functional.batch_norm(
        x.sigmoid(), n.running_mean, n.running_var, n.weight, n.bias
    ).sigmoid()


STAYING = {"called twice": _twice, "asked for its momentum": _asked, "written in code": _in_code}


@pytest.mark.parametrize("run", STAYING.values(), ids=STAYING.keys())
def test_a_module_that_somebody_would_miss_stays(run: Callable[..., Any]) -> None:
    model, x = lively(made(run, n=nn.BatchNorm2d(4))), random(2, 4, 5, 3)
    result = of_kind(MODULE, model, x, leftover="depthwise")
    assert set(forms(result.report)) == {""}
    torch.testing.assert_close(result.model(x), model(x))


@pytest.mark.parametrize("kind", [MODULE, GRAPH])
def test_a_module_with_a_hook_stays(kind: str) -> None:
    model, x = fenced(nn.BatchNorm2d(4)), random(2, 4, 5, 3)
    graph: Any = fx.symbolic_trace(model) if kind == GRAPH else model
    graph.n.register_forward_hook(lambda _m, _a, y: y * 2)
    result = bnfold.fold(graph, (x,), leftover="depthwise")
    assert set(forms(result.report)) == {""}
    torch.testing.assert_close(result.model(x), graph(x))


@pytest.mark.parametrize("form", FORMS)
def test_in_training_mode_it_stays_as_it_is(form: str) -> None:
    model, x = fenced(nn.BatchNorm2d(4)).train(), random(2, 4, 5, 3)
    for kind in (MODULE, GRAPH):
        assert forms(of_kind(kind, model, x, leftover=form).report) == [""]


def _branches(m: Any, x: Tensor) -> Tensor:
    result: Tensor = torch.cond(
        x.sum() > 0, lambda x: m.n(x.sigmoid()).sigmoid(), lambda x: m.o(x.tanh()).tanh(), (x,)
    )
    return result


@pytest.mark.parametrize("form", FORMS)
def test_inside_a_branch(form: str) -> None:
    norms = {"n": nn.BatchNorm2d(4), "o": nn.BatchNorm2d(4)}
    model, x = lively(made(_branches, **norms)), random(2, 4, 5, 3)
    result = of_kind(PROGRAM, model, x, leftover=form)
    assert forms(result.report) == [form, form]
    for each in (x.abs(), -x.abs()):
        torch.testing.assert_close(called(result.model)(each), model(each))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", EDITED)
def test_a_step_that_is_what_the_model_returns(kind: str, form: str) -> None:
    model = lively(made(lambda m, x: (m.n(x), m.o(x)), n=nn.BatchNorm2d(4), o=nn.BatchNorm2d(4)))
    x = random(2, 4, 5, 3)
    result = of_kind(kind, model, x, leftover=form)
    assert forms(result.report) == [form, form]
    torch.testing.assert_close(called(result.model)(x), model(x))


# ---- the check ----


def net() -> nn.Module:
    """A fold, and two steps that stay, one of which takes over another."""
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Sigmoid(), nn.BatchNorm2d(8),
              nn.BatchNorm2d(8), nn.Sigmoid(), nn.BatchNorm2d(8), nn.Tanh())  # fmt: skip
    model: nn.Module = lively(
        made(lambda m, x: m.net(x), net=nn.Sequential(*layers)), positive=True
    )
    return model.float()


TRIED = [(MODULE, "depthwise"), (PROGRAM, "affine"), (DECOMPOSED, "depthwise"), (GRAPH, "affine")]


def pair(kind: str, form: str) -> tuple[Any, Any, dict[str, Any]]:
    """A model, its fold and what the check has to be told."""
    x = random(2, 3, 6, 6).float()
    model: Any = net()
    if kind == GRAPH:
        model = fx.symbolic_trace(model)
    elif kind != MODULE:
        model = exported(model, (x,))
        model = decomposed(model) if kind == DECOMPOSED else model
    if isinstance(model, ExportedProgram):
        return model, bnfold.fold(model, leftover=form), {}
    return model, bnfold.fold(model, (x,), leftover=form), {"example_inputs": x}


@pytest.mark.parametrize(("kind", "form"), TRIED)
def test_the_check_knows_such_a_fold_and_passes_it(kind: str, form: str) -> None:
    model, result, told = pair(kind, form)
    assert forms(result.report) == [form, form]
    check = bnfold.check(model, result.model, samples=2, **told)
    assert check.verdict is Verdict.PASS
    assert {"A", "B", "C"} <= {tier.tier for tier in check.tiers}


@pytest.mark.parametrize(("kind", "form"), TRIED)
def test_the_check_catches_one_channel_that_is_off(kind: str, form: str) -> None:
    model, result, told = pair(kind, form)
    shapes = {"affine": (8, 1, 1), "depthwise": (8, 1, 1, 1)}
    tensors = dict(named_tensors(result.model))
    name = [name for name, tensor in tensors.items() if tensor.shape == shapes[form]][-1]
    wrong = tensors[name].detach().clone()
    wrong[3] *= 1.001
    if isinstance(result.model, ExportedProgram):
        spoilt = rewrite_constants(result.model, {name: wrong})
    else:
        spoilt = copy.deepcopy(result.model)
        dict(named_tensors(spoilt))[name].data.copy_(wrong)
    check = bnfold.check(model, spoilt, samples=2, tiers="AB", **told)
    failing = {tier.tier for tier in check.tiers if tier.verdict is Verdict.FAIL}
    assert {"A", "B"} <= failing
