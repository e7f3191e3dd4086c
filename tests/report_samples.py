"""Envelopes for the tests of reports: everyday, failing, hostile, large and empty ones."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from bnfold.planning import Reason
from bnfold.report.envelope import Envelope
from bnfold.report.model import Joint, Report, Size, Step
from bnfold.verify.judge import Decisions, Figures, Gates, Measured, Settled, Verdict, judge_errors
from bnfold.verify.result import (
    CheckResult,
    InputUse,
    Mutation,
    OutputResult,
    ProviderRun,
    SiteResult,
    TierResult,
    WeightRange,
)

CUDA = "CUDAExecutionProvider"
HOSTILE = (
    "</script><script>alert('x')</script>|`a`&\"]]>\x00\x1b[2J\ud800\u202e@team #1\n::error::x%0A"
)


def step(number: int, name: str = "") -> Step:
    """Every fourth step stays, for one reason after the other."""
    name = name or f"/layer{1 + number // 16}/{number % 16}/bn{number}/BatchNormalization"
    if number % 4 != 3:
        how = ("backward", "forward", "merged")[number % 3]
        into = (f"/layer{1 + number // 16}/{number % 16}/conv{number}/Conv",)
        where = {"backward": "before", "forward": "after", "merged": "with"}[how]
        said = f"into {into[0]} {where} it"
        return Step(name, "BatchNormalization", "folded", how, into, sentence=said)
    reason = list(Reason)[number // 4 % len(Reason)]
    witness = (f"/layer{1 + number // 16}/relu{number}/Relu", "add3")
    names = ", ".join(witness)
    return Step(
        name, "Mul", "kept", code=reason.code, reason=reason.slug, witness=witness,
        sentence=reason.sentence.format(witness=names), hint=reason.hint.format(witness=names),
    )  # fmt: skip


def report(steps: int = 52) -> Report:
    before = Size({"BatchNormalization": 53, "Conv": 53, "Relu": 49, "Add": 16}, 25_583_592,
                  102_334_368)  # fmt: skip
    after = Size({"BatchNormalization": 1, "Conv": 53, "Relu": 49, "Add": 16}, 25_530_472,
                 102_121_888)  # fmt: skip
    return Report("resnet50.onnx", "max", tuple(step(i) for i in range(steps)), before, after,
                  ("one part was left as it is: its loop carries a sequence",),
                  (joint(), joint("serial", "gemm", "Gemm")), (apart("fc2"),))  # fmt: skip


def joint(kind: str = "parallel", into: str = "conv_kxk", op_type: str = "Conv") -> Joint:
    return Joint(into, op_type, kind, (f"{into}_1x1", f"{into}_bn", f"{into}_add"))


def apart(name: str) -> Step:
    said, hint = Reason.GROWS.sentence.format(witness=name), Reason.GROWS.hint
    return Step(name, "Gemm", "apart", code="BNF027", reason="grows", witness=(name,),
                sentence=said, hint=hint)  # fmt: skip


def measured(name: str, samples: int = 8, factor: float = 1.0, seed: int = 0) -> Measured:
    draw = random.Random(seed)
    before = [3e-7 * math.exp(draw.gauss(0, 0.5)) for _ in range(samples)]
    after = [error * factor * math.exp(draw.gauss(0, 0.15)) for error in before]
    return Measured(
        name, "float32", 2.0**-24, 4e-8, tuple(after), tuple(before),
        hull=((0.1, 1e-7), (4.2, 1e-6)), decisions=Decisions(8, 8, 0, 6, 0),
    )  # fmt: skip


def output(found: Measured) -> OutputResult:
    said = judge_errors(found)
    return OutputResult(found.output, said.verdict, said.message, said.figures, found)


def site(number: int, guilty: int | None) -> SiteResult:
    draw = random.Random(number)
    bound = 6e-8 * math.exp(draw.gauss(0, 0.4))
    wrong = guilty is not None and number == guilty
    error = 1e-3 if wrong else bound * draw.uniform(0.2, 0.8)
    if guilty is not None and number > guilty:
        error *= 1 + 400 * 0.9 ** (number - guilty)
    verdict = Verdict.FAIL if error > bound else Verdict.PASS
    return SiteResult(
        f"/layer{1 + number // 16}/conv{number}/Conv", "Conv", f"t{number}", f"r{number}", verdict,
        error, bound, error / bound, channel=number % 64, caught=1e-6,
    )  # fmt: skip


def weight(number: int, channels: int = 64) -> WeightRange:
    draw = random.Random(number)
    before = tuple(0.2 * math.exp(draw.gauss(0, 0.4)) for _ in range(channels))
    after = tuple(size * math.exp(draw.gauss(0, 0.2 * (number % 5))) for size in before)
    return WeightRange(f"layer{number // 4}.{number % 4}.conv.weight", before, after)


def check(guilty: int | None = None, sites: int = 53) -> CheckResult:
    failing = guilty is not None
    outputs = tuple(
        output(measured(name, factor=40.0 if failing and not seed else 1.0, seed=seed))
        for seed, name in enumerate(("logits", "features"))
    )
    constant = OutputResult(
        "anchors", Verdict.INCONCLUSIVE, "output 'anchors' is the same for every sample",
        None, Measured("anchors", "int64", 0.0, settled=Settled(Verdict.PASS, "equal", True)),
    )  # fmt: skip
    verdict = Verdict.FAIL if failing else Verdict.PASS
    marks = tuple(site(number, guilty) for number in range(sites))
    name = marks[guilty].site if guilty is not None else ""
    said = f"site '{name}' is off by 16,700 times what rounding explains" if failing else (
        f"{sites} sites are as close as rounding the weights allows")  # fmt: skip
    tiers = (
        TierResult("A", "", Verdict.PASS, "104 folded tensors are correctly rounded", caught=1e-7),
        TierResult("B", "", verdict, said, sites=marks, caught=9.5e-7),
        TierResult("C", CUDA, verdict, outputs[0].message, (*outputs, constant), caught=3.1e-7),
        TierResult("D", CUDA, Verdict.PASS, "8 of 8 decisions are clear, and all agree"),
    )
    run = ProviderRun(
        CUDA, "onnxruntime 1.31.1", "NVIDIA H200", {"use_tf32": "0"}, {CUDA: 124}, {CUDA: 124},
        tf32="off", tf32_error=6e-8,
    )  # fmt: skip
    return CheckResult(
        "resnet50.onnx", "resnet50.folded.onnx", tiers, 8, 0,
        warnings=("layer1.0.conv.weight: its channels range over a factor of 2.1e+04",),
        runs=(run,), inputs=(InputUse("x", "float32", ((1, 3, 224, 224), (2, 3, 200, 200)),
                                      "running statistics"),),
        weights=tuple(weight(number) for number in range(12)), unpaired=("t7", "t9"), guilty=name,
        caught="" if failing else "a scale error of 1.2e-07 on one channel of any folded weight",
        gates=Gates(rtol=1e-3), environment={"python": "3.11.2", "bnfold": "0.1.0"},
    )  # fmt: skip


PASSING = Envelope(report(), check(), "resnet50.folded.onnx")
FAILING = Envelope(report(), check(guilty=20), None, (step(21).name,), "resnet50.reproducer")
EMPTY = Envelope()
EXPLAINED = Envelope(replace(report(), after=None))
CHECKED = Envelope(check=CheckResult("a.onnx", "b.onnx", (), 1, None))
LARGE = Envelope(report(2000), check(guilty=700, sites=1200))


def _odd(value: float) -> Measured:
    return Measured(HOSTILE, "float32", 2.0**-24, value, (value, 0.0), (0.0, value))


def hostile() -> Envelope:
    """Names that would break every format, and numbers that are none."""
    numbers = Figures(math.nan, math.inf, 0.0, math.nan, -math.inf, math.nan, caught=math.inf)
    outputs = tuple(
        OutputResult(f"{HOSTILE}{value}", Verdict.INCONCLUSIVE, HOSTILE, numbers, _odd(value))
        for value in (math.nan, math.inf, -math.inf, 0.0)
    )
    marks = tuple(
        SiteResult(HOSTILE, HOSTILE, HOSTILE, HOSTILE, Verdict.FAIL, value, value, value)
        for value in (math.nan, math.inf, 0.0)
    )
    tiers = (TierResult("B", "", Verdict.FAIL, HOSTILE, sites=marks, caught=math.nan),
             TierResult("C", HOSTILE, Verdict.INCONCLUSIVE, HOSTILE, outputs))  # fmt: skip
    weights = (WeightRange(HOSTILE, (), (math.nan, 0.0)), WeightRange(HOSTILE, (), ()))
    run = ProviderRun(HOSTILE, HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, {HOSTILE: 1}, {HOSTILE: 1},
                      (HOSTILE,), "off", math.nan, math.inf)  # fmt: skip
    found = CheckResult(
        HOSTILE, HOSTILE, tiers, 1, None, (HOSTILE,), (run,),
        (InputUse(HOSTILE, HOSTILE, ((),), HOSTILE),), weights, (HOSTILE,) * 9, HOSTILE, HOSTILE,
        Gates(math.inf, math.nan), {HOSTILE: HOSTILE}, (Mutation(HOSTILE, HOSTILE, math.nan),),
    )  # fmt: skip
    kept = Step(HOSTILE, HOSTILE, "kept", code="BNF010", reason="zero-padding",
                witness=(HOSTILE,), sentence=HOSTILE, hint=HOSTILE)  # fmt: skip
    size = Size({HOSTILE: 1}, 1, 1)
    steps = (step(0, HOSTILE), kept, kept, step(1, "/".join(["block"] * 40)))
    joints, separate = (joint(HOSTILE, HOSTILE, HOSTILE),), (replace(kept, verdict="apart"),)
    said = Report(HOSTILE, HOSTILE, steps, size, Size({}, 0, 0), (HOSTILE,), joints, separate)
    return Envelope(said, found, HOSTILE, (HOSTILE,), HOSTILE)


SAMPLES = {
    "passing": PASSING, "failing": FAILING, "empty": EMPTY, "explained": EXPLAINED,
    "checked": CHECKED, "large": LARGE, "hostile": hostile(),
}  # fmt: skip
