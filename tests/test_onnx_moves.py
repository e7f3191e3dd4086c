"""Units go where the elements go: Reshape and its kin, also where sizes are not known."""

from __future__ import annotations

import numpy as np
import pytest

from bnfold.channel_graph import Tie
from tests.tie_nets import IMAGE, NCHW, Row, holds, net, of_last_node, only

TOKENS = "float[2,3,4] x"
UNKNOWN = "float[?,4,?,?] x"
ANY = {"x": np.random.default_rng(5).normal(0, 1, (2, 4, 4, 6))}

TIES = {
    "Reshape": Row("y = Reshape(x, s_tokens)", 192),
    "Reshape 1": Row("y = Reshape<shape=[0,4,-1]>(x)", 192, opset=1,
                     run_as="y = Reshape(x, s_tokens)"),
    "Reshape to groups": Row("y = Reshape(x, s_groups)", 192),
    "Reshape to heads": Row("y = Reshape(x, s_heads)", 192),
    "Reshape to rows": Row("y = Reshape(x, s_flat)", 192),
    "Reshape to one axis": Row("y = Reshape(x, s_all)", 192),
    "Reshape across": Row("y = Reshape(x, s_split)", 192, inputs="float[2,6,2,8] x"),
    "Flatten": Row("y = Flatten(x)", 192),
    "Flatten at 2": Row("y = Flatten<axis=2>(x)", 192),
    "Flatten from the back": Row("y = Flatten<axis=-1>(x)", 192),
    "Flatten all": Row("y = Flatten<axis=0>(x)", 192),
    "Flatten of unknown sizes": Row("y = Flatten<axis=3>(x)", 192, inputs=UNKNOWN, given=ANY),
    "Squeeze": Row("y = Squeeze(x, i23)", 8, inputs="float[2,4,1,1] x"),
    "Squeeze 11": Row("y = Squeeze<axes=[2,3]>(x)", 8, inputs="float[2,4,1,1] x", opset=11,
                      run_as="y = Squeeze(x, i23)"),
    "Squeeze of what is 1": Row("y = Squeeze(x)", 8, inputs="float[2,1,4,1] x"),
    "Squeeze of unknown sizes": Row("y = Squeeze(x, im21)", 8, inputs=UNKNOWN, given={
        "x": np.random.default_rng(5).normal(0, 1, (2, 4, 1, 1))}),
    "Unsqueeze": Row("y = Unsqueeze(x, i12)", 24, inputs=TOKENS),
    "Unsqueeze at the back": Row("y = Unsqueeze(x, im21)", 24, inputs=TOKENS),
    "Unsqueeze 11": Row("y = Unsqueeze<axes=[0]>(x)", 24, inputs=TOKENS, opset=11,
                        run_as="y = Unsqueeze(x, i0)"),
    "Unsqueeze of unknown sizes": Row("y = Unsqueeze(x, m1)", 192, inputs=UNKNOWN, given=ANY),
    "Transpose": Row("y = Transpose<perm=[0,2,3,1]>(x)", 192),
    "Transpose to and fro is no cycle": Row("y = Transpose<perm=[1,2,3,0]>(x)", 192),
    "Transpose, reversed": Row("y = Transpose(x)", 192),
    "Transpose of unknown rank": Row("y = Transpose<perm=[0,2,3,1]>(x)", 192, inputs="float[] x",
                                     given=ANY),
    "SpaceToDepth": Row("y = SpaceToDepth<blocksize=2>(x)", 8),
    "SpaceToDepth of symbols": Row("y = SpaceToDepth<blocksize=2>(x)", 8, inputs=NCHW),
    "DepthToSpace": Row("y = DepthToSpace<blocksize=2>(x)", 4, inputs="float[2,8,3,2] x"),
    "DepthToSpace by columns": Row('y = DepthToSpace<blocksize=2, mode="CRD">(x)', 4,
                                   inputs="float[2,8,3,2] x"),
    "DepthToSpace of unknown channels": Row("y = DepthToSpace<blocksize=2>(x)", 2,
                                            inputs="float[2,D,3,2] x", given={
        "x": np.random.default_rng(5).normal(0, 1, (2, 8, 3, 2))}),
}  # fmt: skip

SHUFFLE = "a = Reshape(x, s_groups) b = Transpose<perm=[0,2,1,3,4]>(a) y = Reshape(b, s_wide)"
RUN_TIME = """n = Shape<start=0, end=1>(x) s = Shape(x) h0 = Gather(s, k2) w0 = Gather(s, k3)
    h = Unsqueeze(h0, i0) w = Slice(s, i3, far) """

CHAINS = {
    "channel shuffle": Row(SHUFFLE, 192),
    "channel shuffle of symbols": Row(
        RUN_TIME + """in = Concat<axis=0>(n, i2, i2, h, w) out = Concat<axis=0>(n, i4, h, w)
        a = Reshape(x, in) b = Transpose<perm=[0,2,1,3,4]>(a) y = Reshape(b, out)""",
        192, inputs=NCHW),
    "groups of unknown sizes": Row(
        RUN_TIME + "in = Concat<axis=0>(n, i2, i2, h, w) y = Reshape(x, in)", 192,
        inputs=UNKNOWN, given=ANY),
    "tokens of unknown sizes": Row(
        RUN_TIME + "m = Mul(h, w) in = Concat<axis=0>(n, i4, m) y = Reshape(x, in)", 192,
        inputs=UNKNOWN, given=ANY),
    "image of tokens and back": Row(
        """a = Reshape(x, s_tokens) b = Transpose<perm=[0,2,1]>(a) c = Transpose<perm=[0,2,1]>(b)
        y = Reshape(c, s_wide)""", 192),
}  # fmt: skip

DYNAMIC = {
    "tokens": ("y = Reshape(x, s_tokens)", NCHW, ((1,), (1,))),
    "tokens, nothing but channels known": ("y = Reshape(x, s_tokens)", UNKNOWN, ((1,), (1,))),
    "rows": ("y = Reshape(x, s_flat)", "float[N,4] x", ((1,), (1,))),
    "batch that is computed": ("y = Reshape(x, s_merge)", "float[N,4,4,6] x", ((1,), (1,))),
    "channels at the back": ("y = Reshape(x, s_qkv)", "float[?,?,12] x", ((2,), (2, 3, 4))),
    "tokens from a computed number": (
        RUN_TIME + "m = Mul(h, w) in = Concat<axis=0>(n, i4, m) y = Reshape(x, in)",
        UNKNOWN, ((1,), (1,))),
}  # fmt: skip


@pytest.mark.parametrize("name", TIES)
def test_tie_is_true(name: str) -> None:
    holds(TIES[name])


@pytest.mark.parametrize("name", CHAINS)
def test_moves_one_after_the_other_are_true(name: str) -> None:
    holds(CHAINS[name])


@pytest.mark.parametrize("name", DYNAMIC)
def test_reshape_finds_channels_where_sizes_are_unknown(name: str) -> None:
    body, inputs, axes = DYNAMIC[name]
    tie = only(net(Row(body, 0, inputs=inputs)))
    assert isinstance(tie, Tie)
    (route,) = tie.routes
    assert axes in [(link.source, link.target) for link in route.links or ()]


UNSTATED = {
    "Reshape to what nobody knows": Row("y = Reshape(x, s)", 0, inputs=f"{IMAGE}, int64[?] s"),
    "Reshape of unknown rank": Row("y = Reshape(x, s_tokens)", 0, inputs="float[] x"),
    "Reshape of a constant": Row("y = Reshape(full, s)", 0, inputs="int64[2] s"),
    "Flatten of unknown rank": Row("y = Flatten(x)", 0, inputs="float[] x"),
    "Squeeze of what may be 1": Row("y = Squeeze(x)", 0, inputs="float[N,4,1,1] x"),
    "Squeeze at run time": Row("y = Squeeze(x, a)", 0, inputs="float[2,4,1,1] x, int64[2] a"),
    "Unsqueeze at run time": Row("y = Unsqueeze(x, a)", 0, inputs=f"{IMAGE}, int64[2] a"),
    "integers": Row("y = Transpose(x)", 0, inputs="int64[2,3] x", outputs="int64[] y"),
}


@pytest.mark.parametrize("name", UNSTATED)
def test_nothing_is_stated_of(name: str) -> None:
    assert of_last_node(net(UNSTATED[name])) is None
