# SPDX-License-Identifier: Apache-2.0
"""The CUDA stem on the PTX machine: values against fp64, special values, exact counts, mutants.

The machine stops at races, missing barriers and stray addresses; x, weight and out are surrounded
by NaN. Blocks walk over several tiles, as they do on a GPU.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from resnet_fast import _hardware
from resnet_fast.spec import StemTile
from softgpu import ptx
from tests.kernels.machine import SECTOR, spills, unseen_norms
from tests.ptx.ptx_mutants import hunt
from tests.support import compiled, nvcc
from tests.support.stem import K_GEMM, TILES, StemTensors, stem_kernel, stem_tensors
from tests.support.tolerance import assert_within

pytestmark = pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))

ARCHITECTURES = pytest.mark.parametrize("arch", compiled.MACHINE_ARCHS, ids="sm_{}".format)
DTYPES = pytest.mark.parametrize(
    "dtype", (torch.float16, torch.bfloat16, torch.float32), ids=lambda d: str(d)[6:]
)
BLOCKS = 2  # of a group of channels, so that most of them see more than one tile

# (N, H, W, K) and options of `stem_tensors`
CASES = {
    "one-pixel": ((2, 1, 1, 8), {}),
    "one-column": ((1, 40, 1, 16), {"layout": "nchw"}),
    "one-row": ((1, 1, 61, 16), {}),
    "odd": ((1, 37, 45, 64), {}),
    "odd-planes": ((1, 45, 37, 64), {"layout": "nchw"}),
    "odd-slice": ((2, 35, 30, 40), {"layout": "sliced"}),
    "even": ((1, 34, 58, 64), {"layout": "nchw", "norm": False}),
    "channels-beyond-a-group": ((1, 19, 22, 72), {}),
    "bytes": ((1, 33, 47, 64), {"image": True}),
    "bytes-planes": ((2, 21, 32, 24), {"image": True, "layout": "nchw"}),
    "bytes-slice": ((1, 29, 31, 32), {"image": True, "layout": "sliced"}),
    "narrow-vectors": ((1, 16, 16, 64), {"params": torch.bfloat16}),
}
FEW = ("odd", "odd-planes", "bytes", "bytes-planes")


def check(tensors: StemTensors, label: str = "") -> None:
    """All of `out`, and nothing beside it, is written, and within the tolerance rule."""
    assert_within(tensors.out, tensors.eager(), tensors.reference(), K_GEMM, label)
    assert all(guard.isnan().all() for guard in tensors.out_guard), f"{label}: wrote outside of out"


def assert_right(name: str, dtype: torch.dtype, tile: StemTile, arch: int) -> None:
    shape, options = CASES[name]
    tensors = stem_tensors(*shape, dtype, **options)
    run = stem_kernel(tensors, tile, arch, BLOCKS).run()
    check(tensors, f"{name}, {tile}")
    if shape[-1] * dtype.itemsize % 128 == 0:  # fewer leave lanes of the pool without work
        assert run.counters.bank_conflicts == 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=lambda d: str(d)[6:])
def test_cases(name, dtype):
    assert_right(name, dtype, TILES[0], 80)


@DTYPES
@pytest.mark.parametrize("name", FEW)
def test_small_tile(name, dtype):
    assert_right(name, dtype, TILES[1], 80)


@DTYPES
@pytest.mark.parametrize("name", FEW)
def test_sm_90(name, dtype):
    assert_right(name, dtype, TILES[0], 90)


@ARCHITECTURES
@DTYPES
@pytest.mark.parametrize("index", (0, 1))
def test_resources(index, dtype, arch):
    """No spills; and in half precision two blocks on an SM, one computing while one pools."""
    kernel = stem_kernel(stem_tensors(1, 8, 8, 64, dtype), TILES[index], arch)
    assert not spills(kernel) and kernel.resources().spill_bytes == 0
    assert kernel.resources().shared_bytes <= _hardware.GPUS[86].shared_per_block
    blocks = kernel.resources().blocks_per_sm(_hardware.GPUS[arch])
    assert blocks >= (2 if dtype.itemsize == 2 else 1)


@DTYPES
@pytest.mark.parametrize("layout", ("nhwc", "nchw"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")), ids=str)
def test_special_values_reach_what_they_reach_in_torch(value, layout, dtype):
    """Above all not the filter's eighth tap, which only the padded GEMM has."""
    tensors = stem_tensors(1, 37, 45, 16, dtype, layout=layout)
    tensors.x[0, 1, 20, 22] = value
    stem_kernel(tensors, TILES[0], 80, BLOCKS).run()
    reference = tensors.reference()
    assert 0 < (~reference.isfinite()).sum() < reference.numel()
    assert torch.equal(tensors.out.isnan(), reference.isnan())
    assert torch.equal(tensors.out.isinf(), reference.isinf())


@DTYPES
def test_a_wrong_norm_is_seen(dtype):
    tensors = stem_tensors(1, 19, 22, 72, dtype)

    def launch(wrong):
        stem_kernel(wrong, TILES[0], 80, BLOCKS).run()

    assert not unseen_norms(tensors, launch, check)


def row_sectors(tensors: StemTensors, tile: StemTile) -> int:
    """Sectors that a tile's image rows have inside of x, each row for itself, over all tiles."""
    n, _, h, w = tensors.x.shape
    _, _, p, q = tensors.out.shape
    size, pixel = tensors.x.element_size(), tensors.x.element_size()
    planes = 3
    if tensors.x.stride(1) == 1:
        planes, pixel = 1, 3 * size
    total = 0
    for row, column in itertools.product(range(0, p, tile.BLOCK_P), range(0, q, tile.BLOCK_Q)):
        first, last = 4 * row - 5, 4 * row - 5 + 4 * tile.BLOCK_P + 7
        rows = min(last, h) - max(first, 0)
        left = max(4 * column - 5, 0)
        right = min(4 * column - 5 + 4 * tile.BLOCK_Q + 7, w)
        total += rows * (-(-right * pixel // SECTOR) - left * pixel // SECTOR)
    return n * planes * total


@DTYPES
@pytest.mark.parametrize("layout", ("nhwc", "nchw"))
def test_traffic(layout, dtype):
    """Distinct sectors are the tensors once; those asked for, the rows of tiles with their halo."""
    tile = TILES[0]
    tensors = stem_tensors(1, 64, 128, 64, dtype, layout=layout)
    kernel = stem_kernel(tensors, tile, 80, BLOCKS)
    counters = kernel.run().counters
    sectors = {name: getattr(tensors, name).nbytes // SECTOR for name in ("x", "weight", "out")}
    vectors = 4 * 64 * 4 // SECTOR
    assert counters.unique_sectors["store"] == counters.global_sectors["store"] == sectors["out"]
    read = sectors["x"] + sectors["weight"] + vectors
    assert counters.unique_sectors["load"] == read
    groups = kernel.grid[1]
    once_a_block = BLOCKS * (sectors["weight"] + vectors)
    rows = row_sectors(tensors, tile) * groups
    slack = 1.6 if dtype == torch.float32 else 1.04  # a filter row is 84 bytes, a warp's access
    assert counters.global_sectors["load"] - rows <= slack * once_a_block
    assert counters.bank_conflicts == 0


def test_image_bytes_are_read_once():
    tensors = stem_tensors(1, 64, 128, 64, image=True)
    counters = stem_kernel(tensors, TILES[0], 80, BLOCKS).run().counters
    constants = 2  # mean and std
    others = (tensors.weight.nbytes + 4 * 64 * 4) // SECTOR
    assert counters.unique_sectors["load"] == tensors.x.nbytes // SECTOR + others + constants


def test_beyond_32_bits():
    """x and y pass 2^31 elements: the last two images, in the right place."""
    images, n = 2, 2**18
    near = stem_tensors(images, 64, 64, 64)

    def far(tensor):
        _, channels, height, width = tensor.shape
        whole = torch.from_numpy(ptx.sparse_array((n, height, width, channels), "float16"))
        whole = whole.permute(0, 3, 1, 2)
        whole[-images:] = tensor
        return whole

    tensors = replace(near, x=far(near.x), out=far(near.out))
    kernel = stem_kernel(tensors, TILES[0], 80)
    tiles = kernel.grid[0] // n * images
    run = kernel.run(range(kernel.grid[0] - tiles, kernel.grid[0]))
    near.out.copy_(tensors.out[-images:])
    check(near)
    assert run.counters.unique_sectors["store"] == near.out.nbytes // SECTOR


class Stem:
    """The mutants' kernel; maps whose edges lie within a tile, at it and beyond."""

    sites = 8  # of one mutation
    tile = TILES[1]
    shapes = ((1, 21, 30, 64, "nhwc"), (2, 9, 14, 24, "nchw"), (1, 12, 16, 64, "nhwc"))

    def __init__(self) -> None:
        self.runs = {}
        for n, h, w, k, layout in self.shapes:
            tensors = stem_tensors(n, h, w, k, layout=layout)
            kernel = stem_kernel(tensors, self.tile, 80, 1)
            self.runs[n, h, w, k, layout] = kernel, tensors, tensors.eager(), tensors.reference()
            self.text = kernel.ptx

    def check(self, text: str, shape: tuple):
        kernel, tensors, eager, reference = self.runs[shape]
        tensors.out.fill_(float("nan"))
        run = kernel.run(text=text)
        assert_within(tensors.out, eager, reference, K_GEMM)
        assert all(guard.isnan().all() for guard in tensors.out_guard)
        return run


# mutation -> how many survivors, and why none of them changes anything.
EXPLAINED = {
    "bound off by one": (
        1,
        "the element behind an image row's last goes to the place of the last pixel's eighth tap, "
        "which is masked",
    ),
}


def test_mutants_are_caught():
    tally = hunt(Stem())
    print(f"\nstem_pool sm_80: {tally}")
    assert not tally.unexplained(EXPLAINED)
