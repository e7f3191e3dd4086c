"""Tier B: right folds of any form and by any tool pass, each defect fails and is found.

Every right fold is judged twice: as bnfold's own, where the plan says what each tensor holds, and
as that of a tool that nobody knows, where tensors are paired by name and structure alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import bnfold
from bnfold.onnx_read import from_proto
from bnfold.onnx_shapes import infer_shapes
from bnfold.verify.expected import Expected
from bnfold.verify.judge import Verdict
from bnfold.verify.models import load_model, rounding_unit, same_graph
from bnfold.verify.onnx_expected import recognised
from bnfold.verify.onnx_sites import SiteCheck, judge_sites
from bnfold.verify.subject import Feeds
from models import export_onnx
from tests import nets, solver_nets
from tests.onnx_nets import random_net
from tests.solver_nets import bn
from tools.half import to_half
from tools.sabotage_graph import Draft, NoSiteError
from tools.sabotage_peers import TOOLS
from tools.sabotage_rewrites import REWRITES

DIGITS = Path(__file__).parent.parent / "models" / "digits_resnet.onnx"
Model = onnx.ModelProto


def sites(
    reference: Model, candidate: Model, expected: Expected | None = None, seed: int = 0,
    feeds: Feeds | None = None,
) -> SiteCheck:  # fmt: skip
    return judge_sites(
        load_model(reference, "reference"), load_model(candidate, "candidate"),
        feeds or nets.feeds(reference, seed), unit=rounding_unit(reference), expected=expected,
    )  # fmt: skip


def own(reference: Model, candidate: Model) -> Expected | None:
    """What bnfold makes of the reference, if that is the candidate."""

    def read() -> Any:
        model = from_proto(reference, "reference")
        return model, infer_shapes(model)

    return recognised(read, candidate)


def alarms(reference: Model, candidate: Model, feeds: Feeds | None = None) -> list[str]:
    """What is said against a right fold."""
    expected = own(reference, candidate)
    judged = [sites(reference, candidate, None, feeds=feeds)]
    if expected is not None:
        judged.append(sites(reference, candidate, expected, feeds=feeds))
    return [said.tier.message for said in judged if said.tier.verdict is not Verdict.PASS]


def fold(model: Model, **options: Any) -> Model:
    folded: Model = bnfold.fold(model, **options).model
    return folded


# ---- right folds by bnfold ----


@pytest.mark.parametrize("name", solver_nets.ROWS)
def test_units_that_travel_raise_no_alarm(name: str) -> None:
    row = solver_nets.ROWS[name]
    reference = solver_nets.net(row.body, row.inputs, row.outputs, opset=row.opset)
    assert alarms(reference, fold(reference)) == []


@cache
def exported(name: str, folder: Path) -> Model:
    return onnx.load(DIGITS if name == "digits" else export_onnx(name, folder / f"{name}.onnx"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nets")


EXPORTED = ("digits", "levit", "preactivation_positive", "unet", "speech", "video", "mlp")


@pytest.mark.parametrize("name", EXPORTED)
def test_nets_raise_no_alarm(name: str, folder: Path) -> None:
    reference = exported(name, folder)
    candidate = fold(reference)
    assert own(reference, candidate) is not None
    assert alarms(reference, candidate) == []


@pytest.mark.parametrize("name", ["digits", "levit", "preactivation_positive"])
def test_nets_in_float16_raise_no_alarm(name: str, folder: Path) -> None:
    reference = to_half(exported(name, folder))
    assert alarms(reference, fold(reference)) == []


def weights(seed: int = 0) -> dict[str, nets.Array]:
    rng = np.random.default_rng(seed)
    shapes = {
        "w": (4, 4, 3, 3), "one": (4, 4, 1, 1), "deep": (4, 4, 3, 3, 3), "line": (4, 4, 3),
        "half": (4, 2, 3, 3), "each": (4, 1, 3, 3), "wide": (4, 6, 3, 3), "duo": (4, 3, 2, 2),
        "m8": (8, 8), "turned": (6, 8), "flat": (144, 5), "k4": (4, 1, 1), "b4": (4,), "b8": (8,),
        "b6": (6,),
    }  # fmt: skip
    made = {name: nets.weight(rng, *shape) for name, shape in shapes.items()}
    for channels in (4, 6, 8):
        made |= nets.batch_norm(rng, f"n{channels}", channels)
        made |= nets.batch_norm(rng, f"m{channels}", channels)
    made["tiny8"] = 1e-3 * made["b8"]
    made |= {"p8_g": made["n8_g"] + 3, "p8_b": made["tiny8"], "p8_m": made["tiny8"],
             "p8_v": made["n8_v"]}  # fmt: skip
    return made


def net(body: str, inputs: str = "float[2,4,6,6] x", rank: int = 4, **header: Any) -> Model:
    """A model of the text with the weights that it names, in the type of its first input."""
    kind = inputs.partition("[")[0]
    dtype = helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, kind.upper()))
    axes = ",".join("ABCDE"[:rank])
    used = nets.words(body)
    given = {name: value.astype(dtype) for name, value in weights().items() if name in used}
    return nets.model(f"g ({inputs}) => ({kind}[{axes}] y) {{ {body} }}", given, **header)


PLAIN = f"c = Conv<pads=[1,1,1,1]>(x, w) y = {bn('n4', 'c')}"
BRANCHES = """d = Conv(x, one, b4) [o] n = {outer} y = If (flag) <
    then_branch = t () => (float[2,4,6,6] p) {{ [ci] c = Conv(n, one, b4) [bi] p = {inner} }},
    else_branch = e () => (float[2,4,6,6] q) {{ q = Relu(n) }}>"""
LOOP = """d = Conv(x, one, b4) [o] n = {outer} three = Constant<value_int=3>()
    y = Loop(three, "", n) <body = l (int64 i, bool on, float[2,4,6,6] v)
        => (bool go, float[2,4,6,6] p) {{ go = Identity(on) [ci] c = Conv(v, one) [bi] b = {inner}
        p = Relu(b) }}>"""
FORMS: Mapping[str, Callable[[], Model]] = {
    "Conv of one dimension": lambda: net(
        f"c = Conv<pads=[1,1]>(x, line, b4) y = {bn('n4', 'c')}", "float[2,4,9] x", 3
    ),
    "Conv of three dimensions": lambda: net(
        f"c = Conv<strides=[1,2,1]>(x, deep) y = {bn('n4', 'c')}", "float[1,4,5,6,5] x", 5
    ),
    "groups": lambda: net(f"c = Conv<group=2>(x, half, b4) y = {bn('n4', 'c')}"),
    "depthwise": lambda: net(f"c = Conv<group=4>(x, each) y = {bn('n4', 'c')}"),
    "BatchNorm before an unpadded Conv of two groups": lambda: net(
        f"r = Relu(x) n = {bn('n4', 'r')} y = Conv<group=2>(n, half, b4)"
    ),
    "ConvTranspose": lambda: net(
        f"c = ConvTranspose<strides=[2,2]>(x, wide, b6) y = {bn('n6', 'c')}"
    ),
    "ConvTranspose of two groups": lambda: net(
        f"c = ConvTranspose<group=2>(x, duo, b6) y = {bn('n6', 'c')}"
    ),
    "MatMul, Add, Transpose, BatchNorm": lambda: net(
        f"m = MatMul(x, m8) a = Add(m, b8) t = Transpose<perm=[0,2,1]>(a) y = {bn('n8', 't')}",
        "float[2,6,8] x", 3,
    ),
    "as many tokens as channels": lambda: net(
        f"m = MatMul(x, m8) a = Add(m, b8) t = Transpose<perm=[0,2,1]>(a) n = {bn('n8', 't')}"
        "q = Transpose<perm=[0,2,1]>(n) r = Relu(q) y = MatMul(r, m8)",
        "float[2,8,8] x", 3,
    ),
    "Gemm of all attributes": lambda: net(
        f"c = Gemm<transB=1, alpha=0.5, beta=2.0>(x, turned, b6) y = {bn('n6', 'c')}",
        "float[3,8] x", 2,
    ),
    "BatchNorm, Flatten, Gemm": lambda: net(
        f"r = Relu(x) n = {bn('n4', 'r')} f = Flatten(n) y = Gemm(f, flat)", rank=2
    ),
    "Sub, Div, Mul and Neg": lambda: net(
        "c = Conv(x, w, b4) d = Sub(k4, c) e = Div(d, k4) f = Neg(e) y = Mul(k4, f)"
    ),
    "a weight of two Convs": lambda: net(
        "c = Conv(x, w, b4) d = Conv(x, w) e = Mul(c, k4) f = Mul(d, k4) y = Max(e, f)"
    ),
    "a BatchNorm before and behind a cubic Resize": lambda: net(
        f"""c = Conv(x, w, b4) n = {bn('n4', 'c')} e = Constant<value = float[0] {{}}>()
            s = Constant<value = float[4] {{1, 1, 2, 2}}>()
            r = Resize<mode="cubic">(n, e, s) t = {bn('m4', 'r')} y = Conv(t, one, b4)"""
    ),
    "a MatMul, an Add of next to nothing, a BatchNorm": lambda: net(
        f"m = MatMul(x, m8) a = Add(m, tiny8) b = {bn('p8', 'a')} r = Relu(b) y = MatMul(r, m8)",
        "float[2,8] x", 2,
    ),
    "two BatchNorms in a row": lambda: net(
        f"c = Conv(x, w) d = {bn('n4', 'c')} y = {bn('m4', 'd')}"
    ),
    "a BatchNorm in a branch of an If": lambda: net(
        BRANCHES.format(outer=bn("n4", "d"), inner=bn("m4", "c")),
        "float[2,4,6,6] x, bool flag",
    ),
    "a BatchNorm in the body of a Loop": lambda: net(
        LOOP.format(outer=bn("n4", "d"), inner=bn("m4", "c"))
    ),
    "a function": lambda: with_function(),
    "open sizes": lambda: net(PLAIN, "float[N,4,H,W] x"),
    **{f"opset {n}": partial(net, PLAIN, opset=n) for n in (7, 9, 13, 14, 15, 18, 21)},
    **{kind: partial(net, PLAIN, f"{kind}[2,4,6,6] x") for kind in
       ("float16", "bfloat16", "double")},
}  # fmt: skip


def with_function() -> Model:
    """A Conv and its BatchNorm around a function that has a Conv too."""
    model = net(f"c = Conv(x, one) n = {bn('n4', 'c')} y = local.block(n, w)", domains=["local"])
    head = '<opset_import: ["" : 17], domain: "local">'
    model.functions.append(
        onnx.parser.parse_function(f"{head} block (u, k) => (z) {{ a = Conv(u, k) z = Relu(a) }}")
    )
    return model


@pytest.mark.parametrize("name", FORMS)
def test_folds_of_every_form_raise_no_alarm(name: str) -> None:
    reference = FORMS[name]()
    feeds = nets.feeds(reference, size=6)
    if name == "a BatchNorm in a branch of an If":
        feeds["flag"] = np.array(True)
    candidate = fold(reference)
    assert not same_graph(reference, candidate)
    assert alarms(reference, candidate, feeds) == []


SEEDS = range(100, 200)


def test_random_nets_raise_no_alarm() -> None:
    """In float64, where what rounding explains is next to nothing."""
    found: dict[int, list[str]] = {}
    folded = recognised_ones = 0
    for seed in SEEDS:
        made = random_net(seed, 1 + seed % 24)
        candidate = fold(made.proto)
        if same_graph(made.proto, candidate):
            continue
        folded += 1
        recognised_ones += own(made.proto, candidate) is not None
        found[seed] = alarms(made.proto, candidate, made.feeds(0))
    assert {seed: said for seed, said in found.items() if said} == {}
    assert folded > 0.5 * len(SEEDS)
    assert recognised_ones > 0.3 * len(SEEDS)


# ---- right folds by others ----


@pytest.mark.parametrize("name", ["digits", "mobilenet", "unet", "levit"])
@pytest.mark.parametrize("tool", ["onnxruntime-basic", "onnxruntime-extended"])
def test_folds_by_onnx_runtime_raise_no_alarm(tool: str, name: str, folder: Path) -> None:
    reference = exported(name, folder)
    for source in (reference, fold(reference)):
        candidate = TOOLS[tool](source)
        said = sites(reference, candidate)
        assert said.tier.verdict is Verdict.PASS, said.tier.message
        if tool == "onnxruntime-extended" and name != "levit":
            assert any("Fused" in node.op_type for node in candidate.graph.node)


# Where there is nothing to rewrite in that way.
NOT_THERE = {("bias-as-add", "mlp")}


@pytest.mark.parametrize("name", ["digits", "mlp", "levit"])
@pytest.mark.parametrize("rewrite", REWRITES)
def test_rewritten_folds_raise_no_alarm(rewrite: str, name: str, folder: Path) -> None:
    reference = exported(name, folder)
    draft = Draft(fold(reference))
    if (rewrite, name) in NOT_THERE:
        with pytest.raises(NoSiteError):
            REWRITES[rewrite](draft, np.random.default_rng(0))
        return
    REWRITES[rewrite](draft, np.random.default_rng(0))
    said = sites(reference, draft.model)
    assert said.tier.verdict is Verdict.PASS, said.tier.message


def equalised(candidate: Model, seed: int) -> Model:
    """Scales of every channel moved through each Relu between two Convs, not by powers of two."""
    draft, rng = Draft(candidate), np.random.default_rng(seed)
    moved = 0
    linears = {linear.node.output[0]: linear for linear in draft.linears()}
    makers, reads = draft.makers(), draft.readers()
    for after in linears.values():
        relu = makers.get(after.node.input[0])
        before = linears.get(relu.input[0]) if relu is not None and relu.op_type == "Relu" else None
        if before is None or not before.bias or after.groups > 1 or before.node is after.node:
            continue
        if reads[after.node.input[0]] > 1 or after.node.op_type != "Conv":
            continue
        factors = np.exp(rng.uniform(-2, 2, len(draft.array(before.bias))))
        shape = (-1, *(1,) * (draft.array(before.weight).ndim - 1))
        draft.store(before.weight, draft.array(before.weight) * factors.reshape(shape))
        draft.store(before.bias, draft.array(before.bias) * factors)
        draft.store(after.weight, draft.array(after.weight) / factors.reshape(1, *shape[:-1]))
        moved += 1
    assert moved
    return draft.model


@pytest.mark.parametrize("name", ["digits", "resnet", "unet"])
def test_equalised_folds_raise_no_alarm(name: str, folder: Path) -> None:
    reference = exported(name, folder)
    for seed in range(2):
        said = sites(reference, equalised(fold(reference), seed))
        assert said.tier.verdict is Verdict.PASS, said.tier.message
        assert said.unpaired


# ---- wrong folds ----

VICTIM_TEXT = f"""
    [c1] c1 = Conv<pads=[1,1,1,1]>(x, w1) [n1] b1 = {bn("n1", "c1")} [r1] r1 = Relu(b1)
    [c2] c2 = Conv(r1, w2, a2) [n2] b2 = {bn("n2", "c2")} [r2] r2 = Relu(b2)
    [c3] c3 = Conv(r2, w3) [n3] b3 = {bn("n3", "c3")} [j3] j3 = Add(b3, r2)
    [c4] c4 = Conv(r2, w4) [n4] b4 = {bn("n4", "c4")} [r4] r4 = Relu(b4)
    [j4] j4 = Concat<axis=1>(j3, r4) [c5] c5 = Conv(j4, w5) [p5] p5 = Reshape(c5, lines)
    [t5] t5 = Transpose<perm=[0,2,1]>(p5) [m6] m6 = MatMul(t5, w6) [a6] a6 = Add(m6, a6c)
    [t6] t6 = Transpose<perm=[0,2,1]>(a6) [n6] b6 = {bn("n6", "t6")} [r6] r6 = HardSwish(b6)
    [q6] q6 = Reshape(r6, image) [c7] y = Conv(q6, w7)"""


@cache
def victim() -> Model:
    """A net of a few kinds of sites; nothing of what c4 computes gets past its Relu."""
    rng = np.random.default_rng(5)
    shapes = {"w1": (6, 3, 3, 3), "w2": (8, 6, 3, 3), "a2": (8,), "w3": (8, 8, 1, 1),
              "w4": (4, 8, 1, 1), "w5": (8, 12, 1, 1), "w6": (8, 8), "a6c": (8,),
              "w7": (3, 8, 1, 1)}  # fmt: skip
    given = {name: nets.weight(rng, *shape) for name, shape in shapes.items()}
    for name, channels in (("n1", 6), ("n2", 8), ("n3", 8), ("n4", 4), ("n6", 8)):
        given |= nets.batch_norm(rng, name, channels)
        given[f"{name}_g"][:3] = [-1.5, 0.1, 0.6]
    given["n4_b"] -= 100
    given |= {"lines": np.array([2, 8, -1]), "image": np.array([2, 8, 6, 6])}
    return nets.model(f"g (float[2,3,8,8] x) => (float[A,B,C,D] y) {{ {VICTIM_TEXT} }}", given)


class Site:
    """A right fold, to be spoiled at the operator ``name``."""

    def __init__(self, name: str) -> None:
        self.draft = Draft(fold(victim()))
        self.node = next(n for n in self.draft.graph.node if n.name == name)
        self.before = next(n for n in victim().graph.node if n.name == name)

    def store(self, position: int, array: nets.Array) -> None:
        self.draft.store(self.node.input[position], array)

    def array(self, position: int) -> nets.Array:
        return self.draft.array(self.node.input[position])

    def stale(self, position: int) -> nets.Array:
        """The constant as it is in the unfolded net."""
        return nets.constant(victim(), self.before.input[position]).astype(np.float64)


Spoil = Callable[[Site], None]


def scaled(position: int, factor: float, channel: int | slice = slice(None)) -> Spoil:
    def spoil(site: Site) -> None:
        array = site.array(position)
        array[channel] *= factor
        site.store(position, array)

    return spoil


def permuted(position: int, axis: int) -> Spoil:
    def spoil(site: Site) -> None:
        array = site.array(position)
        order = [1, 0, *range(2, array.shape[axis])]
        site.store(position, array.take(order, axis))

    return spoil


def without_epsilon(site: Site) -> None:
    variance = nets.constant(victim(), "n2_v").astype(np.float64)
    ratio = np.sqrt((variance + 1e-5) / variance).reshape(-1, 1, 1, 1)
    site.store(1, site.array(1) * ratio)


def along_the_wrong_axis(site: Site) -> None:
    stale, right = site.stale(1), site.array(1)
    scale = (right / stale)[:, 0].reshape(1, -1, 1, 1)
    site.store(1, stale * scale)


def not_a_number(site: Site) -> None:
    array = site.array(1)
    array[2, 0, 0, 0] = np.nan
    site.store(1, array)


def stale(site: Site) -> None:
    site.store(1, site.stale(1))


DEFECTS: Mapping[str, tuple[str, Spoil]] = {
    "a bias off by a thousandth": ("c2", scaled(2, 1.001)),
    "one channel scaled by 1.001": ("c2", scaled(1, 1.001, 4)),
    "a bias of zero on one channel": ("c1", scaled(2, 0.0, 1)),
    "output channels swapped": ("c2", permuted(1, 0)),
    "input channels swapped": ("c2", permuted(1, 1)),
    "biases swapped": ("c1", permuted(2, 0)),
    "a sign": ("c1", scaled(1, -1.0, 0)),
    "epsilon left out": ("c2", without_epsilon),
    "a stale weight": ("c2", stale),
    "a stale weight behind a residual Add": ("c3", stale),
    "a scale along the wrong axis": ("c3", along_the_wrong_axis),
    "a weight of a dead branch": ("c4", scaled(1, 1.001, 2)),
    "a weight that no step was folded into": ("c5", scaled(1, 1.0001)),
    "a NaN in a weight": ("c2", not_a_number),
    "a stale weight of a MatMul before its Add": ("m6", stale),
    "a stale Add behind a MatMul": ("a6", stale),
    "the last weight": ("c7", scaled(1, 1.001, 1)),
}


@pytest.mark.parametrize("known", [True, False], ids=["own", "unknown"])
@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found_where_it_is(name: str, known: bool) -> None:
    place, spoil = DEFECTS[name]
    site = Site(place)
    spoil(site)
    expected = own(victim(), site.draft.model) if known else None
    assert (expected is not None) is known
    for seed in range(3):
        said = sites(victim(), site.draft.model, expected, seed)
        assert said.tier.verdict is Verdict.FAIL
        first = next(s for s in said.tier.sites if s.verdict is Verdict.FAIL)
        # What a MatMul holds is told by its Add at the earliest.
        assert first.site in (("m6", "a6") if place in ("m6", "a6") else (place,))


@pytest.mark.parametrize("known", [True, False], ids=["own", "unknown"])
def test_the_net_that_is_spoiled_is_right_before(known: bool) -> None:
    candidate = fold(victim())
    for seed in range(3):
        said = sites(victim(), candidate, own(victim(), candidate) if known else None, seed)
        assert said.tier.verdict is Verdict.PASS, said.tier.message


@pytest.mark.parametrize(
    "name",
    [
        "a bias off by a thousandth",
        "one channel scaled by 1.001",
        "a stale weight",
        "a sign",
        "input channels swapped",
    ],
)
@pytest.mark.parametrize(
    "rewrite",
    [
        "constants-as-nodes",
        "nodes-renamed",
        "nodes-unnamed",
        "tensors-renamed",
        "tensors-shuffled",
        "nodes-reordered",
    ],
)
def test_a_defect_under_other_names_fails(name: str, rewrite: str) -> None:  # fmt: skip
    place, spoil = DEFECTS[name]
    site = Site(place)
    spoil(site)
    draft = Draft(site.draft.model)
    REWRITES[rewrite](draft, np.random.default_rng(0))
    for seed in range(2):
        assert sites(victim(), draft.model, seed=seed).tier.verdict is Verdict.FAIL


@pytest.mark.parametrize("factor", [1.001, -1.0])
def test_a_defect_in_a_fused_operator_or_beside_other_units_fails(
    factor: float, folder: Path
) -> None:
    reference = exported("digits", folder)
    for right in (TOOLS["onnxruntime-extended"](reference), equalised(fold(reference), 0)):
        draft = Draft(right)
        node = [n for n in draft.graph.node if n.op_type in ("Conv", "FusedConv")][1]
        w = draft.array(node.input[1])
        w[3] *= factor
        draft.store(node.input[1], w)
        assert sites(reference, right).tier.verdict is Verdict.PASS
        assert sites(reference, draft.model).tier.verdict is Verdict.FAIL


BORDER = f"[r] r = Relu(x) [n] n = {bn('n4', 'r')} [c] y = Conv<pads=[{{pads}}]>(n, w)"


@pytest.mark.parametrize("pads", ["0,0,0,0", "1,1,1,1", "0,0,0,1"])
def test_a_shift_that_is_not_there_at_the_border_is_missed_there(pads: str) -> None:
    """The textbook fold of a BatchNorm into the Conv behind it, right without padding alone."""
    reference = net(BORDER.format(pads=pads))
    given = weights()
    gamma, beta, mean, variance = (given[f"n4_{c}"].astype(np.float64) for c in "gbmv")
    scale = gamma / np.sqrt(variance + 1e-5)
    shift = beta - mean * scale
    draft = Draft(net(f"[r] r = Relu(x) [c] y = Conv<pads=[{pads}]>(r, w, b4)"))
    w = draft.array("w")
    draft.store("w", w * scale.reshape(1, -1, 1, 1))
    draft.store("b4", (w * shift.reshape(1, -1, 1, 1)).sum(axis=(1, 2, 3)))
    said = sites(reference, draft.model)
    if pads == "0,0,0,0":
        assert said.tier.verdict is Verdict.PASS, said.tier.message
    else:
        assert said.tier.verdict is Verdict.FAIL
        assert said.tier.sites[-1].site == "c"


# ---- what would have been caught ----


# ---- outputs of the model ----

WHOLE = ("c = Conv (x, w)", "z = BatchNormalization (c, n_g, n_b, n_m, n_v)")


def with_outputs(lines: tuple[str, ...], outputs: str, *, folded: bool) -> Model:
    """A Conv and its BatchNormalization, or what becomes of them."""
    rng = np.random.default_rng(0)
    norm, weight = nets.batch_norm(rng, "n", 4), nets.weight(rng, 4, 3, 3, 3)
    gamma, beta, mean, variance = (norm[f"n_{part}"].astype(np.float64) for part in "gbmv")
    scale = gamma / np.sqrt(variance + 1e-5)
    made = {"w": weight * scale.reshape(-1, 1, 1, 1), "b": beta - mean * scale,
            "k": np.ones((1, 4, 6, 6)), "p": np.array([0, 0, 1, 1, 0, 0, 1, 1])}  # fmt: skip
    text = " ".join(lines)
    constants = {k: v for k, v in made.items() if f"{k})" in text or f"{k}," in text}
    constants = {k: v.astype(np.float32) if v.dtype.kind == "f" else v
                 for k, v in constants.items()}  # fmt: skip
    graph = f"g (float[1,3,8,8] x) => ({outputs}) {{ {text} }}"
    return nets.model(graph, constants if folded else {"w": weight, **norm})


LABELS = "int64[1,1,6,6] y"
OUTPUTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], str]] = {
    "a tensor inside is folded though it is an output":
        ("float[1,4,6,6] c, float[1,4,6,6] z", (), ("c = Conv (x, w, b)", "z = Identity (c)"),
         "Conv 'c' is wrong"),
    "another shape":
        ("float[1,4,h,k] z", (), ("z = Conv <pads = [1,1,1,1]> (x, w, b)",),
         r"'z' has shape \[1, 4, 8, 8\], not \[1, 4, 6, 6\]"),
    "another shape behind a tensor that is right":
        ("float[1,4,h,k] y", ("y = Relu (z)",),
         ("z = Conv (x, w, b)", "q = Relu (z)", "y = Pad (q, p)"), "Pad 'y' is wrong"),
    "a constant": ("float[1,4,6,6] z", (), ("c = Conv (x, w, b)", "z = Relu (k)"),
                   "Relu 'z' is wrong"),
    "labels of the least": (LABELS, ("y = ArgMax <axis = 1> (z)",),
                            ("z = Conv (x, w, b)", "y = ArgMin <axis = 1> (z)"),
                            "ArgMin 'y' is wrong: 'y' is not the reference's"),
    "labels without the shift": (LABELS, ("r = Relu (x)", "y = ArgMax <axis = 1> (z)"),
                                 ("r = Relu (x)", "z = Conv (x, w)", "y = ArgMax <axis = 1> (z)"),
                                 "Conv 'z' is wrong"),
}  # fmt: skip


@pytest.mark.parametrize(("outputs", "more", "folded", "said"), OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_is_what_it_is_called(
    outputs: str, more: tuple[str, ...], folded: tuple[str, ...], said: str
) -> None:
    reference = with_outputs((*WHOLE, *more), outputs, folded=False)
    found = sites(reference, with_outputs(folded, outputs, folded=True)).tier
    assert found.verdict is Verdict.FAIL
    assert re.search(said, found.message)


RIGHT_OUTPUTS = {
    "both outputs": ("float[1,4,6,6] c, float[1,4,6,6] z", (), WHOLE),
    "labels": (LABELS, ("y = ArgMax <axis = 1> (z)",),
               ("z = Conv (x, w, b)", "y = ArgMax <axis = 1> (z)")),
    "a shape": ("int64[4] y", ("y = Shape (z)",),
                ("z = Conv (x, w, b)", "y = Constant <value_ints = [1, 4, 6, 6]> ()")),
}  # fmt: skip


@pytest.mark.parametrize(("outputs", "more", "folded"), RIGHT_OUTPUTS.values(), ids=RIGHT_OUTPUTS)
def test_right_outputs_raise_no_alarm(
    outputs: str, more: tuple[str, ...], folded: tuple[str, ...]
) -> None:
    reference = with_outputs((*WHOLE, *more), outputs, folded=False)
    candidate = with_outputs((*folded, *(more if folded is WHOLE else ())), outputs,
                             folded=folded is not WHOLE)  # fmt: skip
    assert sites(reference, candidate).tier.verdict is Verdict.PASS


def test_another_shape_in_a_fold_by_bnfold_fails() -> None:
    """Where a plan says what a tensor holds, it has that tensor's shape."""
    reference = with_outputs((*WHOLE, "y = Relu (z)"), "float[1,4,h,k] y", folded=False)
    candidate: Model = bnfold.fold(reference).model
    known = own(reference, candidate)
    assert known is not None
    candidate.graph.node[0].attribute.append(helper.make_attribute("pads", [1, 1, 1, 1]))
    found = sites(reference, candidate, known).tier
    assert found.verdict is Verdict.FAIL
    assert "has shape [1, 4, 8, 8], not [1, 4, 6, 6]" in found.message


@pytest.mark.parametrize("known", [True, False], ids=["own", "unknown"])
def test_what_is_said_to_be_caught_is_and_much_less_is_not(known: bool) -> None:
    right = fold(victim())
    expected = own(victim(), right) if known else None
    judged = sites(victim(), right, expected)
    told = {s.site: s.caught for s in judged.tier.sites if s.caught is not None}
    convs = ("c1", "c2", "c3", "c4", "c5", "c7")
    assert set(convs) <= set(told)
    # The branch that c4 feeds is dead, by a shift that is rounded far more coarsely.
    assert max(told[name] for name in convs if name != "c4") < 1e-5
    for name in convs:
        assert spoiled_by(name, told[name], expected) is Verdict.FAIL, name
        assert spoiled_by(name, told[name] / 64, expected) is Verdict.PASS, name


def spoiled_by(name: str, caught: float, expected: Expected | None) -> Verdict:
    """With the weight of ``name`` scaled, in double so that the change is not rounded away."""
    site = Site(name)
    array = site.array(1) * (1 + caught)
    tensor = next(t for t in site.draft.graph.initializer if t.name == site.node.input[1])
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return sites(victim(), site.draft.model, expected).tier.verdict


# ---- bodies ----

BODY = """<ir_version: 8, opset_import: ["" : 17]>
g (float[1,3,8,8] x, bool f) => (float[1,4,8,8] y) {
  y = If (f)
    < then_branch = t () => (float[1,4,8,8] a)
        { c = Conv<pads = [1, 1, 1, 1]>(x, w) a = BatchNormalization(c, s, b, m, v) },
      else_branch = e () => (float[1,4,8,8] d)
        { k = Conv<pads = [1, 1, 1, 1]>(x, u) d = BatchNormalization(k, s, b, m, v) } > }"""


@pytest.mark.parametrize("flag", [True, False])
def test_weights_in_a_body_are_rounded_too(flag: bool) -> None:
    rng = np.random.default_rng(3)
    reference = onnx.parser.parse_model(BODY)
    arrays = {"w": rng.normal(0, 0.3, (4, 3, 3, 3)), "u": rng.normal(0, 0.3, (4, 3, 3, 3)),
              "s": rng.normal(1, 0.3, 4), "b": rng.normal(size=4), "m": rng.normal(size=4),
              "v": rng.uniform(0.1, 2, 4)}  # fmt: skip
    for name, array in arrays.items():
        reference.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    feeds = {"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32), "f": np.array(flag)}
    right = fold(reference)
    assert not same_graph(reference, right)
    assert alarms(reference, right, feeds) == []
    for tensor in (t for graph in _graphs(right.graph) for t in graph.initializer):
        if len(tensor.dims) == 4:
            wrong = numpy_helper.to_array(tensor) * np.float32(1.01)
            tensor.CopyFrom(numpy_helper.from_array(wrong, tensor.name))
    assert alarms(reference, right, feeds)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


GELU = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
g (float[1,3,8,8] x) => (float[1,4,8,8] y)
  <float r = {1.4142135}, float one = {1}, float h = {0.5}> {
  c = Conv(x, w) d = Div(c, r) e = Erf(d) f = Add(e, one) m = Mul(c, f) y = Mul(m, h) }"""
FUSED_GELU = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
g (float[1,3,8,8] x) => (float[1,4,8,8] y) { c = Conv(x, w) y = com.microsoft.Gelu(c) }"""


def test_a_fused_operator_has_its_constants_exact() -> None:
    rng = np.random.default_rng(1)
    weight = numpy_helper.from_array(rng.normal(size=(4, 3, 1, 1)).astype(np.float32), "w")
    texts = (GELU, FUSED_GELU, FUSED_GELU.replace("Gelu", "QuickGelu"))
    unfused, fused, wrong = (onnx.parser.parse_model(text) for text in texts)
    for model in (unfused, fused, wrong):
        model.graph.initializer.append(weight)
    feeds = {"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)}
    assert alarms(unfused, fused, feeds) == []
    assert alarms(unfused, wrong, feeds)
