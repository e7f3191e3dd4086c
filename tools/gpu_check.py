"""Fold models and check them on a GPU: float32 with TF32 off and on, float16, bfloat16, TensorRT.

    python -m tools.gpu_check [--provider NAME] [--nets NAME,...] [--out FILE.md] [FOLDER|MODEL ...]

Checks the nets of models/ (all of them unless ``--nets`` names some) and the ONNX files given, each
as ONNX on ONNX Runtime and the nets as torch modules too. Prints a Markdown table with the date,
the device and the versions, then why what did not pass did not. Exits as bnfold does: with 0 where
all pass, 4 where neither runtime has the device; then it says what is missing.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

import bnfold
from bnfold.errors import BnfoldError, ProviderError
from bnfold.verify.diagnosis import Diagnosis
from bnfold.verify.doctor import diagnose
from bnfold.verify.providers import CPU, CUDA, PROVIDERS, full_name
from bnfold.verify.result import CheckResult
from models.export import export_traced
from models.registry import NETS, SEED, build
from models.statistics import randomize
from tools.gpu_table import COLUMNS, Row, line
from tools.half import to_half

DIGITS = Path(__file__).parent.parent / "models" / "digits_resnet.onnx"
INTERNAL = 70  # as the command line has it for a bug
Case = Callable[[], CheckResult]


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to run a model.

    Attributes:
        name: What the table calls it.
        provider: The execution provider's full name; of torch the one that stands for its device.
        dtype: What the model is converted to first.
        tf32: Whether products may be rounded to TF32.
    """

    name: str
    provider: str
    dtype: str = "float32"
    tf32: bool = False

    @property
    def narrow(self) -> bool:
        """Whether floats have 16 bits."""
        return self.dtype != "float32"


# ---- what is run ----


def modes_of_onnx(provider: str, available: Sequence[str]) -> list[Mode]:
    """The ways to run an ONNX model on the provider, and on TensorRT beside CUDA."""
    modes = [Mode("fp32", provider), Mode("fp16", provider, "float16")]
    if provider == CUDA:
        modes.insert(1, Mode("fp32, TF32 allowed", provider, tf32=True))
        if PROVIDERS["tensorrt"] in available:
            modes.append(Mode("TensorRT, TF32 allowed", PROVIDERS["tensorrt"], tf32=True))
    return modes


def modes_of_torch(provider: str) -> list[Mode]:
    """The ways to run a module on the device of the provider."""
    modes = [Mode(f"torch {name}", provider, dtype) for name, dtype in
             (("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16"))]  # fmt: skip
    if provider == CUDA:
        modes.insert(1, Mode("torch fp32, TF32 allowed", provider, tf32=True))
    return modes


def check_onnx(path: Path, mode: Mode, samples: int) -> CheckResult:
    """Fold the model at ``path``, converted first, and check it."""
    unfolded = onnx.load(path)
    if mode.dtype == "float16":
        unfolded = to_half(unfolded)
    folded = bnfold.fold(unfolded).model
    return bnfold.check(unfolded, folded, providers=(mode.provider,), samples=samples,
                        allow_tf32=mode.tf32)  # fmt: skip


def check_net(name: str, mode: Mode, samples: int) -> CheckResult:
    """Fold the net of models/ as a module, and check it on the device."""
    module, example = built(name, mode)
    dtype = getattr(torch, mode.dtype)
    module, example = module.to(dtype), example.to(dtype)
    folded = bnfold.fold(module, example).model
    return bnfold.check(module, folded, providers=(mode.provider,), samples=samples,
                        allow_tf32=mode.tf32, example_inputs=(example,))  # fmt: skip


def built(name: str, mode: Mode) -> tuple[nn.Module, Tensor]:
    """The net of models/, in float32, that the mode can fold.

    Its tiny gammas make a folded weight of 16 bits underflow, and such a fold is refused: then
    there would be nothing to check.
    """
    module, example = build(name)
    return (randomize(module, SEED, positive=True) if mode.narrow else module), example


def exported(name: str, mode: Mode, folder: Path) -> Path:
    """The net as an ONNX file of float32."""
    path = folder / ("narrow" if mode.narrow else "wide") / f"{name}.onnx"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        export_traced(*built(name, mode), path)
    return path


def cases(
    options: argparse.Namespace, found: Diagnosis, folder: Path
) -> Iterator[tuple[str, Mode, Case]]:
    """Every model in every mode that a runtime here has the device for."""
    provider = full_name(options.provider)
    nets = [name for name in options.nets.split(",") if name]
    if has_onnx(found, provider):
        modes = modes_of_onnx(provider, [t.provider for t in found.providers if t.state == "works"])
        for name in nets:
            for mode in modes:
                path = exported(name, mode, folder)
                yield name, mode, partial(check_onnx, path, mode, options.samples)
        for path in [DIGITS, *given(options.models)]:
            for mode in modes:
                yield path.stem, mode, partial(check_onnx, path, mode, options.samples)
    if has_torch(found, provider):
        for name in nets:
            for mode in modes_of_torch(provider):
                yield name, mode, partial(check_net, name, mode, options.samples)


def given(paths: Sequence[Path]) -> list[Path]:
    """The ONNX files that are named, or lie in a folder that is."""
    return [m for p in paths for m in (sorted(p.glob("*.onnx")) if p.is_dir() else [p])]


def run(model: str, mode: Mode, case: Case) -> Row:
    """One line of the table, whatever happens."""
    try:
        result = case()
    except BnfoldError as error:
        return Row(model, mode.name, None, str(error), error.exit_code)
    except Exception as error:  # the time on such a machine is dear, and the others go on
        return Row(model, mode.name, None, f"{type(error).__name__}: {error}"[:300], INTERNAL)
    return Row(model, mode.name, result, exit_code=result.exit_code)


# ---- where it is run ----


def has_onnx(found: Diagnosis, provider: str) -> bool:
    """Whether ONNX Runtime runs on the provider."""
    return any(t.provider == provider and t.state == "works" for t in found.providers)


def has_torch(found: Diagnosis, provider: str) -> bool:
    """Whether torch has the provider's device."""
    if found.torch is None or found.torch.error:
        return False
    return provider == CPU or (provider == CUDA and bool(found.torch.devices))


def missing(found: Diagnosis, provider: str) -> list[str]:
    """What stands in the way of either runtime, in words; empty where nothing does."""
    lines = []
    if not has_onnx(found, provider):
        tried = next((t for t in found.providers if t.provider == provider), None)
        why = "; ".join(part for part in (tried.said, tried.todo) if part) if tried else "no"
        lines.append(f"ONNX Runtime has no {provider}: {why}")
    if not has_torch(found, provider):
        version = found.torch.version if found.torch and not found.torch.error else "not installed"
        lines.append(f"torch ({version}) has no device for {provider}")
    return lines


def heading(found: Diagnosis, provider: str) -> str:
    """The date, the device and the versions, in one line."""
    device = found.devices[0] if provider != CPU and found.devices else None
    where = f"{device.name}, driver {device.driver}" if device else found.cpu
    of_torch = ""
    if found.torch:
        of_torch = f"torch {found.torch.version} (CUDA {found.torch.cuda or '-'})"
    parts = (f"{datetime.now(UTC):%Y-%m-%d}", where, found.runtime, of_torch,
             f"Python {platform.python_version()}", f"bnfold {bnfold.__version__}")  # fmt: skip
    return ", ".join(part for part in parts if part)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and write it where asked."""
    options = _parsed(argv)
    found, provider = diagnose(), full_name(options.provider)
    lacking = missing(found, provider)
    for met in lacking:
        print(met, file=sys.stderr)
    if not (has_onnx(found, provider) or has_torch(found, provider)):
        return ProviderError.exit_code
    text = [heading(found, provider), *(f"Not run: {met}" for met in lacking), ""]
    text += [line(COLUMNS), line(["---"] * len(COLUMNS))]
    print("\n".join(text), flush=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="bnfold-gpu-check-") as folder:
        for model, mode, case in cases(options, found, Path(folder)):
            rows.append(run(model, mode, case))
            text.append(line(rows[-1].cells()))
            print(text[-1], flush=True)
    notes = ["", *(f"- {' '.join(row.note.split())}" for row in rows if row.note)]
    print("\n".join(notes))
    if options.out:
        options.out.write_text("\n".join([*text, *notes]) + "\n")
    return next((row.exit_code for row in sorted(rows, key=_grave) if row.exit_code), 0)


def _grave(row: Row) -> int:
    """A bug first, then what is wrong, what can't be told, and what could not be run."""
    return {INTERNAL: 0, 1: 1, 3: 2}.get(row.exit_code, 3)


def _parsed(argv: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
