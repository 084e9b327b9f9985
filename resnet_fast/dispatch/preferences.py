# SPDX-License-Identifier: Apache-2.0
"""Which backend is asked first on a GPU, by architecture and by what limits the convolution.

`resnet-fast tune` replaces this order, problem by problem, with times taken on the GPU at hand.
Each row names its evidence: counted (in the machine code that is launched), derived (from how the
kernels are built), documented, or assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from resnet_fast import _hardware
from resnet_fast.spec import ConvSpec


@dataclass(frozen=True, slots=True)
class Preference:
    """An order of backends, and why.

    Args:
        archs: the compute capabilities, times ten, that it is for.
        limited_by: "arithmetic", "memory" (see `limit_of`) or "any".
        order: names of backends; the others follow in the order of their table.
        reason: why, with its evidence.
    """

    archs: tuple[int, ...]
    limited_by: str
    order: tuple[str, ...]
    reason: str


PREFERENCES = (
    Preference(
        (80, 86, 89, 120), "any", ("cuda", "triton", "aten"),
        "both multiply with mma.sync here, and the C++ kernel issues fewer instructions for each "
        "(counted in SASS); it pads the filter's products once, not at every tap, and needs no "
        "compiling at the first call (derived)",
    ),
    Preference(
        (90, 100), "arithmetic", ("triton", "cuda", "aten"),
        "Triton's kernel multiplies with wgmma on sm_90 and tcgen05 on sm_100, the C++ kernel with "
        "mma.sync (counted), which cannot keep those tensor cores busy (documented)",
    ),
    Preference(
        (90, 100), "memory", ("cuda", "triton", "aten"),
        "memory sets the time, and both move each tensor once (counted); the C++ kernel needs no "
        "compiling at the first call (derived); that it is no slower is assumed, not measured",
    ),
)  # fmt: skip


def limit_of(spec: ConvSpec, gpu: _hardware.Gpu) -> str:
    """What limits `spec` on `gpu`'s roofline, by mma.sync: "arithmetic" or "memory".

    In other words: whether its instructions could keep the C++ kernel below memory's speed.
    """
    peak = gpu.tflops_fp16 * _hardware.mma_sync_share(gpu) * 1e12
    peak /= 2 if spec.dtype == "float32" else 1
    seconds_of_memory = spec.bytes_minimum / (gpu.bandwidth_gbs * 1e9)
    return "arithmetic" if spec.flops / peak > seconds_of_memory else "memory"


def preference(spec: ConvSpec, target: _hardware.Gpu | int) -> Preference | None:
    """The row for `spec` on a GPU, or on compute capability `target` (90 for 9.0).

    None below 8.0.
    """
    gpu = _hardware.described(target)
    if gpu is None:
        return None
    known = _hardware.nearest_architecture(gpu.capability)
    limits = ("any", limit_of(spec, gpu))
    return next(row for row in PREFERENCES if known in row.archs and row.limited_by in limits)
