"""What the doctor found, on one screen. Pure: values in, text out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnfold.report.lines import UNCUT, counted, human_bytes, paint, wrap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnfold.verify.diagnosis import Diagnosis, Tried

_BOLD, _RED, _GREEN, _YELLOW = "1", "31", "32", "33"
_STATES = {"works": _GREEN, "broken": _RED, "missing": _YELLOW}
_WIDEST = max(map(len, _STATES))


def render_doctor(diagnosis: Diagnosis, *, color: bool = False, width: int = UNCUT) -> str:
    """The machine, the runtime with its providers, NVIDIA, torch, the oracle, and what is wrong.

    Args:
        diagnosis: What was found.
        color: Whether to use ANSI colors.
        width: Columns of the terminal.
    """

    def head(text: str) -> str:
        return paint(wrap(text, width), _BOLD, color)

    lines = [head(f"bnfold {diagnosis.bnfold} on Python {diagnosis.python}")]
    lines += [wrap(f"  {line}", width) for line in _machine(diagnosis)]
    lines.append(head(f"ONNX Runtime: {diagnosis.runtime or 'none'}"))
    lines += [_tried(tried, color, width) for tried in diagnosis.providers]
    for title, found in (("NVIDIA", _nvidia), ("torch", _torch), ("oracle", _oracle)):
        lines.append(head(title))
        lines += [wrap(f"  {line}", width) for line in found(diagnosis)]
    return "\n".join([*lines, *_problems(diagnosis, color, width)])


def _machine(found: Diagnosis) -> Iterator[str]:
    size = f", {human_bytes(found.memory)}" if found.memory else ""
    yield found.platform
    yield f"{found.cpu}, {counted(found.cores, 'core')}{size}"
    yield ", ".join(f"{name} {number or '-'}" for name, number in found.packages.items())


def _tried(tried: Tried, color: bool, width: int) -> str:
    name = tried.provider.removesuffix("ExecutionProvider")
    said = tried.said or tried.todo
    line = wrap(f"  {tried.state:{_WIDEST}}  {name}" + (f": {said}" if said else ""), width)
    return line.replace(tried.state, paint(tried.state, _STATES[tried.state], color), 1)


def _nvidia(found: Diagnosis) -> Iterator[str]:
    for device in found.devices:
        yield f"{device.name}, {device.memory}, {device.capability}, driver {device.driver}"
    if not found.devices:
        yield "no device (nvidia-smi is not there or lists none)"
    there = [f"{library.name} ({library.found})" for library in found.libraries if library.found]
    lacking = [library.name for library in found.libraries if not library.found]
    if there:
        yield f"libraries: {', '.join(there)}"
    if lacking:
        yield f"not found: {', '.join(lacking)}"
    yield from (f"{name}={value}" for name, value in found.environment.items())


def _torch(found: Diagnosis) -> Iterator[str]:
    if found.torch is None:
        yield "not installed; for torch models: pip install 'bnfold[torch]'"
    elif found.torch.error:
        yield f"it can't be imported: {found.torch.error}"
    else:
        built = f"CUDA {found.torch.cuda}" if found.torch.cuda else "the CPU alone"
        yield f"{found.torch.version}, built for {built}"
        yield f"devices: {', '.join(found.torch.devices) or 'the CPU alone'}"


def _oracle(found: Diagnosis) -> Iterator[str]:
    yield f"{found.oracle}, float64: {found.oracle_error or 'works'}"


def _problems(found: Diagnosis, color: bool, width: int) -> Iterator[str]:
    if found.healthy:
        works = sum(tried.state == "works" for tried in found.providers)
        said = f"nothing stands in the way; {counted(works, 'provider')} to check on"
        yield paint(wrap(said, width), _GREEN, color)
        return
    yield paint(counted(len(found.problems), "problem"), _RED, color)
    for problem in found.problems:
        yield wrap(f"  {problem.met}", width)
        yield wrap(f"    -> {problem.todo}", width)
