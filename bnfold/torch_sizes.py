"""Sizes as products of numbers and symbols: ``2*conv.2*conv.3``.

A symbol is a size that nobody knows but that is one and the same wherever its name stands. Sizes
that are no such product have no name here: they are None, and get a symbol of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

from bnfold.channel_graph import Dim

Size = int | str

# A pair of sizes that are equal says what a symbol is; chains of such pairs are short.
_DEPTH = 50


def _factors(size: Size) -> tuple[int, Counter[str]]:
    """The number in a product, and its symbols."""
    if isinstance(size, int):
        return size, Counter()
    parts = size.split("*")
    numbers = [int(part) for part in parts if part.isdigit()]
    return prod(numbers), Counter(part for part in parts if not part.isdigit())


def _product_of(number: int, symbols: Counter[str]) -> Size:
    names = sorted(symbols.elements())
    if not names or number == 0:
        return number
    return "*".join(names if number == 1 else [str(number), *names])


def product(sizes: Iterable[Dim]) -> Dim:
    """The product, if all sizes are known."""
    number, symbols = 1, Counter[str]()
    for size in sizes:
        if size is None:
            return None
        factor, names = _factors(size)
        number, symbols = number * factor, symbols + names
    return _product_of(number, symbols)


def quotient(size: Dim, by: Dim) -> Dim:
    """``size / by`` where that is exact for every value of the symbols; ``by`` is not 0."""
    if size is None or by is None:
        return None
    (number, symbols), (divisor, divided) = _factors(size), _factors(by)
    if divisor <= 0 or number % divisor or divided - symbols:
        return None
    return _product_of(number // divisor, symbols - divided)


def added(one: Dim, other: Dim) -> Dim:
    """The sum, where that is a product again: of numbers, or of multiples of one product."""
    if one is None or other is None or one == 0 or other == 0:
        return other if one == 0 else one if other == 0 else None
    (first, symbols), (second, others) = _factors(one), _factors(other)
    return _product_of(first + second, symbols) if symbols == others else None


@dataclass(frozen=True, slots=True)
class Window:
    """What slides along one axis; ``padded`` counts both sides.

    Sizes are None, or symbols, where they are not known.
    """

    kernel: Dim
    stride: Dim = 1
    padded: Dim = 0
    dilation: Dim = 1
    ceil: bool = False

    def over(self, size: Dim) -> Dim:
        """At how many places it stops along an axis of ``size``."""
        if size == self.kernel is not None and self.padded == 0 and self.dilation == 1:
            return 1
        asked = (self.kernel, self.stride, self.padded, self.dilation)
        kernel, stride, padded, dilation = (v if isinstance(v, int) else -1 for v in asked)
        if min(kernel, stride, padded, dilation) < 0 or stride == 0:
            return None
        spare = padded - dilation * (kernel - 1) - 1
        if isinstance(size, int):
            return self._stops(size, spare, stride, padded)
        # floor((stride * m + spare) / stride) + 1 = m
        return quotient(size, stride) if self._steps(spare, stride) == -1 else None

    def _steps(self, room: int, stride: int) -> int:
        return -(-room // stride) if self.ceil else room // stride

    def _stops(self, size: int, spare: int, stride: int, padded: int) -> int:
        stops = self._steps(size + spare, stride) + 1
        behind = self.ceil and (stops - 1) * stride >= size + padded // 2
        return stops - 1 if behind else stops


def transposed_window(size: Dim, window: Window, extra: Dim) -> Dim:
    """How many places a transposed convolution writes to; ``extra`` is its output padding."""
    asked = (window.kernel, window.stride, window.padded, window.dilation, extra)
    if not all(isinstance(value, int) for value in asked):
        return None
    kernel, stride, padded, dilation, behind = (int(v or 0) for v in asked)
    rest = dilation * (kernel - 1) + 1 + behind - padded - stride
    return added(product((size, stride)), rest)


def broadcast(shapes: Sequence[Sequence[Dim]]) -> tuple[Dim, ...]:
    """The shape that tensors of these shapes are broadcast to."""
    rank = max(map(len, shapes))
    axes = ([s[k - rank] for s in shapes if k >= rank - len(s)] for k in range(rank))
    return tuple(_broadcast(sizes) for sizes in axes)


def _broadcast(sizes: Sequence[Dim]) -> Dim:
    others = [size for size in sizes if size != 1]
    numbers = [size for size in others if isinstance(size, int)]
    if not others:
        return 1
    if numbers:  # whatever the symbols are, they are this or 1
        return numbers[0]
    return others[0] if all(size == others[0] for size in others) else None


@dataclass(slots=True)
class Symbols:
    """What is known of symbols: that one is a number, or another."""

    _meaning: dict[str, Size] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many symbols have been replaced."""
        return len(self._meaning)

    def resolve(self, size: Dim) -> Dim:
        """``size`` with all symbols replaced that are known to be something else."""
        for _ in range(_DEPTH):
            if size is None or isinstance(size, int):
                return size
            number, symbols = _factors(size)
            if not symbols.keys() & self._meaning.keys():
                return size
            size = product([number, *(self._meaning.get(s, s) for s in symbols.elements())])
        return size

    def equate(self, one: Dim, other: Dim) -> None:
        """Note that two sizes are equal, as far as that says what a symbol is."""
        one, other = self.resolve(one), self.resolve(other)
        if one is None or other is None or one == other:
            return
        for side, whole in ((other, one), (one, other)):
            number, symbols = _factors(side)
            meaning = quotient(whole, number)
            if symbols.total() == 1 and meaning is not None and _is_free(symbols, meaning):
                self._meaning[next(iter(symbols))] = meaning
                return


def _is_free(symbols: Counter[str], size: Size) -> bool:
    """Whether none of ``symbols`` is in ``size``."""
    return not symbols.keys() & _factors(size)[1].keys()
