# SPDX-License-Identifier: Apache-2.0
"""Every compiled kernel and tile that the PTX machine runs, against fp64 under the tolerance rule.

The machine stops at races, missing waits and stray addresses, and counts conflicts and sectors. A
test runs its cases in the processes that compile, and one failure names every case that has it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet_fast import _hardware
from resnet_fast.kernels import add_relu
from resnet_fast.spec import ConvSpec, TileConfig
from tests.kernels import machine
from tests.kernels.machine import Job
from tests.support import cases, compiled

ARCHITECTURES = pytest.mark.parametrize("arch", compiled.MACHINE_ARCHS, ids="sm_{}".format)
# Small, so that odd cases have several tiles in both directions; 64 rows are the least for wgmma.
TILES = {
    80: TileConfig(32, 32, 32, 3, 4, GROUP_M=2),
    90: TileConfig(64, 32, 32, 3, 4, GROUP_M=2),
}
CONV3X3 = ConvSpec(2, 7, 9, 64, 48, 3, 3, (1, 1), (1, 1), residual=True, norm=True)


def assert_no_faults(pool, check, jobs) -> None:
    faults = [line for lines in pool.map(check, jobs) for line in lines]
    assert not faults, "\n".join(faults)


@ARCHITECTURES
@pytest.mark.parametrize("kind", cases.KINDS, ids=lambda kind: "-".join(kind))
def test_every_tile_of_the_table(compile_pool, arch, kind):
    jobs = [Job(spec, tile, arch) for spec, tile in cases.tile_cases(arch, *kind)]
    assert_no_faults(compile_pool, machine.conv_faults, jobs)


@ARCHITECTURES
def test_cases_hold_every_tile(arch):
    found = [case for kind in cases.KINDS for case in cases.tile_cases(arch, *kind)]
    table = cases.TILES[arch]
    for whole in (True, False):
        assert {t for spec, t in found if machine.is_whole(spec, t) is whole} >= set(table)
    for tile in table:
        meant = {kind for kind in cases.KINDS if cases.whole(tile, arch, *kind)}
        assert meant == {(spec.dtype, spec.precision) for spec, t in found if t == tile} & meant


@ARCHITECTURES
def test_odd(compile_pool, arch):
    jobs = [Job(spec, TILES[arch], arch) for spec in cases.ODD.values()]
    assert_no_faults(compile_pool, machine.conv_faults, jobs)


@ARCHITECTURES
@pytest.mark.parametrize(
    "options",
    [{"sliced": True}, {"misaligned": True}, {"params": torch.bfloat16}],
    ids=lambda options: next(iter(options)),
)
def test_odd_operands(compile_pool, arch, options):
    names = ("height-is-not-width", "three-channels-7x7", "c-24", "stride-3-pointwise")
    jobs = [Job(cases.ODD[n], TILES[arch], arch, tuple(options.items())) for n in names]
    assert_no_faults(compile_pool, machine.conv_faults, jobs)


def forms(arch: int) -> list[Job]:
    """The convolution whole and split."""
    return [Job(CONV3X3, replace(TILES[arch], SPLIT_K=split), arch) for split in (1, 3)]


@ARCHITECTURES
def test_nan_passes(compile_pool, arch):
    assert_no_faults(compile_pool, machine.nan_faults, forms(arch))


@ARCHITECTURES
def test_residual_may_be_out(compile_pool, arch):
    assert_no_faults(compile_pool, machine.in_place_faults, forms(arch))


@ARCHITECTURES
def test_a_wrong_norm_is_seen(compile_pool, arch):
    assert_no_faults(compile_pool, machine.norm_faults, forms(arch))


@ARCHITECTURES
def test_beyond_32_bits(compile_pool, arch):
    """x, residual and y pass 2^31 elements; the last share of a split begins beyond 2^32."""
    spec = ConvSpec(2**17 + 2, 16, 16, 64, 64, 3, 3, (1, 1), (1, 1), residual=True, norm=True)
    tile = TileConfig(64, 64, 64, 3, 4)
    split = replace(spec, n=2**15 + 2)
    assert 8 * split.m * split.k > 2**32
    jobs = [Job(spec, tile, arch), Job(split, replace(tile, SPLIT_K=9), arch)]
    assert_no_faults(compile_pool, machine.beyond_32_bits_faults, jobs)


@ARCHITECTURES
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(
    "numel, start",
    [(8192, 0), (5000, 0), (5001, 0), (5000, 3)],
    ids=["whole", "eights", "odd", "misaligned"],
)
def test_add_relu(compile_pool, arch, dtype, numel, start):
    faults = compile_pool.submit(machine.add_relu_faults, arch, dtype, numel, start).result()
    assert not faults, "\n".join(faults)


@ARCHITECTURES
def test_add_relu_beyond_32_bits(compile_pool, arch):
    faults = compile_pool.submit(machine.add_relu_beyond_32_bits_faults, arch).result()
    assert not faults, "\n".join(faults)


def first_case(arch: int) -> tuple:
    kernel = next(compiled.cases((arch,), ("triton conv_bn_act",)))
    return kernel.name, len(kernel.args), kernel.resources(), kernel.main_loop()


def test_a_case_is_a_kernel_with_its_arguments(compile_pool):
    name, args, used, loop = compile_pool.submit(first_case, 80).result()
    assert name == "conv_bn_act_kernel"
    assert args == 8 + 1 + 16  # pointers, eps, sizes
    a100 = _hardware.GPUS[80]
    assert used.occupancy.keys() == {gpu.name for gpu in _hardware.GPUS.values()}
    assert used.occupancy[a100.name] == used.blocks_per_sm(a100) * used.threads / 2048 > 0
    assert loop.share == loop.mma / loop.instructions and 0 < loop.loads < loop.instructions


def run_without_arguments() -> None:
    (launch,) = add_relu.launches(4096, torch.float16, True)
    compiled.compile_launch(launch, 80).run()


def test_a_launch_without_arguments_cannot_run(compile_pool):
    with pytest.raises(ValueError, match="without arguments"):
        compile_pool.submit(run_without_arguments).result()
