# SPDX-License-Identifier: Apache-2.0
"""Which tile for which convolution: candidates -> legality with a reason -> score.

The candidates are the rows of one table per architecture, each tried with every split of the
products. A candidate is refused with a reason or scored with an estimate of its time, and the least
time wins. Nothing is measured or compiled here: `explain` shows every candidate, and
`resnet-fast tune` replaces the estimate by measurements.

Both families of kernels, Triton's and the CUDA C++ ones, are chosen by the same rules and the same
score; a `Family` is all in which they differ: the table, how a filter is walked, and what one of
them alone refuses.

The estimate is a roofline with two corrections: whole waves of blocks, and the latency of a block
that walks its steps alone. Its constants are round figures of the hardware, not fits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from resnet_fast import _hardware
from resnet_fast.kernels.filter_walk import FilterWalk, filter_walk
from resnet_fast.spec import ELEMENT_SIZE, ConvSpec, TileConfig

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
# of a tile in shared memory: the widest swizzle and a full cache line; scalar FMAs unroll them
ROW_BYTES = {"tensor": 128, "scalar": 64}
ACCUMULATORS = {"tensor": 128, "scalar": 32}  # per thread; scalar FMAs keep operands there as well
SHORT_ROW_ACCUMULATORS = 16  # with 32, ptxas spills a pointwise kernel at 80 registers on sm_80
GATHERED = 16  # elements per thread and step where each needs an address of its own
MAX_WORKSPACE = 32 * 2**20  # bytes: beyond it the shares would leave the L2 cache
LAUNCH_US = 2.5  # from one kernel's end to the next one's first instruction
BLOCK_US = 1.0  # first loads in, last stores out
LOAD_US = 0.6  # one load from DRAM or a busy L2
L2_SPEEDUP = 3.0  # L2 bandwidth over DRAM bandwidth

WIDE = (
    TileConfig(128, 256, 64, 3, 8, reason="256 channels and more, large batch: 85 products a byte"),
    TileConfig(256, 128, 64, 3, 8, reason="128 channels, large batch: as many products a byte"),
)
SMALL = (
    TileConfig(32, 64, 64, 4, 4, reason="batch 1: more blocks, still whole rows of 64 filters"),
    TileConfig(64, 32, 64, 4, 4, reason="batch 1: a 7x7 map fits one row of tiles"),
    TileConfig(32, 32, 64, 4, 4, reason="batch 1 on 7x7 maps: most blocks"),
)
# BLOCK_K of 32: fp32 rows of 128 bytes, and half-precision taps of at most 32 products
K32 = (
    TileConfig(128, 128, 32, 3, 8, reason="TF32 at large batch"),
    TileConfig(128, 64, 32, 4, 8, reason="TF32, 64 channels"),
    TileConfig(64, 64, 32, 4, 4, reason="TF32 on 14x14 maps"),
    TileConfig(32, 64, 32, 4, 4, reason="TF32 at batch 1"),
    TileConfig(32, 32, 32, 4, 4, reason="TF32 at batch 1 on 7x7 maps"),
    TileConfig(128, 64, 32, 3, 8, reason="the 7x7 stem: 16 gathered elements a thread"),
    TileConfig(128, 32, 32, 4, 4, reason="CIFAR's 32 channels"),
)
# BLOCK_K of 16: the least that tensor cores take; scalar FMAs need no more
K16 = (
    TileConfig(128, 16, 16, 3, 4, reason="CIFAR's 16 channels and its 3x3 stem"),
    TileConfig(128, 64, 16, 3, 8, reason="IEEE fp32 at large batch"),
    TileConfig(64, 64, 16, 3, 8, reason="IEEE fp32"),
    TileConfig(64, 32, 16, 3, 4, reason="IEEE fp32, few channels"),
    TileConfig(32, 32, 16, 4, 4, reason="IEEE fp32 at batch 1"),
)
# what 99 KiB of shared memory hold (sm_86, 89, 120): fewer stages, so that two blocks fit
COMPACT = (
    TileConfig(128, 128, 64, 3, 4, reason="most products a byte that 99 KiB hold"),
    TileConfig(128, 64, 64, 3, 4, reason="64 channels, large batch"),
    TileConfig(64, 128, 64, 3, 4, reason="14x14 maps: wide in channels"),
    TileConfig(64, 64, 64, 3, 4, reason="two blocks in 99 KiB"),
    *SMALL,
    *K32,
    *K16,
)
TILES: dict[int, tuple[TileConfig, ...]] = {
    80: (
        *WIDE,
        TileConfig(128, 128, 64, 3, 4, reason="4 warps of 64x64: 2.6 instructions per HMMA"),
        TileConfig(256, 64, 64, 3, 8, reason="64 channels, large batch"),
        TileConfig(128, 64, 64, 4, 4, reason="64 channels"),
        TileConfig(64, 128, 64, 4, 4, reason="14x14 maps: wide in channels"),
        TileConfig(64, 64, 64, 4, 4, reason="small batch"),
        *SMALL,
        *K32,
        *K16,
    ),
    86: COMPACT,
    89: COMPACT,
    90: (
        *(replace(tile, NUM_STAGES=4) for tile in WIDE),
        TileConfig(128, 128, 64, 3, 8, reason="two warpgroups; two blocks an SM"),
        TileConfig(256, 64, 64, 3, 8, reason="64 channels, large batch"),
        TileConfig(128, 64, 64, 4, 4, reason="64 channels; two blocks an SM"),
        TileConfig(64, 128, 64, 4, 4, reason="14x14 maps: one warpgroup, wide in channels"),
        TileConfig(64, 64, 64, 4, 4, reason="small batch: the least that wgmma takes"),
        *SMALL,
        *K32,
        *K16,
    ),
    100: (
        TileConfig(128, 128, 64, 4, 8, reason="8 warps: with 4 the epilogue spills"),
        TileConfig(128, 64, 64, 4, 8, reason="64 channels; 8 warps: with 4 the epilogue spills"),
        TileConfig(64, 128, 64, 4, 4, reason="14x14 maps: wide in channels"),
        TileConfig(64, 64, 64, 4, 4, reason="small batch"),
        *SMALL,
        *K32,
        *K16,
    ),
    120: COMPACT,
}

# The CUDA C++ kernels, the same on every architecture: `tile` of the private ops is the index of a
# row, and the C++ table at the end of csrc/cuda/conv_bn_act.cu has the same rows. All have 2x2
# warps. BLOCK_K counts 16-bit elements; in float32 a step of the same bytes is half as many.
CUDA_TILES = (
    TileConfig(128, 128, 64, 3, 4, reason="most products a byte: warps of 64x64"),
    TileConfig(128, 128, 32, 4, 4, reason="the same in 64 KiB: two blocks on an SM of 163 KiB"),
    TileConfig(128, 64, 64, 3, 4, reason="64 channels"),
    TileConfig(64, 128, 64, 3, 4, reason="14x14 maps: wide in channels"),
    TileConfig(64, 64, 64, 3, 4, reason="small batch: two blocks even in 99 KiB"),
    TileConfig(128, 64, 32, 4, 4, reason="64 channels in 48 KiB: two blocks in 99 KiB"),
    TileConfig(64, 64, 32, 4, 4, reason="short sums (1x1 on 64 channels): 32 KiB, many blocks"),
    TileConfig(64, 32, 64, 4, 4, reason="batch 1 on 7x7 maps: most blocks"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """One kernel's side of the choice.

    Args:
        name: of the kernels, for messages.
        tiles: (arch, dtype) -> the rows of the table, in the elements of dtype.
        walk: how the kernel walks a filter; its steps are what the score counts.
        refusal: why a tile is not for a spec, by rules of this kernel alone; None where it is.
        share: of a GPU's tensor peak, what the instructions for a tile can reach.
    """

    name: str
    tiles: Callable[[int, str], tuple[TileConfig, ...]]
    walk: Callable[[ConvSpec], FilterWalk]
    refusal: Callable[[ConvSpec, TileConfig], str | None]
    share: Callable[[_hardware.Gpu, TileConfig], float]


def _cuda_tiles(arch: int, dtype: str) -> tuple[TileConfig, ...]:
    size = ELEMENT_SIZE[dtype]
    return tuple(replace(tile, BLOCK_K=tile.BLOCK_K * 2 // size) for tile in CUDA_TILES)


def _flat_walk(spec: ConvSpec) -> FilterWalk:
    """All R*S*C products in the order they have in memory: padding only at the very end."""
    return FilterWalk(1, spec.k_gemm, True)


def _triton_refusal(spec: ConvSpec, tile: TileConfig) -> str | None:
    size = ELEMENT_SIZE[spec.dtype]
    products = filter_walk(spec).products
    threads = 32 * tile.NUM_WARPS
    unit = "scalar" if is_ieee(spec) else "tensor"
    if tile.BLOCK_K * size > ROW_BYTES[unit]:
        return f"{tile.BLOCK_K * size} bytes a row, {ROW_BYTES[unit]} at most for {unit} arithmetic"
    if tile.BLOCK_K * size < ROW_BYTES[unit] and products >= 2 * tile.BLOCK_K:
        return f"BLOCK_K {tile.BLOCK_K}: {products} products a tap fill longer rows"
    sums = tile.BLOCK_M * tile.BLOCK_N // threads
    if tile.BLOCK_K * size < 64 and sums > SHORT_ROW_ACCUMULATORS:
        return f"{sums} accumulators a thread, {SHORT_ROW_ACCUMULATORS} at most for 32-byte rows"
    if spec.c * size % 16 != 0:
        gathered = max(tile.BLOCK_M, tile.BLOCK_N) * tile.BLOCK_K // threads
        if gathered > GATHERED:
            return f"C {spec.c} is gathered: {gathered} addresses a thread, {GATHERED} at most"
    return None


def _triton_share(gpu: _hardware.Gpu, tile: TileConfig) -> float:
    """wgmma and tcgen05 take 64 rows and more of a tile; for fewer there is mma.sync."""
    return 1.0 if tile.BLOCK_M >= 64 else _hardware.mma_sync_share(gpu)


def _cuda_share(gpu: _hardware.Gpu, tile: TileConfig) -> float:
    return _hardware.mma_sync_share(gpu)


TRITON = Family(
    "Triton", lambda arch, dtype: TILES[arch], filter_walk, _triton_refusal, _triton_share
)
CUDA = Family("CUDA", _cuda_tiles, _flat_walk, lambda spec, tile: None, _cuda_share)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of `explain`: a tile and either why it is refused or its estimated time.

    Args:
        tile: the tile, split included.
        refusal: why it cannot or should not be used; None where it was scored.
        microseconds: estimated time; infinite where it was refused.
        bound: what the estimate is bound by: "tensor", "DRAM", "L2" or "latency".
    """

    tile: TileConfig
    refusal: str | None = None
    microseconds: float = float("inf")
    bound: str = ""

    def __str__(self) -> str:
        verdict = self.refusal or f"{self.microseconds:.1f} us, bound by {self.bound}"
        return f"{self.tile}: {verdict}"


Target = _hardware.Gpu | int  # a GPU; or a compute capability, for which a product stands


def choose(spec: ConvSpec, target: Target, family: Family = TRITON) -> TileConfig:
    """The tile for `spec` on a GPU, or on compute capability `target` (90 for 9.0).

    Raises:
        ValueError: no tile of the table is legal, or the architecture is older than sm_80.
    """
    best = min(explain(spec, target, family), key=lambda candidate: candidate.microseconds)
    if best.refusal:
        arch = target if isinstance(target, int) else target.capability
        raise ValueError(f"no {family.name} tile for {spec} on sm_{arch}: {best}")
    return best.tile


@functools.lru_cache(maxsize=1024)
def explain(spec: ConvSpec, target: Target, family: Family = TRITON) -> tuple[Candidate, ...]:
    """Every candidate for `spec` on a target, in table order, refused with a reason or scored."""
    gpu = _hardware.described(target)
    if gpu is None:
        needed = f"the {family.name} kernels need 8.0 or newer"
        raise ValueError(f"compute capability {target / 10}: {needed}")
    known = _hardware.nearest_architecture(gpu.capability)
    candidates = []
    for row in family.tiles(known, spec.dtype):
        refused = refusal(spec, row, gpu, family)
        if refused:
            candidates.append(Candidate(row, refused))
            continue
        for split in SPLITS:
            tile = replace(row, SPLIT_K=split)
            refused = split_refusal(spec, tile, gpu, family)
            scored = Candidate(tile, refused) if refused else score(spec, tile, gpu, family)
            candidates.append(scored)
    return tuple(candidates)


def cuda_index(spec: ConvSpec, tile: TileConfig) -> int:
    """The row of `CUDA_TILES` that `tile` is, its split aside: what the private ops call `tile`."""
    return _cuda_tiles(0, spec.dtype).index(replace(tile, SPLIT_K=1))


def refusal(
    spec: ConvSpec, tile: TileConfig, gpu: _hardware.Gpu, family: Family = TRITON
) -> str | None:
    """Why `tile` cannot or should not cut `spec` on `gpu`, its split aside; None where it may."""
    products = family.walk(spec).products
    unit = "scalar" if is_ieee(spec) else "tensor"
    if (shared := shared_bytes(spec, tile)) > gpu.shared_per_block:
        return f"{shared} bytes of shared memory, {gpu.shared_per_block} available"
    if reason := family.refusal(spec, tile):
        return reason
    sums = tile.BLOCK_M * tile.BLOCK_N // (32 * tile.NUM_WARPS)
    if sums > ACCUMULATORS[unit]:
        return f"{sums} accumulators a thread, {ACCUMULATORS[unit]} at most for {unit} arithmetic"
    if tile.BLOCK_K > 16 and 2 * products <= tile.BLOCK_K:
        return f"BLOCK_K {tile.BLOCK_K} for taps of {products} products: half were padding"
    return None


def split_refusal(
    spec: ConvSpec, tile: TileConfig, gpu: _hardware.Gpu, family: Family = TRITON
) -> str | None:
    """Why `tile.SPLIT_K` should not be used; None where it may."""
    split = tile.SPLIT_K
    if split == 1:
        return None
    steps = family.walk(spec).steps(tile.BLOCK_K)
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


def score(
    spec: ConvSpec, tile: TileConfig, gpu: _hardware.Gpu, family: Family = TRITON, sums: int = 1
) -> Candidate:
    """The estimated time: the slowest of four resources, and a tenth of what the others take.

    `sums` is how many accumulators a thread keeps for each of its output elements.
    """
    size = ELEMENT_SIZE[spec.dtype]
    count = blocks(spec, tile)
    steps = -(-family.walk(spec).steps(tile.BLOCK_K) // tile.SPLIT_K)
    products = tile.BLOCK_M * tile.BLOCK_N
    edges = tile.BLOCK_M + tile.BLOCK_N
    resident = resident_blocks(spec, tile, gpu, sums)

    # operands come from shared memory: the larger the tile, the more products for each; and every
    # step has its barrier and its addresses, however few products it brings
    row_bytes = tile.BLOCK_K * size
    efficiency = products / (products + 32 * edges) * row_bytes / (row_bytes + 32)
    peak = gpu.tflops_fp16 * family.share(gpu, tile) / (2 if spec.dtype == "float32" else 1)
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
    bound = max(times, key=times.get)
    total = LAUNCH_US + 0.9 * times[bound] + 0.1 * sum(times.values())
    if tile.SPLIT_K > 1:
        shares = 2 * 4 * tile.SPLIT_K * spec.m * spec.k  # fp32, written and read
        total += LAUNCH_US + BLOCK_US + shares / (bandwidth * L2_SPEEDUP)
    return Candidate(tile, None, total, bound)


def is_ieee(spec: ConvSpec) -> bool:
    """Whether the products are full fp32, which no tensor core computes."""
    return spec.dtype == "float32" and spec.precision == "ieee"


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
