# SPDX-License-Identifier: Apache-2.0
"""The tiles of a GEMM: which are legal for a convolution, and what each should cost.

The estimate is a roofline with two corrections: whole waves of blocks, and the latency of a block
that walks its steps alone. Its constants are round figures of the hardware, not fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from resnet_fast import _hardware
from resnet_fast.dispatch.heuristics import BLOCK_US, LAUNCH_US, LOAD_US, Candidate
from resnet_fast.kernels.filter_walk import FilterWalk
from resnet_fast.spec import ELEMENT_SIZE, ConvSpec, TileConfig

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
# of a tile in shared memory: the widest swizzle and a full cache line; scalar FMAs unroll them
ROW_BYTES = {"tensor": 128, "scalar": 64}
ACCUMULATORS = {"tensor": 128, "scalar": 32}  # per thread; scalar FMAs keep operands there as well
SHORT_ROW_ACCUMULATORS = 16  # with 32, ptxas spills a pointwise kernel at 80 registers on sm_80
GATHERED = 16  # elements per thread and step where each needs an address of its own
MAX_WORKSPACE = 32 * 2**20  # bytes: beyond it the shares would leave the L2 cache
L2_SPEEDUP = 3.0  # L2 bandwidth over DRAM bandwidth


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """In what one GEMM kernel differs from another.

    Args:
        walk: how it walks a filter; its steps are what the cost counts.
        refusal: why a tile is not for a spec, by rules of this kernel alone; None where it is.
        share: of a GPU's tensor peak, what the instructions for a tile can reach.
    """

    walk: Callable[[ConvSpec], FilterWalk]
    refusal: Callable[[ConvSpec, TileConfig], str | None]
    share: Callable[[_hardware.Gpu, TileConfig], float]


def refusal(kernel: Kernel, spec: ConvSpec, tile: TileConfig, gpu: _hardware.Gpu) -> str | None:
    """Why `tile` cannot or should not cut `spec` on `gpu`, its split aside; None where it may."""
    products = kernel.walk(spec).products
    unit = unit_of(spec)
    if (shared := shared_bytes(spec, tile)) > gpu.shared_per_block:
        return f"{shared} bytes of shared memory, {gpu.shared_per_block} available"
    if reason := kernel.refusal(spec, tile):
        return reason
    sums = tile.BLOCK_M * tile.BLOCK_N // (32 * tile.NUM_WARPS)
    if sums > ACCUMULATORS[unit]:
        return f"{sums} accumulators a thread, {ACCUMULATORS[unit]} at most for {unit} arithmetic"
    if tile.BLOCK_K > 16 and 2 * products <= tile.BLOCK_K:
        return f"BLOCK_K {tile.BLOCK_K} for taps of {products} products: half were padding"
    return None


def split_refusal(
    kernel: Kernel, spec: ConvSpec, tile: TileConfig, gpu: _hardware.Gpu
) -> str | None:
    """Why `tile.SPLIT_K` should not be used; None where it may."""
    split = tile.SPLIT_K
    if split == 1:
        return None
    steps = kernel.walk(spec).steps(tile.BLOCK_K)
    share = -(-steps // split)
    if share < tile.NUM_STAGES:
        return f"{share} steps a share would not fill {tile.NUM_STAGES} stages"
    if (split - 1) * share >= steps:
        return f"{steps} steps leave the last of {split} shares empty"
    if blocks(spec, tile) // split >= gpu.sms:
        return f"{blocks(spec, tile) // split} blocks occupy {gpu.sms} SMs without a split"
    if (workspace := split * spec.m * spec.k * 4) > MAX_WORKSPACE:
        return f"{workspace} bytes of workspace, {MAX_WORKSPACE} at most"
    return None


def cost(
    kernel: Kernel, spec: ConvSpec, tile: TileConfig, gpu: _hardware.Gpu, sums: int = 1
) -> Candidate:
    """The estimated time: the slowest of four resources, and a tenth of what the others take.

    `sums` is how many accumulators a thread keeps for each of its output elements.
    """
    size = ELEMENT_SIZE[spec.dtype]
    count = blocks(spec, tile)
    steps = -(-kernel.walk(spec).steps(tile.BLOCK_K) // tile.SPLIT_K)
    products = tile.BLOCK_M * tile.BLOCK_N
    edges = tile.BLOCK_M + tile.BLOCK_N
    resident = resident_blocks(spec, tile, gpu, sums)

    # operands come from shared memory: the larger the tile, the more products for each; and every
    # step has its barrier and its addresses, however few products it brings
    row_bytes = tile.BLOCK_K * size
    efficiency = products / (products + 32 * edges) * row_bytes / (row_bytes + 32)
    peak = gpu.tflops_fp16 * kernel.share(gpu, tile) / (2 if spec.dtype == "float32" else 1)
    if is_ieee(spec):
        peak = gpu.tflops_fp16 / 16
    step_us = 2 * products * tile.BLOCK_K / (peak / gpu.sms * efficiency * 1e6)
    load_us = LOAD_US / max(tile.NUM_STAGES - 1, 1)
    rounds = -(-count // (gpu.sms * resident))
    bandwidth = gpu.bandwidth_gbs * 1e3  # bytes per microsecond
    times = {
        "tensor": -(-count // gpu.sms) * steps * step_us,
        "DRAM": spec.bytes_minimum / bandwidth,
        "L2": count * steps * edges * tile.BLOCK_K * size / (bandwidth * L2_SPEEDUP),
        "latency": rounds * (BLOCK_US + LOAD_US + steps * max(step_us, load_us)),
    }
    slowest = max(times, key=times.get)
    total = LAUNCH_US + 0.9 * times[slowest] + 0.1 * sum(times.values())
    if tile.SPLIT_K > 1:
        shares = 2 * 4 * tile.SPLIT_K * spec.m * spec.k  # fp32, written and read
        total += LAUNCH_US + BLOCK_US + shares / (bandwidth * L2_SPEEDUP)
    return Candidate(tile, None, total, slowest)


def is_ieee(spec: ConvSpec) -> bool:
    """Whether the products are full fp32, which no tensor core computes."""
    return spec.dtype == "float32" and spec.precision == "ieee"


def unit_of(spec: ConvSpec) -> str:
    """What multiplies: "tensor" cores, or "scalar" instructions."""
    return "scalar" if is_ieee(spec) else "tensor"


def gathered(tile: TileConfig) -> int:
    """Elements per thread and step, each with an address of its own where channels are odd."""
    return max(tile.BLOCK_M, tile.BLOCK_N) * tile.BLOCK_K // (32 * tile.NUM_WARPS)


def shared_bytes(spec: ConvSpec, tile: TileConfig) -> int:
    """Shared memory of the pipeline: every stage holds a tile of x and one of weight."""
    step = (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * ELEMENT_SIZE[spec.dtype]
    return tile.NUM_STAGES * step


def blocks(spec: ConvSpec, tile: TileConfig) -> int:
    """Blocks of the grid."""
    return -(-spec.m // tile.BLOCK_M) * -(-spec.k // tile.BLOCK_N) * tile.SPLIT_K


def resident_blocks(spec: ConvSpec, tile: TileConfig, gpu: _hardware.Gpu, sums: int = 1) -> int:
    """Blocks that one SM holds at a time, the registers estimated from the accumulators."""
    threads = 32 * tile.NUM_WARPS
    registers = min(255, sums * tile.BLOCK_M * tile.BLOCK_N // threads + 80) * threads
    return max(
        1,
        min(
            _hardware.REGISTERS_PER_SM // registers,
            gpu.shared_per_sm // (shared_bytes(spec, tile) + 1024),
            gpu.max_threads_per_sm // threads,
        ),
    )
