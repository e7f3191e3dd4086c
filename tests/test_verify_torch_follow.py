"""What tier B follows through buffers, masks, lists and what is written in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfold
from bnfold.verify.judge import Verdict
from bnfold.verify.torch_compare import distance
from bnfold.verify.torch_sites import torch_sites
from tests.torch_nets import made, one_thread
from tests.verify_torch_nets import block, checked, feeds, subject


@pytest.fixture(scope="module", autouse=True)
def single() -> Iterator[None]:
    yield from one_thread()


def verdict(reference: Any, candidate: Any, example: Any) -> Verdict:
    return checked(reference, candidate, example, ours=False).tier.verdict


# ---- written to ----


def in_parts(self: Any, x: Tensor) -> Any:
    """A buffer that depends on no input until it is written to, through views."""
    y = self.one(x)
    whole = torch.zeros(y.shape, dtype=y.dtype)
    whole[:, :4] = y[:, :4]
    whole[:, 4:] = torch.relu(y[:, 4:])
    return self.other(whole)


@pytest.mark.parametrize("units", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_through_a_view_is_followed(dtype: torch.dtype, units: float) -> None:
    conv, norm, _, other, after, *_ = block(dtype=dtype)[0]
    example = block(dtype=dtype)[1]
    net = made(in_parts, one=nn.Sequential(conv, norm), other=nn.Sequential(other, after)).eval()

    def folded(spoil: float) -> nn.Module:
        one = bnfold.fold(nn.Sequential(conv, norm), example).model[0]
        two = bnfold.fold(nn.Sequential(other, after), net.get_submodule("one")(example)).model[0]
        one.weight.data *= units
        one.bias.data *= units
        two.weight.data *= spoil / units
        return made(in_parts, one=one, other=two).eval()

    assert verdict(net, folded(1.0), example) is Verdict.PASS
    assert verdict(net, folded(2.0), example) is Verdict.FAIL
    if dtype is torch.float32:
        assert verdict(net, folded(1.0001), example) is Verdict.FAIL


class Divided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 3


def test_what_rounding_did_before_is_known_behind_a_write_through_a_view() -> None:
    conv, norm, *_ = block()[0]
    example = block()[1]
    net = made(in_parts, one=nn.Sequential(conv, norm), other=nn.Identity()).eval()

    def folded(spoil: float) -> nn.Module:
        one = bnfold.fold(nn.Sequential(conv, norm), example).model[0]
        one.weight.data *= 3 * spoil
        one.bias.data *= 3
        return made(in_parts, one=one, other=Divided()).eval()

    assert verdict(net, folded(1.0), example) is Verdict.PASS
    assert verdict(net, folded(1.0001), example) is Verdict.FAIL


def scaled_in_place(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    for scale in self.scales:
        y *= scale
    return torch.relu(y).mean((2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twins_of_what_is_written_in_place_are_made_before(dtype: torch.dtype) -> None:
    conv, example = block(dtype=dtype)[0][0], block(dtype=dtype)[1]
    one, other = (torch.rand(8, 1, 1).add(0.5).to(dtype) for _ in range(2))

    def net(*scales: Tensor) -> nn.Module:
        held = [nn.Parameter(scale, requires_grad=False) for scale in scales]
        return made(scaled_in_place, conv=conv, scales=nn.ParameterList(held)).eval()

    assert verdict(net(one, other), net(one * other), example) is Verdict.PASS
    assert verdict(net(one, other), net(one * other * 3), example) is Verdict.FAIL


# ---- masks ----


def attention(fill: float, *, added: bool) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor) -> Any:
        z = self.norm(x.transpose(1, 2)).transpose(1, 2)
        scores = self.query(z) @ self.key(z).transpose(1, 2)
        size = x.shape[1]
        if added:
            scores = scores + torch.triu(torch.full((size, size), fill), 1)
        else:
            scores = scores.masked_fill(torch.ones(size, size, dtype=torch.bool).triu(1), fill)
        return torch.softmax(scores, -1) @ x

    return forward


def folded(linear: nn.Linear, norm: nn.BatchNorm1d) -> nn.Linear:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = linear.weight.double(), linear.bias.double()
    scale = 1 / (norm.running_var.double() + norm.eps).sqrt()
    result = nn.Linear(linear.in_features, linear.out_features).requires_grad_(False)
    result.weight.copy_(weight * scale)
    result.bias.copy_(bias - weight @ (scale * norm.running_mean.double()))
    return result


@pytest.mark.parametrize("added", [True, False], ids=["added", "filled"])
@pytest.mark.parametrize("fill", [-torch.inf, torch.finfo(torch.float32).min, -1e9, -1e4])
def test_a_mask_hides_no_fault(fill: float, added: bool) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6, affine=False).eval()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.05, 2)
    query, key = (nn.Linear(6, 4).requires_grad_(False) for _ in range(2))
    forward, example = attention(fill, added=added), torch.randn(3, 7, 6)
    net = made(forward, norm=norm, query=query, key=key).eval()

    def with_query(linear: nn.Linear) -> nn.Module:
        return made(forward, norm=nn.Identity(), query=linear, key=folded(key, norm)).eval()

    turned = folded(query, norm)
    turned.weight[0] *= -1
    assert verdict(net, with_query(folded(query, norm)), example) is Verdict.PASS
    assert verdict(net, with_query(query), example) is Verdict.FAIL  # stale
    assert verdict(net, with_query(turned), example) is Verdict.FAIL


@pytest.mark.parametrize("fill", [-torch.inf, torch.finfo(torch.float32).min, torch.nan])
def test_a_number_that_is_masked_in_one_only_is_far_off(fill: float) -> None:
    one = torch.randn(4, 4, dtype=torch.float64)
    masked, other = one.clone(), one.clone()
    masked[0, 0], other[0, 0] = fill, fill
    assert distance(masked, other) == 0
    assert distance(masked, one) > 1e9


# ---- constants in lists, inputs by name ----


def joined(self: Any, x: Tensor) -> Any:
    shown = self.shown.expand(len(x), -1, -1, -1)
    return self.after(torch.cat([self.conv(x), shown], 1))


def test_a_constant_in_a_list_is_rounded_as_any_other() -> None:
    conv, example = block()[0][0], block()[1]
    scale = torch.linspace(0.3, 3.1, 10, dtype=torch.float64)[:, None, None]
    shown = torch.randn(2, 8, 8)
    norm = nn.BatchNorm2d(10).eval()
    norm.weight.data = (scale.flatten() * (1 + norm.eps) ** 0.5).float()
    net = made(joined, conv=conv, shown=shown[None], after=norm).eval()
    own = norm.weight.double() / (1 + norm.eps) ** 0.5

    def candidate(spoil: float) -> nn.Module:
        other = nn.Conv2d(3, 8, 3).requires_grad_(False)
        other.weight.copy_(conv.weight.double() * own[:8, None, None, None])
        other.bias.copy_(conv.bias.double() * own[:8])  # type: ignore[union-attr]
        held = (spoil * shown.double() * own[8:, None, None]).detach().float()[None]
        return made(joined, conv=other, shown=held, after=nn.Identity()).eval()

    found = checked(net, candidate(1.0), example, ours=False)
    assert found.tier.verdict is Verdict.PASS
    assert "shown" in {site.site for site in found.tier.sites}
    assert verdict(net, candidate(1.0001), example) is Verdict.FAIL


def test_inputs_of_the_same_names_are_paired_by_these() -> None:
    net, example = block()
    after = bnfold.fold(net, example).model

    def forward(self: Any, x: Tensor, y: Tensor) -> Any:
        return self.net(x) - self.net(2 * y)

    def turned(self: Any, y: Tensor, x: Tensor) -> Any:
        return self.net(x) - self.net(2 * y)

    before = subject(made(forward, net=net).eval(), (example, example))
    candidate = subject(made(turned, net=after).eval(), (example, example))
    found = torch_sites(before, candidate, feeds(before), ours=False)
    assert found.tier.verdict is Verdict.PASS, found.tier.message
