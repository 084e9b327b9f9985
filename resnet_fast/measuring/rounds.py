# SPDX-License-Identifier: Apache-2.0
"""How many rounds there are, and how functions take turns in them.

A round runs each function once, so that a machine that slows down slows all of them, and a ratio of
two medians of the same rounds is a statement about the functions.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator

import torch

from resnet_fast.measuring.clock import clock_of
from resnet_fast.measuring.steadiness import MAX_ROUNDS, MIN_ROUNDS, Timing

WARM_UP_LIMIT = 24
WINDOW = 3  # calls whose median is compared with that of the calls before them
SETTLED = 0.10
LAUNCH_MS = 1.0  # more than launching one kernel takes

Timer = Callable[[dict[Hashable, Callable[[], object]], float], dict[Hashable, Timing]]


def rounds(
    seconds: float,
    now: Callable[[], float] = time.perf_counter,
    deadline: float = math.inf,
    count: int | None = None,
) -> Iterator[int]:
    """Number the rounds from 1 until the time is up: at least 7 of them, at most 200.

    Args:
        seconds: for all rounds together.
        now: tells the time, in seconds.
        deadline: no round begins after it, however few there were.
        count: how many rounds there are instead, whatever time they take.
    """
    end = min(now() + seconds, deadline)
    fewest, most = (MIN_ROUNDS, MAX_ROUNDS) if count is None else (count, count)
    for number in range(1, most + 1):
        if now() >= (deadline if number <= fewest else end):
            return
        yield number


def warm_up(lap: Callable[[], float], milliseconds: float) -> int:
    """Call until the median of the last three times is within 10 % of that of the three before.

    Args:
        lap: calls once and returns how many milliseconds that took.
        milliseconds: for all calls together; three are made in any case, 24 at most.

    Returns:
        How often it was called.
    """
    times: list[float] = []
    while len(times) < WARM_UP_LIMIT and (len(times) < WINDOW or sum(times) < milliseconds):
        times.append(lap())
        if len(times) >= 2 * WINDOW:
            now = statistics.median(times[-WINDOW:])
            before = statistics.median(times[-2 * WINDOW : -WINDOW])
            if abs(now - before) <= SETTLED * before:
                break
    return len(times)


def event_timer(device: torch.device) -> Timer:
    """A timer of a GPU's own time: CUDA events around each call, the L2 cache flushed before it.

    Returns:
        A function (functions by key, seconds) -> `Timing` by key, in microseconds.

    Example:
        >>> times = event_timer(torch.device("cuda"))({"copy": lambda: x.clone()}, seconds=1.0)
        >>> times["copy"].median
    """
    clock = clock_of(device)

    def timer(functions, seconds: float):
        samples: dict[Hashable, list[float]] = {key: [] for key in functions}
        with clock.current():
            for _ in rounds(seconds):
                for key, function in functions.items():
                    milliseconds = clock.device_lap(function, cold=True, ahead_ms=LAUNCH_MS)
                    samples[key].append(milliseconds * 1e3)
        return {key: Timing.of(found) for key, found in samples.items()}

    return timer
