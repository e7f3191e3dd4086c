"""The README says what is true now."""

from __future__ import annotations

from pathlib import Path

from bnfold.planning import Reason
from bnfold.report.model import Report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_reason_is_listed_in_its_own_words() -> None:
    for reason in Reason:
        sentence = reason.sentence.format(witness="…")
        assert f"| {reason.code} | {reason.slug} | {sentence} |" in README
    assert README.count("| BNF") == len(Reason)


def test_the_two_commands_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert f"\n{target}:" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_what_the_example_uses_is_there() -> None:
    for name in ("kept", "steps"):
        assert hasattr(Report, name) or name in Report.__dataclass_fields__
    assert "@@" not in README
