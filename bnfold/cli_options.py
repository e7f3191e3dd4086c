"""The options that commands share, each named as the argument of `bnfold.api` that it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Command = Callable[..., None]
DEBUG = "bnfold.debug"


def _remember_debug(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        ctx.meta[DEBUG] = True


debug = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_remember_debug,
    help="Show the traceback of an error.",
)  # fmt: skip
level = click.option(
    "--level", type=click.Choice(["max", "local"]), default="max", show_default=True,
    help="How far folds may reach: local stays with direct neighbours.",
)  # fmt: skip
trust = click.option(
    "--trust-initializers", is_flag=True,
    help="Take initializers that are also graph inputs as constants.",
)  # fmt: skip
unshare = click.option(
    "--unshare", metavar="BYTES", type=click.IntRange(min=0), default=0,
    help="Let operators that share a weight have their own, up to so many bytes more.",
)  # fmt: skip
leftover = click.option(
    "--leftover", metavar="FORM", type=click.Choice(["keep", "affine", "depthwise"]),
    default="keep", show_default=True,
    help="How to write a BatchNormalization that stays: keep (as it is), affine (Mul and Add) or "
    "depthwise (a 1x1 Conv).",
)  # fmt: skip
horizontal = click.option(
    "--horizontal", is_flag=True,
    help="Let operators over one tensor whose outputs are concatenated become one also where parts "
    "of its output have to be copied.",
)  # fmt: skip
report = click.option(
    "--report", "reports", metavar="FILE|-", multiple=True,
    help="Write what was found, in the form that the ending asks for: .json, .xml (JUnit), .sarif, "
    ".md, .html or .txt; with - as JSON to stdout, and any text to stderr. May be given several "
    "times.",
)  # fmt: skip
fail_on_kept = click.option(
    "--fail-on-kept", metavar="CODE,...", default="",
    help="Exit with 1 when a step stays for one of these reasons (BNF010 or zero-padding).",
)  # fmt: skip


def _some_of(options: tuple[Any, ...]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_limit = click.FloatRange(min=0)
gates = _some_of((
    click.option(
        "--rtol", metavar="X", type=_limit, default=None,
        help="Beside the noise floor: no element may differ by more than atol + rtol * its size.",
    ),
    click.option("--atol", metavar="X", type=_limit, default=None, help="See --rtol."),
))  # fmt: skip
checking = _some_of((
    click.option(
        "--provider", "providers", metavar="NAME", multiple=True, default=("cpu",),
        show_default=True,
        help="Execution provider to check on: cpu, cuda, tensorrt, migraphx, openvino, dml, coreml "
        "or its full name; may be given several times.",
    ),
    click.option(
        "--tiers", metavar="A,B,C,D", default="A,B,C,D", show_default=True,
        help="Which tiers: A stored weights, B every site in float64, C both models on each "
        "provider, D decisions there.",
    ),
    click.option(
        "--samples", metavar="N", type=click.IntRange(min=1), default=8, show_default=True,
        help="How many input samples to draw.",
    ),
    click.option(
        "--seed", metavar="N", type=click.IntRange(min=0), default=0, show_default=True,
        help="Seed of the samples.",
    ),
    click.option(
        "--inputs", metavar="PATH", multiple=True,
        help="Check on these inputs instead: .npz (arrays by input name), .npy, a test_data_set_0 "
        "folder or a folder of such; may be given several times.",
    ),
    click.option(
        "--allow-tf32", is_flag=True,
        help="Let NVIDIA devices round products of float32 to TF32; the report says so.",
    ),
    gates,
    click.option(
        "--reproducer", metavar="DIR", default=None,
        help="Where to write both models, inputs and a script, should the check fail.  [default: "
        "for optimize <stem of OUT>.reproducer beside OUT]",
    ),
))  # fmt: skip
timing = _some_of((
    click.option(
        "--provider", metavar="NAME", default="cpu", show_default=True,
        help="Execution provider to run on: cpu, cuda, tensorrt, migraphx, openvino, dml, coreml "
        "or its full name.",
    ),
    click.option(
        "--threads", metavar="N,...", default="",
        help="Numbers of threads to measure on, each by itself.  [default: 1 and, on cpu, all "
        "cores]",
    ),
    click.option(
        "--runs", metavar="N", type=click.IntRange(min=1), default=30, show_default=True,
        help="How often each model has its turn.",
    ),
    click.option(
        "--seed", metavar="N", type=click.IntRange(min=0), default=0, show_default=True,
        help="Seed of the inputs.",
    ),
    click.option(
        "--inputs", metavar="PATH", multiple=True,
        help="Run on these inputs instead, one sample a turn: .npz (arrays by input name), .npy, a "
        "test_data_set_0 folder or a folder of such; may be given several times.",
    ),
    click.option(
        "--allow-tf32", is_flag=True,
        help="Let NVIDIA devices round products of float32 to TF32.",
    ),
))  # fmt: skip
