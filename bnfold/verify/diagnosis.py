"""What the doctor found, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bnfold.verify.cuda_libraries import Library
from bnfold.verify.machine import Gpu, TorchFound
from bnfold.verify.plain import plain


@dataclass(frozen=True, slots=True)
class Tried:
    """An execution provider, tried on a model of one node.

    Attributes:
        provider: Its full name.
        state: ``works``, ``broken`` (built in, but it does not start) or ``missing``.
        said: Of one that works the device and how exactly it multiplies; of one that is broken
            the runtime's own words.
        todo: What to do to have it; empty for one that works.
    """

    provider: str
    state: str
    said: str = ""
    todo: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that stands in the way.

    Attributes:
        met: What was met, in one sentence.
        todo: The next step.
    """

    met: str
    todo: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found.

    Attributes:
        bnfold: Its version.
        python: Its version.
        platform: The operating system in words.
        cpu: What the processor calls itself.
        cores: How many this process may use.
        memory: Bytes; None where the system does not say.
        flavours: Installed distributions of ONNX Runtime and their versions; one is right.
        runtime: The ONNX Runtime that is imported, with its version; empty where there is none.
        providers: Each provider that is built in or could be installed.
        devices: NVIDIA devices, by the driver's own tool.
        libraries: CUDA's libraries, each with where it was found.
        torch: torch as another process imports it; None where it is not installed.
        oracle: What computes the float64 oracle, with its version.
        oracle_error: Why it does not work; empty where it does.
        packages: Versions of the packages that bnfold stands on, and of optional ones; empty
            for one that is not installed.
        environment: Variables that change how a provider computes.
        problems: What stands in the way of a check.
    """

    bnfold: str
    python: str
    platform: str
    cpu: str
    cores: int
    memory: int | None
    flavours: Mapping[str, str]
    runtime: str
    providers: tuple[Tried, ...]
    devices: tuple[Gpu, ...]
    libraries: tuple[Library, ...]
    torch: TorchFound | None
    oracle: str
    oracle_error: str
    packages: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether nothing stands in the way of a check."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis for JSON, with ``healthy``."""
        fields: dict[str, Any] = plain(self)
        return {"healthy": self.healthy} | fields
