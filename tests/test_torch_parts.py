"""Units go where the elements go: what is joined, cut, picked, repeated and surrounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bnfold.channel_graph import Tie
from tests.torch_half_known import axes_of, half_known
from tests.torch_tie_nets import (
    BARE,
    DECOMPOSED,
    EXPORTED,
    FORMS,
    FX,
    IMAGE,
    TRACED,
    TWO,
    A,
    E,
    P,
    Row,
    Z,
    holds,
    is_unstated,
    only,
    random,
    together,
)

BATCHES, IMAGES = ((0,),), ((0, 2, 3),)
UNLIKE = (IMAGE, (2, 2, 4, 6))
FULL, EMPTY = random(*IMAGE), random(0)
MIXED, GRID = torch.tensor([3, 0, -2]), torch.tensor([[0, 1], [3, 3]])
ROWS, COLUMNS = torch.tensor([[0], [2]]), torch.tensor([1, -1, 5])
ONE_OF, NEAR = torch.tensor(2), torch.tensor([1, 0], dtype=torch.int32)
KEPT = torch.tensor([True, False, True, True])
CHOSEN = {1: torch.tensor([3, 0])}

JOINED = {
    "cat": Row(lambda x, z: torch.cat([x, z], 1), 288, inputs=UNLIKE),
    "cat from the back": Row(lambda x, z: torch.cat((x, z, x), dim=-3), 288, inputs=UNLIKE),
    "cat of one twice": Row(lambda x: torch.cat([x, x], 2), 192),
    "cat, another name": Row(lambda x, z: torch.concat([x, z], dim=0), 384, inputs=TWO),
    "cat with a constant": Row(lambda x: torch.cat([x, FULL], 1), 192),
    "cat of any images": Row(
        lambda x, z: torch.cat([x, z], 1), 288, inputs=UNLIKE, dynamic=(*IMAGES, *IMAGES)),
    "cat along an unknown axis": Row(
        lambda x, z: torch.cat([x, z], 2), 48, inputs=TWO, dynamic=((2,), (2,)), loses=(TRACED,)),
    "cat of unlike types": Row(
        lambda x, z: torch.cat([x, z.float()], 1), 384, inputs=TWO, tolerance=1e-3),
    "stack": Row(lambda x, z: torch.stack([x, z], 1), 384, inputs=TWO),
    "stack at the end": Row(lambda x, z: torch.stack((x, z, x), dim=-1), 384, inputs=TWO),
    "stack with a constant": Row(lambda x: torch.stack([FULL, x]), 192),
}  # fmt: skip

CUT = {
    "chunk": Row(lambda x: x.chunk(2, 1), 192, loses=(TRACED,)),
    "chunk, one taken": Row(lambda x: x.chunk(2, dim=1)[1], 192),
    "chunk, uneven": Row(lambda x: torch.chunk(x, 4, -1)[1], 192),
    "chunk of an unknown axis": Row(
        lambda x: x.chunk(2, 2)[0], 48, dynamic=((2,),), loses=(TRACED,)),
    "split": Row(lambda x: torch.split(x, 3, 1)[1], 192),
    "split by sizes": Row(lambda x: x.split([1, 3], dim=1)[1], 192),
    "split_with_sizes": Row(lambda x: x.split_with_sizes((2, 4), -1)[0], 192),
    "split and joined": Row(
        lambda x: torch.cat([x.split([1, 3], 1)[1], x.split([1, 3], 1)[0]], 1), 192),
    "split of any images": Row(lambda x: x.split([1, 3], 1)[1], 192, dynamic=IMAGES),
    "tensor_split": Row(lambda x: x.tensor_split(4, -1)[1], 192),
    "tensor_split at places": Row(lambda x: torch.tensor_split(x, (1, -2), 3)[1], 192),
    "tensor_split, the last": Row(lambda x: torch.tensor_split(x, [1, 3], 1)[2], 192),
    "unbind": Row(lambda x: x.unbind(1)[2], 192),
    "unbind from the back": Row(lambda x: torch.unbind(x, dim=-1)[0], 192),
    "queries, keys and values": Row(
        lambda x: x.reshape(2, 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)[2], 192),
}  # fmt: skip

PICKED = {
    "select": Row(lambda x: x.select(1, -2), 192),
    "select, torch's function": Row(lambda x: torch.select(x, dim=2, index=3), 192),
    "select at the end of an unknown axis": Row(
        lambda x: x.select(2, -1), 48, dynamic=((2,),), loses=(TRACED,)),
    "narrow": Row(lambda x: x.narrow(1, 1, 2), 192),
    "narrow from the back": Row(lambda x: torch.narrow(x, 1, -3, 3), 192),
    "narrow by a computed length": Row(
        lambda x, z: x.narrow(1, 0, z.size(1)), 48 + 96, inputs=UNLIKE, dynamic=((), (1,)),
        loses=FX),
    "slice": Row(lambda x: x[:, 1:3], 192),
    "slice by a step": Row(lambda x: x[..., ::2], 192),
    "slice from the back": Row(lambda x: x[:, -3:-1, 1:], 192),
    "slice of nothing": Row(lambda x: x[:, :], 192, dynamic=IMAGES),
    "slice of an unknown axis": Row(lambda x: x[:, :, 1:3], 48, dynamic=((2,),), loses=(TRACED,)),
    "slice up to a computed size": Row(
        lambda x, z: x[:, :, : z.size(2)], 48 + 192, inputs=TWO, dynamic=((2,), (2,)),
        loses=(EXPORTED, DECOMPOSED, *FX)),
    "entry": Row(lambda x: x[1], 192),
    "entries of two axes": Row(lambda x: x[:, 2, ..., -1], 192),
    "new axes": Row(lambda x: x[None, :, 1:, None], 192),
    "new axis at the end": Row(lambda x: x[..., None], 192),
    "patches of a focus": Row(
        lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2]], 1), 192),
    "index_select": Row(lambda x: x.index_select(1, MIXED.abs()), 192),
    "index_select of short integers": Row(lambda x: torch.index_select(x, 1, NEAR), 192),
    "index_select at run time": Row(
        lambda x, i: x.index_select(1, i), 48, inputs=(IMAGE, (2,)), given=CHOSEN),
    "index": Row(lambda x: x[:, MIXED], 192),
    "index from the front": Row(lambda x: x[GRID.clamp(max=1)], 192),
    "index by a grid": Row(lambda x: x[:, GRID], 192),
    "index by a list": Row(lambda x: x[:, [0, 2]], 192),
    "index beside an entry": Row(lambda x: x[0, :, MIXED], 192),
    "index by one of no axes": Row(lambda x: x[:, ONE_OF], 192, loses=(BARE,)),
    "index of two axes": Row(lambda x: x[:, :, ROWS, COLUMNS], 192),
    "index of two axes that lie apart": Row(lambda x: x[:, MIXED, :, MIXED], 192),
    "index of the first and the last axis": Row(lambda x: x[NEAR.long(), :, :, NEAR.long()], 192),
    "index of an unknown axis": Row(lambda x: x[:, :, NEAR.long()], 192, dynamic=((2,),)),
    "index from the back of an unknown axis": Row(
        lambda x: x[:, :, MIXED], 48, dynamic=((2,),), loses=(TRACED,)),
    "index at run time": Row(
        lambda x, i: x[:, i], 48, inputs=(IMAGE, (2,)), given=CHOSEN),
    "index of one axis at run time": Row(
        lambda x, i: x[:, i, :, NEAR.long()], 8, inputs=(IMAGE, (2,)), given=CHOSEN),
}  # fmt: skip

REPEATED = {
    "expand": Row(lambda x: x.expand(2, -1, 4, 6), 4, inputs=((4, 1, 1),)),
    "expand by a list": Row(lambda x: x.expand([2, 4, 3, -1]), 8, inputs=((2, 4, 1, 1),)),
    "expand to a computed size": Row(
        lambda x, z: x.expand(z.size(0), -1, z.size(2), -1), 4 + 192, inputs=((4, 1, 1), IMAGE),
        dynamic=((), *((0, 2),)), loses=FX),
    "expand of nothing": Row(lambda x: x.expand(-1, -1, -1, -1), 192, dynamic=IMAGES),
    "expand_as": Row(lambda x, z: x.expand_as(z), 8 + 192, inputs=((2, 4, 1, 1), IMAGE)),
    "expand_as any images": Row(
        lambda x, z: x.expand_as(z), 8 + 192, inputs=((2, 4, 1, 1), IMAGE),
        dynamic=((0,), *IMAGES)),
    "broadcast_to": Row(lambda x: torch.broadcast_to(x, (2, 4, 3, 5)), 20, inputs=((4, 1, 5),)),
    "repeat": Row(lambda x: x.repeat(1, 1, 2, 2), 192),
    "repeat of channels": Row(lambda x: x.repeat(1, 3, 1, 2), 192),
    "repeat along new axes": Row(lambda x: x.repeat(3, 1, 2, 1), 24, inputs=((1, 4, 6),)),
    "repeat of any images": Row(lambda x: x.repeat(1, 2, 1, 1), 192, dynamic=IMAGES),
    "repeat along an unknown axis": Row(
        lambda x: x.repeat(1, 1, 2, 1), 48, dynamic=((2,),), loses=(TRACED,)),
    "tile": Row(lambda x: x.tile(2, 1), 192),
    "tile along new axes": Row(lambda x: torch.tile(x, (3, 1, 2)), 24, inputs=((4, 6),)),
    "repeat_interleave": Row(lambda x: x.repeat_interleave(2, 1), 192),
    "repeat_interleave by name": Row(
        lambda x: torch.repeat_interleave(x, repeats=3, dim=-1), 192),
    "roll": Row(lambda x: x.roll(1, 1), 192),
    "roll of two axes": Row(lambda x: torch.roll(x, (-1, 2), dims=(1, 3)), 192),
    "roll of all": Row(lambda x: x.roll(5), 1, loses=(DECOMPOSED,)),
    "roll of an unknown axis": Row(
        lambda x: x.roll(1, 2), 48, dynamic=((2,),), loses=(TRACED,)),
    "flip": Row(lambda x: x.flip(1, -1), 192),
    "flip by a list": Row(lambda x: torch.flip(x, [0]), 192),
    "fliplr": Row(lambda x: x.fliplr(), 192),
    "flipud": Row(lambda x: torch.flipud(x), 192),
}  # fmt: skip

SURROUNDED = {
    "pad": Row(lambda x: F.pad(x, (1, 2, 0, 1)), 192, A, Z),
    "pad with 0": Row(lambda x: F.pad(x, [1, 1], "constant", 0.0), 192, A, Z),
    "pad of channels": Row(lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), 192, A, Z),
    "pad that crops": Row(lambda x: F.pad(x, (0, 0, 0, 0, -1, 1)), 192, A, Z),
    "pad of any images": Row(
        lambda x: F.pad(x, (1, 1, 1, 1)), 8, A, Z, dynamic=IMAGES, loses=(TRACED,)),
    "pad of channels of any images": Row(
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), 192, A, Z, dynamic=IMAGES),
    "pad, module": Row(nn.ZeroPad2d(1), 192, A, Z),
    "pad with nothing": Row(lambda x: F.pad(x, (1, 1), value=float("-inf")), 32, P, E),
    "pad by reflection": Row(
        lambda x: F.pad(x, (1, 2, 1, 0), mode="reflect"), 8, loses=(DECOMPOSED,)),
    "pad by reflection, module": Row(nn.ReflectionPad2d(1), 8, loses=(DECOMPOSED,)),
    "pad by the edge": Row(
        lambda x: F.pad(x, (1, 0), mode="replicate"), 4, inputs=((4, 6),),
        loses=(DECOMPOSED,)),
    "pad by the edge, module": Row(nn.ReplicationPad2d((1, 0, 0, 2)), 8, loses=(DECOMPOSED,)),
    "pad, wrapped": Row(
        lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"), 8, skips=(DECOMPOSED,)),
    "windows": Row(lambda x: x.unfold(2, 3, 1), 192),
    "windows of channels": Row(lambda x: x.unfold(1, 2, 2), 192),
    "windows of an unknown axis": Row(
        lambda x: x.unfold(2, 3, 1), 48, dynamic=((2,),), loses=(TRACED,)),
    "patches": Row(lambda x: F.unfold(x, (2, 3)), 8, loses=(DECOMPOSED,)),
    "patches with zeros around": Row(
        lambda x: F.unfold(x, 3, padding=1, stride=2), 8, A, Z, loses=(DECOMPOSED,)),
    "patches without a batch": Row(
        lambda x: F.unfold(x, 2), 4, inputs=((4, 4, 6),), loses=(DECOMPOSED,)),
}  # fmt: skip

TIES = JOINED | CUT | PICKED | REPEATED | SURROUNDED


def whole(value: Tensor) -> Tensor:
    return (value * 9).to(torch.int64)


UNSTATED = {
    "gather": Row(lambda x, i: x.gather(1, i), 0, inputs=TWO,
                  given={1: whole(random(*IMAGE)) % 4}),
    "a mask": Row(lambda x: x[:, KEPT], 0, skips=(DECOMPOSED,)),
    "pad with NaN": Row(lambda x: F.pad(x, (1, 1), value=float("nan")), 0),
    "all pieces at once": Row(lambda x: torch.cat(x.chunk(2, 1)), 0, skips=(EXPORTED, DECOMPOSED)),
    "an entry at run time": Row(
        lambda x, i: x[i], 0, inputs=(IMAGE, ()), given={1: torch.tensor(1)},
        skips=(EXPORTED, DECOMPOSED, TRACED)),
    "repeated as counted": Row(
        lambda x, n: x.repeat_interleave(n, 1), 0, inputs=(IMAGE, (4,)),
        given={1: torch.tensor([1, 2, 1, 0])}, skips=(EXPORTED, DECOMPOSED)),
    "two arrays around an entry": Row(
        lambda x: x[:, NEAR.long(), 0, NEAR.long()], 0, skips=(EXPORTED, DECOMPOSED)),
    "masked_select": Row(lambda x, m: x.masked_select(m), 0, inputs=TWO,
                         given={1: random(*IMAGE) > 0}, skips=(EXPORTED, DECOMPOSED)),
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


FILLED: Mapping[str, tuple[Callable[..., Tensor], float]] = {
    "F.pad": (lambda x: F.pad(x, (1, 1)), 0.0),
    "F.pad with 3": (lambda x: F.pad(x, (1, 1), value=3.0), 3.0),
    "module": (nn.ConstantPad2d(1, -2.5), -2.5),
}


@pytest.mark.parametrize("form", [EXPORTED, DECOMPOSED, TRACED])
@pytest.mark.parametrize("name", FILLED)
def test_a_pad_says_what_it_fills_in(name: str, form: str) -> None:
    run, fill = FILLED[name]
    operator = only(Row(run, 0), form)
    assert isinstance(operator, Tie)
    assert operator.fill == fill
    assert operator.shift is Z


def test_a_tensor_whose_shape_is_read_is_not_bound() -> None:
    operator = only(TIES["expand_as"])
    assert isinstance(operator, Tie)
    assert len(operator.inputs) == 1


def test_constants_may_lie_anywhere_on_an_axis_of_unknown_size() -> None:
    assert half_known(lambda x: torch.cat([x, FULL], 2), (2, 4, None, 6)) is None
    assert half_known(lambda x: torch.cat([x, FULL], 2), (2, 4, 3, 6)) is not None


def test_tensors_that_are_joined_have_one_rank() -> None:
    assert half_known(lambda x, z: torch.cat([x, z]), (2, 4), (0,)) is None


def test_only_an_axis_that_may_be_of_size_1_is_expanded() -> None:
    stated = half_known(lambda x: x.expand(2, 3, -1, 5), (None, 3, "h", "w"))
    assert axes_of(stated) == [((1,), (1,)), ((2,), (2,))]
    stated = half_known(lambda x, z: x.expand(z.size(0), z.size(1), 6), (1, 4, 6), (None, None))
    assert axes_of(stated) == [((1,), (1,)), ((2,), (2,))]


def test_an_expansion_to_a_shape_that_is_computed_is_unknown() -> None:
    assert half_known(lambda x, z: x.expand(z.shape), (1, 4), ("n", 4)) is None


def test_an_index_that_may_be_a_mask_is_unknown() -> None:
    assert half_known(lambda x, i: x[:, i], (2, 4), ("k",)) is None
