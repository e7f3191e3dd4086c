"""What is stated about pooling, reductions and resampling is true, and says all that is true."""

from __future__ import annotations

import numpy as np
import pytest

from bnfold.channel_graph import Sum
from tests.tie_nets import IMAGE, NCHW, A, E, P, Row, Z, agrees, holds, net, of_last_node, only

REGIONS = "float[2,4,4,6] x, float[3,4] rois, int64[3] which"
WHICH = {
    "rois": np.array([[0, 0, 2, 3], [1, 1, 4, 3], [0, 0, 3.5, 2]], np.float64),
    "which": np.array([0, 1, 1]),
}
UNKNOWN = "float[?,4,?,?] x"
ANY = {"x": np.random.default_rng(5).normal(0, 1, (2, 4, 4, 6))}
GRID = "float[2,4,4,6] x, float[2,3,5,2] grid"
SIZED = "float[2,4,4,6] x, int64[4] size"
SIZE = {"size": np.array([2, 4, 7, 9])}

TIES = {
    "MaxPool": Row("y = MaxPool<kernel_shape=[3,2], strides=[2,1], pads=[1,0,1,1]>(x)", 8, P, E),
    "MaxPool with indices": Row("y, i = MaxPool<kernel_shape=[2,2]>(x)", 8, P, E,
                                outputs="float[] y, int64[] i"),
    "MaxPool of symbols": Row("y = MaxPool<kernel_shape=[2,2]>(x)", 8, P, E, NCHW),
    "MaxPool of unknown sizes": Row("y = MaxPool<kernel_shape=[2,2]>(x)", 8, P, E, UNKNOWN,
                                    given=ANY),
    "MaxPool, 1 axis": Row("y = MaxPool<kernel_shape=[2]>(x)", 8, P, E, "float[2,4,6] x"),
    "GlobalMaxPool": Row("y = GlobalMaxPool(x)", 8, P, E),
    "AveragePool": Row("y = AveragePool<kernel_shape=[2,3], pads=[1,1,0,1]>(x)", 8),
    "AveragePool 7": Row("y = AveragePool<kernel_shape=[2,3], pads=[1,1,0,1]>(x)", 8, opset=7),
    "AveragePool, SAME": Row('y = AveragePool<kernel_shape=[3,3], auto_pad="SAME_UPPER">(x)', 8),
    "AveragePool, ceil": Row(
        "y = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(x)", 8),
    "AveragePool that counts no padding": Row(
        "y = AveragePool<kernel_shape=[2,2], count_include_pad=1>(x)", 8),
    "AveragePool that counts its padding": Row(
        "y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(x)", 8, A, Z),
    "AveragePool that counts padding, SAME": Row(
        'y = AveragePool<kernel_shape=[3,3], auto_pad="SAME_LOWER", count_include_pad=1>(x)',
        8, A, Z),
    "AveragePool that counts padding, ceil": Row(
        "y = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1, count_include_pad=1>(x)",
        8, A, Z),
    "GlobalAveragePool": Row("y = GlobalAveragePool(x)", 8),
    "LpPool": Row("y = LpPool<kernel_shape=[2,2], p=3, pads=[1,1,0,0]>(x)", 8, P, Z),
    "GlobalLpPool": Row("y = GlobalLpPool(x)", 8, P, Z,
                        run_as="y = ReduceL2<axes=[2,3]>(x)"),
    "ReduceMax": Row("y = ReduceMax<axes=[2,3]>(x)", 8, P, E),
    "ReduceMax 18": Row("y = ReduceMax<keepdims=0>(x, i23)", 8, P, E, opset=18),
    "ReduceMin 11 of negative axes": Row("y = ReduceMin<axes=[-2,-1], keepdims=0>(x)", 8, P, E,
                                         opset=11),
    "ReduceMin of all": Row("y = ReduceMin(x)", 1, P, E),
    "ReduceMean": Row("y = ReduceMean<axes=[2,3], keepdims=0>(x)", 8),
    "ReduceMean 18": Row("y = ReduceMean<keepdims=0>(x, im21)", 8, opset=18),
    "ReduceMean of channels": Row("y = ReduceMean<axes=[1], keepdims=0>(x)", 48),
    "ReduceMean of symbols": Row("y = ReduceMean<axes=[2,3], keepdims=0>(x)", 8, inputs=NCHW),
    "ReduceMean of all": Row("y = ReduceMean<keepdims=0>(x)", 1),
    "ReduceMean over no axes is over all": Row("y = ReduceMean(x, none)", 1, opset=18),
    "ReduceMean that does nothing": Row("y = ReduceMean<noop_with_empty_axes=1>(x)", 192,
                                        opset=18),
    "ReduceMean over no axes that does nothing": Row(
        "y = ReduceMean<noop_with_empty_axes=1>(x, none)", 192, opset=18),
    "ReduceSum that does nothing": Row("y = ReduceSum<noop_with_empty_axes=1>(x)", 192),
    "ReduceSum of unknown sizes": Row("y = ReduceSum(x, i23)", 8, A, Z, NCHW),
    "ReduceL1": Row("y = ReduceL1<axes=[2,3]>(x)", 8, P, Z),
    "ReduceL2 18": Row("y = ReduceL2(x, i23)", 8, P, Z, opset=18),
    "CumSum": Row("y = CumSum(x, k3)", 32, A, Z),
    "CumSum from the back": Row("y = CumSum<reverse=1, exclusive=1>(x, km1)", 32, A, Z),
    "GridSample": Row("y = GridSample(x, grid)", 8, A, Z, GRID),
    "GridSample at the border": Row(
        'y = GridSample<padding_mode="border">(x, grid)', 8, inputs=GRID, tolerance=1e-5),
    "GridSample, reflected": Row(
        'y = GridSample<padding_mode="reflection", mode="cubic">(x, grid)', 8, inputs=GRID,
        opset=20, tolerance=1e-5),
    "RoiAlign": Row("y = RoiAlign<output_height=2, output_width=2>(x, rois, which)", 4, A, Z,
                    REGIONS, given=WHICH),
    "RoiAlign, largest": Row('y = RoiAlign<mode="max", output_height=2>(x, rois, which)', 4, P, Z,
                             REGIONS, given=WHICH),
}  # fmt: skip

RESAMPLED = {
    "nearest": Row("y = Resize(x, , up)", 8),
    "linear": Row('y = Resize<mode="linear">(x, , up)', 8),
    "linear, corners": Row(
        'y = Resize<mode="linear", coordinate_transformation_mode="align_corners">(x, , up)', 8),
    "cubic": Row('y = Resize<mode="cubic">(x, , up)', 8, tolerance=1e-5),
    "cubic, nothing from outside": Row(
        'y = Resize<mode="cubic", exclude_outside=1, cubic_coeff_a=-0.5>(x, , up)', 8),
    "smoothed": Row('y = Resize<mode="linear", antialias=1>(x, , , size_up)', 8, opset=18),
    "by sizes": Row('y = Resize<mode="linear">(x, , , size_up)', 8),
    "by sizes, scales empty": Row('y = Resize<mode="linear">(x, , no_scales, size_up)', 8,
                                  opset=11, run_as='y = Resize<mode="linear">(x, , , size_up)'),
    "by computed sizes": Row("y = Resize(x, , , size)", 8, inputs=SIZED, given=SIZE,
                             outputs="float[2,4,7,9] y"),
    "by computed sizes of symbols": Row(
        "y = Resize(x, , , size)", 8, inputs=f"{NCHW}, int64[4] size", given=SIZE,
        outputs="float[N,4,h,w] y"),
    "by computed sizes that nothing states": Row(
        "y = Resize(x, , , size)", 1, inputs=SIZED, given=SIZE, outputs="float[?,?,?,?] y"),
    "of unknown sizes": Row("y = Resize(x, , up)", 8, inputs=UNKNOWN, given=ANY),
    "two axes": Row("y = Resize<axes=[2,3]>(x, , up_hw)", 8, opset=18),
    "two axes, to computed sizes": Row(
        "y = Resize<axes=[2,3]>(x, , , size)", 8, inputs=f"{IMAGE}, int64[2] size",
        given={"size": np.array([7, 9])}, opset=18),
    "two axes, in proportion": Row(
        'y = Resize<axes=[2,3], keep_aspect_ratio_policy="not_larger">(x, , , size_hw)', 8,
        opset=18),
    "all axes, in proportion": Row(
        'y = Resize<keep_aspect_ratio_policy="not_smaller">(x, , , size_up)', 1, opset=18),
    "channels too": Row('y = Resize<mode="linear">(x, , up_c)', 48),
    "a scale that changes no size": Row(
        'y = Resize<mode="linear", coordinate_transformation_mode="asymmetric">(x, , near_one)',
        48),
    "10": Row("y = Resize(x, up)", 8, opset=10, run_as=(
        'y = Resize<coordinate_transformation_mode="asymmetric", nearest_mode="floor">(x, , up)')),
    "Upsample 9": Row("y = Upsample(x, up)", 8, opset=9, run_as=(
        'y = Resize<coordinate_transformation_mode="asymmetric", nearest_mode="floor">(x, , up)')),
    "Upsample 7": Row("y = Upsample<scales=[1.0, 1.0, 2.0, 1.5]>(x)", 8, opset=7, run_as=(
        'y = Resize<coordinate_transformation_mode="asymmetric", nearest_mode="floor">(x, , up)')),
    "Upsample 1": Row("y = Upsample<height_scale=2.0, width_scale=1.5>(x)", 8, opset=1, run_as=(
        'y = Resize<coordinate_transformation_mode="asymmetric", nearest_mode="floor">(x, , up)')),
    "TensorFlow's nearest": Row(
        'y = Resize<coordinate_transformation_mode="tf_half_pixel_for_nn">(x, , up)', 8, opset=11,
        run_as='y = Resize(x, , up)'),
}  # fmt: skip

CROP = 'mode="linear", coordinate_transformation_mode="tf_crop_and_resize"'
CROPPED = {
    "cropped": Row(f"y = Resize<{CROP}>(x, roi, , size_up)", 8, A, Z),
    "channels cropped": Row(f"y = Resize<{CROP}>(x, roi_c, , size_up)", 2, A, Z),
    "cropped at run time": Row(f"y = Resize<{CROP}>(x, r, , size_up)", 1, A, Z,
                               f"{IMAGE}, float[8] r", given={"r": np.repeat([0.1, 0.9], 4)}),
    "two axes cropped at run time": Row(
        f"y = Resize<{CROP}, axes=[2,3]>(x, r, , size_hw)", 8, A, Z, f"{IMAGE}, float[4] r",
        given={"r": np.repeat([0.1, 0.9], 2)}, opset=18),
}  # fmt: skip


@pytest.mark.parametrize("name", TIES)
def test_tie_is_true(name: str) -> None:
    holds(TIES[name])


@pytest.mark.parametrize("name", RESAMPLED)
def test_resampling_is_a_weighted_mean(name: str) -> None:
    holds(RESAMPLED[name])


@pytest.mark.parametrize("name", CROPPED)
def test_what_is_cropped_may_see_zeros(name: str) -> None:
    holds(CROPPED[name])


SUMS = {
    "two axes": (Row("y = ReduceSum(x, i23)", 8), 24),
    "axes dropped": (Row("y = ReduceSum<keepdims=0>(x, i23)", 8), 24),
    "all": (Row("y = ReduceSum(x)", 1), 192),
    "no axes are all": (Row("y = ReduceSum(x, none)", 1), 192),
    "version 11": (Row("y = ReduceSum<axes=[-1], keepdims=0>(x)", 32, opset=11,
                       run_as="y = ReduceSum<keepdims=0>(x, m1)"), 6),
    "unknown batch": (Row("y = ReduceSum(x, i23)", 8, inputs="float[N,4,4,6] x"), 24),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_reduce_sum_adds_up_shifts(name: str) -> None:
    row, count = SUMS[name]
    total = only(net(row))
    assert isinstance(total, Sum)
    assert total.signs == (count,)
    assert agrees(row) == row.free


UNSTATED = {
    "unknown rank": Row("y = MaxPool<kernel_shape=[2,2]>(x)", 0, inputs="float[] x"),
    "axes at run time": Row("y = ReduceMean(x, a)", 0, inputs=f"{IMAGE}, int64[2] a", opset=18),
    "sum over axes at run time": Row("y = ReduceSum(x, a)", 0, inputs=f"{IMAGE}, int64[2] a"),
    "axis at run time": Row("y = CumSum(x, a)", 0, inputs=f"{IMAGE}, int64 a"),
    "product": Row("y = ReduceProd(x)", 0),
    "squares": Row("y = ReduceSumSquare(x)", 0),
    "filled with 1": Row(f"y = Resize<{CROP}, extrapolation_value=1.0>(x, roi, , size_up)", 0),
    "moved by one": Row(
        'y = Resize<coordinate_transformation_mode="tf_half_pixel_for_nn", nearest_mode="ceil">'
        "(x, , up)", 0, opset=11),
    "axis that is not there": Row("y = ReduceMean(x, far)", 0, opset=18),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSTATED)
def test_nothing_is_stated_of(name: str) -> None:
    assert of_last_node(net(UNSTATED[name])) is None
