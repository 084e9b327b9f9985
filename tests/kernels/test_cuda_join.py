# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ join: what nvcc makes of it, and what that computes on the PTX machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet_fast import _hardware
from resnet_fast.dispatch import gemm, tiles
from resnet_fast.spec import JoinSpec, TileConfig
from tests.kernels import join_checks
from tests.kernels.join_checks import Job
from tests.support import cuda_kernels, join_cases, nvcc, sass
from tests.support.families import in_elements, whole_join

pytestmark = pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))

DTYPES = ("float16", "bfloat16", "float32")
CUDA_TILES = tiles.CUDA_TILES[JoinSpec]
SMALL = CUDA_TILES[-1]
ODD = {
    name: spec
    for name, spec in join_cases.ODD.items()
    if all(part.c % 8 == part.k % 8 == 0 for part in join_checks.parts(spec))
}


def job(spec: JoinSpec, tile: TileConfig, dtype: str = "float16", arch: int = 80, **options) -> Job:
    parts = (replace(part, dtype=dtype) for part in join_checks.parts(spec))
    tile = in_elements(tile, dtype)
    return Job(JoinSpec(*parts), tile, arch, tuple(options.items()), cuda_kernels.join_kernels)


def assert_no_faults(pool, check, jobs) -> None:
    faults = [line for lines in pool.map(check, jobs) for line in lines]
    assert not faults, "\n".join(faults)


def counted(arguments: Job) -> int:
    """Blocks per SM as the choice of a tile estimates them."""
    whole, gpu = arguments.spec.as_one_product, _hardware.GPUS[arguments.arch]
    return gemm.resident_blocks(whole, arguments.tile, gpu, sums=tiles.SUMS)


def compiled_faults(arguments: Job) -> list[str]:
    """What is wrong with the machine code of one kernel."""
    tensors = join_cases.join_tensors(arguments.spec)
    (kernel,) = arguments.source(tensors, arguments.tile, arguments.arch)
    gpu = _hardware.GPUS[arguments.arch]
    used, codes = kernel.resources(), kernel.opcodes()
    fits = used.shared_bytes <= gpu.shared_per_block
    large = gpu.shared_per_sm > 2**17
    blocks = 2 if arguments.tile.BLOCK_N <= 64 and large else 1
    faults = {
        f"spills {used.spill_bytes} bytes": used.spill_bytes > 0,
        f"{used.shared_bytes} bytes of shared memory on {gpu.name}": not fits,
        f"{used.blocks_per_sm(gpu)} blocks per SM": used.blocks_per_sm(gpu) < blocks,
        "not one loop for each product": len(sass.tensor_loops(kernel.sass())) != 2,
        "fewer blocks per SM than the choice counts on": fits
        and counted(arguments) > used.blocks_per_sm(gpu),
        "stores less than 16 bytes": any(
            code.startswith("STG") and ".128" not in code for code in codes
        ),
    }
    return [f"{arguments}: {fault}" for fault, present in faults.items() if present]


@pytest.mark.parametrize("arch", _hardware.GPUS, ids="sm_{}".format)
def test_machine_code(compile_pool, arch):
    dtypes = ("float16", "float32") if arch == 80 else ("float16",)
    jobs = [job(whole_join(t, 3), t, dtype, arch) for t in CUDA_TILES for dtype in dtypes]
    assert_no_faults(compile_pool, compiled_faults, jobs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile(compile_pool, dtype):
    """Results, guards, conflicts, spills; the distinct sectors are those of inputs and output."""
    jobs = [job(whole_join(tile, r), tile, dtype) for tile in CUDA_TILES for r in (1, 3)]
    assert_no_faults(compile_pool, join_checks.machine_faults, jobs)


@pytest.mark.parametrize("depth", [18, 50])
def test_every_projection_block(compile_pool, depth):
    joins = join_cases.resnet_joins(depth, size=32).values()
    jobs = [job(spec, CUDA_TILES[i % 3], DTYPES[i % 3]) for i, spec in enumerate(joins)]
    assert_no_faults(compile_pool, join_checks.machine_faults, jobs)


def test_odd(compile_pool):
    jobs = [job(spec, SMALL) for spec in ODD.values()]
    jobs += [job(spec, CUDA_TILES[0], "float32", sliced=True) for spec in ODD.values()]
    assert len(jobs) > 14
    assert_no_faults(compile_pool, join_checks.machine_faults, jobs)


@pytest.mark.parametrize("name", join_cases.FACTORS)
def test_scales(compile_pool, name):
    """Neither sum is scaled by the other's factor, which may be zero or tiny."""
    spec = join_cases.join(2, 7, 9, 64, 96, 48, stride=(2, 2), odd=(1, 0))
    factors = join_cases.FACTORS[name]
    jobs = [job(spec, SMALL, dtype, factors=factors) for dtype in ("float16", "float32")]
    jobs.append(job(spec, SMALL, "bfloat16", factors=factors, params=torch.bfloat16))
    assert_no_faults(compile_pool, join_checks.machine_faults, jobs)


def test_nan_passes(compile_pool):
    spec = join_cases.join(2, 7, 9, 64, 96, 48, r=3, s=3, stride=(2, 2), odd=(1, 0))
    jobs = [job(spec, SMALL, dtype) for dtype in DTYPES]
    assert_no_faults(compile_pool, join_checks.nan_faults, jobs)


def test_a_wrong_norm_is_seen(compile_pool):
    spec = join_cases.join(2, 3, 5, 64, 96, 48, stride=(2, 2), odd=(1, 0))
    jobs = [job(spec, SMALL, dtype) for dtype in DTYPES]
    assert_no_faults(compile_pool, join_checks.norm_faults, jobs)


def test_beyond_32_bits(compile_pool):
    """x, h and y pass 2^31 elements."""
    source = cuda_kernels.join_kernels
    assert not compile_pool.submit(join_checks.beyond_32_bits_faults, 80, source).result()
