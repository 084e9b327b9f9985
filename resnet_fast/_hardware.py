# SPDX-License-Identifier: Apache-2.0
"""Facts about GPUs that heuristics and rooflines need; no device is touched by importing this.

Sources: NVIDIA's architecture white papers and the CUDA C++ Programming Guide, "Compute
Capabilities" (shared memory per block and per SM, registers, threads).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Gpu:
    """What one GPU can hold and move.

    Args:
        name: the product that stands for its architecture.
        capability: compute capability times ten: 80 for 8.0.
        sms: streaming multiprocessors.
        bandwidth_gbs: specified DRAM bandwidth in GB/s.
        tflops_fp16: specified dense fp16 tensor throughput with fp32 accumulation, in TFLOP/s.
        shared_per_block: bytes of shared memory that one block may ask for.
        shared_per_sm: bytes of shared memory that the blocks of one SM share.
        max_threads_per_sm: resident threads.
    """

    name: str
    capability: int
    sms: int
    bandwidth_gbs: float
    tflops_fp16: float
    shared_per_block: int
    shared_per_sm: int
    max_threads_per_sm: int


REGISTERS_PER_SM = 65536

GPUS = {
    80: Gpu("A100 SXM 80GB", 80, 108, 2039, 312, 163 * 1024, 164 * 1024, 2048),
    86: Gpu("A10", 86, 72, 600, 125, 99 * 1024, 100 * 1024, 1536),
    89: Gpu("L4", 89, 58, 300, 121, 99 * 1024, 100 * 1024, 1536),
    90: Gpu("H100 SXM", 90, 132, 3350, 989, 227 * 1024, 228 * 1024, 2048),
    100: Gpu("B200", 100, 148, 8000, 2250, 227 * 1024, 228 * 1024, 2048),
    120: Gpu("RTX 5090", 120, 170, 1792, 210, 99 * 1024, 100 * 1024, 1536),
}


def capability_of(device: torch.device) -> int:
    """Compute capability of a CUDA device times ten, for example 90."""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def nearest_architecture(capability: int) -> int | None:
    """The newest architecture of `GPUS` that is not newer than `capability`; None below 8.0."""
    known = [arch for arch in GPUS if arch <= capability]
    return max(known) if known else None
