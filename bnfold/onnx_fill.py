"""Filling a file that has gaps with the weights that belong there, in two threads.

Folded weights are computed straight into the mapped file: a write would copy them once more, and
two writers of one file wait for each other. The space is reserved first, because a mapping can't
report that the disk is full; where it can't be reserved, weights are written.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from bnfold.errors import ReadError
from bnfold.onnx_fold import FoldedTensor

Wrote = Callable[[int, int], None]

_THREADS = 2
_MAPPED_BYTES = 1 << 16  # a smaller weight is written sooner than mapped
_RESIDENT_BYTES = 64 << 20  # of a mapping, before its pages are let go
_CANT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes go."""

    offset: int
    tensor: ir.TensorProtocol


def fill(path: Path, places: Sequence[Place], on_progress: Wrote | None) -> None:
    """Write every tensor to its place in the file at ``path``.

    Args:
        path: The file; made if it is not there.
        places: No two of them overlap.
        on_progress: Called with the bytes of weights written and their sum.

    Raises:
        OSError: There is no space, or something else can't be written.
        ReadError: A file that holds weights is gone.
    """
    total = sum(int(place.tensor.nbytes) for place in places)
    done = 0
    reserved = _reserve(path, places)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="bnfold-write") as pool:
        tasks = {pool.submit(write_tensor, path, place, reserved): place for place in places}
        try:
            for task in as_completed(tasks):
                task.result()
                done += int(tasks[task].tensor.nbytes)
                if on_progress is not None:
                    on_progress(done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _reserve(path: Path, places: Sequence[Place]) -> bool:
    """Make sure that the disk has room for the file as it will be; False where that can't be."""
    path.touch()
    end = max((place.offset + int(place.tensor.nbytes) for place in places), default=0)
    if not end or not hasattr(os, "posix_fallocate"):
        return False
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, end)
        except OSError as error:
            if error.errno in _CANT_RESERVE:
                return False
            raise
    return True


def write_tensor(path: Path, place: Place, reserved: bool) -> None:
    """Write one tensor to its place."""
    tensor = place.tensor
    if isinstance(tensor, ir.ExternalTensor) and not Path(tensor.path).is_file():
        met = f"the file of tensor '{tensor.name}' is gone"
        raise ReadError(met, file=str(tensor.path), todo="keep the input until all is written")
    with path.open("r+b") as file:
        if reserved and isinstance(tensor, FoldedTensor) and tensor.nbytes >= _MAPPED_BYTES:
            _compute_into(file.fileno(), place.offset, tensor)
            return
        file.seek(place.offset)
        if isinstance(tensor, FoldedTensor | ir.TensorProtoTensor | ir.ExternalTensor | ir.Tensor):
            tensor.tofile(file)
        else:
            file.write(tensor.tobytes())


def _compute_into(descriptor: int, offset: int, tensor: FoldedTensor) -> None:
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    at = offset - start
    resident = 0
    with mmap.mmap(descriptor, at + int(tensor.nbytes), offset=start) as region:
        for block in tensor.blocks():
            region[at : at + block.nbytes] = block
            at += block.nbytes
            if at - resident >= _RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
                # The pages stay in the file; this process alone lets go of them.
                full = at // mmap.PAGESIZE * mmap.PAGESIZE
                region.madvise(mmap.MADV_DONTNEED, resident, full - resident)
                resident = full
