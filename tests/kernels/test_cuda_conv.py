# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ convolution: what nvcc makes of it, and what that computes on the PTX machine.

The code is written for sm_80 and has no branch on the architecture, so the PTX of a newer one has
the same instructions: sm_80 runs everything, sm_90 every tile once, the others are compiled.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from resnet_fast import _hardware
from resnet_fast.spec import ConvSpec, TileConfig
from tests.kernels import machine
from tests.kernels.machine import Job, assert_no_faults
from tests.support import cases, cuda_kernels, families, nvcc

pytestmark = pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))

DTYPES = ("float16", "bfloat16", "float32")
TILE = TileConfig(64, 64, 32, 4, 4)  # small: odd cases have several in both directions
CONV3X3 = ConvSpec(2, 7, 9, 64, 80, 3, 3, (1, 1), (1, 1), residual=True, norm=True)
ODD = {name: spec for name, spec in cases.ODD.items() if spec.c % 8 == spec.k % 8 == 0}


def job(spec: ConvSpec, tile: TileConfig = TILE, arch: int = 80, **options) -> Job:
    tile = families.in_elements(tile, spec.dtype)
    return Job(spec, tile, arch, tuple(options.items()), cuda_kernels.conv_kernels)


# --- what the compiler makes of it ----------------------------------------------------------------


def forms(tile: TileConfig, dtype: str) -> list[ConvSpec]:
    """The two kernels of a tile: of any filter, and of a pointwise one."""
    return [families.whole_conv(tile, dtype, r) for r in (3, 1)]


def per_mma_at_most(tile: TileConfig, spec: ConvSpec, arch: int) -> float:
    """Of SASS instructions in the main loop: few where a warp has 64x64 sums.

    CUTLASS's convolution has 3.06 at 128x128x32 and 2.62 at 128x128x64 on sm_80. TF32 rounds every
    operand, and ptxas needs more for the newest architectures.
    """
    if tile.BLOCK_M * tile.BLOCK_N < 128 * 128:
        return float("inf")
    if spec.dtype == "float32":
        return 5.0
    return 2.6 if arch <= 90 else 3.7


def compiled_faults(arguments: Job) -> list[str]:
    """What is wrong with the machine code of one kernel."""
    spec, tile, arch = arguments.spec, arguments.tile, arguments.arch
    gpu = _hardware.GPUS[arch]
    (kernel,) = arguments.source(cases.conv_tensors(spec), tile, arch)
    used, codes, loop = kernel.resources(), kernel.opcodes(), kernel.main_loop()
    stores = {code for code in codes if code.startswith("STG")}
    fits = used.shared_bytes <= gpu.shared_per_block
    blocks = 2 if min(tile.BLOCK_M, tile.BLOCK_N) <= 64 and gpu.shared_per_sm > 2**17 else 1
    faults = {
        f"spills {used.spill_bytes} bytes": used.spill_bytes > 0,
        f"{used.shared_bytes} bytes of shared memory on {gpu.name}": not fits,
        f"{used.blocks_per_sm(gpu)} blocks per SM": fits and used.blocks_per_sm(gpu) < blocks,
        f"{loop.per_mma:.2f} instructions per HMMA": loop.per_mma
        > per_mma_at_most(tile, spec, arch),
        "divides in its main loop": any(re.match(r"MUFU|I2F|F2I", code) for code in loop.opcodes),
        f"stores by {stores}": not all(".128" in code for code in stores),
        "loads x or weight through registers": any(c.startswith("LDG.") for c in loop.opcodes),
        "copies less than 16 bytes": any(is_narrow_copy(code) for code in codes),
    }
    return [f"{arguments}: {fault}" for fault, present in faults.items() if present]


def is_narrow_copy(code: str) -> bool:
    return re.match(r"LDGSTS(?!.*\.128)", code) is not None


def tile_jobs(archs, dtypes=DTYPES) -> list[Job]:
    return [
        job(spec, tile, arch)
        for tile in cuda_kernels.TILES
        for dtype in dtypes
        for spec in forms(tile, dtype)
        for arch in archs
    ]


def test_machine_code(compile_pool):
    jobs = tile_jobs((80,), ("float16", "float32"))  # bfloat16 has other opcodes, no other code
    assert_no_faults(compile_pool, compiled_faults, jobs)


@pytest.mark.parametrize("arch", [a for a in _hardware.GPUS if a != 80], ids="sm_{}".format)
def test_machine_code_of_newer_architectures(compile_pool, arch):
    """Half precision's filters have the most registers; the other kernels are no different."""
    jobs = [j for j in tile_jobs((arch,), ("float16",)) if not j.spec.is_pointwise]
    assert_no_faults(compile_pool, compiled_faults, jobs)


def opcodes_of(arguments: Job) -> Counter:
    """How often the PTX has each instruction that moves vectors, multiplies or waits."""
    (kernel,) = arguments.source(cases.conv_tensors(arguments.spec), TILE, arguments.arch)
    body = kernel.ptx.replace(".u32", ".b32")  # one bit pattern, two names
    return Counter(
        re.findall(r"^\s*(?:@!?%p\d+ )?((?:cp|mma|ldmatrix|bar|st(?=.*\.v))\.[\w.:]+)", body, re.M)
    )


def test_newer_architectures_get_the_same_ptx(compile_pool):
    one, *others = compile_pool.map(opcodes_of, [job(CONV3X3, TILE, a) for a in _hardware.GPUS])
    assert one and not [other - one + (one - other) for other in others if other != one]


# --- what it computes -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile(compile_pool, dtype):
    """Results, guards, bank conflicts, spills, and sectors: every distinct one is moved once."""
    assert_no_faults(compile_pool, machine.conv_faults, tile_jobs((80,), (dtype,)))


def test_whole_tiles_with_a_split(compile_pool):
    """Sectors of the shares and of their sum, where the columns are fewer than a warp's sums, and
    more."""
    spec = ConvSpec(1, 8, 8, 160, 64, 1, 1, residual=True, norm=True)
    specs = (spec, replace(spec, k=192, norm=False), replace(spec, dtype="bfloat16"))
    jobs = [job(s, replace(TILE, SPLIT_K=2)) for s in (*specs, replace(spec, dtype="float32"))]
    assert all(machine.is_whole(j.spec, j.tile) for j in jobs)
    assert_no_faults(compile_pool, machine.conv_faults, jobs)


def test_every_tile_cut(compile_pool):
    """Tiles that are cut in M and N, a last step that is cut in K, and split sums."""
    jobs = []
    for i, tile in enumerate(cuda_kernels.TILES):
        spec = ConvSpec(
            1, tile.BLOCK_M // 10 + 1, 10, 72, tile.BLOCK_N + 16, 3, 3, (1, 1), (1, 1),
            dtype=DTYPES[i % 3], residual=True, norm=True,
        )  # fmt: skip
        pointwise = replace(spec, r=1, s=1, padding=(0, 0), c=136)
        jobs += [job(spec, replace(tile, SPLIT_K=2)), job(spec, tile), job(pointwise, tile)]
    assert_no_faults(compile_pool, machine.conv_faults, jobs)


def test_on_sm_90(compile_pool):
    jobs = [j for j in tile_jobs((90,), ("bfloat16",)) if not j.spec.is_pointwise]
    assert_no_faults(compile_pool, machine.conv_faults, jobs)


@pytest.mark.parametrize("depth", [18, 50])
def test_every_convolution_of_resnet(compile_pool, depth):
    specs = [s for s in cases.resnet_convs(depth, 1, 64).values() if s.c % 8 == 0]
    tiles = cuda_kernels.TILES
    jobs = [
        job(replace(spec, dtype=DTYPES[i % 3]), tiles[i % len(tiles)])
        for i, spec in enumerate(specs)
    ]
    assert len(jobs) > 9
    assert_no_faults(compile_pool, machine.conv_faults, jobs)


def test_odd(compile_pool):
    jobs = [job(spec) for spec in ODD.values()]
    jobs += [job(replace(spec, dtype="float32")) for spec in ODD.values()]
    assert len(jobs) >= 24
    assert_no_faults(compile_pool, machine.conv_faults, jobs)


def test_odd_operands(compile_pool):
    """x is a slice; the parameters have half precision; both with a split."""
    options = ({"sliced": True}, {"params": torch.bfloat16}, {"params": torch.float16})
    specs = (CONV3X3, ODD["stride-3-pointwise"], replace(ODD["dilation-2"], dtype="float32"))
    jobs = [job(spec, **option) for spec in specs for option in options]
    jobs += [job(CONV3X3, replace(TILE, SPLIT_K=3), **option) for option in options]
    assert_no_faults(compile_pool, machine.conv_faults, jobs)


SPLITS = (TILE, replace(TILE, SPLIT_K=3))


def test_nan_passes(compile_pool):
    assert_no_faults(compile_pool, machine.nan_faults, [job(CONV3X3, tile) for tile in SPLITS])


def test_residual_may_be_out(compile_pool):
    jobs = [job(CONV3X3, tile) for tile in SPLITS]
    assert_no_faults(compile_pool, machine.in_place_faults, jobs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_norm_is_seen(compile_pool, dtype):
    jobs = [job(replace(CONV3X3, dtype=dtype), tile) for tile in SPLITS]
    assert_no_faults(compile_pool, machine.norm_faults, jobs)


def test_beyond_32_bits(compile_pool):
    """x, residual and y pass 2^31 elements, the last share of a split begins beyond 2^32, signed
    and unsigned 32 bits; images lie 2^30 apart."""
    spec = ConvSpec(2**17 + 2, 16, 16, 64, 64, 3, 3, (1, 1), (1, 1), residual=True, norm=True)
    split = job(replace(spec, n=2**15 + 2), replace(TILE, SPLIT_K=9))
    assert 8 * split.spec.m * split.spec.k > 2**32
    assert_no_faults(compile_pool, machine.beyond_32_bits_faults, [job(spec), split])
    apart = ConvSpec(3, 5, 5, 32, 32, 3, 3, (1, 1), (1, 1), residual=True, norm=True)
    pointwise = replace(apart, r=1, s=1, padding=(0, 0))
    assert_no_faults(compile_pool, machine.far_apart_faults, [job(apart), job(pointwise)])
