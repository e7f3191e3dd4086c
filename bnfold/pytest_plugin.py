"""The pytest plugin: a fixture ``bnfold_check``, and the options of a session.

def test_the_folded_net_says_the_same(bnfold_check):
    bnfold_check("net.onnx", "net.folded.onnx", samples=16)

Loaded by every pytest session where bnfold is installed, so that it may cost nothing: neither onnx
nor a runtime is imported before the fixture is called.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from bnfold.verify.result import CheckResult

_LONGEST = 120  # of a report's name; file systems end at 255 bytes


class BnfoldCheck(Protocol):
    """What the fixture is: the type to annotate it with."""

    def __call__(self, reference: Any, candidate: Any, **options: Any) -> CheckResult:
        """As `bnfold.testing.assert_same_model`."""
        ...


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--bnfold-provider``, ``--bnfold-report-dir`` and the ini option ``bnfold_provider``."""
    group = parser.getgroup("bnfold", "checks of folded models")
    group.addoption(
        "--bnfold-provider", metavar="NAME", action="append", default=[],
        help="execution provider that bnfold_check runs on; may be given several times",
    )  # fmt: skip
    group.addoption(
        "--bnfold-report-dir", metavar="DIR",
        help="write what each bnfold_check found there, as JSON, Markdown and HTML",
    )  # fmt: skip
    parser.addini("bnfold_provider", "providers of bnfold_check (default: cpu)", type="args")


@pytest.fixture
def bnfold_check(request: pytest.FixtureRequest) -> BnfoldCheck:
    """``bnfold_check(reference, candidate, **options)`` fails the test unless the check passes.

    Options are those of `bnfold.check`; providers are the session's where none are given.
    """
    folder, counter = _report_folder(request.config), itertools.count(1)

    def run(reference: Any, candidate: Any, **options: Any) -> CheckResult:
        __tracebackhide__ = True
        import bnfold
        from bnfold.testing import require_pass, write_reports

        options.setdefault("providers", _providers(request.config))
        check: CheckResult = bnfold.check(reference, candidate, **options)
        report = None
        if folder is not None:
            name = _report_name(request.node.nodeid, next(counter))
            report = write_reports(check, folder, name)
        require_pass(check, report)
        return check

    return run


def _providers(config: pytest.Config) -> tuple[str, ...]:
    """Of the command line, else of the ini file, else the CPU."""
    named = config.getoption("--bnfold-provider") or config.getini("bnfold_provider")
    return tuple(named) or ("cpu",)


def _report_folder(config: pytest.Config) -> Path | None:
    folder = config.getoption("--bnfold-report-dir")
    return config.invocation_params.dir / folder if folder else None


def _report_name(nodeid: str, count: int) -> str:
    """One name for each call; what a file system may not take is replaced, not what tells apart."""
    plain = re.sub(r"[^\w.-]+", "-", nodeid, flags=re.ASCII).strip("-.")
    mark = hashlib.sha256(nodeid.encode("utf-8", "backslashreplace")).hexdigest()[:8]
    return f"{plain[:_LONGEST]}-{mark}-{count}"
