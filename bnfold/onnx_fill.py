"""Filling a file that has gaps with the weights that belong there, in two threads.

One computes while the other writes. They take turns at writing, because the kernel lets one writer
at a time into a file and the others burn their time waiting; and they write small pieces, because
large ones make it look for large pages, which takes longer than the copy.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from bnfold.errors import ReadError
from bnfold.onnx_fold import FoldedTensor

Wrote = Callable[[int, int], None]

_THREADS = 2
_PIECE_BYTES = 1 << 16


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
    _make_room(path, places)
    turn = threading.Lock()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="bnfold-write") as pool:
        tasks = {pool.submit(write_tensor, path, place, turn): place for place in places}
        try:
            for task in as_completed(tasks):
                task.result()
                done += int(tasks[task].tensor.nbytes)
                if on_progress is not None:
                    on_progress(done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _make_room(path: Path, places: Sequence[Place]) -> None:
    """Give the file its final size: growing it here and there is several times as slow."""
    end = max((place.offset + int(place.tensor.nbytes) for place in places), default=0)
    with path.open("ab") as file:
        if file.tell() < end:
            file.truncate(end)


def write_tensor(path: Path, place: Place, turn: threading.Lock) -> None:
    """Write one tensor to its place, a folded one piece by piece when it is this thread's turn."""
    tensor = place.tensor
    if isinstance(tensor, ir.ExternalTensor) and not Path(tensor.path).is_file():
        met = f"the file of tensor '{tensor.name}' is gone"
        raise ReadError(met, file=str(tensor.path), todo="keep the input until all is written")
    with path.open("r+b") as file:
        file.seek(place.offset)
        if isinstance(tensor, FoldedTensor):
            _write_folded(file.fileno(), place.offset, tensor, turn)
        elif isinstance(tensor, ir.TensorProtoTensor | ir.ExternalTensor | ir.Tensor):
            tensor.tofile(file)
        else:
            file.write(tensor.tobytes())


def _write_folded(descriptor: int, at: int, tensor: FoldedTensor, turn: threading.Lock) -> None:
    for block in tensor.blocks():
        with turn:
            while len(block):
                wrote = os.pwrite(descriptor, block[:_PIECE_BYTES], at)
                block, at = block[wrote:], at + wrote
