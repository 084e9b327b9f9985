# SPDX-License-Identifier: Apache-2.0
"""Facts about GPUs that heuristics and rooflines need; no device is touched by importing this.

The driver of a GPU in this machine reports its multiprocessors and its memory's clock; the speed of
its tensor cores is found only in its data sheet, by its name. A GPU that is not in this machine is
described by a product of its architecture.

Sources: NVIDIA's data sheets and architecture white papers; the CUDA C++ Programming Guide,
"Compute Capabilities" (shared memory per block and per SM, registers, threads).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Gpu:
    """What one GPU can hold and move.

    Args:
        name: the product.
        capability: compute capability times ten: 80 for 8.0.
        sms: streaming multiprocessors.
        bandwidth_gbs: specified DRAM bandwidth in GB/s.
        tflops_fp16: specified dense fp16 tensor throughput with fp32 accumulation, in TFLOP/s; TF32
            is half of it.
        tflops_fp32: of CUDA cores.
        tflops_fp64: of whichever cores do most.
        shared_per_block: bytes of shared memory that one block may request.
        shared_per_sm: bytes of shared memory that the blocks of one SM share.
        max_threads_per_sm: resident threads.
        note: whose figures these are, where they are not those of its own data sheet.
    """

    name: str
    capability: int
    sms: int
    bandwidth_gbs: float
    tflops_fp16: float
    tflops_fp32: float
    tflops_fp64: float
    shared_per_block: int
    shared_per_sm: int
    max_threads_per_sm: int
    note: str = ""


REGISTERS_PER_SM = 65536
# What mma.sync reaches of the tensor peak, all of which takes wgmma or tcgen05: on sm_90 as others
# have measured (Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture",
# 2024); on sm_100 as if an SM took as many products a clock as one of sm_90, which is assumed.
MMA_SYNC = {90: 0.62, 100: 0.31}
_LARGE, _SMALL = (227 * 1024, 228 * 1024, 2048), (99 * 1024, 100 * 1024, 1536)
_LIMITS = {80: (163 * 1024, 164 * 1024, 2048), 86: _SMALL, 89: _SMALL, 90: _LARGE, 100: _LARGE,
           120: _SMALL}  # fmt: skip


def _gpu(name: str, capability: int, *figures: float) -> Gpu:
    return Gpu(name, capability, *figures, *_LIMITS[capability])


# Found by the words in torch's name of a GPU: the first row whose words all occur. GeForce cards
# accumulate in fp32 at half the rate of fp16, the others at the same rate.
PRODUCTS = {
    # words: name, capability, SMs, GB/s, TFLOP/s of fp16, fp32, fp64
    "a100 40gb": _gpu("A100 40GB", 80, 108, 1555, 312, 19.5, 19.5),
    "a100 pcie": _gpu("A100 PCIe 80GB", 80, 108, 1935, 312, 19.5, 19.5),
    "a100": _gpu("A100 SXM 80GB", 80, 108, 2039, 312, 19.5, 19.5),
    "a30": _gpu("A30", 80, 56, 933, 165, 10.3, 10.3),
    "a10": _gpu("A10", 86, 72, 600, 125, 31.2, 0.49),
    "a40": _gpu("A40", 86, 84, 696, 150, 37.4, 0.58),
    "rtx a6000": _gpu("RTX A6000", 86, 84, 768, 155, 38.7, 0.6),
    "rtx 3080": _gpu("RTX 3080", 86, 68, 760, 59.5, 29.8, 0.47),
    "rtx 3090": _gpu("RTX 3090", 86, 82, 936, 71, 35.6, 0.56),
    "l4": _gpu("L4", 89, 58, 300, 121, 30.3, 0.47),
    "l40": _gpu("L40", 89, 142, 864, 181, 90.5, 1.41),
    "l40s": _gpu("L40S", 89, 142, 864, 362, 91.6, 1.43),
    "rtx 6000 ada": _gpu("RTX 6000 Ada", 89, 142, 960, 364, 91.1, 1.42),
    "rtx 4080": _gpu("RTX 4080", 89, 76, 717, 97.5, 48.7, 0.76),
    "rtx 4090": _gpu("RTX 4090", 89, 128, 1008, 165, 82.6, 1.29),
    "h100 pcie": _gpu("H100 PCIe", 90, 114, 2039, 756, 51.2, 51.2),
    "h100 nvl": _gpu("H100 NVL", 90, 132, 3938, 835, 60, 60),
    "h100": _gpu("H100 SXM", 90, 132, 3350, 989, 66.9, 66.9),
    "h200 nvl": _gpu("H200 NVL", 90, 132, 4800, 835, 60, 60),
    "h200": _gpu("H200 SXM", 90, 132, 4800, 989, 66.9, 66.9),
    "gh200": _gpu("GH200", 90, 132, 4000, 989, 66.9, 66.9),
    "b200": _gpu("B200", 100, 148, 8000, 2250, 75, 37),
    "gb200": _gpu("GB200", 100, 148, 8000, 2500, 80, 40),
    "rtx 5080": _gpu("RTX 5080", 120, 84, 960, 112, 56.3, 0.88),
    "rtx 5090": _gpu("RTX 5090", 120, 170, 1792, 210, 104.8, 1.64),
    "rtx pro 6000": _gpu("RTX PRO 6000", 120, 188, 1792, 503, 126, 1.97),
}
# For each architecture, the product that describes it if no such GPU is here.
GPUS = {gpu.capability: gpu for gpu in map(PRODUCTS.get, (
    "a100", "a10", "l4", "h100", "b200", "rtx 5090",
))}  # fmt: skip


def capability_of(device: torch.device) -> int:
    """Compute capability of a CUDA device times ten, for example 90."""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None if it is not known."""
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


def gpu_of(device: torch.device) -> Gpu | None:
    """A CUDA device of this machine; None below compute capability 8.0."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _gpu_at(index)


@functools.cache
def _gpu_at(index: int) -> Gpu | None:
    return gpu_from(torch.cuda.get_device_properties(index))


def gpu_from(facts) -> Gpu | None:
    """The GPU that torch's device properties describe; None below compute capability 8.0.

    Its size and its memory's speed are what the driver says. Its peaks are those of its data sheet,
    or else of the product that describes its architecture, in which case `note` says so. They are
    scaled by the number of SMs if it has fewer or more (part of a GPU, a mobile one).
    """
    capability = facts.major * 10 + facts.minor
    arch = nearest_architecture(capability)
    if arch is None:
        return None
    words = set(re.split("[^a-z0-9]+", facts.name.lower()))
    sheets = (gpu for name, gpu in PRODUCTS.items() if words.issuperset(name.split()))
    sheet = next((gpu for gpu in sheets if gpu.capability == arch), None)
    base = sheet or GPUS[arch]
    share = facts.multi_processor_count / base.sms
    note = "" if sheet and share == 1 else f"its peaks are {base.name}'s, by the number of SMs"
    if sheet is None:
        note = f"no data sheet of {facts.name} is known here: {note}"
    return replace(
        base,
        name=facts.name,
        capability=capability,
        sms=facts.multi_processor_count,
        bandwidth_gbs=_bandwidth(facts) or base.bandwidth_gbs,
        tflops_fp16=base.tflops_fp16 * share,
        tflops_fp32=base.tflops_fp32 * share,
        tflops_fp64=base.tflops_fp64 * share,
        note=note,
    )


def _bandwidth(facts) -> float:
    """GB/s by the memory's clock in kHz and its bus in bits, two a clock; 0 where unknown."""
    clock = getattr(facts, "memory_clock_rate", 0)
    return 2 * clock * 1e3 * getattr(facts, "memory_bus_width", 0) / 8 / 1e9


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error was caused by a lack of memory, at whatever step it was raised."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def mma_sync_share(gpu: Gpu) -> float:
    """The share of its tensor peak that kernels can reach by mma.sync."""
    return MMA_SYNC.get(nearest_architecture(gpu.capability), 1.0)


def described(target: Gpu | int) -> Gpu | None:
    """A GPU, or the product that describes a compute capability; None below 8.0."""
    if isinstance(target, Gpu):
        return target
    arch = nearest_architecture(target)
    return None if arch is None else GPUS[arch]
