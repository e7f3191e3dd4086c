"""What a check found, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bnfold.errors import InconclusiveError, MismatchError
from bnfold.verify.judge import Figures, Verdict, worst


@dataclass(frozen=True, slots=True)
class OutputResult:
    """One output of a tier: its name, verdict, reason and errors."""

    output: str
    verdict: Verdict
    message: str
    figures: Figures | None = None


@dataclass(frozen=True, slots=True)
class TierResult:
    """One tier on one provider.

    Attributes:
        tier: ``A`` (weights) or ``C`` (end to end).
        provider: The execution provider's full name; empty for tier A, which runs nothing.
        verdict: What the tier says.
        message: Why, in one sentence.
        outputs: Each output's verdict and errors; empty for tier A.
    """

    tier: str
    provider: str
    verdict: Verdict
    message: str
    outputs: tuple[OutputResult, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check found.

    Attributes:
        reference: What the unfolded model is called.
        candidate: What the folded model is called.
        tiers: What each tier said; the worst one speaks.
        samples: How many samples were run.
        seed: The seed of synthetic samples; None for the user's own.
        warnings: What is worth knowing and changes no verdict.
    """

    reference: str
    candidate: str
    tiers: tuple[TierResult, ...]
    samples: int
    seed: int | None
    warnings: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The worst of the tiers' verdicts; inconclusive where there is none."""
        return worst(tier.verdict for tier in self.tiers)

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 3 inconclusive."""
        return self.verdict.exit_code

    @property
    def message(self) -> str:
        """What the tier that speaks says."""
        for tier in self.tiers:
            if tier.verdict is self.verdict:
                return tier.message
        return "nothing was checked"

    def raise_for_status(self) -> None:
        """Raises unless the verdict is pass.

        Raises:
            MismatchError: The candidate does not say what the reference says.
            InconclusiveError: Nothing could be told.
        """
        if self.verdict is Verdict.FAIL:
            raise MismatchError(self.message, file=self.candidate)
        if self.verdict is Verdict.INCONCLUSIVE:
            raise InconclusiveError(self.message, file=self.candidate)

    def to_dict(self) -> dict[str, Any]:
        """The result for JSON: strings, numbers, lists and None only."""
        return {
            "verdict": self.verdict.value,
            "exit_code": self.exit_code,
            "message": self.message,
            "reference": self.reference,
            "candidate": self.candidate,
            "samples": self.samples,
            "seed": self.seed,
            "warnings": list(self.warnings),
            "tiers": [_plain(tier) for tier in self.tiers],
        }


def _plain(tier: TierResult) -> dict[str, Any]:
    plain = asdict(tier)
    plain["verdict"] = tier.verdict.value
    plain["outputs"] = [
        {**asdict(output), "verdict": output.verdict.value} for output in tier.outputs
    ]
    return plain
