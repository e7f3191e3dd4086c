"""Units go where the elements go: Concat, Split, Slice, Gather, Tile, Expand and Pad."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tie_nets import IMAGE, NCHW, A, Row, Z, holds, net, of_last_node

TWO = "float[2,4,4,6] x, float[2,2,4,6] z"
UNKNOWN = "float[?,4,?,?] x"
ANY = {"x": np.random.default_rng(5).normal(0, 1, (2, 4, 4, 6))}
RANGE = "float[2,4,4,6] x, int64[1] a, int64[1] b"
BOUNDS = {"a": np.array([1]), "b": np.array([3])}

TIES = {
    "Concat": Row("y = Concat<axis=1>(x, z)", 288, inputs=TWO),
    "Concat from the back": Row("y = Concat<axis=-3>(x, z, x)", 288, inputs=TWO),
    "Concat of one": Row("y = Concat<axis=1>(x)", 192),
    "Concat of one twice": Row("y = Concat<axis=2>(x, x)", 192),
    "Concat 1": Row("y = Concat(x, z)", 288, inputs=TWO, opset=1,
                    run_as="y = Concat<axis=1>(x, z)"),
    "Concat with a constant": Row("y = Concat<axis=1>(x, image)", 192),
    "Concat of symbols": Row("y = Concat<axis=1>(x, z)", 288,
                             inputs=f"{NCHW}, float[N,2,H,W] z"),
    "Concat along an unknown axis": Row("y = Concat<axis=2>(x, z)", 48,
                                        inputs=f"{NCHW}, float[N,4,K,W] z"),
    "Split": Row("y, z = Split<axis=1>(x)", 192, outputs="float[] y, float[] z"),
    "Split, uneven": Row("y, z = Split<axis=1>(x, part13)", 192, outputs="float[] y, float[] z"),
    "Split 2, uneven": Row("y, z = Split<axis=1, split=[1,3]>(x)", 192, opset=2,
                           outputs="float[] y, float[] z",
                           run_as="y, z = Split<axis=1>(x, part13)"),
    "Split 18, last one smaller": Row("y, z, w = Split<axis=-1, num_outputs=3>(x)", 192, opset=18,
                                      inputs="float[2,4,3,8] x",
                                      outputs="float[] y, float[] z, float[] w"),
    "Split at run time": Row("y, z = Split<axis=1>(x, a)", 48, inputs=f"{IMAGE}, int64[2] a",
                             outputs="float[2,?,4,6] y, float[2,?,4,6] z",
                             given={"a": np.array([1, 3])}),
    "Split of an unknown axis": Row("y, z = Split<axis=2>(x)", 48, inputs=NCHW,
                                    outputs="float[] y, float[] z"),
    "Slice": Row("y = Slice(x, i1, i3, i1)", 192),
    "Slice by a step": Row("y = Slice(x, i0, far, i3, i2)", 192),
    "Slice, backwards": Row("y = Slice(x, m1, near, i1, m1)", 192),
    "Slice of two axes": Row("y = Slice(x, i10, i23, i12)", 192),
    "Slice of the first axes": Row("y = Slice(x, i01, i23)", 192),
    "Slice 1": Row("y = Slice<starts=[1], ends=[3], axes=[1]>(x)", 192, opset=1,
                   run_as="y = Slice(x, i1, i3, i1)"),
    "Slice of nothing": Row("y = Slice(x, i0, far, i2)", 192, inputs=NCHW),
    "Slice of an unknown axis": Row("y = Slice(x, i1, i3, i2)", 48, inputs=NCHW),
    "Slice from the back of an unknown axis": Row("y = Slice(x, m1, far, i2)", 48, inputs=NCHW),
    "Slice at run time": Row("y = Slice(x, a, b, i2)", 48, inputs=RANGE, given=BOUNDS),
    "Slice at run time, axes implied": Row("y = Slice(x, i1, b)", 96, inputs=RANGE, given=BOUNDS),
    "Gather": Row("y = Gather<axis=1>(x, mixed)", 192),
    "Gather of one": Row("y = Gather<axis=1>(x, k1)", 192),
    "Gather from the back": Row("y = Gather<axis=-1>(x, km1)", 192),
    "Gather of a grid": Row("y = Gather<axis=1>(x, grid_of)", 192),
    "Gather of an unknown axis": Row("y = Gather<axis=2>(x, i12)", 192, inputs=NCHW),
    "Gather from the back of an unknown axis": Row("y = Gather<axis=2>(x, mixed)", 48,
                                                   inputs=NCHW),
    "Gather at run time": Row("y = Gather<axis=1>(x, a)", 48, inputs=f"{IMAGE}, int64[2] a",
                              given={"a": np.array([3, 0])}),
    "Tile": Row("y = Tile(x, r1122)", 192),
    "Tile of channels": Row("y = Tile(x, r1312)", 192),
    "Tile of symbols": Row("y = Tile(x, r1122)", 8, inputs=NCHW),
    "Expand": Row("y = Expand(x, s_wide)", 4, inputs="float[4,1,1] x"),
    "Expand of unknown sizes": Row("y = Expand(x, s_ones)", 192, inputs=UNKNOWN, given=ANY),
    "Expand of an axis that may be 1": Row("y = Expand(x, s_four)", 48, inputs=UNKNOWN, given=ANY),
    "Expand at run time": Row("s = Shape(z) y = Expand(x, s)", 8,
                              inputs=f"float[N,4,1,1] x, {NCHW[:-1]}z"),
    "Pad": Row("y = Pad(x, pad_hw)", 192, A, Z),
    "Pad with 0": Row("y = Pad(x, pad_hw, zero)", 192, A, Z),
    "Pad of symbols": Row("y = Pad(x, pad_hw)", 8, A, Z, NCHW),
    "Pad of channels": Row("y = Pad(x, pad_c)", 192, A, Z),
    "Pad that crops": Row("y = Pad(x, crop_c)", 192, A, Z),
    "Pad of one axis": Row("y = Pad(x, pad_one, , i1)", 192, A, Z, opset=18),
    "Pad of nothing": Row("y = Pad(x, pad_none)", 192, A, Z),
    "Pad 2": Row("y = Pad<pads=[0,0,1,2,0,0,1,0]>(x)", 192, A, Z, opset=2,
                 run_as="y = Pad(x, pad_hw)"),
    "Pad 1": Row("y = Pad<paddings=[0,0,1,2,0,0,1,0]>(x)", 192, A, Z, opset=1,
                 run_as="y = Pad(x, pad_hw)"),
    "Pad, reflected": Row('y = Pad<mode="reflect">(x, pad_hw)', 8),
    "Pad by the edge": Row('y = Pad<mode="edge">(x, pad_hw)', 8),
    "Pad, wrapped": Row('y = Pad<mode="wrap">(x, pad_hw)', 8, opset=19),
}  # fmt: skip


@pytest.mark.parametrize("name", TIES)
def test_tie_is_true(name: str) -> None:
    holds(TIES[name])


UNSTATED = {
    "Concat of a constant along an unknown axis": Row(
        "y = Concat<axis=2>(x, image)", 0, inputs="float[2,2,H,6] x"),
    "Concat of unknown rank": Row("y = Concat<axis=1>(x, x)", 0, inputs="float[] x"),
    "Slice of axes at run time": Row("y = Slice(x, i1, i3, a)", 0, inputs=RANGE),
    "Slice of unknown axes at run time": Row("y = Slice(x, a, b)", 0, inputs=RANGE),
    "Gather from a constant": Row("y = Gather(full, a)", 0, inputs="int64[2] a"),
    "GatherElements": Row("y = GatherElements(x, a)", 0, inputs="float[2,3] x, int64[2,3] a"),
    "Expand of a constant": Row("y = Expand(full, a)", 0, inputs="int64[4] a"),
    "Tile at run time": Row("y = Tile(x, a)", 0, inputs=f"{IMAGE}, int64[4] a"),
    "Pad with what is computed": Row("y = Pad(x, pad_hw, v)", 0, inputs=f"{IMAGE}, float v"),
    "Pad at run time": Row("y = Pad(x, a)", 0, inputs=f"{IMAGE}, int64[8] a"),
    "Pad with NaN": Row("y = Pad<pads=[0,0,1,2,0,0,1,0], value=nan>(x)", 0, opset=2),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSTATED)
def test_nothing_is_stated_of(name: str) -> None:
    assert of_last_node(net(UNSTATED[name])) is None
