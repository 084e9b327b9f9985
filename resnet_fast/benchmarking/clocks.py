# SPDX-License-Identifier: Apache-2.0
"""Clocks: wall time on the host, time on the device, memory of a call, and caches made cold."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

MB = 1e6


@dataclass(frozen=True, slots=True)
class Lap:
    """One call: wall time, which ends when the device is done, and the device's own time."""

    wall_ms: float
    device_ms: float | None = None


class Clock:
    """The host's clock, for the CPU; what it cannot do, it says by None.

    Args:
        now: seconds since some moment; a test gives its own.
    """

    peak_how = "resident memory of the process"

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def current(self) -> contextlib.AbstractContextManager:
        """Entered around all calls: makes the clock's device the thread's."""
        return contextlib.nullcontext()

    def lap(self, call: Callable[[], object]) -> Lap:
        """Time one call."""
        start = self.now()
        call()
        return Lap((self.now() - start) * 1e3)

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

    def lap(self, call: Callable[[], object]) -> Lap:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin = self.now()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return Lap((self.now() - begin) * 1e3, start.elapsed_time(end))

    def flush(self) -> None:
        self._buffer.zero_()

    def capture(self, call: Callable[[], object]) -> Callable[[], object] | None:
        """A CUDA graph of the call; None where it cannot be captured (it syncs, or is a graph)."""
        graph = torch.cuda.CUDAGraph()
        try:
            # torch's own stream for this stays on the device that was the first to record.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(self.device)):
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
