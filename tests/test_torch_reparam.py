"""Computed parameters become ordinary ones of the same value; hooks of other kinds are named."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from bnfold.torch_reparam import copied, foreign_hooks, materialise, owned, reparametrised


def own_copy(module: nn.Module) -> nn.Module:
    """A copy that shares no tensor with the module."""
    other, lent = copied(module)
    owned(other, lent)
    assert not {id(t) for t in other.parameters()} & {id(t) for t in module.parameters()}
    return other


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*weight_norm.* is deprecated", FutureWarning)
        torch.nn.utils.weight_norm(layer, "weight")


def old_spectral_norm(layer: nn.Module) -> None:
    spectral_norm(layer, "weight", n_power_iterations=3)


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.4)  # type: ignore[no-untyped-call]


def pruned_twice(layer: nn.Module) -> None:
    pruned(layer)
    prune.random_structured(layer, "weight", 0.5, dim=0)  # type: ignore[no-untyped-call]


def new_weight_norm(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)


def new_spectral_norm(layer: nn.Module) -> None:
    parametrizations.spectral_norm(layer)


def orthogonal(layer: nn.Module) -> None:
    parametrizations.orthogonal(layer)


def custom(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Half())
    parametrize.register_parametrization(layer, "weight", Half())


WAYS: list[tuple[Callable[[nn.Module], None], str]] = [
    (old_weight_norm, "weight_norm"),
    (old_spectral_norm, "spectral_norm"),
    (pruned, "prune"),
    (pruned_twice, "prune"),
    (new_weight_norm, "parametrize"),
    (new_spectral_norm, "parametrize"),
    (orthogonal, "parametrize"),
    (custom, "parametrize"),
]
CHANGING = (old_spectral_norm, new_spectral_norm, custom)
NAMES = [way.__name__ for way, _ in WAYS]


def conv() -> nn.Conv2d:
    layer = nn.Conv2d(6, 4, 3).eval()
    with torch.no_grad():
        layer.weight[1] *= -1e-6
        layer.weight[2, 0] = 0
    return layer


def input_of_conv() -> Tensor:
    return torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("way", "kind"), WAYS, ids=NAMES)
def test_a_computed_weight_becomes_a_parameter_of_the_same_value(
    way: Callable[[nn.Module], None], kind: str
) -> None:
    layer = conv()
    way(layer)
    layer.eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            # What the hooks left behind is out of date now.
            parameter.mul_(1.25).add_(0.01)
        expected = own_copy(layer)(input_of_conv())
    assert reparametrised(layer) == {"weight": kind}
    assert materialise(layer, "weight")
    assert reparametrised(layer) == {}
    assert type(layer) is nn.Conv2d
    assert {*dict(layer.named_parameters())} == {"weight", "bias"}
    assert not dict(layer.named_buffers())
    assert {*layer.state_dict()} == {"weight", "bias"}
    assert layer.weight.requires_grad and layer.weight.is_leaf
    with torch.no_grad():
        assert torch.equal(layer(input_of_conv()), expected)
        # Nobody computes it anew.
        layer.weight.zero_()
        assert torch.equal(layer(input_of_conv())[0, :, 0, 0], layer.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize(("way", "kind"), WAYS, ids=NAMES)
def test_a_frozen_weight_stays_frozen(way: Callable[[nn.Module], None], kind: str) -> None:
    layer = conv()
    way(layer)
    layer.eval().requires_grad_(False)
    assert materialise(layer, "weight")
    assert not layer.weight.requires_grad


@pytest.mark.parametrize(("way", "kind"), WAYS, ids=NAMES)
def test_a_copy_is_materialised_without_the_original(
    way: Callable[[nn.Module], None], kind: str
) -> None:
    layer = conv()
    way(layer)
    layer.eval()
    other = own_copy(layer)
    with torch.no_grad():
        expected = layer(input_of_conv())
        assert materialise(other, "weight")
        assert reparametrised(layer) == {"weight": kind}
        assert torch.equal(layer(input_of_conv()), expected)
        assert torch.equal(other(input_of_conv()), expected)


@pytest.mark.parametrize(("way", "kind"), WAYS, ids=NAMES)
def test_a_value_that_each_call_changes_is_not_materialised(
    way: Callable[[nn.Module], None], kind: str
) -> None:
    layer = conv()
    way(layer)
    layer.train()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert materialise(layer, "weight") is (way not in CHANGING)
    if way in CHANGING:
        assert reparametrised(layer) == {"weight": kind}
        assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())


@pytest.mark.parametrize("way", [pruned, custom, new_weight_norm], ids=lambda way: way.__name__)
def test_what_a_weight_was_computed_from_is_left_to_others(
    way: Callable[[nn.Module], None],
) -> None:
    layer, other = conv(), conv()
    way(layer)
    sources = [*layer.parameters()]
    other.register_parameter("tied", sources[-1])
    before = sources[-1].detach().clone()
    assert materialise(layer, "weight")
    assert torch.equal(other.tied, before)  # type: ignore[arg-type]


def test_a_pruned_part_of_a_weight_norm_goes_with_it() -> None:
    layer = nn.Conv2d(6, 4, 3)  # a channel that is pruned whole would be 0/0
    old_weight_norm(layer)
    prune.l1_unstructured(layer, "weight_v", 0.4)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        layer(input_of_conv())
        expected = layer(input_of_conv())
    assert reparametrised(layer) == {"weight": "weight_norm", "weight_v": "prune"}
    assert materialise(layer, "weight")
    assert reparametrised(layer) == {}
    assert {*layer.state_dict()} == {"weight", "bias"}
    with torch.no_grad():
        assert torch.equal(layer(input_of_conv()), expected)


def test_one_of_two_attributes_is_materialised() -> None:
    layer = conv()
    custom(layer)
    parametrize.register_parametrization(layer, "bias", Half())
    layer.eval()
    expected = layer(input_of_conv())
    assert materialise(layer, "bias")
    assert reparametrised(layer) == {"weight": "parametrize"}
    assert torch.equal(layer(input_of_conv()), expected)
    assert materialise(layer, "weight")
    assert type(layer) is nn.Conv2d


def test_a_computed_buffer_becomes_a_buffer() -> None:
    norm = nn.BatchNorm2d(3).eval()
    assert norm.running_var is not None
    norm.running_var.uniform_(0.5, 2)
    parametrize.register_parametrization(norm, "running_var", Half())
    norm.eval()
    expected = norm.running_var.clone()
    assert materialise(norm, "running_var")
    assert "running_var" in dict(norm.named_buffers())
    assert torch.equal(norm.running_var, expected)


def test_an_ordinary_parameter_is_left_alone() -> None:
    layer = conv()
    weight = layer.weight
    assert reparametrised(layer) == {}
    assert not materialise(layer, "weight")
    assert not materialise(layer, "nothing")
    assert layer.weight is weight


def test_hooks_that_compute_a_parameter_are_not_foreign() -> None:
    for way, _ in WAYS:
        layer = conv()
        way(layer)
        assert foreign_hooks(layer) == ()


def test_each_kind_of_hook_is_named() -> None:
    def hook(*_: object) -> None: ...

    for register, kind in [
        ("register_forward_pre_hook", "forward pre-hook"),
        ("register_forward_hook", "forward hook"),
        ("register_full_backward_pre_hook", "backward pre-hook"),
        ("register_full_backward_hook", "backward hook"),
    ]:
        layer = conv()
        handle = getattr(layer, register)(hook)
        assert foreign_hooks(layer) == (kind,)
        handle.remove()
        assert foreign_hooks(layer) == ()


def test_a_foreign_hook_is_seen_beside_one_that_computes() -> None:
    layer = conv()
    pruned(layer)
    layer.register_forward_pre_hook(lambda *_: None)
    assert foreign_hooks(layer) == ("forward pre-hook",)
    assert reparametrised(layer) == {"weight": "prune"}


def test_a_copy_holds_tensors_of_its_own_where_torch_refuses_to_copy() -> None:
    layer = conv()
    old_weight_norm(layer)
    layer(input_of_conv())
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(layer)
    other = own_copy(layer)
    assert torch.equal(other(input_of_conv()), layer(input_of_conv()))
    mine, theirs = ({t.data_ptr() for t in m.parameters()} for m in (layer, other))
    assert mine.isdisjoint(theirs)
