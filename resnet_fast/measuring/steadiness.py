# SPDX-License-Identifier: Apache-2.0
"""A time, and whether it may be taken as a fact.

A median says nothing about itself. Its rounds do: p20 to p80 hold the middle three fifths of them,
and a time is stable where there are at least seven rounds and these span no more than a third of
the median. Other work on the machine spoils even rounds that lie close together, so Linux is asked
about that too (`/proc/stat`); elsewhere the rounds alone decide.

A time that is not stable is marked with `MARK` wherever it is shown, and wins nothing; a ratio that
its noise makes meaningless is not shown at all.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

MIN_ROUNDS, MAX_ROUNDS = 7, 200  # of every command
FEWEST_ROUNDS = 3  # that a time is shown for at all, marked as not stable
MARK, NO_RATIO = "~", "?"
SPREAD = 1 / 3  # of the median, from p20 to p80
BUSY = 0.2  # of the CPU time that the threads could have had
RATIO_NOISE = 0.5  # beyond which a ratio no longer says which is faster
SIGMAS_BETWEEN_P20_AND_P80 = 1.683  # of a normal distribution
SHORTEST = 0.2  # seconds; the kernel counts in hundredths of one
STAT = Path("/proc/stat")
IDLE, IOWAIT, GUEST = 3, 4, 8  # columns of a line of /proc/stat; guests are users already

NOTE = (
    f"{MARK}: not stable, the 20th and the 80th percentile are more than a third of the median "
    f"apart, there were fewer than {MIN_ROUNDS} rounds, or other processes kept the machine busy; "
    f"{NO_RATIO} in place of a ratio: too far apart to say which is faster"
)
ADVICE = "close what else runs, or measure longer (--seconds)"


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one function took over all rounds; milliseconds unless it is said otherwise.

    Args:
        median, p20, p80, p99: of the rounds; p20 is the 20th percentile.
        rounds: how many there were.
        busy: the share of the CPU time that others took meanwhile; None where it is not known.
        first: the very first call, which packs weights or compiles; None where it was not timed.
    """

    median: float
    p20: float
    p80: float
    p99: float = math.nan
    rounds: int = 0
    busy: float | None = None
    first: float | None = None

    @classmethod
    def of(
        cls, samples: Sequence[float], busy: float | None = None, first: float | None = None
    ) -> Timing:
        """Of at least one sample; percentiles lie between neighbours, within the samples."""
        if len(samples) == 1:
            return cls(*(samples[0],) * 4, 1, busy, first)
        cuts = statistics.quantiles(samples, n=100, method="inclusive")
        found = (statistics.median(samples), cuts[19], cuts[79], cuts[98])
        return cls(*found, len(samples), busy, first)

    @property
    def spread(self) -> float:
        """From p20 to p80, as a part of the median."""
        return spread(self.median, self.p20, self.p80)

    @property
    def scatter(self) -> float:
        """The relative standard error of the median."""
        return scatter(self.spread, self.rounds)

    @property
    def stable(self) -> bool:
        """Whether the median may be taken as a fact."""
        return is_stable(self.spread, self.busy, self.rounds)

    def over(self, other: Timing) -> float | None:
        """The ratio of the medians; None where they scatter so much that it would say nothing."""
        if self is other:
            return 1.0
        return ratio(self.median, self.scatter, other.median, other.scatter)


def spread(median: float, p20: float, p80: float) -> float:
    """From p20 to p80, as a part of the median."""
    return (p80 - p20) / median if median > 0 else 0.0


def spread_of(times: Sequence[float]) -> float:
    """The spread of the rounds' times; nothing is known of a single one."""
    return Timing.of(times).spread if times else 0.0


def is_stable(spread: float, busy: float | None = None, rounds: int = MIN_ROUNDS) -> bool:
    """Whether a time of this spread, measured while others were this busy, is a fact."""
    return spread <= SPREAD and (busy is None or busy <= BUSY) and rounds >= MIN_ROUNDS


def scatter(spread: float, rounds: int) -> float:
    """The relative standard error of a median of so many rounds.

    A median of n rounds scatters 1.2533 / sqrt(n) as much as one round. Rounds in a row are not
    independent, so no more than nine of them count.
    """
    one = spread / SIGMAS_BETWEEN_P20_AND_P80
    return one * 1.2533 / math.sqrt(min(max(rounds, 1), 9))


def ratio(time: float, scatter: float, base: float, base_scatter: float) -> float | None:
    """A time over another; None where they scatter so much that it would say nothing."""
    if base <= 0 or noise((scatter, base_scatter)) > RATIO_NOISE:
        return None
    return time / base


def noise(scatters: Iterable[float]) -> float:
    """How far from 1 a ratio of medians may be without meaning anything: two standard errors."""
    return 2 * math.sqrt(sum(one**2 for one in scatters))


def marked(text: str, stable: bool) -> str:
    """The text of a figure, with the mark of one that is not stable."""
    return text if stable or not text else MARK + text


def ratio_text(ratio: float | None, stable: bool) -> str:
    """A ratio with two digits behind the point, or that it would say nothing."""
    return NO_RATIO if ratio is None else marked(f"{ratio:.2f}", stable)


def too_busy(busy: float | None) -> list[str]:
    """The warning of a machine that others keep this busy, if that is too much to time on."""
    if busy is None or busy <= BUSY:
        return []
    return [
        f"this machine is too busy to time on: other processes took up to {busy:.0%} of the CPU "
        f"time that the measured code could have had; {ADVICE}"
    ]


def warnings(timings: Sequence[Timing]) -> list[str]:
    """What to say below times of which some are not stable, and what to do about it."""
    stable = [timing.stable for timing in timings]
    busy = max((t.busy for t in timings if t.busy is not None), default=None)
    return [*too_busy(busy), *unstable(stable.count(False), len(stable))]


def unstable(count: int, figures: int) -> list[str]:
    """The warning that so many of the times are marked, if any are."""
    if not count:
        return []
    return [
        f"{MARK} marks what is not stable, {count} of {figures} times: the rounds lie more than a "
        f"third of the median apart, are too few, or the machine was busy; {ADVICE}"
    ]


class Others:
    """How much of the CPU time that our threads could have had went to others.

    Enter it around what is timed; `busy` tells a share from then on, or None where it is not known.

    Args:
        threads: that compute. Others take nothing from them as long as a CPU is left for each.
    """

    def __init__(
        self,
        threads: int,
        now: Callable[[], float] = time.perf_counter,
        own: Callable[[], float] = time.process_time,
        read: Callable[[], tuple[float, int] | None] | None = None,
    ) -> None:
        self.threads, self.busy = threads, None
        self._now, self._own, self._read = now, own, read or used_seconds

    def __enter__(self) -> Others:
        self._before = (self._now(), self._own(), self._read())
        return self

    def __exit__(self, *error) -> None:
        begin, own, used = self._before
        after = self._read()
        seconds = self._now() - begin
        if used is None or after is None or seconds < SHORTEST or after[0] <= used[0]:
            return
        others = max(0.0, after[0] - used[0] - (self._own() - own)) / seconds  # CPUs
        spare = max(0, after[1] - self.threads)
        self.busy = min(1.0, max(0.0, others - spare) / self.threads)


def busy_now(threads: int, seconds: float = 0.5) -> float | None:
    """How busy others are while we do nothing; None where it is not known."""
    with Others(threads) as others:
        time.sleep(seconds)
    return others.busy


def used_seconds() -> tuple[float, int] | None:
    """The CPU seconds that all have used of the CPUs that are ours to use, and how many these are.

    What a hypervisor gave to others ("steal") counts as used. None where Linux does not say.
    """
    try:
        lines = STAT.read_text().splitlines()
        ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        tick = os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return None
    found = [line.split() for line in lines if line.partition(" ")[0] in ours]
    columns = [[int(word) for word in words[1 : GUEST + 1]] for words in found]
    used = sum(sum(times) - times[IDLE] - times[IOWAIT] for times in columns)
    return (used / tick, len(found)) if found else None
