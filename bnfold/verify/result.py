"""What a check found, as plain data: enough to print it in any form, and to judge it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bnfold.errors import InconclusiveError, MismatchError
from bnfold.verify.judge import Figures, Gates, Measured, Verdict, worst
from bnfold.verify.plain import plain, restored


@dataclass(frozen=True, slots=True)
class OutputResult:
    """One output in one tier.

    Attributes:
        output: Its name.
        verdict: What the tier says of it.
        message: Why, in one sentence.
        figures: What the verdict rests on; None where nothing was computed.
        measured: The errors sample by sample, from which it can be judged again.
    """

    output: str
    verdict: Verdict
    message: str
    figures: Figures | None = None
    measured: Measured | None = None


@dataclass(frozen=True, slots=True)
class SiteResult:
    """One site of tier B: an operator of the candidate on real activations, in float64.

    Attributes:
        site: The candidate's operator, by name.
        op_type: Its type.
        tensor: The candidate's tensor that was compared.
        reference: The reference's tensor that it should hold.
        verdict: Whether the difference is no larger than what rounding the weights explains.
        error: Norm of the difference over the norm of the reference's tensor.
        bound: The same of what rounding explains.
        ratio: The largest difference of any channel over what rounding explains there.
        channel: The channel where that is; None where the bound is on all channels together.
        caught: The smallest power of two that would have been flagged, had the whole weight of the
            site a factor of ``1 + caught``; None without a weight, or where that is not sure.
    """

    site: str
    op_type: str
    tensor: str
    reference: str
    verdict: Verdict
    error: float
    bound: float
    ratio: float
    channel: int | None = None
    caught: float | None = None


@dataclass(frozen=True, slots=True)
class TierResult:
    """One tier, on one provider.

    Attributes:
        tier: ``A`` (weights), ``B`` (site by site), ``C`` (end to end) or ``D`` (decisions).
        provider: The execution provider's full name; empty for tiers that run nothing there.
        verdict: What the tier says.
        message: Why, in one sentence.
        outputs: Each output's verdict and errors, in tiers C and D.
        sites: Each site's verdict and errors, in tier B, in the order of the graph.
        caught: The smallest relative error that this tier would have flagged; None if unknown.
    """

    tier: str
    provider: str
    verdict: Verdict
    message: str
    outputs: tuple[OutputResult, ...] = ()
    sites: tuple[SiteResult, ...] = ()
    caught: float | None = None


@dataclass(frozen=True, slots=True)
class ProviderRun:
    """How one execution provider ran the models: the certificate of placement.

    Attributes:
        provider: Its full name.
        runtime: What ran the candidate, with its version (``onnxruntime 1.31.1``, ``torch 2.13``).
        device: The device in words; empty where the runtime does not say.
        options: The provider's options as read back from the session.
        promised: How many nodes the runtime assigned to each provider when it loaded the model.
        ran: How many nodes each provider ran, by the runtime's own profile.
        elsewhere: Nodes that ran on another provider, with their operator type.
        tf32: ``off``, ``on`` (by request) or empty where the device has no such mode.
        tf32_error: The relative error measured on a product that TF32 would spoil (about 1e-4 with
            TF32, 1e-7 without); None where it was not measured.
        jitter: The largest relative distance of two runs of the unfolded model on one sample.
    """

    provider: str
    runtime: str
    device: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    promised: Mapping[str, int] = field(default_factory=dict)
    ran: Mapping[str, int] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    tf32: str = ""
    tf32_error: float | None = None
    jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class WeightRange:
    """How large each channel of a weight is, before and after.

    At most 256 numbers on each side: with more channels each number is the largest of several
    neighbours.

    Attributes:
        tensor: The candidate's name of the weight.
        before: Largest absolute value of each output channel in the reference; empty if it has
            no such weight.
        after: The same in the candidate.
    """

    tensor: str
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class InputUse:
    """What was fed to one input.

    Attributes:
        name: The input's name.
        dtype: Its numpy type.
        shapes: The distinct shapes that were fed.
        kind: How they were made: ``given``, ``normal``, ``running statistics``, ``integers``,
            ``bits``, ``boxes``.
    """

    name: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    kind: str


@dataclass(frozen=True, slots=True)
class Mutation:
    """What tier C flags when a weight of the candidate is spoilt on purpose.

    Attributes:
        provider: Where the mutants ran, by its full name.
        weight: The weight, by name.
        caught: The smallest ``2^-k`` such that the weight times ``1 + 2^-k`` fails.
    """

    provider: str
    weight: str
    caught: float


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
        runs: How each provider ran the models.
        inputs: What was fed to each input.
        weights: Weights whose channels changed, before and after.
        unpaired: Tensors of the candidate that could not be paired with one of the reference.
        guilty: The first site that is wrong; empty where none is, or it is not known.
        caught: The smallest error that the check would have flagged, in one sentence.
        gates: The user's own limits beside the noise floor.
        environment: Versions and machine, by name.
        mutations: What tier C flags of mutants, where no tier B says what is caught.
    """

    reference: str
    candidate: str
    tiers: tuple[TierResult, ...]
    samples: int
    seed: int | None
    warnings: tuple[str, ...] = ()
    runs: tuple[ProviderRun, ...] = ()
    inputs: tuple[InputUse, ...] = ()
    weights: tuple[WeightRange, ...] = ()
    unpaired: tuple[str, ...] = ()
    guilty: str = ""
    caught: str = ""
    gates: Gates = field(default_factory=Gates)
    environment: Mapping[str, str] = field(default_factory=dict)
    mutations: tuple[Mutation, ...] = ()

    def __str__(self) -> str:
        lines = [f"check: {self.verdict.value}: {self.candidate} against {self.reference}"]
        for tier in self.tiers:
            place = f"tier {tier.tier}" + (f" on {tier.provider}" if tier.provider else "")
            lines.append(f"  {place}: {tier.verdict.value}: {tier.message}")
        return "\n".join(
            [*lines, *([f"  would have caught: {self.caught}"] if self.caught else [])]
        )

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

    def named(self, reference: str, candidate: str) -> CheckResult:
        """The same result under other names of the models."""
        return replace(self, reference=reference, candidate=candidate)

    def to_dict(self) -> dict[str, Any]:
        """The result for JSON: strings, numbers, lists, mappings and None only."""
        head = {
            "verdict": self.verdict.value, "exit_code": self.exit_code, "message": self.message,
        }  # fmt: skip
        fields: dict[str, Any] = plain(self)
        return head | fields

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> CheckResult:
        """The result that ``to_dict`` wrote.

        Raises:
            ValueError: It is none; names the field.
        """
        result: CheckResult = restored(cls, stored)
        return result
