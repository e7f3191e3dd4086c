"""One model's latencies, and the table of all of them; `tools.latency` measures them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bnfold.report.bench import BenchResult, Setting, Speed, Timing
from bnfold.report.words_bench import milliseconds


@dataclass(frozen=True, slots=True)
class Row:
    """One model.

    Attributes:
        model: Its name.
        options: What it was measured with; its file's size and date among it.
        tools: Those whose results were timed, behind the original.
        failures: Why another one has none, by tool.
        bench: What was measured; None where the original itself can't be timed.
        again: The same once more, where bnfold was slower.
    """

    model: str
    options: tuple[str, ...]
    tools: tuple[str, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    bench: BenchResult | None = None
    again: BenchResult | None = None

    def timing(self, tool: str, threads: int, *, again: bool = False) -> Timing | None:
        """How long what ``tool`` made takes; None where it was not timed."""
        result = self.again if again else self.bench
        if result is None or tool not in ("original", *self.tools):
            return None
        index = ("original", *self.tools).index(tool)
        return next((s.timings[index] for s in result.settings if s.threads == threads), None)

    def ratio(self, tool: str, threads: int) -> float:
        """Its time over the original's; 1 where it failed."""
        found = self.timing(tool, threads)
        return 1.0 if found is None else found.ratio

    def unclear(self, tool: str) -> list[int]:
        """On which numbers of threads it can't be told how ``tool`` compares."""
        numbers = [s.threads for s in self.bench.settings] if self.bench else []
        found = {number: self.timing(tool, number) for number in numbers}
        return [n for n, one in found.items() if one and one.speed is Speed.UNCLEAR]

    def slower(self, tool: str) -> list[Setting]:
        """Where what ``tool`` made is slower than the original, each time that it was measured."""
        first = {s.threads: s for s in self.bench.settings} if self.bench else {}
        return [
            setting
            for threads, setting in first.items()
            if _is_slower(self.timing(tool, threads))
            and (self.again is None or _is_slower(self.timing(tool, threads, again=True)))
        ]


def _is_slower(timing: Timing | None) -> bool:
    return timing is not None and timing.speed is Speed.SLOWER


def told(row: Row, tools: Sequence[str]) -> str:
    """What was found, in one line."""
    numbers = [s.threads for s in row.bench.settings] if row.bench else []
    said = [f"{tool} {_cell(row, tool, number)}" for number in numbers for tool in tools]
    return ", ".join([*said, *(f"{tool} failed: {why}" for tool, why in row.failures.items())])


def report(rows: Sequence[Row], tools: Sequence[str]) -> str:
    """The table, the means, the models where bnfold is slower, and what failed; as Markdown."""
    numbers = sorted({s.threads for row in rows if row.bench for s in row.bench.settings})
    columns = [(number, tool) for number in numbers for tool in tools]
    heads = ["model", *(f"original, {_on(n)}, ms" for n in numbers),
             *(f"{tool}, {_on(n)}" for n, tool in columns),
             f"operators: original, {', '.join(tools)}"]  # fmt: skip
    lines = [_line(heads), "|:--|" + "--:|" * (len(heads) - 1)]
    for row in rows:
        times = [row.timing("original", number) for number in numbers]
        lines.append(_line([
            row.model, *("-" if one is None else milliseconds(one.median) for one in times),
            *(_cell(row, tool, number) for number, tool in columns), _operators(row, tools),
        ]))  # fmt: skip
    means = [f"**{mean(rows, tool, number):.3f}**" for number, tool in columns]
    lines.append(_line(["**geometric mean**", *([""] * len(numbers)), *means, ""]))
    return "\n".join([*_conditions(rows), "", *lines, "", *_summary(rows, tools)])


def mean(rows: Sequence[Row], tool: str, threads: int) -> float:
    """The geometric mean of a tool's ratios."""
    logs = [math.log(row.ratio(tool, threads)) for row in rows if row.bench is not None]
    return math.exp(math.fsum(logs) / len(logs)) if logs else 1.0


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _on(threads: int) -> str:
    return f"{threads} thread" + "s" * (threads > 1)


def _cell(row: Row, tool: str, threads: int) -> str:
    found = row.timing(tool, threads)
    if found is None:
        return "failed" if tool in row.failures else "-"
    signs = {Speed.FASTER: " ▼", Speed.SLOWER: " ▲", Speed.SAME: " ≈", Speed.UNCLEAR: " ?"}
    return f"{found.ratio:.3f}{signs.get(found.speed, '')}"


def _operators(row: Row, tools: Sequence[str]) -> str:
    if row.bench is None:
        return "-"
    names = ("original", *row.tools)
    nodes = {n: m.size.nodes for n, m in zip(names, row.bench.models, strict=True)}
    return ", ".join(str(nodes.get(name, "-")) for name in ("original", *tools))


def _conditions(rows: Sequence[Row]) -> list[str]:
    result = next((row.bench for row in rows if row.bench is not None), None)
    if result is None:
        return ["Nothing was timed."]
    return [
        f"Milliseconds of the original, and ratios to it; {result.runtime} with all optimisations "
        f"on, {result.provider}, {result.device}; median of {result.rounds} rounds in which all "
        "have their turn. ▼ faster, ▲ slower, ≈ no difference beyond noise, ? too noisy to tell."
    ]


def _summary(rows: Sequence[Row], tools: Sequence[str]) -> list[str]:
    lines = []
    for tool in tools:
        slow = [f"{row.model} ({_slow(row, tool)})" for row in rows if row.slower(tool)]
        what = f"slower than the original beyond noise on {len(slow)} of {len(rows)} models"
        unclear = sum(bool(row.unclear(tool)) for row in rows)
        listed = f": {', '.join(slow)}" if slow else ""
        lines.append(f"- {tool}: {what}{listed}; unclear on {unclear}")
    lines += [f"- {row.model}: {tool} failed: {why}" for row in rows
              for tool, why in row.failures.items()]  # fmt: skip
    return lines


def _slow(row: Row, tool: str) -> str:
    return ", ".join(
        f"{row.ratio(tool, setting.threads):.3f} on {_on(setting.threads)}"
        for setting in row.slower(tool)
    )
