# SPDX-License-Identifier: Apache-2.0
"""Time several functions against each other so that the machine's drift hits all alike.

One round times each function once, in turn; a ratio of two medians of the same rounds is then a
statement about the functions. Each timed call follows an untimed one of the same function: whoever
serves a model serves that one, and does not find the caches as another model left them. Absolute
times are of this machine at this hour.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from resnet_fast.comparison import steadiness

WARM_UP_ROUNDS = 3
MIN_ROUNDS = 7
MAX_ROUNDS = 200


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall time of one function over all rounds, in milliseconds.

    Args:
        median, p20, p80: of the rounds; p20 and p80 are the 20th and 80th percentile.
        rounds: how many there were.
        first: the very first call, which packs weights or compiles.
        busy: the share of the CPU time that others took meanwhile; None where it is not known.
    """

    median: float
    p20: float
    p80: float
    rounds: int
    first: float
    busy: float | None = None

    @property
    def spread(self) -> float:
        """From p20 to p80, as a part of the median."""
        return steadiness.spread(self.median, self.p20, self.p80)

    @property
    def scatter(self) -> float:
        """The relative standard error of the median."""
        return steadiness.scatter(self.spread, self.rounds)

    @property
    def stable(self) -> bool:
        """Whether the median may be taken as a fact."""
        return steadiness.is_stable(self.spread, self.busy)

    def over(self, other: Timing) -> float | None:
        """The ratio of the medians; None where they scatter so much that it would say nothing."""
        if self is other:
            return 1.0
        return steadiness.ratio(self.median, self.scatter, other.median, other.scatter)


def interleaved(
    functions: dict[str, Callable[[], object]],
    seconds: float,
    device: torch.device,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Timing]:
    """Call the functions in turn until the time is up.

    Args:
        functions: by name; each does its whole work when called, on a GPU in a thread of its own.
        seconds: for all rounds together, warm-up apart; at least 7 rounds are made.
        device: synchronised after each call if it is a GPU.
        progress: told now and then what is being done.

    Returns:
        A `Timing` per name.
    """
    with contextlib.ExitStack() as stack:
        run = {name: _runner(device, stack) for name in functions}
        return _interleaved(functions, run, seconds, device, progress)


def _runner(device: torch.device, stack: contextlib.ExitStack) -> Callable:
    """What does a function's work: on a GPU a thread of its own, where cuDNN's choices are kept.

    On a CPU the calling thread: each thread that computes has workers of its own, which spin.
    """
    if device.type != "cuda":
        return lambda work, *args: work(*args)
    thread = stack.enter_context(ThreadPoolExecutor(1))
    return lambda work, *args: thread.submit(work, *args).result()


def _interleaved(
    functions: dict[str, Callable[[], object]],
    run: dict[str, Callable],  # does a function's work, where that is to be done
    seconds: float,
    device: torch.device,
    progress: Callable[[str], None],
) -> dict[str, Timing]:
    first = {}
    for name, function in functions.items():
        progress(f"first call of {name}")
        first[name] = run[name](_time, function, device)
    for _ in range(WARM_UP_ROUNDS - 1):
        for name, function in functions.items():
            run[name](function)
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    rounds = 0
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    with steadiness.Others(threads) as others:
        while rounds < MIN_ROUNDS or (time.perf_counter() < end and rounds < MAX_ROUNDS):
            rounds += 1
            progress(f"round {rounds}")
            for name, function in functions.items():
                run[name](_time, function, device)
                times[name].append(run[name](_time, function, device))
    return {name: _summary(times[name], first[name], others.busy) for name in functions}


def _time(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _summary(times: list[float], first: float, busy: float | None) -> Timing:
    fifths = statistics.quantiles(times, n=5)
    return Timing(statistics.median(times), fifths[0], fifths[3], len(times), first, busy)
