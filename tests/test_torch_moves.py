"""Units go where the elements go: views, permutations, channels that become space."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from bnfold.channel_graph import Tie
from tests.torch_half_known import axes_of, half_known
from tests.torch_tie_nets import (
    DECOMPOSED,
    FORMS,
    FX,
    TRACED,
    Row,
    holds,
    is_unstated,
    only,
    together,
)

TOKENS, MATRIX = ((2, 6, 4),), ((4, 6),)
BATCHES, IMAGES = ((0,),), ((0, 2, 3),)
DEEP = ((2, 12, 2, 3),)

RESHAPED = {
    "view": Row(lambda x: x.view(2, 2, 2, 24), 192),
    "view of a list": Row(lambda x: x.view([2, 4, -1]), 192),
    "view of a rest": Row(lambda x: x.view(x.size(0), -1), 192),
    "view of any batch": Row(lambda x: x.view(x.size(0), 96), 192, dynamic=BATCHES),
    "view of any images": Row(
        lambda x: x.view(x.shape[0], 2, 2, x.shape[2], x.shape[3]), 192, dynamic=IMAGES),
    "view that merges any images": Row(
        lambda x: x.reshape(x.shape[0], 4, -1).transpose(1, 2), 192, dynamic=IMAGES),
    "view that merges any batch": Row(
        lambda x: x.view(-1, 4, 6), 192, dynamic=BATCHES),
    "reshape": Row(lambda x: torch.reshape(x, (2, 96)), 192),
    "reshape by name": Row(lambda x: x.reshape(shape=(8, 24)), 192),
    "reshape to one axis": Row(lambda x: x.reshape(-1), 192),
    "reshape of a permuted one": Row(lambda x: x.permute(0, 2, 3, 1).reshape(2, 24, 4), 192),
    "view_as": Row(lambda x, z: x.view_as(z), 192 + 192, inputs=((2, 4, 4, 6), (2, 4, 24))),
    "reshape_as": Row(lambda x, z: x.reshape_as(z), 192 + 192, inputs=((2, 4, 4, 6), (8, 24))),
    "flatten": Row(lambda x: x.flatten(1), 192),
    "flatten, module": Row(nn.Flatten(), 192),
    "flatten all": Row(torch.flatten, 192),
    "flatten, from the back": Row(lambda x: torch.flatten(x, -3, -2), 192),
    "flatten one axis": Row(lambda x: x.flatten(1, 1), 192),
    "flatten any images": Row(lambda x: x.flatten(2), 192, dynamic=IMAGES),
    "ravel": Row(lambda x: x.ravel(), 192),
    "unflatten": Row(lambda x: x.unflatten(1, (2, 2)), 192),
    "unflatten, module": Row(nn.Unflatten(-1, (3, -1)), 192),
    "heads of attention": Row(
        lambda x: x.reshape(2, 6, 2, 2).permute(0, 2, 1, 3).reshape(4, 6, 2), 48, inputs=TOKENS),
    "windows": Row(
        lambda x: x.view(2, 4, 2, 2, 3, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 4), 192),
    "shuffled channels": Row(
        lambda x: x.view(2, 2, 2, 4, 6).transpose(1, 2).contiguous().view(2, 4, 4, 6), 192),
}  # fmt: skip

REARRANGED = {
    "squeeze": Row(lambda x: x.squeeze(), 12, inputs=((1, 2, 1, 6),)),
    "squeeze an axis": Row(lambda x: x.squeeze(-1), 12, inputs=((2, 1, 6, 1),)),
    "squeeze axes": Row(lambda x: torch.squeeze(x, (1, -1)), 12, inputs=((2, 1, 6, 1),)),
    "squeeze an axis that is not 1": Row(lambda x: x.squeeze(1), 192),
    "squeeze of any batch": Row(
        lambda x: x.squeeze(), 12, inputs=((2, 1, 6, 1),), dynamic=BATCHES),
    "squeeze all but the batch": Row(
        lambda x: x.squeeze((0, 1)), 12, inputs=((2, 1, 6, 1),), dynamic=BATCHES),
    "unsqueeze": Row(lambda x: x.unsqueeze(1), 192),
    "unsqueeze at the end": Row(lambda x: torch.unsqueeze(x, dim=-1), 192),
    "permute": Row(lambda x: x.permute(0, 2, 3, 1), 192),
    "permute from the back": Row(lambda x: torch.permute(x, (0, -1, 1, -2)), 192),
    "permute of any images": Row(lambda x: x.permute(0, 2, 3, 1), 192, dynamic=IMAGES),
    "transpose": Row(lambda x: x.transpose(1, 2), 192),
    "transpose from the back": Row(lambda x: torch.transpose(x, -1, 0), 192),
    "swapaxes": Row(lambda x: x.swapaxes(1, -1), 192),
    "swapdims": Row(lambda x: x.swapdims(0, 2), 192),
    "movedim": Row(lambda x: torch.movedim(x, 1, -1), 192),
    "movedim of several": Row(lambda x: x.movedim((0, 3), (2, 0)), 192),
    "moveaxis": Row(lambda x: x.moveaxis((1, 2, 0), (-1, 0, 1)), 192),
    "t": Row(lambda x: x.t(), 24, inputs=MATRIX),
    "t of a line": Row(lambda x: x.t(), 6, inputs=((6,),)),
    "T": Row(lambda x: x.T, 24, inputs=MATRIX, loses=FX),
    "mT": Row(lambda x: x.mT, 192, loses=FX),
    "adjoint": Row(lambda x: x.adjoint(), 192),
}  # fmt: skip

BLOCKS = {
    "pixel_shuffle": Row(lambda x: F.pixel_shuffle(x, 2), 2 * 3, inputs=DEEP, loses=(DECOMPOSED,)),
    "pixel_shuffle, module": Row(nn.PixelShuffle(2), 2 * 3, inputs=DEEP, loses=(DECOMPOSED,)),
    "pixel_shuffle without a batch": Row(
        lambda x: F.pixel_shuffle(x, 2), 3, inputs=((12, 2, 3),), loses=(DECOMPOSED,)),
    "pixel_shuffle of any images": Row(
        lambda x: F.pixel_shuffle(x, 2), 2 * 3, inputs=DEEP, dynamic=IMAGES, loses=(DECOMPOSED,)),
    "pixel_unshuffle": Row(lambda x: F.pixel_unshuffle(x, 2), 2 * 4, loses=(DECOMPOSED,)),
    "pixel_unshuffle, module": Row(nn.PixelUnshuffle(2), 2 * 4, loses=(DECOMPOSED,)),
    "channel_shuffle": Row(
        lambda x: torch.channel_shuffle(x, 2), 2 * 12 * 6, inputs=DEEP),
    "channel_shuffle, module": Row(
        nn.ChannelShuffle(3), 2 * 12 * 6, inputs=DEEP),
    "as_strided that shows what is": Row(
        lambda x: x.as_strided((2, 4, 4, 6), (96, 24, 6, 1)), 192, loses=FX),
}  # fmt: skip

TIES = RESHAPED | REARRANGED | BLOCKS

UNSTATED = {
    "another type of the same bits": Row(lambda x: x.view(torch.int64), 0),
    "as_strided": Row(lambda x: x.as_strided((2, 3), (96, 1)), 0),
    "as_strided from elsewhere": Row(
        lambda x: x.as_strided((2, 4, 4, 5), (96, 24, 6, 1), 1), 0),
    "diagonal": Row(lambda x: x.diagonal(0, 1, 2), 0),
    "rot90": Row(lambda x: x.rot90(1, (2, 3)), 0, skips=(DECOMPOSED,)),
    "fold": Row(lambda x: F.fold(x, (3, 4), 2), 0, inputs=((2, 8, 6),), skips=(DECOMPOSED,)),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def decomposed_together() -> None:
    together(TIES, UNSTATED)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TIES)
def test_tie_is_true(name: str, form: str) -> None:
    holds(TIES[name], form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", UNSTATED)
def test_nothing_is_stated_of(name: str, form: str) -> None:
    is_unstated(UNSTATED[name], form)


KNOWN = {
    "view of any batch": [((0,), (0,)), ((1, 2, 3), (1,))],
    "view of any images": [((0,), (0,)), ((1,), (1, 2)), ((2,), (3,)), ((3,), (4,))],
    "flatten any images": [((0,), (0,)), ((1,), (1,)), ((2, 3), (2,))],
    "permute of any images": [((0,), (0,)), ((2,), (1,)), ((3,), (2,)), ((1,), (3,))],
}


@pytest.mark.parametrize("name", KNOWN)
def test_channels_are_followed_beside_sizes_that_are_unknown(name: str) -> None:
    operator = only(TIES[name])
    assert isinstance(operator, Tie)
    (route,) = operator.routes
    assert [(link.source, link.target) for link in route.links or ()] == KNOWN[name]


@pytest.mark.parametrize("name", ["view_as", "reshape_as"])
def test_a_tensor_whose_shape_is_read_is_not_bound(name: str) -> None:
    operator = only(TIES[name])
    assert isinstance(operator, Tie)
    assert len(operator.inputs) == 1


IMAGES_OF = ("n", 4, "h", "w")


def test_sizes_that_a_view_states_are_enough() -> None:
    stated = half_known(lambda x: x.view(-1, 4, 49), (None, 4, 7, 7))
    assert axes_of(stated) == [((0,), (0,)), ((1,), (1,)), ((2, 3), (2,))]


def test_a_view_to_a_shape_that_is_computed_is_unknown() -> None:
    assert half_known(lambda x, y: x.view(y.shape), IMAGES_OF, IMAGES_OF) is None


def test_axes_of_unknown_sizes_may_be_squeezed() -> None:
    assert half_known(lambda x: x.squeeze(), ("n", 1, 4)) is None
    assert half_known(lambda x: x.squeeze(0), ("n", 1, 4), made=("n", 1, 4)) is not None
    assert half_known(lambda x: x.squeeze(0), ("n", 1, 4), made=(1, 4)) is None
    assert axes_of(half_known(lambda x: x.squeeze(1), ("n", 1, 4))) == [((0,), (0,)), ((2,), (1,))]


def test_channels_of_unknown_number_are_not_shuffled() -> None:
    kept = [((0,), (0,)), ((2,), (2,)), ((3,), (3,))]
    shape = ("n", "c", "h", "w")
    assert axes_of(half_known(lambda x: torch.channel_shuffle(x, 2), shape)) == kept
    assert axes_of(half_known(lambda x: F.pixel_shuffle(x, 2), shape)) == [((0,), (0,))]


@torch.fx.wrap
def flatten(x: torch.Tensor) -> torch.Tensor:
    return x * x


@torch.fx.wrap
def mean(x: torch.Tensor) -> torch.Tensor:
    return x * x


@pytest.mark.parametrize("run", [lambda x: flatten(x), lambda x: mean(x)])
def test_a_users_function_is_not_the_operation_of_its_name(
    run: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    is_unstated(Row(run, 0), TRACED)
