"""Refuse a check that this machine's memory can't hold, before it has begun to swap or be killed.

Only the reference's weights in float64 are counted, which the oracle holds all at once: whatever
else is needed comes on top, so that a refusal is never a false alarm. What fits by that count and
runs out all the same is told by `memory_guard`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path

import onnx

from bnfold.errors import BnfoldError, InconclusiveError
from bnfold.verify.models import tensors

_CGROUP = Path("/sys/fs/cgroup")
_TODO = "use a machine with more memory, fewer samples or smaller inputs"
# Of numpy, C++, ONNX Runtime, torch on the CPU and torch on CUDA, in this order.
_EXHAUSTED = re.compile(
    r"unable to allocate|bad_alloc|failed to allocate memory|can't allocate memory|"
    r"out of memory|bad allocation|not enough memory|cannot allocate memory",
    re.IGNORECASE,
)
_WIDENED = frozenset({
    onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
})  # fmt: skip


def float64_bytes(model: onnx.ModelProto) -> int:
    """Bytes of an ONNX model's float weights in float64, from their shapes alone."""
    return sum(8 * prod(t.dims) for t in tensors(model.graph) if t.data_type in _WIDENED)


def require_memory(needed: int, *, file: str, available: int | None = None) -> None:
    """There is room for so many bytes.

    Args:
        needed: Bytes that are needed whatever else is.
        file: Whose weights they are.
        available: Bytes that are there; measured where None.

    Raises:
        InconclusiveError: There is not; gives both numbers.
    """
    free = available_bytes() if available is None else available
    if free is not None and needed > free:
        raise InconclusiveError(
            f"the check needs {_gigabytes(needed)} for the weights in float64 alone, and "
            f"{_gigabytes(free)} are free", file=file, todo="use a machine with more memory",
        )  # fmt: skip


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


@contextmanager
def memory_guard(file: str) -> Iterator[None]:
    """Turns whatever says that memory ran out into one clear error.

    Args:
        file: The model that was being run.

    Raises:
        InconclusiveError: Memory ran out; any other error passes as it is.
    """
    try:
        yield
    except (MemoryError, RuntimeError, BnfoldError) as error:
        if not is_exhausted(error):
            raise
        free = available_bytes()
        left = f" ({_gigabytes(free)} are free now)" if free is not None else ""
        raise InconclusiveError(
            f"there is not enough memory to run the model{left}", file=file, todo=_TODO
        ) from error


def is_exhausted(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says that memory ran out."""
    while error is not None:
        if isinstance(error, MemoryError) or _EXHAUSTED.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


# ---- what is free ----


def available_bytes() -> int | None:
    """The least of what the machine, its control group and this process may still take.

    Returns:
        None where nothing tells (systems other than Linux).
    """
    rooms = [_machine(), *_control_groups(_CGROUP, Path("/proc/self/cgroup")), *_process_limits()]
    known = [room for room in rooms if room is not None]
    return max(0, min(known)) if known else None


def _machine(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _lines(path: Path) -> list[str]:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text().splitlines()
    return []


def _number(path: Path) -> int | None:
    first = next(iter(_lines(path)), "")
    return int(first) if first.isdigit() else None


def _control_groups(root: Path, membership: Path) -> Iterator[int | None]:
    """What is left in each control group that this process is in, of either version."""
    for line in _lines(membership):
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        own = base / place.lstrip("/")
        for folder in (own, *own.parents):
            yield _room(folder, *names)
            if folder == base:
                break


def _room(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    most, used = _number(folder / limit), _number(folder / usage)
    if most is None or used is None:
        return None
    cached = 0
    for line in _lines(folder / "memory.stat"):
        if line.startswith(f"{reclaimable} "):
            cached = int(line.split()[1])
    return most - used + cached


def _process_limits() -> Iterator[int | None]:
    """What ``ulimit -v`` leaves."""
    with suppress(ImportError):  # not on Windows
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages = next(iter(_lines(Path("/proc/self/statm"))), "").split()
        if most != resource.RLIM_INFINITY and pages:
            yield most - int(pages[0]) * os.sysconf("SC_PAGE_SIZE")
