# SPDX-License-Identifier: Apache-2.0
"""The least memory traffic of a tiled convolution, in sectors of 32 bytes.

For channels in whole sectors; a tile or a step that is cut need not read what it does not use.
"""

from __future__ import annotations

from dataclasses import dataclass

from resnet_fast.spec import ELEMENT_SIZE, ConvSpec, TileConfig

SECTOR = 32  # bytes


@dataclass(frozen=True, slots=True)
class Sectors:
    """Requested loads, stores (each is requested once), and distinct loads."""

    loads: int
    stores: int
    unique_loads: int


def of_gemm(spec: ConvSpec, tile: TileConfig, readers: int) -> Sectors:
    """The least that the implicit GEMM moves.

    Every tile reads its pixels inside the image at each tap, and its filters; and `readers` times
    the scale, shift, mean and variance of its columns. Without readers there is no BatchNorm.
    """
    size = ELEMENT_SIZE[spec.dtype]
    tiles_m, tiles_n = -(-spec.m // tile.BLOCK_M), -(-spec.k // tile.BLOCK_N)
    taps = pixels = spec.n  # inside the image: the product of those along each axis
    for length, out, r, stride, pad, dilation in zip(
        *((spec.h, spec.w), (spec.p, spec.q), (spec.r, spec.s)),
        *(spec.stride, spec.padding, spec.dilation),
        strict=True,
    ):
        places = [o * stride + i * dilation - pad for o in range(out) for i in range(r)]
        inside = [place for place in places if 0 <= place < length]
        taps *= len(inside)
        pixels *= len(set(inside))  # a stride may step over some
    pixel = spec.c * size // SECTOR
    filters = spec.k * spec.k_gemm * size // SECTOR
    loads = tiles_n * taps * pixel + tiles_m * filters
    unique = pixels * pixel + filters
    if tile.SPLIT_K > 1:
        return Sectors(loads, tile.SPLIT_K * spec.m * spec.k * 4 // SECTOR, unique)
    y = spec.m * spec.k * size // SECTOR
    residual = y if spec.residual else 0
    loads += residual + tiles_m * readers * vectors(spec)
    return Sectors(loads, y, unique + residual + (vectors(spec) if readers else 0))


def of_reduction(spec: ConvSpec, tile: TileConfig, readers: int) -> Sectors:
    """The same of the sum of the splits: the shares, the residual, and the vectors of all columns
    `readers` times over."""
    y = spec.m * spec.k * ELEMENT_SIZE[spec.dtype] // SECTOR
    read = tile.SPLIT_K * spec.m * spec.k * 4 // SECTOR + (y if spec.residual else 0)
    return Sectors(read + readers * vectors(spec), y, read + vectors(spec))


def vectors(spec: ConvSpec) -> int:
    """Of scale and shift, and mean and variance where they are given, in fp32."""
    return (4 if spec.norm else 2) * 4 * spec.k // SECTOR
