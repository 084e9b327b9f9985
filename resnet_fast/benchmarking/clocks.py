# SPDX-License-Identifier: Apache-2.0
"""Clocks: wall time on the host, time on the device, memory of a call, and caches made cold."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch

from resnet_fast.comparison import steadiness

MB = 1e6
MOST_AHEAD_MS = 50.0  # the host queues any model in less
CYCLES_PER_MS = 2e6  # of a GPU that runs at 2 GHz, and few run faster


class Clock:
    """The host's clock, for the CPU; what it cannot do, it says by None.

    Args:
        now: seconds since some moment; a test gives its own.
    """

    peak_how = "resident memory of the process"

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    @property
    def others(self) -> steadiness.Others:
        """Entered around timed rounds: knows then how busy others kept the CPU meanwhile."""
        return steadiness.Others(torch.get_num_threads())

    def current(self) -> contextlib.AbstractContextManager:
        """Entered around all calls: makes the clock's device the thread's."""
        return contextlib.nullcontext()

    def lap(self, call: Callable[[], object]) -> float:
        """Wall time of one call in milliseconds, which ends when the device is done."""
        start = self.now()
        call()
        return (self.now() - start) * 1e3

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
    """Events around the work of one stream; memory as torch's allocator counts it.

    Args:
        device: which GPU.
        flush_bytes: how much is written to push everything else out of the L2 cache.
    """

    peak_how = "torch's allocator"

    def __init__(self, device: torch.device, flush_bytes: int, now=time.perf_counter) -> None:
        super().__init__(now)
        self.device = device
        self._buffer = torch.empty(flush_bytes, dtype=torch.int8, device=device)

    def current(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self.device)  # whose stream events are recorded on

    @property
    def others(self) -> steadiness.Others:
        return steadiness.Others(1)  # the one that launches

    def lap(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize(self.device)
        begin = self.now()
        call()
        torch.cuda.synchronize(self.device)
        return (self.now() - begin) * 1e3

    def device_lap(self, call: Callable[[], object], cold: bool, ahead_ms: float) -> float:
        # Behind a sleep: an idle device would wait between the events for the host to launch.
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(int(min(ahead_ms, MOST_AHEAD_MS) * CYCLES_PER_MS))
        if cold:
            self.flush()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end)

    def flush(self) -> None:
        self._buffer.zero_()

    def capture(self, call: Callable[[], object]) -> Callable[[], object] | None:
        """A CUDA graph of the call; None where it cannot be captured (it syncs, or is a graph)."""
        graph = torch.cuda.CUDAGraph()
        try:
            # torch's own stream for this stays on the device that was the first to record.
            stream, mode = torch.cuda.Stream(self.device), "thread_local"
            with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
                call()
            graph.replay()
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return None
        return graph.replay

    def peak_memory_mb(self, call: Callable[[], object]) -> float | None:
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / MB


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    if device.type == "cuda":
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        return CudaClock(device, 2 * l2)
    return Clock()


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
