"""Inputs for several runs, and what is worth telling about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from bnfold.verify.result import InputUse
from bnfold.verify.subject import Feeds

SAMPLES = 8
GIVEN = "given"


class Redraw(Protocol):
    """Draws the same samples with fewer liberties."""

    def __call__(self, *, second_sizes: bool, extremes: bool) -> Samples:
        """As many samples from the same seed."""
        ...


@dataclass(frozen=True, slots=True)
class Samples:
    """Inputs for several runs.

    Attributes:
        feeds: One mapping of input names to arrays per sample.
        seed: What they were drawn with; None for the user's own.
        kinds: How each input was made, by name: ``given``, ``normal``, ``running statistics``,
            ``integers``, ``bits``, ``boxes``.
        roles: Of each sample: ``ordinary``, ``large``, ``tiny``, ``even`` or ``given``.
        second: Of each sample, whether the sizes that the model leaves open are the second ones.
        redraw: How to draw them again with fewer liberties; None for the user's own.
    """

    feeds: tuple[Feeds, ...]
    seed: int | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)
    roles: tuple[str, ...] = ()
    second: tuple[bool, ...] = ()
    redraw: Redraw | None = field(default=None, compare=False, repr=False)

    @property
    def distinct(self) -> int:
        """How many samples differ from all others in at least one value."""
        return len({tuple((k, _content(f[k])) for k in sorted(f)) for f in self.feeds})

    @property
    def has_second_sizes(self) -> bool:
        """Whether a sample has other sizes than the first one where the model leaves them open."""
        return any(self.second)

    @property
    def has_extremes(self) -> bool:
        """Whether a sample is large, tiny or even."""
        return any(role not in ("ordinary", GIVEN) for role in self.roles)

    def without_second_sizes(self) -> Samples:
        """The same, all in the first sizes: for a model that takes no others."""
        if self.redraw is None or not self.has_second_sizes:
            return self
        return self.redraw(second_sizes=False, extremes=self.has_extremes)

    def without_extremes(self) -> Samples:
        """The same, all ordinary: for a model that overflows on large inputs, say."""
        if self.redraw is None or not self.has_extremes:
            return self
        return self.redraw(second_sizes=self.has_second_sizes, extremes=False)

    def uses(self) -> tuple[InputUse, ...]:
        """What was fed to each input."""
        return tuple(
            InputUse(
                name, str(first.dtype) if first.dtype.kind not in "OUS" else "string",
                tuple(dict.fromkeys(tuple(feed[name].shape) for feed in self.feeds)),
                self.kinds.get(name, GIVEN),
            )
            for name, first in (self.feeds[0].items() if self.feeds else ())
        )  # fmt: skip


def _content(array: NDArray[Any]) -> tuple[Any, ...]:
    # The bytes of an array of strings are addresses.
    body = tuple(array.ravel().tolist()) if array.dtype.kind == "O" else array.tobytes()
    return array.shape, body
