"""What is stated about pooling, reductions and resampling is true, and says all that is true."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from bnfold.channel_graph import Sum
from tests.torch_tie_nets import (
    BARE,
    DECOMPOSED,
    EXPORTED,
    FORMS,
    FX,
    TRACED,
    A,
    E,
    P,
    Row,
    Z,
    agrees,
    holds,
    is_unstated,
    only,
    together,
)

LINE, VOLUME = ((2, 4, 6),), ((2, 3, 4, 4, 6),)
NO_BATCH = ((4, 4, 6),)
BATCHES = ((0,),)
IMAGES = ((0, 2, 3),)
GRID = ((2, 4, 4, 6), (2, 3, 5, 2))

POOLED = {
    "max_pool2d": Row(lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 0)), 8, P, E),
    "max_pool2d, dilated": Row(lambda x: torch.max_pool2d(x, 2, dilation=2), 8, P, E),
    "max_pool2d, sticking out": Row(
        lambda x: F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True), 8, P, E),
    "max_pool2d, module": Row(nn.MaxPool2d(2), 8, P, E),
    "max_pool2d without a batch": Row(lambda x: F.max_pool2d(x, 2), 4, P, E, NO_BATCH),
    "max_pool2d, module, without a batch": Row(nn.MaxPool2d(2), 4, P, E, NO_BATCH),
    "max_pool2d of any batch": Row(lambda x: F.max_pool2d(x, 2), 8, P, E, dynamic=BATCHES),
    "max_pool2d of any images": Row(lambda x: F.max_pool2d(x, 2), 8, P, E, dynamic=IMAGES),
    "max_pool2d with indices": Row(
        lambda x: F.max_pool2d(x, 2, return_indices=True), 8, P, E, loses=(TRACED,)),
    "max_pool2d with indices, values": Row(
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0], 8, P, E),
    "max_pool1d": Row(lambda x: F.max_pool1d(x, 2), 8, P, E, LINE),
    "max_pool1d without a batch": Row(lambda x: F.max_pool1d(x, 2), 4, P, E, ((4, 6),)),
    "max_pool3d": Row(lambda x: F.max_pool3d(x, 2), 6, P, E, VOLUME),
    "adaptive_max_pool2d": Row(lambda x: F.adaptive_max_pool2d(x, (2, 3)), 8, P, E),
    "adaptive_max_pool2d, module": Row(nn.AdaptiveMaxPool2d(1), 8, P, E),
    "adaptive_max_pool1d without a batch": Row(
        lambda x: F.adaptive_max_pool1d(x, 2), 4, P, E, ((4, 6),)),
    "adaptive_max_pool3d": Row(lambda x: F.adaptive_max_pool3d(x, 2), 6, P, E, VOLUME),
    "avg_pool2d": Row(lambda x: F.avg_pool2d(x, (2, 3)), 8),
    "avg_pool2d, module": Row(nn.AvgPool2d(2), 8),
    "avg_pool2d without a batch": Row(lambda x: F.avg_pool2d(x, 2), 4, inputs=NO_BATCH),
    "avg_pool2d, sticking out": Row(lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True), 8),
    "avg_pool2d that counts no padding": Row(
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), 8),
    "avg_pool2d that counts no padding, module": Row(
        nn.AvgPool2d(3, 1, 1, count_include_pad=False), 8),
    "avg_pool2d that counts no padding, sticking out": Row(
        lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), 8),
    "avg_pool2d that counts its padding": Row(lambda x: F.avg_pool2d(x, 3, 2, 1), 8, A, Z),
    "avg_pool2d that counts its padding, module": Row(nn.AvgPool2d(3, 2, 1), 8, A, Z),
    "avg_pool2d that counts padding along one axis": Row(
        lambda x: F.avg_pool2d(x, 3, 2, (0, 1)), 8, A, Z),
    "avg_pool2d by another divisor": Row(
        lambda x: F.avg_pool2d(x, 2, divisor_override=3), 8, A, Z),
    "avg_pool1d": Row(lambda x: F.avg_pool1d(x, 2), 8, inputs=LINE),
    "avg_pool1d that counts its padding": Row(lambda x: F.avg_pool1d(x, 3, 1, 1), 8, A, Z, LINE),
    "avg_pool3d": Row(lambda x: F.avg_pool3d(x, 2), 6, inputs=VOLUME),
    "adaptive_avg_pool2d": Row(lambda x: F.adaptive_avg_pool2d(x, (3, 4)), 8),
    "adaptive_avg_pool2d to one": Row(nn.AdaptiveAvgPool2d(1), 8),
    "adaptive_avg_pool2d of one axis": Row(lambda x: F.adaptive_avg_pool2d(x, (None, 1)), 8),
    "adaptive_avg_pool2d of any images": Row(
        lambda x: F.adaptive_avg_pool2d(x, 1), 8, dynamic=IMAGES),
    "adaptive_avg_pool2d without a batch": Row(
        lambda x: F.adaptive_avg_pool2d(x, 2), 4, inputs=NO_BATCH),
    "adaptive_avg_pool1d": Row(lambda x: F.adaptive_avg_pool1d(x, 2), 8, inputs=LINE),
    "adaptive_avg_pool3d": Row(lambda x: F.adaptive_avg_pool3d(x, 2), 6, inputs=VOLUME),
    "lp_pool2d": Row(lambda x: F.lp_pool2d(x, 2, 2), 8, P, Z, loses=(EXPORTED, DECOMPOSED)),
    "lp_pool1d, module": Row(nn.LPPool1d(4, 2), 8, P, Z, LINE, loses=(EXPORTED, DECOMPOSED)),
}  # fmt: skip

REDUCED = {
    "mean": Row(lambda x: x.mean((2, 3)), 8),
    "mean, kept": Row(lambda x: torch.mean(x, dim=[-2, -1], keepdim=True), 8),
    "mean, numpy's words": Row(lambda x: x.mean(axis=1), 48),
    "mean of channels": Row(lambda x: x.mean(1, keepdim=True), 48),
    "mean of all": Row(lambda x: x.mean(), 1),
    "mean of no axes is of all": Row(lambda x: x.mean([]), 1),
    "mean of any batch": Row(lambda x: x.mean((2, 3)), 8, dynamic=BATCHES),
    "mean in another type": Row(lambda x: x.mean(1, dtype=torch.float32), 48, tolerance=1e-3),
    "nanmean": Row(lambda x: x.nanmean((2, 3)), 8, loses=(DECOMPOSED,)),
    "sum of unknown sizes": Row(lambda x: x.sum((2, 3)), 8, A, Z, dynamic=IMAGES, loses=(TRACED,)),
    "sum of all of unknown sizes": Row(lambda x: x.sum(), 1, A, Z, dynamic=IMAGES, loses=(TRACED,)),
    "amax": Row(lambda x: x.amax((2, 3)), 8, P, E),
    "amax of all": Row(lambda x: x.amax(), 1, P, E),
    "amin, kept": Row(lambda x: torch.amin(x, 1, keepdim=True), 48, P, E),
    "max": Row(lambda x: x.max(2)[0], 48, P, E),
    "max by name": Row(
        lambda x: torch.max(x, dim=-1, keepdim=True).values, 32, P, E, loses=(TRACED,)),
    "max of all": Row(lambda x: x.max(), 1, P, E),
    "min with indices": Row(lambda x: x.min(2), 48, P, E, loses=(TRACED,)),
    "aminmax": Row(lambda x: tuple(x.aminmax(dim=1)), 48, P, E, skips=FX),
    "median": Row(lambda x: x.median(1)[0], 48, P, E),
    "median of all": Row(lambda x: x.median(), 1, P, E),
    "sort": Row(lambda x: x.sort(1, descending=True)[0], 48, P, E),
    "topk": Row(lambda x: x.topk(2, 1)[0], 48, P, E),
    "kthvalue": Row(lambda x: x.kthvalue(2, 1)[0], 48, P, E),
    "cummax": Row(lambda x: x.cummax(1)[0], 48, P, E),
    "cumsum": Row(lambda x: x.cumsum(1), 48, A, Z),
    "cumsum from the back": Row(lambda x: torch.cumsum(x, dim=-1), 32, A, Z),
    "norm": Row(lambda x: x.norm(2, 1), 48, P, Z),
    "norm of all": Row(lambda x: x.norm(), 1, P, Z),
    "norm, torch's function": Row(lambda x: torch.norm(x, dim=(2, 3)), 8, P, Z, loses=FX),
    "norm, largest": Row(lambda x: x.norm(float("inf"), 1, True), 48, P, Z),
    "vector_norm": Row(
        lambda x: torch.linalg.vector_norm(x, 3, (2, 3), True), 8, P, Z, loses=FX),
    "vector_norm of all": Row(
        lambda x: torch.linalg.vector_norm(x, keepdim=True), 1, P, Z, loses=FX),
}  # fmt: skip

RESAMPLED = {
    "nearest": Row(lambda x: F.interpolate(x, scale_factor=2), 8),
    "nearest, module": Row(nn.Upsample(scale_factor=2), 8),
    "nearest, exact": Row(
        lambda x: F.interpolate(x, (7, 9), mode="nearest-exact"), 8, loses=(DECOMPOSED,)),
    "nearest of any images": Row(lambda x: F.interpolate(x, scale_factor=2.0), 8, dynamic=IMAGES),
    "nearest to a computed size": Row(
        lambda x, z: F.interpolate(x, z.shape[2:]), 8 + 240, inputs=((2, 4, 4, 6), (2, 3, 8, 5)),
        dynamic=(*IMAGES, *IMAGES)),
    "bilinear": Row(lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"), 8),
    "bilinear, module": Row(nn.UpsamplingBilinear2d(scale_factor=2), 8),
    "bilinear, corners": Row(
        lambda x: F.interpolate(x, (7, 9), mode="bilinear", align_corners=True), 8),
    "bilinear, smoothed": Row(
        lambda x: F.interpolate(x, (3, 4), mode="bilinear", antialias=True), 8),
    "bicubic": Row(lambda x: F.interpolate(x, (7, 9), mode="bicubic"), 8,
                   skips=(DECOMPOSED,)),
    "bicubic, smoothed": Row(
        lambda x: F.interpolate(x, (3, 4), mode="bicubic", antialias=True), 8),
    "area": Row(lambda x: F.interpolate(x, (3, 4), mode="area"), 8),
    "linear": Row(lambda x: F.interpolate(x, 9, mode="linear"), 8, inputs=LINE,
                  loses=(DECOMPOSED,)),
    "nearest, 1 axis": Row(lambda x: F.interpolate(x, 9), 8, inputs=LINE,
                           loses=(DECOMPOSED,)),
    "trilinear": Row(lambda x: F.interpolate(x, (5, 6, 7), mode="trilinear"), 6, inputs=VOLUME,
        skips=(DECOMPOSED,)),
    "grid_sample": Row(
        lambda x, g: F.grid_sample(x, g, align_corners=False), 8, A, Z, GRID),
    "grid_sample at the border": Row(
        lambda x, g: F.grid_sample(x, g, padding_mode="border", align_corners=True), 8,
        inputs=GRID),
    "grid_sample, reflected": Row(
        lambda x, g: F.grid_sample(x, g, "bicubic", "reflection", False), 8, inputs=GRID),
}  # fmt: skip

TIES = POOLED | REDUCED | RESAMPLED


SUMS = {
    "two axes": (Row(lambda x: x.sum((2, 3)), 8), 24),
    "kept": (Row(lambda x: torch.sum(x, dim=-1, keepdim=True), 32), 6),
    "all": (Row(lambda x: x.sum(), 1), 192),
    "no axes are all": (Row(lambda x: x.sum([]), 1), 192),
    "any batch": (Row(lambda x: x.sum((2, 3)), 8, dynamic=BATCHES), 24),
}  # fmt: skip


UNSTATED = {
    "count of what is not 0": Row(lambda x: x.norm(0, 1), 0),
    "product": Row(lambda x: x.prod(1), 0),
    "variance": Row(lambda x: x.var(1), 0),
    "logsumexp": Row(lambda x: x.logsumexp(1), 0, skips=(DECOMPOSED,)),
    "sum in whole numbers": Row(lambda x: x.sum(1, dtype=torch.int64), 0),
    "which is largest": Row(lambda x: x.argmax(1), 0),
    "indices alone": Row(lambda x: x.max(1)[1], 0, skips=(EXPORTED, *FX)),
    "both at once": Row(lambda x: F.max_pool2d(x, 2, return_indices=True), 0,
                        skips=(EXPORTED, DECOMPOSED)),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def decomposed_together() -> None:
    together(TIES, {name: row for name, (row, _) in SUMS.items()}, UNSTATED)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TIES)
def test_tie_is_true(name: str, form: str) -> None:
    holds(TIES[name], form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SUMS)
def test_sum_adds_up_shifts(name: str, form: str) -> None:
    row, count = SUMS[name]
    assert form == BARE or agrees(row, form) == row.free
    if form == EXPORTED:
        total = only(row)
        assert isinstance(total, Sum)
        assert total.signs == (count,)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", UNSTATED)
def test_nothing_is_stated_of(name: str, form: str) -> None:
    is_unstated(UNSTATED[name], form)
