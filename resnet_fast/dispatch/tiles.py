# SPDX-License-Identifier: Apache-2.0
"""Every tile of every kernel, and for each op and backend the family that chooses among them.

A new tile is a row here; one of a CUDA kernel also stands in the table of its .cu file, in the same
place. Most rows are for GEMMs, and `gemm.py` has their rules and their cost. What is an op's own
(two sums a thread in a join, idle SMs in a stem) is here beside its table.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from resnet_fast import _hardware
from resnet_fast.dispatch import gemm
from resnet_fast.dispatch.heuristics import LAUNCH_US, Candidate, Family
from resnet_fast.kernels.filter_walk import FilterWalk, filter_walk
from resnet_fast.spec import (
    ELEMENT_SIZE,
    ConvSpec,
    JoinSpec,
    Spec,
    StemSpec,
    StemTile,
    Tile,
    TileConfig,
)

# ---- Triton: by architecture

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
CONV_TILES = {
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

# Two sums for each output element: half the tile that one convolution can keep in registers. At
# 128x128 one block would fill an SM, and nothing would run while its pipeline drains between the
# products.
LARGE = TileConfig(128, 64, 64, 3, 4, reason="large batch: 4 warps, so that two blocks fit an SM")
LARGE_8 = TileConfig(128, 64, 64, 3, 8, reason="large batch: with 4 warps the sums spill")
MIDDLE = TileConfig(64, 64, 64, 3, 4, reason="14x14 and 7x7 maps: three blocks an SM")
MIDDLE_8 = TileConfig(64, 64, 64, 3, 8, reason="14x14 and 7x7 maps: with 4 warps the sums spill")
REST = (
    TileConfig(32, 64, 64, 4, 4, reason="batch 1: more blocks, still whole rows of 64 filters"),
    TileConfig(32, 32, 64, 4, 4, reason="batch 1 on 7x7 maps: most blocks"),
    TileConfig(64, 64, 32, 3, 8, reason="TF32, and products of at most 32 channels"),
    TileConfig(32, 64, 32, 4, 4, reason="TF32 at batch 1"),
    TileConfig(128, 16, 16, 3, 4, reason="16 channels"),
    TileConfig(64, 32, 16, 3, 4, reason="IEEE fp32"),
)
JOIN_TILES = {
    80: (LARGE, MIDDLE, *REST),
    86: (LARGE_8, MIDDLE, *REST),
    89: (LARGE_8, MIDDLE, *REST),
    90: (LARGE, MIDDLE, *REST),
    100: (LARGE_8, MIDDLE_8, *REST),
    120: (LARGE_8, MIDDLE, *REST),
}

TRITON_TILES = {ConvSpec: CONV_TILES, JoinSpec: JOIN_TILES}

# ---- CUDA C++: the same on every architecture

# The private ops take the index of a row as `tile`; the tables at the end of csrc/cuda/<op>.cu have
# the same rows in the same order. All GEMM tiles of a convolution have 2x2 warps. BLOCK_K counts
# 16-bit elements; in float32 a step of the same bytes is half as many.
CUDA_TILES: dict[type[Spec], tuple[Tile, ...]] = {
    ConvSpec: (
        TileConfig(128, 128, 64, 3, 4, reason="most products a byte: warps of 64x64"),
        TileConfig(128, 128, 32, 4, 4, reason="the same in 64 KiB: two blocks on an SM of 163 KiB"),
        TileConfig(128, 64, 64, 3, 4, reason="64 channels"),
        TileConfig(64, 128, 64, 3, 4, reason="14x14 maps: wide in channels"),
        TileConfig(64, 64, 64, 3, 4, reason="small batch: two blocks even in 99 KiB"),
        TileConfig(128, 64, 32, 4, 4, reason="64 channels in 48 KiB: two blocks in 99 KiB"),
        TileConfig(64, 64, 32, 4, 4, reason="short sums (1x1 on 64 channels): 32 KiB, many blocks"),
        TileConfig(64, 32, 64, 4, 4, reason="batch 1 on 7x7 maps: most blocks"),
    ),
    JoinSpec: (
        TileConfig(128, 128, 64, 3, 8, reason="large batch: 8 warps hold two sums of 64x32 each"),
        TileConfig(128, 64, 64, 3, 4, reason="large batch: two sums of 64 registers a thread"),
        TileConfig(64, 64, 64, 3, 4, reason="14x14 and 7x7 maps: more blocks"),
    ),
    StemSpec: (
        StemTile(
            8, 7, 8, "17 x 15 convolution pixels fill 16 fragments but for one; 56 x 56 is whole"
        ),
        StemTile(3, 4, 4, "7 x 9 fill 4 but for one: for batches that would leave SMs idle"),
    ),
}


def cuda_tiles(kind: type[Spec], dtype: str) -> tuple[Tile, ...]:
    """`CUDA_TILES` of a kind of problem in the elements of a dtype."""
    halves = ELEMENT_SIZE[dtype] // 2
    return tuple(
        replace(tile, BLOCK_K=tile.BLOCK_K // halves) if isinstance(tile, TileConfig) else tile
        for tile in CUDA_TILES[kind]
    )


def cuda_index(spec: Spec, tile: Tile) -> int:
    """The row of `CUDA_TILES` that `tile` is, its split aside: what the private ops call `tile`."""
    unsplit = replace(tile, SPLIT_K=1) if isinstance(tile, TileConfig) else tile
    return cuda_tiles(type(spec), spec.dtype).index(unsplit)


# ---- convolutions


def _triton_refusal(spec: ConvSpec, tile: TileConfig) -> str | None:
    size = ELEMENT_SIZE[spec.dtype]
    products = filter_walk(spec).products
    threads = 32 * tile.NUM_WARPS
    unit = gemm.unit_of(spec)
    if tile.BLOCK_K * size > gemm.ROW_BYTES[unit]:
        most = gemm.ROW_BYTES[unit]
        return f"{tile.BLOCK_K * size} bytes a row, {most} at most for {unit} arithmetic"
    if tile.BLOCK_K * size < gemm.ROW_BYTES[unit] and products >= 2 * tile.BLOCK_K:
        return f"BLOCK_K {tile.BLOCK_K}: {products} products a tap fill longer rows"
    sums, most = tile.BLOCK_M * tile.BLOCK_N // threads, gemm.SHORT_ROW_ACCUMULATORS
    if tile.BLOCK_K * size < 64 and sums > most:
        return f"{sums} accumulators a thread, {most} at most for 32-byte rows"
    if spec.c * size % 16 != 0:
        gathered = gemm.gathered(tile)
        if gathered > gemm.GATHERED:
            return f"C {spec.c} is gathered: {gathered} addresses a thread, {gemm.GATHERED} at most"
    return None


def _triton_share(gpu: _hardware.Gpu, tile: TileConfig) -> float:
    """wgmma and tcgen05 take 64 rows and more of a tile; for fewer there is mma.sync."""
    return 1.0 if tile.BLOCK_M >= 64 else _hardware.mma_sync_share(gpu)


def _flat_walk(spec: ConvSpec) -> FilterWalk:
    """All R*S*C products in the order they have in memory: padding only at the very end."""
    return FilterWalk(1, spec.k_gemm, True)


TRITON_GEMM = gemm.Kernel(filter_walk, _triton_refusal, _triton_share)
CUDA_GEMM = gemm.Kernel(
    _flat_walk, lambda spec, tile: None, lambda gpu, tile: _hardware.mma_sync_share(gpu)
)


# ---- joins

SUMS = 2  # of a thread for each output element: one of each product


def _join_refusal(spec: JoinSpec, tile: TileConfig, gpu: _hardware.Gpu) -> str | None:
    """The longer product decides the length of the Triton kernel's rows."""
    parts, size = (spec.main, spec.projection), ELEMENT_SIZE[spec.dtype]
    gathered = gemm.gathered(tile)
    if any(part.c * size % 16 for part in parts) and gathered > gemm.GATHERED:
        return f"odd channels: {gathered} addresses a thread, {gemm.GATHERED} at most"
    longer = max(parts, key=lambda part: filter_walk(part).products)
    return gemm.refusal(TRITON_GEMM, longer, tile, gpu)


def _join_cost(
    kernel: gemm.Kernel, spec: JoinSpec, tile: TileConfig, gpu: _hardware.Gpu
) -> Candidate:
    """Both products as one, of which a thread keeps two sums."""
    return gemm.cost(kernel, spec.as_one_product, tile, gpu, sums=SUMS)


# ---- stems

FRAGMENT = 16  # convolution pixels that one mma.sync takes
CONV_PRODUCTS = 7 * 8 * 4  # a filter's products as the kernel walks them, padded
LONE = 1.25  # of a block that has its SM to itself while others idle: nothing hides its waits


def _stem_cost(spec: StemSpec, tile: StemTile, gpu: _hardware.Gpu) -> Candidate:
    """Whole fragments of convolution pixels, by the SMs that have a block; idle ones are dear.

    A tile of fewer pixels computes more of its border twice. It pays where the larger one would
    give less than a block for each SM.
    """
    rows, columns = 2 * tile.BLOCK_P + 1, 2 * tile.BLOCK_Q + 1
    pixels = -(-rows * columns // FRAGMENT) * FRAGMENT * tile.blocks(spec)
    peak = gpu.tflops_fp16 * _hardware.mma_sync_share(gpu) * 1e6  # flops per microsecond
    peak /= 2 if spec.dtype == "float32" else 1
    busy = 2 * pixels * spec.conv.k * CONV_PRODUCTS / peak
    blocks = tile.blocks(spec)
    if 0 < blocks < gpu.sms:
        return Candidate(tile, None, LAUNCH_US + LONE * busy * gpu.sms / blocks, "idle SMs")
    return Candidate(tile, None, LAUNCH_US + busy, "tensor")


# ---- the families, by backend and by what is computed


def _of_conv(name: str, tiles, kernel: gemm.Kernel) -> Family:
    rules = (gemm.cost, gemm.refusal, gemm.split_refusal)
    cost, refusal, split_refusal = (functools.partial(rule, kernel) for rule in rules)
    return Family(name, tiles, cost, refusal, gemm.SPLITS, split_refusal)


def _of_join(name: str, tiles, kernel: gemm.Kernel, **rules) -> Family:
    return Family(name, tiles, functools.partial(_join_cost, kernel), **rules)


def _triton(kind: type[Spec]):
    return lambda arch, dtype: TRITON_TILES[kind][arch]


def _cuda(kind: type[Spec]):
    return lambda arch, dtype: cuda_tiles(kind, dtype)


TRITON: dict[type[Spec], Family] = {
    ConvSpec: _of_conv("Triton", _triton(ConvSpec), TRITON_GEMM),
    JoinSpec: _of_join("Triton", _triton(JoinSpec), TRITON_GEMM, refusal=_join_refusal),
}
TRITON[StemSpec] = TRITON[ConvSpec].of(lambda spec: spec.conv)
CUDA: dict[type[Spec], Family] = {
    ConvSpec: _of_conv("CUDA", _cuda(ConvSpec), CUDA_GEMM),
    JoinSpec: _of_join("CUDA", _cuda(JoinSpec), CUDA_GEMM),
    StemSpec: Family("CUDA", _cuda(StemSpec), _stem_cost),
}
