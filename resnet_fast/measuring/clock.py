# SPDX-License-Identifier: Apache-2.0
"""Clocks: wall time on the host, time on the device, memory of a call, and cold caches.

Two ways to read one: `lap` and `device_lap` time one call from outside; `start`, `mark` and
`finish` mark moments inside a run, which on a GPU are events in the order of what is queued.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch

from resnet_fast.measuring import steadiness

MB = 1e6
MOST_AHEAD_MS = 50.0  # the host queues any model in less
CYCLES_PER_MS = 2e6  # of a GPU that runs at 2 GHz, and few run faster
HOLD_CYCLES = 40_000_000  # 20 to 40 ms, in which the host queues a whole model with its marks


class Clock:
    """The host's clock, for the CPU; returns None for what it cannot measure.

    Args:
        now: seconds since some moment; a test gives its own.
    """

    device_apart = False  # whether host and device have times of their own
    peak_how = "resident memory of the process"

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    @property
    def others(self) -> steadiness.Others:
        """Entered around timed rounds; knows afterwards how busy others kept the CPU meanwhile."""
        return steadiness.Others(torch.get_num_threads())

    def current(self) -> contextlib.AbstractContextManager:
        """Entered around all calls: makes the clock's device the thread's."""
        return contextlib.nullcontext()

    def lap(self, call: Callable[[], object]) -> float:
        """Wall time of one call in milliseconds, which ends when the device is done."""
        self.synchronize()
        start = self.now()
        call()
        self.synchronize()
        return (self.now() - start) * 1e3

    def synchronize(self) -> None:
        """Wait until the device has done all that was queued."""

    def start(self) -> None:
        """Before a run that is to be marked."""

    def mark(self) -> object:
        """Now, in the order of what is queued."""
        return self.now()

    def finish(self) -> None:
        """After the run: all marks can be read."""

    def host(self, before, after) -> float:
        """Seconds between two marks on the host."""
        return after - before

    def device(self, before, after) -> float:
        """Seconds between two marks on the device."""
        return after - before

    def device_lap(self, call: Callable[[], object], cold: bool, ahead_ms: float) -> float | None:
        """The device's own time of one call in milliseconds; None where that is not apart.

        Args:
            call: queues the work.
            cold: whether the caches are made to forget before it.
            ahead_ms: how long the device is kept from it, so that all of it is queued by then.
        """
        return None

    def flush(self) -> None:
        """Make the caches forget; on the CPU the inputs are rotated instead."""

    def capture(self, call: Callable[[], object]) -> Callable[[], object] | None:
        """What replays the call's work on the device alone, or None."""
        return None

    def peak_memory_mb(self, call: Callable[[], object]) -> float | None:
        """What the call needs at its peak above what is held before it, in MB."""
        _give_back()
        before = _status_kb("VmRSS")
        if before is None or not _reset_peak():
            call()
            return None
        call()
        peak = _status_kb("VmHWM")
        return max(0.0, (peak - before) * 1024 / MB)


class CudaClock(Clock):
    """A GPU's clock: events in one stream; memory as torch's allocator counts it.

    Args:
        place: which GPU.
        now: of the host.
        cuda: `torch.cuda`, or what stands in for it in a test.
    """

    device_apart = True
    peak_how = "torch's allocator"

    def __init__(self, place: torch.device, now=time.perf_counter, cuda=torch.cuda) -> None:
        super().__init__(now)
        self.place, self._cuda = place, cuda
        self._buffer: torch.Tensor | None = None  # written to push all else out of the L2 cache
        self._events: list = []
        self._moments: list[float] = []

    def current(self) -> contextlib.AbstractContextManager:
        return self._cuda.device(self.place)  # whose stream events are recorded on

    @property
    def others(self) -> steadiness.Others:
        return steadiness.Others(1)  # the thread that launches

    def synchronize(self) -> None:
        self._cuda.synchronize(self.place)

    def device_lap(self, call: Callable[[], object], cold: bool, ahead_ms: float) -> float:
        # Behind a sleep: an idle device would wait between the events for the host to launch.
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        self._cuda._sleep(int(min(ahead_ms, MOST_AHEAD_MS) * CYCLES_PER_MS))
        if cold:
            self.flush()
        start.record()
        call()
        end.record()
        self.synchronize()
        return start.elapsed_time(end)

    def flush(self) -> None:
        if self._buffer is None:
            size = 2 * self._cuda.get_device_properties(self.place).L2_cache_size
            self._buffer = torch.empty(size, dtype=torch.int8, device=self.place)
        self._buffer.zero_()

    def start(self) -> None:
        self._moments.clear()
        self.synchronize()
        self._cuda._sleep(HOLD_CYCLES)  # the host runs ahead, and the device never waits for it

    def mark(self) -> int:
        index = len(self._moments)
        if index == len(self._events):
            self._events.append(self._cuda.Event(enable_timing=True))
        self._events[index].record()
        self._moments.append(self.now())
        return index

    def finish(self) -> None:
        self.synchronize()

    def host(self, before: int, after: int) -> float:
        return self._moments[after] - self._moments[before]

    def device(self, before: int, after: int) -> float:
        return self._events[before].elapsed_time(self._events[after]) / 1e3

    def capture(self, call: Callable[[], object]) -> Callable[[], object] | None:
        """A CUDA graph of the call; None where it cannot be captured (it syncs, or is a graph)."""
        graph = self._cuda.CUDAGraph()
        try:
            # torch's own stream for this stays on the device that was the first to record.
            stream, mode = self._cuda.Stream(self.place), "thread_local"
            with self._cuda.graph(graph, stream=stream, capture_error_mode=mode):
                call()
            graph.replay()
            self.synchronize()
        except RuntimeError:
            return None
        return graph.replay

    def peak_memory_mb(self, call: Callable[[], object]) -> float | None:
        self.synchronize()
        before = self._cuda.memory_allocated(self.place)
        self._cuda.reset_peak_memory_stats(self.place)
        call()
        self.synchronize()
        return (self._cuda.max_memory_allocated(self.place) - before) / MB


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else Clock()


def cache_bytes() -> tuple[int, int]:
    """The CPU's second-level caches together, and its last-level cache; typical ones if unknown."""
    sizes: dict[int, dict[str, int]] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level = int((index / "level").read_text())
            shared = (index / "shared_cpu_list").read_text().strip()
            size = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if size.endswith("K") and size[:-1].isdigit():
            sizes.setdefault(level, {})[shared] = int(size[:-1]) * 1024
    l2 = sum(sizes.get(2, {}).values()) or 2 << 20
    return l2, sum(sizes.get(max(sizes, default=0), {}).values()) or 32 << 20


def _status_kb(name: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1])
    except OSError:
        pass
    return None


def _give_back() -> None:
    """Let the C library return freed memory: what it kept, a call would take unseen."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    """Let Linux forget the process's peak of resident memory."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
