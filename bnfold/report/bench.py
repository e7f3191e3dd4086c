"""What `bnfold bench` measured, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from bnfold.errors import BnfoldError, UsageError
from bnfold.report.model import Size
from bnfold.verify.paired import FEWEST
from bnfold.verify.result import InputUse, ProviderRun


class Speed(Enum):
    """How a model compares with the baseline; ``unclear`` where noise hides it."""

    BASELINE = "baseline"
    FASTER = "faster"
    SLOWER = "slower"
    SAME = "no difference beyond noise"
    UNCLEAR = "unclear"


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A model that was timed.

    Attributes:
        file: Its path, or what it is called.
        size: How large it is, as it stands in the file.
        steps: How many affine steps it has, by bnfold's own count.
    """

    file: str
    size: Size
    steps: int


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one model took, in one setting.

    Attributes:
        median: Milliseconds of a call, the median of all rounds.
        quartiles: The quarter of the rounds below the first took less, that above the second more.
        ratio: Its time over the baseline's in the same round, the median of all rounds.
        interval: Where that median lies, with a confidence of at least 99 % (sign test); None of
            the baseline, and with fewer than 8 rounds.
        speed: What follows from the interval and the noise.
        milliseconds: Of a call, in each round; of the baseline the mean of its two sessions.
    """

    median: float
    quartiles: tuple[float, float]
    ratio: float
    interval: tuple[float, float] | None
    speed: Speed
    milliseconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """All models on one number of threads.

    Attributes:
        threads: Threads within an operator.
        calls: How many calls in a row are timed at once; more than one where they are short.
        noise: By how much a ratio has to differ from 1 to count, whole interval and all: what two
            sessions of the baseline itself differ by in these rounds, but at least 0.02.
        timings: Of each model, in their order.
    """

    threads: int
    calls: int
    noise: float
    timings: tuple[Timing, ...]


@dataclass(frozen=True, slots=True)
class BenchResult:
    """The latency of models side by side.

    Attributes:
        models: The models; the first is the baseline.
        settings: What was measured, for each number of threads.
        provider: Where they ran, by its full name.
        device: What that runs on, as far as it says.
        runtime: The runtime and its version.
        rounds: How often each model had its turn, for each number of threads.
        seed: The seed of the drawn inputs; None for the user's own.
        inputs: What was fed to each input, the same to all models.
        certificates: How the provider ran each model; empty on the CPU, where there is no other
            place.
        environment: Versions of what took part, and the machine.
    """

    models: tuple[BenchModel, ...]
    settings: tuple[Setting, ...]
    provider: str
    device: str
    runtime: str
    rounds: int
    seed: int | None
    inputs: tuple[InputUse, ...]
    certificates: tuple[ProviderRun, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        from bnfold.report.text_bench import render_bench

        return render_bench(self)

    def raise_if_slower(self, percent: float = 0.0) -> None:
        """Raises where a model is slower than the baseline, beyond noise.

        Args:
            percent: By how much it may be slower: the whole interval has to lie beyond.

        Raises:
            UsageError: There are too few runs to tell.
            BnfoldError: A model is slower; names it, with its ratio.
        """
        require_enough(self.rounds)
        slow = [
            f"{model.file} takes {timing.ratio:.3f} times as long on {setting.threads} thread(s)"
            for setting in self.settings
            for model, timing in zip(self.models, setting.timings, strict=True)
            if timing.speed is Speed.SLOWER
            and timing.interval is not None
            and timing.interval[0] > 1 + percent / 100
        ]
        if slow:
            limit = f" by more than {percent:g} %" if percent else ""
            raise BnfoldError(f"slower than {self.models[0].file}{limit}: {', '.join(slow)}")


def require_enough(rounds: int) -> None:
    """Refuses a number of rounds that could never show that a model is slower.

    Raises:
        UsageError: It is one.
    """
    if rounds < FEWEST:
        met = f"{rounds} runs can't tell whether a model is slower"
        raise UsageError(met, todo=f"take at least {FEWEST}")
