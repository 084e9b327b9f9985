# SPDX-License-Identifier: Apache-2.0
"""Whether a time may be taken as a fact: how far its rounds lie apart, and who else used the CPU.

A median says nothing about itself. Its rounds do: p20 to p80 hold the middle three fifths of them,
and a time is stable where these span no more than a third of the median. A machine that does other
work meanwhile spoils even rounds that lie close together, so that is asked too: of Linux, in
`/proc/stat`; elsewhere it is not known, and the rounds speak alone.

A time that is not stable is marked with `MARK` wherever it is shown, and wins nothing; a ratio that
its noise makes meaningless is not shown at all.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

MARK, NO_RATIO = "~", "?"
SPREAD = 1 / 3  # of the median, from p20 to p80
BUSY = 0.2  # of the CPU time that the threads could have had
RATIO_NOISE = 0.5  # beyond which a ratio says no longer who is faster
SIGMAS_BETWEEN_P20_AND_P80 = 1.683  # of a normal distribution
SHORTEST = 0.2  # seconds; the kernel counts in hundredths of one
STAT = Path("/proc/stat")
IDLE, IOWAIT, GUEST = 3, 4, 8  # columns of a line of /proc/stat; guests are users already

NOTE = (
    f"{MARK}: not stable, from the 20th to the 80th percentile it is more than a third of the "
    f"median; {NO_RATIO} in place of a ratio: too far apart to say who is faster"
)
ADVICE = "close what else runs, or measure longer (--seconds)"


def spread(median: float, p20: float, p80: float) -> float:
    """From p20 to p80, as a part of the median."""
    return (p80 - p20) / median if median > 0 else 0.0


def spread_of(times: Sequence[float]) -> float:
    """The spread of the rounds' times; nothing is known of a single one."""
    if len(times) < 2:
        return 0.0
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return spread(statistics.median(times), fifths[0], fifths[3])


def is_stable(spread: float, busy: float | None = None) -> bool:
    """Whether a time of this spread, measured while others were this busy, may be taken as one."""
    return spread <= SPREAD and (busy is None or busy <= BUSY)


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


def warnings(unstable: int, figures: int, busy: float | None) -> list[str]:
    """What to say below figures of which some are not stable, and what to do about it.

    Args:
        unstable, figures: how many times are not stable, and of how many.
        busy: the largest share that others took of the CPU time; None where it is not known.
    """
    found = too_busy(busy)
    if unstable:
        found.append(
            f"{MARK} marks what is not stable, {unstable} of {figures} times: the rounds lie more "
            f"than a third of the median apart, or the machine was busy; {ADVICE}"
        )
    return found


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
