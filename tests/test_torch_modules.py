"""A folded nn.Module is the user's own module: nothing of it changes that has not to."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import bnfold
from bnfold.errors import InvalidModelError, UsageError
from tests import nets
from tests.torch_nets import (
    MODULE,
    TRACED,
    error,
    exported,
    folded,
    lively,
    made,
    one_thread,
    outputs,
    random,
    step,
    tensors_in,
    verdicts,
)

IMAGE = (2, 3, 6, 6)
CLOSE = 1e-9
CAPTURES = pytest.mark.parametrize("kind", [MODULE, TRACED])
single = pytest.fixture(autouse=True, scope="module")(one_thread)


def conv(inputs: int = 3, channels: int = 3, size: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, channels, size, **options)


def norm(channels: int = 3, **options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **options)


def layers() -> Any:
    """Conv, norm, rectifier, conv without a bias, norm."""
    return nn.Sequential(conv(3, 4, 3), norm(4), nn.ReLU(), conv(4, 4, 3, bias=False), norm(4))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.bn = norm()
        self.rate = 0.5

    def forward(self, x: Tensor) -> Any:
        return functional.relu(self.bn(self.conv(x)))

    def note(self) -> str:
        return f"rate {self.rate}"


class Model(nn.Module):
    """Of a user: hierarchy, methods, attributes, several inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: Any = nn.ModuleList([Stage(), Stage()])
        self.heads: Any = nn.ModuleDict({"main": conv(bias=False), "side": Stage()})
        self.norm: nn.Module = norm()
        self.labels = ["cat", "dog"]
        self.register_buffer("mean", torch.zeros(3))

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, scale: float = 1.0
    ) -> Mapping[str, Any]:
        for stage in self.stages:
            x = stage(x)
        if y is not None:
            x = x + self.heads["side"](y)
        return {"out": self.norm(self.heads["main"](x)) * scale, "aux": (x, None, 3)}

    def best(self, x: Tensor) -> str:
        return self.labels[int(self(x)["out"].mean((0, 2, 3)).argmax()) % 2]


def agree(model: Any, result: Any, *args: Any, **kwargs: Any) -> bool:
    with torch.no_grad():
        expected, given = (list(tensors_in(runs(*args, **kwargs))) for runs in (model, result))
    return error(expected, given) < CLOSE


# ---- the module that comes back ----


@CAPTURES
def test_the_users_class_comes_back_with_everything_it_has(kind: str) -> None:
    model = lively(Model())
    x = random(*IMAGE)
    result = folded(kind, model, [x]).model
    assert type(result) is Model
    assert agree(model, result, x)
    assert result.best(x) == model.best(x)
    assert result.stages[1].note() == "rate 0.5"
    assert isinstance(result.stages[0], Stage)
    assert isinstance(result.heads, nn.ModuleDict)
    assert [*dict(result.named_modules())] == [*dict(model.named_modules())]
    assert {*dict(result.named_parameters())} <= {*dict(model.named_parameters())} | {
        "heads.main.bias"
    }
    assert isinstance(result.norm, nn.Identity)
    assert isinstance(result.heads["main"].bias, nn.Parameter)
    assert not any(module.training for module in result.modules())


@pytest.mark.parametrize("inputs", ["x", "x y", "y by name", "all by name", "none"])
def test_other_inputs_and_outputs_than_one_tensor(inputs: str) -> None:
    model = lively(Model())
    x, y = random(*IMAGE), random(*IMAGE, seed=2)
    ways: dict[str, dict[str, Any]] = {
        "x": {"example_inputs": x},
        "x y": {"example_inputs": (x, y)},
        "y by name": {"example_inputs": [x], "example_kwargs": {"y": y, "scale": 2.0}},
        "all by name": {"example_kwargs": {"x": x, "y": y}},
        "none": {},
    }
    result = bnfold.fold(model, **ways[inputs])
    assert isinstance(result.model.stages[0].bn, nn.Identity)
    assert ("y" in inputs) == isinstance(result.model.heads["side"].bn, nn.Identity)
    assert agree(model, result.model, x)
    assert agree(model, result.model, x, y, scale=2.0)


def bits(model: nn.Module) -> dict[str, Any]:
    return {
        name: (t.detach().numpy().tobytes(), t.dtype, t.stride(), t.requires_grad, id(t))
        for name, t in model.state_dict(keep_vars=True).items()
    }


@CAPTURES
def test_the_given_module_is_left_as_it_is(kind: str) -> None:
    model = lively(Model())
    model.stages[0].train()
    x = random(*IMAGE)
    before, flags = bits(model), [module.training for module in model.modules()]
    printed = repr(model)
    generator = torch.get_rng_state()
    folded(kind, model, [x])
    bnfold.explain(model, (x,) if kind == MODULE else None)
    assert bits(model) == before
    assert [module.training for module in model.modules()] == flags
    assert repr(model) == printed
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(module._forward_hooks for module in model.modules())


@CAPTURES
def test_inplace_gives_back_the_very_object_folded(kind: str) -> None:
    model = lively(layers())
    x = random(*IMAGE)
    expected = outputs(model, [x])
    result = folded(kind, model, [x], inplace=True)
    assert result.model is model
    assert [type(layer) for layer in model] == [
        nn.Conv2d, nn.Identity, nn.ReLU, nn.Conv2d, nn.Identity,
    ]  # fmt: skip
    assert error(expected, outputs(model, [x])) < CLOSE


def test_a_state_dict_goes_into_another_fold_of_the_same_model() -> None:
    one, other = lively(layers()), lively(layers(), seed=1)
    x = random(*IMAGE)
    first, second = bnfold.fold(one).model, bnfold.fold(other).model
    assert not agree(first, second, x)
    second.load_state_dict(first.state_dict(), strict=True)
    assert agree(one, second, x)
    assert set(first.state_dict()) == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_a_gradient_is_asked_for_where_it_was_and_flags_stay() -> None:
    model = lively(layers())
    model[0].weight.requires_grad_(False)
    model[3].weight.requires_grad_(False)
    model[2].train()
    result = bnfold.fold(model).model
    assert {name: p.requires_grad for name, p in result.named_parameters()} == {
        "0.weight": False, "0.bias": True, "3.weight": False, "3.bias": False,
    }  # fmt: skip
    assert all(type(p) is nn.Parameter for p in result.parameters())
    assert [m.training for m in result.modules()] == [False, False, False, True, False, False]
    outputs_with_grad = result(random(*IMAGE))
    outputs_with_grad.sum().backward()
    assert result[0].bias.grad is not None


def test_channels_last_stays_channels_last() -> None:
    model = lively(layers()).to(memory_format=torch.channels_last)
    result = bnfold.fold(model).model
    for name in ("0.weight", "3.weight"):
        before, after = model.get_parameter(name), result.get_parameter(name)
        assert after.stride() == before.stride()
        assert after.is_contiguous(memory_format=torch.channels_last)


# ---- numbers ----


def exact(layer: nn.Conv2d, batch: nn.BatchNorm2d) -> tuple[Any, Any]:
    """What a fold comes to in float64, before it is rounded."""
    gamma, beta, mean, variance = (
        t.detach().double().numpy()
        for t in (batch.weight, batch.bias, batch.running_mean, batch.running_var)
        if t is not None
    )
    wide = layer.weight.dtype == torch.float64
    scale = gamma / np.sqrt(variance + (batch.eps if wide else float(np.float32(batch.eps))))
    bias = 0.0 if layer.bias is None else layer.bias.detach().double().numpy()
    weight = layer.weight.detach().double().numpy()
    return weight * scale[:, None, None, None], scale * bias + (beta - scale * mean)


def nearest(values: Any, dtype: torch.dtype) -> Any:
    """``values`` rounded once, to the even one of two that are as near."""
    if dtype == torch.bfloat16:
        return nets.rounded(values, ml_dtypes.bfloat16)
    return nets.rounded(values, {torch.float16: np.float16, torch.float32: np.float32,
                                 torch.float64: np.float64}[dtype])  # fmt: skip


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_weights_are_the_float64_fold_rounded_once(dtype: torch.dtype, with_bias: bool) -> None:
    model = lively(nn.Sequential(conv(8, 16, 3, bias=with_bias), norm(16)), positive=True)
    with torch.no_grad():
        model[1].weight[::3] *= -1
        model[1].weight[5] = 0
    model.to(dtype)
    weight, bias = exact(model[0], model[1])
    result = bnfold.fold(model).model
    assert type(result[1]) is nn.Identity
    for made_, expected in ((result[0].weight, weight), (result[0].bias, bias)):
        assert made_.dtype == dtype
        given = made_.detach().double().numpy()
        rounded = nearest(expected, dtype).astype(np.float64)
        if dtype == torch.float64:  # here an order of operations shows
            np.testing.assert_allclose(given, rounded, rtol=1e-14, atol=1e-15)
        else:
            np.testing.assert_array_equal(given, rounded)


def test_bfloat16_is_not_rounded_by_way_of_float32() -> None:
    # 1 + 2^-8 + 2^-30 is above the middle of two neighbours; in float32 it is the middle.
    model: Any = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0)).eval()
    gamma, variance = 1 + 2.0**-7, 1.0
    target = (1 + 2.0**-8 + 2.0**-30) / gamma
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bfloat16()
        model[1].double()
        model[1].weight.fill_(gamma)
        model[1].running_var.fill_(variance / target**2)
    result = bnfold.fold(
        made(lambda self, x: self.bn(self.conv(x).double()), conv=model[0], bn=model[1]).eval()
    )
    assert verdicts(result.report) == {"bn": "backward"}
    assert result.model.conv.weight.item() == 1 + 2.0**-7


def test_half_precision_conv_and_single_precision_norm_commit_in_the_weights_type() -> None:
    model = lively(
        made(lambda self, x: self.bn(self.conv(x.half()).float()), conv=conv(), bn=norm()),
        positive=True,
    ).float()
    model.conv.half()
    x = random(*IMAGE).float()
    result = bnfold.fold(model, x)
    assert verdicts(result.report) == {"bn": "backward"}
    assert result.model.conv.weight.dtype == result.model.conv.bias.dtype == torch.float16
    assert error(outputs(model, [x]), outputs(result.model, [x])) < 5e-3


def test_a_weight_that_leaves_half_precision_is_not_written() -> None:
    model: Any = nn.Sequential(conv(), norm(), nn.ReLU(), conv(), norm()).eval()
    with torch.no_grad():
        model[0].weight.fill_(300)
        model[1].running_var.fill_(1e-6)
    model.half()
    result = bnfold.fold(model)
    assert verdicts(result.report) == {"1": "BNF013", "4": "backward"}
    assert "channel 0" in step(result.report, "1").sentence
    assert all(p.isfinite().all() for p in result.model.parameters())
    assert torch.equal(result.model[0].weight, model[0].weight)


def test_a_dead_channel_in_half_precision_makes_no_nan() -> None:
    model: Any = nn.Sequential(conv(), norm(eps=1e-8)).eval()  # 1e-8 is 0 in half precision
    with torch.no_grad():
        model[1].running_var[1] = 0
        model[1].weight[1] = 1e-2
        model[0].weight[1] = 1e-2
    result = bnfold.fold(model.half())
    assert verdicts(result.report) == {"1": "backward"}
    assert all(p.isfinite().all() for p in result.model.parameters())


BAD_NUMBERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a negative variance": (lambda m: m[1].running_var.fill_(-1), "running variance of channel 0"),
    "no number": (lambda m: m[1].running_var.fill_(torch.nan), "running variance of channel 0"),
}


@pytest.mark.parametrize(("spoil", "words"), BAD_NUMBERS.values(), ids=BAD_NUMBERS.keys())
def test_statistics_that_mean_nothing_are_named(spoil: Callable[[Any], Any], words: str) -> None:
    model = lively(layers())
    spoil(model)
    with pytest.raises(InvalidModelError, match=f"'1'.*{words}"):
        bnfold.fold(model)


# ---- meta and Lazy ----


@CAPTURES
def test_a_module_on_meta_stays_with_a_reason(kind: str) -> None:
    model = layers().eval().to("meta")
    result = folded(kind, model, [torch.empty(IMAGE, device="meta")])
    assert {*verdicts(result.report)} == {"1", "4"}
    assert all(found.verdict == "kept" for found in result.report.steps)
    assert type(result.model[1]) is nn.BatchNorm2d


def test_what_is_not_on_meta_folds() -> None:
    model: Any = nn.Sequential(conv(), norm(), nn.ReLU(), conv(), norm()).eval()
    model[4].to("meta")
    report = bnfold.fold(model).report
    assert step(report, "1").how == "backward"
    assert step(report, "4").verdict == "kept"
    assert step(report, "4").code == "BNF002"


@CAPTURES
def test_a_lazy_module_that_has_seen_no_input_stays_and_the_others_fold(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules are a new feature", UserWarning)
        model = nn.Sequential(nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d(), conv(), norm()).eval()
    result = folded(kind, model, [torch.zeros(IMAGE)])
    assert verdicts(result.report)["3"] == "backward"
    assert verdicts(result.report).get("1", "BNF025") == "BNF025"


@CAPTURES
def test_a_lazy_module_that_has_seen_an_input_folds(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules are a new feature", UserWarning)
        model = nn.Sequential(nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d())
    model(torch.zeros(IMAGE))
    x = random(*IMAGE)
    result = folded(kind, lively(model), [x])
    assert verdicts(result.report) == {"1": "backward"}
    assert agree(model, result.model, x)


# ---- training mode ----


@CAPTURES
def test_a_norm_in_training_mode_stays_among_others_that_fold(kind: str) -> None:
    model = lively(nn.Sequential(conv(), norm(), nn.ReLU(), conv(), norm(), conv(), norm()))
    model[4].train()
    x = random(*IMAGE)
    before = model[4].running_mean.clone()
    result = folded(kind, model, [x])
    assert verdicts(result.report) == {"1": "backward", "4": "BNF001", "6": "backward"}
    assert torch.equal(model[4].running_mean, before)
    assert result.model[4].training
    assert agree(copy.deepcopy(model), result.model, x)
    assert torch.equal(result.model[4].num_batches_tracked, model[4].num_batches_tracked + 1)


# ---- hooks ----


def see(module: nn.Module, *args: Any) -> None:
    module.seen = True  # type: ignore[assignment]


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda module: module.register_forward_hook(see),
    "pre": lambda module: module.register_forward_pre_hook(see),
    "backward": lambda module: module.register_full_backward_hook(see),
    "that changes": lambda module: module.register_forward_hook(lambda m, a, y: y * 2),
    "that changes before": lambda module: module.register_forward_pre_hook(
        lambda m, a: (a[0] * 2,)
    ),
}


@CAPTURES
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
@pytest.mark.parametrize(("place", "stays"), [(0, True), (1, True), (2, False), (None, False)])
def test_a_hook_sees_what_it_saw(
    place: int | None, stays: bool, hook: Callable[[nn.Module], Any], kind: str
) -> None:
    model = lively(layers())
    hook(model if place is None else model[place])
    x = random(*IMAGE)
    result = folded(kind, model, [x])
    found = step(result.report, "1")
    # On the conv's other side stands the ReLU, which is as good a reason.
    assert found.code in ("BNF021", "BNF017") if stays else found.verdict == "folded"
    assert step(result.report, "4").verdict == "folded"
    assert agree(model, result.model, x)


def test_hooks_that_are_not_involved_still_fire() -> None:
    model = lively(Model())
    seen: list[str] = []
    model.heads.register_forward_hook(lambda *_: None)
    model.register_forward_hook(lambda *_: seen.append("model"))
    model.stages[1].register_forward_pre_hook(lambda *_: seen.append("stage"))
    result = bnfold.fold(model, random(*IMAGE)).model
    seen.clear()
    result(random(*IMAGE))
    assert seen == ["stage", "model"]


@pytest.fixture
def everywhere(request: pytest.FixtureRequest) -> Iterator[None]:
    registered = request.param()
    yield
    registered.remove()


GLOBAL_HOOKS: dict[str, Callable[[], Any]] = {
    "sees": lambda: torch_module.register_module_forward_hook(lambda m, a, y: None),
    "changes": lambda: torch_module.register_module_forward_hook(lambda m, a, y: y * 2),
    "changes before": lambda: torch_module.register_module_forward_pre_hook(
        lambda m, a: (a[0] * 2,)  # type: ignore[arg-type]
    ),
}


@CAPTURES
@pytest.mark.parametrize(
    "everywhere", GLOBAL_HOOKS.values(), ids=GLOBAL_HOOKS.keys(), indirect=True
)
@pytest.mark.usefixtures("everywhere")
def test_a_hook_on_all_modules_sees_what_it_saw(kind: str) -> None:
    model = lively(layers())
    x = random(*IMAGE)
    expected = outputs(model, [x])
    result = folded(kind, model, [x])
    assert error(expected, outputs(result.model, [x])) < CLOSE


# ---- computed parameters ----


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "weight_norm of old": lambda m: weight_norm(m[0]),
    "weight_norm": lambda m: parametrizations.weight_norm(m[0]),
    "spectral_norm of old": lambda m: spectral_norm(m[0]),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m[0]),
    "orthogonal": lambda m: parametrizations.orthogonal(m[0]),
    "prune": lambda m: prune.l1_unstructured(m[0], "weight", 0.5),  # type: ignore[no-untyped-call]
    "prune of a norm": lambda m: prune.l1_unstructured(m[1], "weight", 0.5),  # type: ignore[no-untyped-call]
    "parametrize": lambda m: parametrize.register_parametrization(m[0], "weight", Doubled()),
    "parametrize of a norm": lambda m: parametrize.register_parametrization(
        m[1], "weight", Doubled()
    ),
    "parametrize of a bias": lambda m: parametrize.register_parametrization(
        m[0], "bias", Doubled()
    ),
}


@CAPTURES
@pytest.mark.filterwarnings("ignore:.*(weight|spectral)_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED.keys())
def test_a_computed_parameter_folds_as_its_value_or_stays(
    compute: Callable[[Any], Any], kind: str
) -> None:
    model = layers()
    compute(model)
    lively(model)
    x = random(*IMAGE)
    expected = outputs(model, [x])
    names = [*model.state_dict()]
    result = folded(kind, model, [x])
    assert step(result.report, "4").verdict == "folded"
    assert error(expected, outputs(result.model, [x])) < CLOSE
    # Of the given one nothing was taken off.
    assert [*model.state_dict()] == names
    assert error(expected, outputs(model, [x])) == 0


@CAPTURES
def test_a_computed_weight_is_an_ordinary_parameter_once_it_is_folded(kind: str) -> None:
    model = layers()
    parametrizations.weight_norm(model[0])
    x = random(*IMAGE)
    result = folded(kind, lively(model), [x]).model
    assert type(result[1]) is nn.Identity
    assert isinstance(result[0]._parameters["weight"], nn.Parameter)
    assert not parametrize.is_parametrized(result[0])
    assert parametrize.is_parametrized(model[0])


# ---- norms that do more, and modules around norms ----


class BatchNormAct(nn.BatchNorm2d):
    """As timm has it."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Any:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")  # type: ignore[no-untyped-call]
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        x = functional.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight, self.bias, by_batch, factor, self.eps,
        )  # fmt: skip
        return self.act(self.drop(x))


@CAPTURES
@pytest.mark.parametrize(
    "act",
    [nn.ReLU(inplace=True), nn.SiLU(), nn.Hardswish(inplace=True), nn.Identity(), nn.GELU()],
    ids=lambda act: type(act).__name__,
)
def test_a_norm_with_an_activation_becomes_the_activation(act: nn.Module, kind: str) -> None:
    model = lively(nn.Sequential(conv(3, 4, 3), BatchNormAct(4, act), conv(4, 2)))
    x = random(*IMAGE)
    result = folded(kind, model, [x])
    assert verdicts(result.report) == {"1": "backward"}
    assert type(result.model[1]) is type(act)
    assert agree(model, result.model, x)


class Times2(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * 2 + 1


class Averaged(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).mean((2, 3))


class InTuple(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x),)


class InDict(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Any:
        return {"y": super().forward(x)}


@CAPTURES
@pytest.mark.parametrize("norm_class", [Times2, Averaged, InTuple, InDict])
def test_a_norm_with_a_forward_of_its_own_says_what_it_said(norm_class: Any, kind: str) -> None:
    model = lively(nn.Sequential(conv(3, 4, 3), norm_class(4)))
    x = random(*IMAGE)
    result = folded(kind, model, [x]).model
    assert agree(model, result, x)
    with torch.no_grad():
        assert type(result(x)) is type(model(x))


class Wrapped(nn.Module):
    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.bn = norm(4)
        self.give = give

    def forward(self, x: Tensor) -> Any:
        return self.give(self.bn(x), x)


GIVEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a tuple": lambda y, x: (y,),
    "a list": lambda y, x: [y],
    "a dict": lambda y, x: {"y": y},
    "it twice": lambda y, x: (y, y),
    "its input, too": lambda y, x: (y, x),
    "and nothing": lambda y, x: (y, None),
}


@CAPTURES
@pytest.mark.parametrize("give", GIVEN.values(), ids=GIVEN.keys())
def test_a_module_that_gives_no_tensor_is_no_identity(
    give: Callable[[Tensor, Tensor], Any], kind: str
) -> None:
    model = lively(nn.Sequential(conv(3, 4, 3), Wrapped(give)))
    x = random(*IMAGE)
    result = folded(kind, model, [x]).model
    assert type(result[1]) is Wrapped
    assert agree(model, result, x)
    with torch.no_grad():
        assert type(result(x)) is type(model(x))


# ---- convolutions with a forward of their own ----


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Any:
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True)
        weight = (self.weight - mean) / (variance + 1e-5).sqrt()
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class Same(nn.Conv2d):
    """As timm has it."""

    def forward(self, x: Tensor) -> Any:
        pads: list[int] = []
        for axis in (-1, -2):
            size, kernel, stride = x.size(axis), self.weight.size(axis), self.stride[axis]
            pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [pad // 2, pad - pad // 2]
        x = functional.pad(x, pads)
        return functional.conv2d(x, self.weight, self.bias, self.stride)


class WithoutBias(nn.Conv2d):
    def forward(self, x: Tensor) -> Any:
        return functional.conv2d(x, self.weight, None, self.stride, self.padding)


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Any:
        return super().forward(super().forward(x))


@CAPTURES
@pytest.mark.parametrize("first", ["conv", "norm"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("conv_class", [Standardised, Same, WithoutBias, Twice])
def test_a_conv_with_a_forward_of_its_own_says_what_it_said(
    conv_class: Any, with_bias: bool, first: str, kind: str
) -> None:
    stride = 1 if conv_class is Twice else 2
    layer = conv_class(3, 3, 3, stride=stride, bias=with_bias)
    model = lively(nn.Sequential(*((layer, norm()) if first == "conv" else (norm(), layer))))
    x = random(2, 3, 7, 7)
    assert agree(model, folded(kind, model, [x]).model, x)


def replaced(place: int, forward: Callable[[Any, Tensor], Any]) -> Any:
    model: Any = nn.Sequential(conv(), norm())
    module = model[place]
    module.forward = lambda x: forward(module, x)
    return model


REPLACED: dict[str, Callable[[], Any]] = {
    "of a conv": lambda: replaced(0, lambda m, x: functional.conv2d(x, m.weight) * 2),
    "of a norm": lambda: replaced(1, lambda m, x: x * 2),
    "of a norm, that calls it": lambda: replaced(1, lambda m, x: type(m).forward(m, x) + 1),
}


@CAPTURES
@pytest.mark.parametrize("build", REPLACED.values(), ids=REPLACED.keys())
def test_a_forward_that_was_replaced_on_the_instance_counts(
    build: Callable[[], Any], kind: str
) -> None:
    model = lively(build())
    x = random(*IMAGE)
    assert agree(model, folded(kind, model, [x]).model, x)


# ---- code that looks at what a fold changes ----


def asks_for_the_bias(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    return self.bn(y if self.conv.bias is None else y * 2)


LOOKS: dict[str, Callable[..., Any]] = {
    "whether there is a bias": asks_for_the_bias,
    "how many channels a norm has": lambda self, x: self.bn(self.conv(x)).view(
        -1, self.bn.num_features, 36
    ),
    "the type of a norm": lambda self, x: self.bn(self.conv(x.to(self.bn.weight.dtype))),
    "the gamma of a norm": lambda self, x: self.bn(self.conv(x)) * self.bn.weight.reshape(-1, 1, 1),
    "the weight itself": lambda self, x: self.bn(
        functional.conv2d(x, self.conv.weight, self.conv.bias)
    ),
    "the weight's size": lambda self, x: self.bn(self.conv(x)) / self.conv.weight.shape[0],
}


@CAPTURES
@pytest.mark.parametrize("run", LOOKS.values(), ids=LOOKS.keys())
def test_code_that_looks_at_a_layer_finds_what_it_looks_for(
    run: Callable[..., Any], kind: str
) -> None:
    model = lively(made(run, conv=conv(bias=False), bn=norm()))
    x = random(*IMAGE)
    assert agree(model, folded(kind, model, [x]).model, x)


def peeked(module: Any, x: Tensor) -> Any:
    y = module.part[0](x)
    if y.sum() > 0:
        y = y + 1
    return module.part[1](y) + module.part(x)


TAKEN: dict[str, Callable[..., Any]] = {
    "by a function": lambda self, x: peeked(self, x),
    "by its own code": peeked,
    "through another name": lambda self, x: (lambda module: peeked(module, x))(self),
}


@pytest.mark.parametrize(
    "run",
    [
        TAKEN["by a function"],
        TAKEN["through another name"],
        TAKEN["by its own code"],
    ],
    ids=["by a function", "through another name", "by its own code"],
)  # fmt: skip
def test_a_part_that_is_taken_apart_is_left_alone(run: Callable[..., Any]) -> None:
    model = lively(made(run, part=nn.Sequential(conv(), norm())))
    x = random(*IMAGE)
    assert agree(model, bnfold.fold(model).model, x)


# ---- what can't be captured ----


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(conv(), norm())
        self.last = nn.Sequential(conv(), norm())
        self.bn = norm()

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        if x.sum() > 0:
            x = self.bn(x)
        return self.last(x)


@CAPTURES
def test_around_a_branch_on_data_the_parts_fold(kind: str) -> None:
    model = lively(Branches())
    result = folded(kind, model, [random(*IMAGE)])
    found = verdicts(result.report)
    assert (found["first.1"], found["last.1"]) == ("backward", "backward")
    assert step(result.report, "bn").verdict == "kept"
    for seed in range(4):
        x = random(*IMAGE, seed=seed)
        assert agree(model, result.model, x)


@CAPTURES
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_part_is_left_alone_and_the_others_fold(kind: str) -> None:
    scripted = torch.jit.script(lively(layers()))
    model = nn.Sequential(scripted, *lively(nn.Sequential(conv(4, 4), norm(4))))
    x = random(*IMAGE)
    result = folded(kind, model, [x])
    assert verdicts(result.report)["2"] == "backward"
    assert agree(model, result.model, x)


# ---- sharing ----


def test_two_parameters_on_one_storage_are_one_weight() -> None:
    def tied() -> Any:
        model = lively(nn.Sequential(conv(), norm(), nn.Hardswish(), conv(), norm()), positive=True)
        model[3].weight = nn.Parameter(model[0].weight.detach().view(3, 3, 1, 1))
        return model

    model, x = tied(), random(*IMAGE)
    expected = outputs(model, [x])
    assert model[0].weight.data_ptr() == model[3].weight.data_ptr()
    for inplace in (False, True):
        result = bnfold.fold(tied(), x, inplace=inplace)
        assert error(expected, outputs(result.model, [x])) < CLOSE


@CAPTURES
def test_a_block_that_is_called_twice_folds_where_all_calls_agree(kind: str) -> None:
    block = nn.Sequential(conv(), norm())
    model = lively(nn.Sequential(block, nn.Hardswish(), block), positive=True)
    x = random(*IMAGE)
    result = folded(kind, model, [x])
    assert {*verdicts(result.report).values()} == {"backward"}
    assert result.model[0] is result.model[2]
    assert type(result.model[0][1]) is nn.Identity
    assert agree(model, result.model, x)


class Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), norm()
        self.again, self.same = self.conv, self.bn

    def forward(self, x: Tensor) -> Any:
        return self.same(self.again(x))


@CAPTURES
def test_both_names_of_a_layer_see_the_fold(kind: str) -> None:
    model = lively(Aliased())
    x = random(*IMAGE)
    result = folded(kind, model, [x])
    assert [*verdicts(result.report).values()] == ["backward"]
    assert result.model.conv is result.model.again
    assert result.model.bn is result.model.same
    assert type(result.model.bn) is nn.Identity
    assert agree(model, result.model, x)


class Elsewhere(nn.Module):
    """Its layers are called from somewhere that is no part of the module tree."""

    def __init__(self, hold: Callable[[nn.Module, nn.Module], Any]) -> None:
        super().__init__()
        self.conv, self.bn = conv(), norm()
        self.steps = hold(self.conv, self.bn)

    def forward(self, x: Tensor) -> Any:
        return self.steps["bn"](self.steps["conv"](x))


class Indexed:
    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        self.layers = first, last

    def __getitem__(self, name: str) -> nn.Module:
        return self.layers[name == "bn"]


HELD: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "a dict": lambda first, last: {"conv": first, "bn": last},
    "an object": Indexed,
}


@CAPTURES
@pytest.mark.parametrize("hold", HELD.values(), ids=HELD.keys())
def test_a_layer_that_is_held_outside_of_the_tree_is_folded_there_too(
    hold: Callable[[nn.Module, nn.Module], Any], kind: str
) -> None:
    model = lively(Elsewhere(hold))
    x = random(*IMAGE)
    assert agree(model, folded(kind, model, [x]).model, x)


def asks_for_the_class(self: Any, x: Tensor) -> Any:
    for layer in self.layers:
        x = layer(x)
        if isinstance(layer, nn.BatchNorm2d):
            x = x * 2
    return x


@CAPTURES
def test_code_that_asks_for_the_class_of_a_layer_finds_it(kind: str) -> None:
    model = lively(made(asks_for_the_class, layers=nn.ModuleList([conv(), norm()])))
    x = random(*IMAGE)
    assert agree(model, folded(kind, model, [x]).model, x)


def test_a_weight_in_a_list_of_parameters_folds() -> None:
    model = lively(
        made(
            lambda self, x: self.bn(functional.conv2d(x, self.held[0], self.held[1])),
            held=nn.ParameterList([torch.ones(3, 3, 1, 1), torch.ones(3)]),
            bn=norm(),
        )
    )
    x = random(*IMAGE)
    result = bnfold.fold(model, x)
    assert verdicts(result.report) == {"bn": "backward"}
    assert agree(model, result.model, x)


# ---- contexts, wrappers, layers of torch that are not ours ----


def without_gradients(self: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = self.conv(x)
    return self.bn(y)


@CAPTURES
def test_no_grad_inside_a_forward_is_looked_into(kind: str) -> None:
    model = lively(made(without_gradients, conv=conv(), bn=norm()))
    x = random(*IMAGE)
    result = folded(kind, model, [x])
    assert verdicts(result.report) == {"bn": "backward"}
    assert agree(model, result.model, x)


def cast_by_torch(self: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = self.conv(x)
    return self.bn(y.float())


@CAPTURES
def test_autocast_inside_a_forward_folds_into_weights_of_their_type(kind: str) -> None:
    model = lively(made(cast_by_torch, conv=conv(), bn=norm())).float()
    x = random(*IMAGE).float()
    result = folded(kind, model, [x])
    assert result.model.conv.weight.dtype == torch.float32
    assert error(outputs(model, [x]), outputs(result.model, [x])) < 0.05


class Passing(nn.Module):
    """As wrappers for parallel training have it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@CAPTURES
@pytest.mark.parametrize("wrapper", [Passing, nn.DataParallel])
def test_a_wrapper_stays_around_what_is_folded(wrapper: Any, kind: str) -> None:
    model = wrapper(lively(layers()))
    x = random(*IMAGE)
    result = folded(kind, model, [x])
    assert verdicts(result.report) == {"module.1": "backward", "module.4": "backward"}
    assert type(result.model) is wrapper
    assert agree(model, result.model, x)


OF_TORCH: dict[str, Callable[[], nn.Module]] = {
    "TransformerEncoderLayer": lambda: made(
        lambda self, x: self.bn(self.inner(x).transpose(1, 2)),
        inner=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), bn=nn.BatchNorm1d(4),
    ),
    "MultiheadAttention": lambda: made(
        lambda self, x: self.bn(self.inner(self.fc(x), x, x)[0].transpose(1, 2)),
        fc=nn.Linear(4, 4), inner=nn.MultiheadAttention(4, 2, batch_first=True),
        bn=nn.BatchNorm1d(4),
    ),
    "LSTM": lambda: made(
        lambda self, x: self.bn(self.inner(x)[0].transpose(1, 2)), inner=nn.LSTM(4, 4),
        bn=nn.BatchNorm1d(4),
    ),
    "Bilinear": lambda: made(
        lambda self, x: self.bn(self.inner(x, x).transpose(1, 2)), inner=nn.Bilinear(4, 4, 4),
        bn=nn.BatchNorm1d(4),
    ),
}  # fmt: skip


@CAPTURES
@pytest.mark.parametrize("build", OF_TORCH.values(), ids=OF_TORCH.keys())
def test_layers_of_torch_that_hold_weights_their_own_way(
    build: Callable[[], nn.Module], kind: str
) -> None:
    model = lively(build())
    x = random(2, 5, 4)
    assert agree(model, folded(kind, model, [x]).model, x)


# ---- copies ----


class Caching(Stage):
    """Keeps a tensor that was computed from a parameter, which torch refuses to copy."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = self.conv.weight * 2


def test_a_computed_tensor_in_an_attribute_does_not_stop_the_copy() -> None:
    model = Caching().eval()
    result = bnfold.fold(model, torch.zeros(IMAGE)).model
    assert type(result.bn) is nn.Identity
    assert torch.equal(result.cache, model.cache)
    assert not result.cache.requires_grad or result.cache is not model.cache


# ---- what is no module that can be folded ----


def test_a_compiled_model_is_refused_in_one_line() -> None:
    model = torch.compile(layers().eval(), backend="eager")
    for run in (bnfold.fold, bnfold.explain):
        with pytest.raises(UsageError, match=r"torch\.compile"):
            run(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_model_is_refused_in_one_line() -> None:
    model = layers().eval()
    for made_ in (torch.jit.script(model), torch.jit.trace(model, torch.zeros(IMAGE))):  # type: ignore[no-untyped-call]
        for run in (bnfold.fold, bnfold.explain):
            with pytest.raises(UsageError, match="ScriptModule"):
                run(made_)


def test_options_of_other_kinds_are_refused() -> None:
    program = exported(layers().eval(), [torch.zeros(IMAGE)])
    with pytest.raises(UsageError, match="in place"):
        bnfold.fold(program, inplace=True)
    given: list[dict[str, Any]] = [
        {"example_inputs": torch.zeros(1)}, {"inplace": True}, {"example_kwargs": {}},
    ]  # fmt: skip
    for options in given:
        with pytest.raises(UsageError, match="for torch models"):
            bnfold.fold(onnx.ModelProto(), **options)
    with pytest.raises(UsageError, match="level"):
        bnfold.fold(layers(), level="most")
    with pytest.raises(UsageError, match="horizontal is for ONNX models"):
        bnfold.fold(layers(), horizontal=True)


class Slotted(nn.BatchNorm2d):
    """A class that nothing else can become, nor become something else."""

    __slots__ = ("mark",)


@pytest.mark.parametrize("inputs", [(torch.ones(2, 3, 8, 8, dtype=torch.float64),), None])
def test_a_norm_of_a_class_with_slots_is_replaced_in_the_tree(inputs: Any) -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), Slotted(4), nn.ReLU()))
    result = bnfold.fold(model, inputs)
    assert len(result.report.folded) == 1
    assert isinstance(result.model[1], nn.Identity)
    data = torch.linspace(-1, 1, 2 * 3 * 64, dtype=torch.float64).reshape(2, 3, 8, 8)
    torch.testing.assert_close(result.model(data), model(data), rtol=1e-12, atol=1e-12)


def changing_copies(self: Any, x: torch.Tensor) -> Any:
    """A weight and a scale that are changed in place before they are read."""
    weight, scale = self.w.clone(), self.k.clone()
    weight.mul_(2)
    scale.view(-1).add_(1)
    return self.n(nn.functional.linear(x, weight) * scale)


@pytest.mark.parametrize("program", [True, False])
def test_a_constant_that_is_changed_in_place_is_none(program: bool) -> None:
    model = lively(made(changing_copies, w=torch.randn(5, 4), k=torch.rand(5), n=nn.BatchNorm1d(5)))
    data = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
    given = torch.export.export(model, (data,), strict=False) if program else model
    result = bnfold.fold(given) if program else bnfold.fold(given, data)
    folded = result.model.module() if program else result.model
    torch.testing.assert_close(folded(data), model(data), rtol=1e-12, atol=1e-12)
