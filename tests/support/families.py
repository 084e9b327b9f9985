# SPDX-License-Identifier: Apache-2.0
"""Every op in every family of kernels, as compilations that can be listed without doing them.

    triton, cuda  x  a convolution, a join of two, a stem, an addition

The families `cuda` need nvcc. Shapes are small enough for the PTX machine, and each tile of a
family's table has some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from resnet_fast import _hardware, ops
from resnet_fast.dispatch import tiles
from resnet_fast.kernels import stem_pool
from resnet_fast.spec import ELEMENT_SIZE, ConvSpec, JoinSpec, StemSpec, StemTile, TileConfig
from tests.support import cases, compiled, cuda_kernels, join_cases, stem
from tests.support.compiled import CompiledKernel

NUMEL = 5000  # of add_relu: blocks that are whole, and one that is not


@dataclass(frozen=True)
class Work:
    """Something to compile.

    Args:
        problem: what is computed: a spec, or sizes.
        tile: how it is cut; None where the kernel has no tiles.
        dtype: of x.
        compile: makes the launches, with their arguments.
    """

    problem: object
    tile: object
    dtype: str
    compile: Callable[[], list[CompiledKernel]]


def whole_join(tile: TileConfig, r: int = 1, **options) -> JoinSpec:
    """Two tiles each way, steps enough to fill the pipeline."""
    c = 2 * tile.BLOCK_K
    sizes = (2, tile.BLOCK_M // 8, 8, c, c, 2 * tile.BLOCK_N)
    return join_cases.join(*sizes, r=r, s=r, stride=(2, 2), **options)


def whole_conv(tile: TileConfig, dtype: str, r: int = 3) -> ConvSpec:
    """Whole tiles, two each way in N, and three steps: of a filter, or with r = 1 pointwise."""
    sizes = (1, tile.BLOCK_M // 8, 8, 2 * tile.BLOCK_K, 2 * tile.BLOCK_N)
    padding = (r // 2, r // 2)
    return ConvSpec(*sizes, r, r, (1, 1), padding, dtype=dtype, residual=True, norm=True)


def in_elements(tile: TileConfig, dtype: str) -> TileConfig:
    """A CUDA tile, whose table counts 16-bit elements, in those of a dtype."""
    return replace(tile, BLOCK_K=tile.BLOCK_K * 2 // ELEMENT_SIZE[dtype])


# ---- the families


def _conv(source, spec: ConvSpec, tile: TileConfig, arch: int) -> Work:
    return Work(spec, tile, spec.dtype, lambda: source(cases.conv_tensors(spec), tile, arch))


def _join(source, spec: JoinSpec, tile: TileConfig, arch: int) -> Work:
    dtype = spec.main.dtype
    return Work(spec, tile, dtype, lambda: source(join_cases.join_tensors(spec), tile, arch))


def _triton_convs(arch: int) -> Iterator[Work]:
    for kind in cases.KINDS:
        for spec, tile in cases.tile_cases(arch, *kind):
            yield _conv(compiled.conv_kernels, spec, tile, arch)


def _triton_joins(arch: int) -> Iterator[Work]:
    for tile in tiles.TRITON_TILES[JoinSpec][arch]:
        for dtype, precision in cases.KINDS:
            spec = whole_join(tile, dtype=dtype, precision=precision)
            if tiles.TRITON[JoinSpec].refusal(spec, tile, _hardware.GPUS[arch]) is None:
                yield _join(join_cases.join_kernels, spec, tile, arch)


def _triton_pools(arch: int) -> Iterator[Work]:
    for dtype in cases.DTYPES:
        yield Work((2, 9, 7, 64), None, _name(dtype), partial(_pool_kernels, dtype, arch))


def _pool_kernels(dtype: torch.dtype, arch: int) -> list[CompiledKernel]:
    kernels: list[CompiledKernel] = []
    n, p, q, k = shape = (2, 9, 7, 64)
    x = torch.randn(shape).relu().to(dtype)
    out = torch.full((n, (p + 1) // 2, (q + 1) // 2, k), float("nan"), dtype=dtype)
    bind = compiled.recorder(kernels)
    stem_pool.build_max_pool(shape, dtype, True, arch=arch, bind=bind)(x, out)
    return kernels


def _adds(source, arch: int) -> Iterator[Work]:
    for dtype in cases.DTYPES:
        tensors = [torch.randn(NUMEL).to(dtype) for _ in range(3)]
        yield Work(NUMEL, None, _name(dtype), partial(source, *tensors, arch))


def _cuda_convs(arch: int) -> Iterator[Work]:
    for row in cuda_kernels.TILES:
        for dtype in map(_name, cases.DTYPES):
            tile = in_elements(row, dtype)
            for r in (3, 1):
                yield _conv(cuda_kernels.conv_kernels, whole_conv(tile, dtype, r), tile, arch)
    split = replace(in_elements(row, dtype), SPLIT_K=2)
    yield _conv(cuda_kernels.conv_kernels, whole_conv(split, dtype), split, arch)


def _cuda_joins(arch: int) -> Iterator[Work]:
    for row in tiles.CUDA_TILES[JoinSpec]:
        for dtype in map(_name, cases.DTYPES):
            tile = in_elements(row, dtype)
            for r in (3, 1):
                spec = whole_join(tile, r, dtype=dtype)
                yield _join(cuda_kernels.join_kernels, spec, tile, arch)


def _cuda_stems(arch: int) -> Iterator[Work]:
    for dtype in cases.DTYPES:
        for tile in tiles.CUDA_TILES[StemSpec]:
            make = partial(_stem_kernels, dtype, tile, arch)
            yield Work((1, 33, 30, 64), tile, _name(dtype), make)


def _stem_kernels(dtype: torch.dtype, tile: StemTile, arch: int) -> list[CompiledKernel]:
    return [stem.stem_kernel(stem.stem_tensors(1, 33, 30, 64, dtype), tile, arch)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# arch -> its work, tile by tile
FAMILIES: dict[str, Callable[[int], Iterator[Work]]] = {
    "triton conv_bn_act": _triton_convs,
    f"triton {ops.CONV_BN_JOIN.name}": _triton_joins,
    "triton stem_pool": _triton_pools,
    "triton add_relu": partial(_adds, compiled.add_relu_kernels),
    "cuda conv_bn_act": _cuda_convs,
    f"cuda {ops.CONV_BN_JOIN.name}": _cuda_joins,
    "cuda stem_pool": _cuda_stems,
    "cuda add_relu": partial(_adds, cuda_kernels.add_relu_kernels),
}
