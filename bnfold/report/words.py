"""What a check says, in the words that all formats share. Names are left as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnfold.report.lines import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnfold.report.model import Size
    from bnfold.verify.judge import Gates
    from bnfold.verify.result import (
        CheckResult,
        InputUse,
        ProviderRun,
        SiteResult,
        TierResult,
    )

TIERS = {"A": "stored weights", "B": "site by site", "C": "end to end", "D": "decisions"}
_NAMED = 6  # of many names: as many as a line takes


def number(value: float) -> str:
    """Two digits that count: ``1.2e-07``."""
    return f"{value:.2g}"


def times(ratio: float) -> str:
    """Three digits that count, written out: ``10,100``."""
    return f"{ratio:,.0f}" if 1000 <= ratio < 1e7 else f"{ratio:.3g}"


def spoken(check: CheckResult) -> tuple[TierResult, ...]:
    """What the tiers say; where there is none, that nothing was checked, which is no pass."""
    from bnfold.verify.result import TierResult  # loaded on use: it needs numpy

    return check.tiers or (TierResult("", "", check.verdict, check.message),)


def tier_name(tier: TierResult) -> str:
    """``tier C``."""
    return f"tier {tier.tier}" if tier.tier else "check"


def tier_place(tier: TierResult) -> str:
    """``tier C on CPUExecutionProvider``."""
    return tier_name(tier) + (f" on {tier.provider}" if tier.provider else "")


def summary(check: CheckResult) -> str:
    """What the tier that speaks says; where all pass, that they do."""
    if check.verdict.value != "pass":
        return check.message
    names = list(dict.fromkeys(tier.tier for tier in check.tiers))
    places = dict.fromkeys(tier.provider for tier in check.tiers if tier.provider)
    where = f" on {', '.join(places)}" if places else ""
    passed = f"tier {names[0]} passes" if len(names) == 1 else f"tiers {', '.join(names)} pass"
    return f"{passed}{where} ({drawn(check)})"


def drawn(check: CheckResult) -> str:
    """How many samples there were and where they came from."""
    source = "given" if check.seed is None else f"seed {check.seed}"
    return f"{counted(check.samples, 'sample')}, {source}"


def certificate(run: ProviderRun) -> str:
    """Where the nodes ran, and how exactly; in one line."""
    parts = [_placement(run), _tf32(run), f"jitter {number(run.jitter)}"]
    return ", ".join(part for part in parts if part)


def _placement(run: ProviderRun) -> str:
    here, promised = run.ran.get(run.provider, 0), run.promised.get(run.provider, 0)
    if run.ran:
        promise = f" (promise {promised:,})" if run.promised else ""
        return f"ran {here:,} of {sum(run.ran.values()):,} nodes on {run.provider}{promise}"
    if run.promised:
        return f"{promised:,} of {sum(run.promised.values()):,} nodes promised to {run.provider}"
    return f"ran on {run.provider}"


def _tf32(run: ProviderRun) -> str:
    if not run.tf32:
        return ""
    measured = "" if run.tf32_error is None else f" (measured {number(run.tf32_error)})"
    return f"TF32 {run.tf32}{measured}"


def fed(use: InputUse) -> str:
    """``x float32 1x3x8x8 (normal)``."""
    shapes = ", ".join("x".join(map(str, shape)) or "scalar" for shape in use.shapes)
    return " ".join(part for part in (use.name, use.dtype, shapes, f"({use.kind})") if part)


def limits(gates: Gates) -> str:
    """The user's own limits; empty where there are none."""
    if gates.rtol is None and gates.atol is None:
        return ""
    return f"rtol {gates.rtol or 0:g}, atol {gates.atol or 0:g}"


def site_said(site: SiteResult) -> str:
    """A site and by how much it is off."""
    channel = "" if site.channel is None else f" on channel {site.channel}"
    return (
        f"{site.site} ({site.op_type}): off by {times(site.ratio)} times what rounding explains"
        f"{channel} (error {number(site.error)}, bound {number(site.bound)})"
    )


def some(names: Sequence[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def unpaired(check: CheckResult) -> str:
    """How many of the candidate's tensors have no counterpart; empty where all have one."""
    if not check.unpaired:
        return ""
    return f"{counted(len(check.unpaired), 'tensor')} could not be paired: {some(check.unpaired)}"


def changed_operators(before: Size, after: Size) -> list[tuple[str, int, int]]:
    """Operators whose number changed, the largest change first."""
    names = {*before.operators, *after.operators}
    counts = [(n, before.operators.get(n, 0), after.operators.get(n, 0)) for n in names]
    changed = [(name, old, new) for name, old, new in counts if old != new]
    return sorted(changed, key=lambda row: (-abs(row[2] - row[1]), row[0]))


def totals(before: Size, after: Size) -> list[tuple[str, int, int]]:
    """Nodes, parameters and bytes before and after."""
    return [
        ("nodes", before.nodes, after.nodes),
        ("parameters", before.parameters, after.parameters),
        ("bytes", before.parameter_bytes, after.parameter_bytes),
    ]


def rolled_back(dropped: Sequence[str]) -> str:
    """Which folds were taken back; empty where none was."""
    if not dropped:
        return ""
    return f"{counted(len(dropped), 'fold')} rolled back after the check: {some(dropped)}"
