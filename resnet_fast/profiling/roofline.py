# SPDX-License-Identifier: Apache-2.0
"""The roofline: the least time that a device needs for so many operations and so many bytes.

    time >= max(flops / peak arithmetic, bytes / peak bandwidth)

For GPUs the two ceilings are those of the data sheet; for a CPU they are measured once per process,
as the best that matrix products and copies reach here. A copy is faster where it fits a cache, so
the CPU's bandwidth depends on how many bytes are moved. What runs faster than its ceiling proves
the ceiling too low, and raises it (`raised`).

Source: Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for
Multicore Architectures", 2009.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from resnet_fast import _hardware, ops

# Bytes read and written by one measured copy: inside a core's cache, up to far outside of it.
COPY_SIZES = (1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
SECONDS_PER_CEILING = 0.05
# On a GPU, from one kernel's start to the next one's in a full queue (order of magnitude).
GPU_LAUNCH_SECONDS = 2e-6
DTYPES = ("float32", "tf32", "float16", "bfloat16", "float64")


class Floor(NamedTuple):
    """The least time for a layer, and what binds it: "memory", "arithmetic" or "launch".

    `seconds` is the roofline's; "launch" says that starting the layer takes longer than that.
    """

    seconds: float
    bound: str


@dataclass(frozen=True, slots=True)
class Roofline:
    """What a device can do at best with one dtype.

    Args:
        name: the device and the dtype.
        tflops: TFLOP/s.
        bandwidth_gbs: GB/s from and to memory; of a CPU, outside of its fast caches.
        source: "specified" or "measured".
        caches: (bytes, GB/s) for layers of up to so many bytes, ascending; empty for a GPU.
        launch_seconds: what starting a layer takes.
        notes: in words, what raised a ceiling, or which device it was taken from.
    """

    name: str
    tflops: float
    bandwidth_gbs: float
    source: str
    caches: tuple[tuple[int, float], ...] = ()
    launch_seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def bandwidth_at(self, moved: int) -> float:
        """GB/s for a layer that moves so many bytes."""
        return next((rate for size, rate in self.caches if moved <= size), self.bandwidth_gbs)

    def time_floor(self, flops: int, moved: int) -> Floor:
        """The least time for `flops` operations and `moved` bytes, and what binds it."""
        arithmetic = flops / (self.tflops * 1e12)
        memory = moved / (self.bandwidth_at(moved) * 1e9)
        seconds = max(arithmetic, memory)
        if seconds < self.launch_seconds:
            return Floor(seconds, "launch")
        return Floor(seconds, "arithmetic" if arithmetic >= memory else "memory")

    def raised(self, measured: Iterable[tuple[str, int, int, float]]) -> Roofline:
        """This roofline with the ceilings raised that a measured layer went through.

        Args:
            measured: (name, flops, bytes, seconds) per layer.
        """
        best = self
        rates = [(f / s / 1e12, b, b / s / 1e9, name) for name, f, b, s in measured if s > 0]
        for tflops, *_, name in sorted(rates, reverse=True)[:1]:
            if tflops > best.tflops:
                note = f"arithmetic raised from {best.tflops:.3g} TFLOP/s by {name}"
                best = replace(best, tflops=tflops, notes=(*best.notes, note))
        for _, moved, rate, name in sorted(rates, key=lambda r: -r[2]):
            before = best.bandwidth_at(moved)
            if rate > before:
                note = f"bandwidth at {moved / 1e6:.2g} MB raised from {before:.3g} GB/s by {name}"
                best = replace(best._with_bandwidth(moved, rate), notes=(*best.notes, note))
        return best

    def _with_bandwidth(self, moved: int, rate: float) -> Roofline:
        """With `rate` for so many bytes, and at least that for fewer: a part of a copy is one."""
        at = next((size for size, _ in self.caches if moved <= size), math.inf)
        caches = tuple((size, max(r, rate) if size <= at else r) for size, r in self.caches)
        memory = rate if at == math.inf else self.bandwidth_gbs
        return replace(self, caches=caches, bandwidth_gbs=memory)

    def __str__(self) -> str:
        near = max((rate for _, rate in self.caches), default=0.0)
        caches = f" ({near:.0f} GB/s in cache)" if near else ""
        return (
            f"{self.name}: {self.tflops:.3g} TFLOP/s, {self.bandwidth_gbs:.0f} GB/s{caches}, "
            f"{self.source}"
        )


def roofline_of(
    device: torch.device | str,
    dtype: torch.dtype | str,
    progress: Callable[[str], None] = lambda text: None,
) -> Roofline:
    """The roofline of a device of this machine.

    Args:
        device: "cpu" or a CUDA device.
        dtype: of the convolutions: one of `DTYPES`; "float32" on a GPU is TF32 where torch's own
            flag says so.
        progress: told that a CPU is being measured: a second, once per process.

    Raises:
        ValueError: an unknown dtype, or a device that is neither a CPU nor an NVIDIA GPU from
            compute capability 8.0.
    """
    device, name = torch.device(device), str(dtype).removeprefix("torch.")
    _check_dtype(name)
    if device.type == "cpu":
        return _of_cpu(name.replace("tf32", "float32"), torch.get_num_threads(), progress)
    if device.type != "cuda":
        raise ValueError(f"no roofline is known for the {device.type} device; known: cpu, cuda")
    gpu = _hardware.gpu_of(device)
    if gpu is None:
        known = ", ".join(str(arch / 10) for arch in _hardware.GPUS)
        capability = _hardware.capability_of(device) / 10
        raise ValueError(f"no roofline for compute capability {capability}; known: {known}")
    if name == "float32" and ops.precision() == "tf32":
        name = "tf32"
    return roofline_of_gpu(gpu, name)


def roofline_of_gpu(gpu: _hardware.Gpu, dtype: str) -> Roofline:
    """The specified roofline of a GPU that need not be here, as those of `_hardware.PRODUCTS`."""
    _check_dtype(dtype)
    tflops = {
        "float32": gpu.tflops_fp32,
        "float64": gpu.tflops_fp64,
        "tf32": gpu.tflops_fp16 / 2,
    }.get(dtype, gpu.tflops_fp16)
    return Roofline(
        f"{gpu.name}, {dtype}", tflops, gpu.bandwidth_gbs, "specified",
        launch_seconds=GPU_LAUNCH_SECONDS, notes=(gpu.note,) if gpu.note else (),
    )  # fmt: skip


def _check_dtype(name: str) -> None:
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; known are {', '.join(DTYPES)}")


# ---- a CPU, measured

_measured: dict[tuple[str, int], Roofline] = {}


def _of_cpu(dtype: str, threads: int, progress: Callable[[str], None]) -> Roofline:
    key = (dtype, threads)
    if key not in _measured:
        progress(f"measuring what this CPU can do in {dtype}")
        caches = _descending(tuple((size, _copy_rate(size)) for size in COPY_SIZES))
        _measured[key] = Roofline(
            f"CPU, {threads} threads, {dtype}", _best_tflops(getattr(torch, dtype)),
            caches[-1][1], "measured", caches[:-1], _launch_seconds(),
        )  # fmt: skip
    return _measured[key]


def _descending(rates: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    """Each rate at least that of the larger sizes: a small copy can be done as a large one is."""
    best, found = 0.0, []
    for size, rate in reversed(rates):
        best = max(best, rate)
        found.append((size, best))
    return tuple(reversed(found))


@torch.inference_mode()
def _copy_rate(size: int) -> float:
    """GB/s read and written by copying, `size` bytes altogether."""
    source = torch.ones(size // 8)
    target = torch.empty_like(source)
    return size / _best_seconds(functools.partial(target.copy_, source)) / 1e9


@torch.inference_mode()
def _best_tflops(dtype: torch.dtype) -> float:
    """TFLOP/s of the best of a few matrix products and a convolution."""
    best = 0.0
    for n in (256, 1024):
        a, b = (torch.rand(n, n).to(dtype) for _ in range(2))
        best = max(best, 2 * n**3 / _best_seconds(functools.partial(torch.mm, a, b)))
    x, w = (torch.rand(s).to(dtype).to(memory_format=torch.channels_last)
            for s in ((4, 256, 28, 28), (256, 256, 3, 3)))  # fmt: skip
    conv = functools.partial(torch.nn.functional.conv2d, x, w, padding=1)
    flops = 2 * 4 * 28 * 28 * 256 * 256 * 9
    return max(best, flops / _best_seconds(conv)) / 1e12


@torch.inference_mode()
def _launch_seconds() -> float:
    """What a convolution of nothing to speak of takes: the way through torch's layers."""
    x, w = torch.ones(1, 8, 1, 1), torch.ones(8, 8, 1, 1)
    return _best_seconds(functools.partial(torch.nn.functional.conv2d, x, w))


def _best_seconds(function: Callable[[], object]) -> float:
    """The least time of one call, by all threads or by one.

    Nothing makes it less that is not the device's own doing; but on a busy machine threads that
    wait for each other may never all run at once.
    """
    threads = torch.get_num_threads()
    try:
        best = _least(function)
        torch.set_num_threads(1)
        return min(best, _least(function))
    finally:
        torch.set_num_threads(threads)


def _least(function: Callable[[], object]) -> float:
    function()
    best, end = math.inf, time.perf_counter() + SECONDS_PER_CEILING
    while True:
        start = time.perf_counter()
        function()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best
