"""What the machine is made of, as far as it tells without a framework."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_QUERY = ("name", "memory.total", "compute_cap", "driver_version")


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA device.

    Attributes:
        name: What its maker calls it.
        memory: With its unit.
        capability: CUDA's compute capability, as ``9.0``.
        driver: The driver's version.
    """

    name: str
    memory: str
    capability: str
    driver: str


@cache
def nvidia_devices() -> tuple[Gpu, ...]:
    """The devices that the driver's own tool lists; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    try:
        done = subprocess.run(
            [tool, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = (line.split(", ") for line in done.stdout.splitlines())
    return tuple(Gpu(*row) for row in rows if len(row) == len(_QUERY))


def nvidia_device() -> str:
    """The device's name; several kinds are told apart by nobody here, so all are named."""
    return " or ".join(dict.fromkeys(device.name for device in nvidia_devices()))


@cache
def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """How many cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int | None:
    """Bytes of main memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


@dataclass(frozen=True, slots=True)
class TorchFound:
    """torch, as it is when imported.

    Attributes:
        version: Its version; empty where it can't be imported.
        cuda: The CUDA that it was built for; empty where for none.
        cudnn: The cuDNN that it brings; empty where none.
        devices: Names of the devices that it can use.
        error: Why it can't be imported.
    """

    version: str = ""
    cuda: str = ""
    cudnn: str = ""
    devices: tuple[str, ...] = ()
    error: str = ""


_ASK_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda or "",
    "cudnn": str(torch.backends.cudnn.version() or "") if cuda else "",
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
}))
"""


def torch_found() -> TorchFound | None:
    """torch, asked in a process of its own; None where it is not installed.

    It takes a second to load, and where its CUDA is broken it can take the process with it.
    """
    if find_spec("torch") is None:
        return None
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _ASK_TORCH],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        told = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError):
        return TorchFound(error="asking it took too long")
    except (ValueError, IndexError):
        return TorchFound(error=(done.stderr.strip().splitlines() or ["it says nothing"])[-1])
    return TorchFound(told["version"], told["cuda"], told["cudnn"], tuple(told["devices"]))
