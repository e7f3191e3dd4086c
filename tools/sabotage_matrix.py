"""What came of a sabotage: cases, how often the judge was right, and all of it as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Said:
    """What a judge says of a pair: ``pass``, ``inconclusive``, ``fail`` or ``error``."""

    verdict: str
    message: str = ""
    tiers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """One pair that was judged.

    Attributes:
        model: The unfolded model.
        name: The tool, rewrite or defect.
        origin: Who made the fold that the defect or rewrite is in; empty for a tool's own fold.
        right: Whether the judge should say pass.
        site: Where the defect is.
        felt: How much it moves the outputs, in roundings of the same weights.
        said: What the judge says.
        seconds: How long that took.
        seed: What the site was drawn with.
    """

    model: str
    name: str
    origin: str
    right: bool
    site: str
    felt: float
    said: Said
    seconds: float
    seed: int

    @property
    def outcome(self) -> str:
        """``good``, ``miss``, ``false alarm``, ``undecided`` or ``error``."""
        if self.said.verdict == "error":
            return "error"
        if self.said.verdict == "inconclusive":
            return "undecided"
        if self.right:
            return "good" if self.said.verdict == "pass" else "false alarm"
        return "good" if self.said.verdict == "fail" else "miss"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A case that could not be made, and why."""

    model: str
    name: str
    origin: str
    why: str


@dataclass(frozen=True, slots=True)
class Matrix:
    """What the sabotage of one or several models gave."""

    cases: tuple[Case, ...]
    skipped: tuple[Skipped, ...]

    @classmethod
    def of(cls, found: Iterable[Case | Skipped]) -> Matrix:
        """Sorts what was found."""
        every = list(found)
        return cls(
            tuple(case for case in every if isinstance(case, Case)),
            tuple(case for case in every if isinstance(case, Skipped)),
        )

    @property
    def bad(self) -> tuple[Case, ...]:
        """All that the judge did not tell."""
        return tuple(case for case in self.cases if case.outcome != "good")

    def text(self) -> str:
        """A row for each model, what was not told, what each tier said, what could not be made."""
        return "\n\n".join(
            part for part in (self._table(), self._wrong(), self._tiers(), self._left_out()) if part
        )

    def _table(self) -> str:
        lines = [
            f"{'model':28} {'right':>6} {'false':>6} {'undec':>6}   {'defects':>7} {'missed':>6}"
            f" {'undec':>6}   {'errors':>6} {'skipped':>7}"
        ]
        every = [case.model for case in self.cases] + [case.model for case in self.skipped]
        for name in dict.fromkeys(every):
            own = [case for case in self.cases if case.model == name]
            lines += [_row(name, own, sum(case.model == name for case in self.skipped))]
        return "\n".join([*lines, _row("all", self.cases, len(self.skipped))])

    def _wrong(self) -> str:
        return "\n".join(
            f"{case.outcome}: {case.model} {case.name} in {case.origin or 'its own fold'}, seed "
            f"{case.seed}{f', {case.site}' if case.site else ''}, {case.felt:.3g} roundings: "
            f"{' '.join(f'{k}={v}' for k, v in case.said.tiers.items())} {case.said.message[:160]}"
            for case in self.bad
        )

    def _tiers(self) -> str:
        """How many each tier told by itself."""
        names = dict.fromkeys(tier for case in self.cases for tier in case.said.tiers)
        lines = []
        for name in names:
            cells = []
            for right in (True, False):
                said = [c.said.tiers[name] for c in self.cases
                        if c.right is right and name in c.said.tiers]  # fmt: skip
                counts = ", ".join(f"{n} {verdict}" for verdict, n in Counter(said).items())
                cells.append(f"{'right folds' if right else 'defects'}: {counts or 'none'}")
            lines.append(f"tier {name}: {'; '.join(cells)}")
        return "\n".join(lines)

    def _left_out(self) -> str:
        """How often each case could not be made, and why."""
        whys = Counter((s.name, s.why) for s in self.skipped)
        return "\n".join(f"skipped {n} x {name}: {why}" for (name, why), n in whys.items())


def _row(name: str, cases: Sequence[Case], skipped: int) -> str:
    def count(outcome: str, right: bool | None = None) -> int:
        return sum(c.outcome == outcome and right in (None, c.right) for c in cases)

    right = sum(case.right for case in cases)
    return (
        f"{name:28} {right:6} {count('false alarm'):6} {count('undecided', True):6}"
        f"   {len(cases) - right:7} {count('miss'):6} {count('undecided', False):6}"
        f"   {count('error'):6} {skipped:7}"
    )
