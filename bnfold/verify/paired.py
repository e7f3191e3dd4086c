"""ratio = median over rounds of t(model) / t(baseline), and when it differs from 1.

All models take turns in one process, so that what the machine does meanwhile meets all of them: the
two times of a round are a pair, and only their ratio is used. Two kinds of noise remain.

- From round to round. If the true median ratio is m, each round's ratio is above m with probability
  1/2, whatever its distribution. So m lies between the k-th smallest and the k-th largest of n
  ratios but for 2 P(Binomial(n, 1/2) < k) (the sign test, inverted); k is the largest for which
  that is at most 1 %. With fewer than 8 rounds there is none: 2 (1/2)^7 > 1 %.
- From session to session. Where a session happens to place its weights stays with it for all
  rounds, so that two sessions of one file can differ by more than the rounds explain. The baseline
  therefore has two sessions, the first and the last to be made. Their mean is what models are held
  against, and by what these two differ in the median is noise; at least 2 %, for they may agree by
  chance. Of 120 comparisons of a file with itself (five models, on one thread and on two) the
  interval did not hold 1 in 10; in none it lay beyond this noise.

A model is faster or slower if its whole interval lies beyond 1 by more than that noise. It is the
same if the whole interval lies within 5 % of 1; else nothing can be told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
# Runs so many calls in a row on the inputs of a round, and says the seconds that one took.
Player = Callable[[int, int], float]

DOUBT = 0.01  # that the interval misses the median
LEAST_NOISE = 0.02
RESOLVED = 0.05  # an interval that reaches further does not show that there is no difference
FEWEST = 8  # rounds that can tell anything
TURN = 0.01  # seconds that a turn should take at least: a timer's step and a wake-up are no news
MOST_CALLS = 1000
_WARM_UPS = 2  # beside the call that comes before every turn


@dataclass(frozen=True, slots=True)
class Compared:
    """The ratio to the baseline: its median, and where that lies; None where nothing can tell."""

    ratio: float
    interval: tuple[float, float] | None

    @property
    def is_same(self) -> bool:
        """Whether a difference worth speaking of would have been seen."""
        if self.interval is None:
            return False
        low, high = self.interval
        return low > 1 / (1 + RESOLVED) and high < 1 + RESOLVED

    def beyond(self, noise: float) -> int:
        """1 if it is slower by more than ``noise``, -1 if faster, else 0."""
        if self.interval is None:
            return 0
        low, high = self.interval
        return int(low > 1 + noise) - int(high < 1 / (1 + noise))


def compared(seconds: F64, baseline: F64) -> Compared:
    """How long a model takes, in units of the baseline's time in the same round.

    Args:
        seconds: Of the model; shape (rounds,).
        baseline: Of the baseline; shape (rounds,).
    """
    logs = np.sort(np.log(seconds / baseline))
    rank = sign_rank(len(logs))
    inner = (math.exp(logs[rank - 1]), math.exp(logs[-rank])) if rank else None
    return Compared(math.exp(np.median(logs)), inner)


def sign_rank(rounds: int) -> int:
    """The k of the sign test: the k-th value from either end bounds the median; 0 where none does.

    Source: W. J. Conover, Practical Nonparametric Statistics, 3.2.
    """
    tail, rank = 0.0, 0
    while rank < rounds // 2:
        tail += math.comb(rounds, rank) / 2**rounds
        if 2 * tail > DOUBT:
            break
        rank += 1
    return rank


def noise_of(first: F64, again: F64) -> float:
    """What two sessions of one model differ by in the median, but at least `LEAST_NOISE`."""
    return max(LEAST_NOISE, math.expm1(abs(float(np.median(np.log(again / first))))))


# ---- whose turn it is ----


def orders(players: int, rounds: int) -> Iterator[tuple[int, ...]]:
    """The order of each round: rotated every second one and read backwards in between.

    So in 2 n rounds of n players everybody is at each place twice, and before each other one as
    often as behind.
    """
    for number in range(rounds):
        start = number // 2 % players
        order = (*range(start, players), *range(start))
        yield order[::-1] if number % 2 else order


def take_turns(
    players: Sequence[Player], rounds: int, tell: Callable[[float], None]
) -> tuple[F64, int]:
    """The seconds of a call, of shape (players, rounds), and the calls in a turn.

    Args:
        players: The sessions.
        rounds: How often each has its turn.
        tell: Told of the fraction that is done.
    """
    calls = _calls(players, rounds)
    seconds = np.empty((len(players), rounds))
    for number, order in enumerate(orders(len(players), rounds)):
        for player in order:
            seconds[player, number] = players[player](number, calls)
        tell((number + 1) / rounds)
    return seconds, calls


def _calls(players: Sequence[Player], rounds: int) -> int:
    """How many calls the fastest needs for a turn; all are warm afterwards."""
    fastest = min(
        player(number, 1) for player in players for number in range(min(_WARM_UPS, rounds))
    )
    return min(MOST_CALLS, max(1, math.ceil(TURN / max(fastest, 1e-9))))
