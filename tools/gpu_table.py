"""The table of `tools.gpu_check`: what a check found, in one line of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bnfold.verify.result import CheckResult

COLUMNS = ("model", "ran as", "verdict", "e_fold", "e_unfold", "jitter", "product", "nodes there",
           "elsewhere", "caught")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One model in one mode.

    Attributes:
        model: Its name.
        mode: What the mode is called.
        result: What the check found; None where there was no check.
        error: Why not.
        exit_code: Of the check, or of the error in its place.
    """

    model: str
    mode: str
    result: CheckResult | None
    error: str = ""
    exit_code: int = 0

    @property
    def note(self) -> str:
        """Why it is no pass; empty where it is one."""
        said = self.result.message if self.result else self.error
        return f"{self.model}, {self.mode}: {said}" if self.exit_code else ""

    def cells(self) -> tuple[str, ...]:
        """As `COLUMNS` has it."""
        if self.result is None:
            return (self.model, self.mode, "not run", *["-"] * (len(COLUMNS) - 3))
        tier = next((t for t in self.result.tiers if t.tier == "C"), None)
        worst = max((o.figures for o in tier.outputs if o.figures), key=lambda f: f.e_fold,
                    default=None) if tier else None  # fmt: skip
        run = self.result.runs[-1] if self.result.runs else None
        figures = (worst.e_fold, worst.e_unfold, worst.jitter) if worst else (None,) * 3
        return (
            self.model, self.mode, self.result.verdict.value, *map(_number, figures),
            _number(run.tf32_error if run else None),
            str(run.ran.get(run.provider, 0)) if run else "-",
            str(len(run.elsewhere)) if run else "-",
            _number(tier.caught if tier else None),
        )  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.1e}"


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
