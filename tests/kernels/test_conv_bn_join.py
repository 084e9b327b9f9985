# SPDX-License-Identifier: Apache-2.0
"""The join's kernel, interpreted, compiled and run on the PTX machine, against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet_fast import _hardware
from resnet_fast.dispatch import heuristics, tiles
from resnet_fast.kernels import conv_bn_join
from resnet_fast.spec import JoinSpec, TileConfig
from tests.kernels import join_checks
from tests.kernels.join_checks import Job
from tests.support import cases, compiled, join_cases

FAMILY, TILES = tiles.TRITON[JoinSpec], tiles.TRITON_TILES[JoinSpec]
TILE = TileConfig(32, 32, 32, 3, 4, GROUP_M=2)  # several tiles, the last one cut
SMALL = join_cases.join(2, 7, 9, 64, 96, 48, stride=(2, 2), odd=(1, 0))
FILTER = join_cases.join(2, 7, 9, 64, 32, 48, r=3, s=3, stride=(2, 2), odd=(0, 1))
NETWORKS = {
    f"resnet{depth}-{name}": spec
    for depth in (18, 50)
    for name, spec in join_cases.resnet_joins(depth, size=32).items()
}
ARCHITECTURES = pytest.mark.parametrize("arch", compiled.MACHINE_ARCHS, ids="sm_{}".format)
MACHINE_TILES = {80: TILE, 90: replace(TILE, BLOCK_M=64)}  # 64 rows are the least for wgmma


def of(spec: JoinSpec, dtype: str, precision: str = "tf32") -> JoinSpec:
    """The same join at another dtype."""
    parts = (replace(part, dtype=dtype, precision=precision) for part in join_checks.parts(spec))
    return JoinSpec(*parts)


def assert_no_faults(pool, check, jobs) -> None:
    faults = [line for lines in pool.map(check, jobs) for line in lines]
    assert not faults, "\n".join(faults)


# ---- interpreted


def test_the_projection_blocks_are_known():
    assert [n for n in NETWORKS if "50" in n] == [f"resnet50-layer{i}" for i in (1, 2, 3, 4)]
    assert [n for n in NETWORKS if "18" in n] == [f"resnet18-layer{i}" for i in (2, 3, 4)]
    last = NETWORKS["resnet50-layer4"]
    assert (last.main.c, last.projection.c, last.main.k) == (512, 1024, 2048)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(interpret, name):
    spec = of(NETWORKS[name], "bfloat16")
    tile = heuristics.choose(spec, 80, FAMILY)
    interpret(join_checks.interpreted, spec, tile, params=torch.bfloat16)


@pytest.mark.parametrize("name", join_cases.ODD)
def test_odd(interpret, name):
    interpret(join_checks.interpreted, join_cases.ODD[name], TILE)


@pytest.mark.parametrize(
    "options", [{"sliced": True}, {"misaligned": True}], ids=lambda o: next(iter(o))
)
@pytest.mark.parametrize("name", ["odd-map", "3x3", "c-100-d-20"])
def test_odd_operands(interpret, name, options):
    interpret(join_checks.interpreted, join_cases.ODD[name], TILE, **options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", join_cases.FACTORS)
def test_scales(interpret, name, dtype):
    interpret(join_checks.interpreted, of(SMALL, dtype), TILE, factors=join_cases.FACTORS[name])


@pytest.mark.parametrize("kind", cases.KINDS, ids="-".join)
@pytest.mark.parametrize("spec", [SMALL, FILTER], ids=["1x1", "3x3"])
def test_dtypes(interpret, spec, kind):
    interpret(join_checks.interpreted, of(spec, *kind), TILE)


@pytest.mark.parametrize(
    "tile",
    [
        TileConfig(128, 64, 64, 3, 8, reason="one tile covers all"),
        TileConfig(16, 128, 64, 3, 4, reason="wide"),
        TileConfig(64, 16, 128, 3, 4, reason="BLOCK_K above C"),
        TileConfig(16, 16, 16, 3, 4, GROUP_M=64, reason="one group"),
    ],
    ids=lambda tile: tile.reason,
)
def test_tile_shapes(interpret, tile):
    interpret(join_checks.interpreted, SMALL, tile)


@pytest.mark.parametrize("spec", [SMALL, FILTER], ids=["1x1", "3x3"])
def test_nan_passes(interpret, spec):
    interpret(join_checks.interpreted_nan, spec, TILE)


# ---- compiled


def meant(tile: TileConfig, arch: int, r: int) -> list[JoinSpec]:
    """The joins of each kind of arithmetic that `tile` is meant for, the longest products first."""
    channels = (264, 40, 24, 16)  # steps that are not full
    joins = [
        of(join_cases.join(1, 4, 4, c, c, 256, r=r, s=r, stride=(2, 2)), *kind)
        for c in channels
        for kind in reversed(cases.KINDS)  # which need the most first
    ]
    gpu = _hardware.GPUS[arch]
    return [spec for spec in joins if FAMILY.refusal(spec, tile, gpu) is None]


@pytest.mark.parametrize("arch", TILES)
def test_every_tile_compiles_without_spills(compile_pool, arch):
    """With the most demanding 3x3, and those for half precision also pointwise."""
    jobs = [(meant(tile, arch, 3)[0], tile, arch) for tile in TILES[arch]]
    jobs += [(meant(tile, arch, 1)[-1], tile, arch) for tile in TILES[arch][:3]]
    assert_no_faults(compile_pool, join_checks.compiled_faults, jobs)


# ---- on the PTX machine


def machine_jobs(arch: int) -> list[Job]:
    """Every projection block at a few pixels of its channels' first eighth, and whole tiles."""
    jobs = []
    for depth in (18, 50):
        for spec in join_cases.resnet_joins(depth, size=64).values():
            p, c, d, k = spec.main.p, spec.main.c, spec.projection.c, spec.main.k
            r, stride = spec.main.r, spec.projection.stride
            p, c, d, k = min(p, 8), min(c, 128), min(d, 128), min(k, 128)
            small = join_cases.join(1, p, p, c, d, k, r=r, s=r, stride=stride)
            jobs.append(Job(small, TileConfig(64, 64, 64, 3, 4), arch))
    return jobs


@ARCHITECTURES
def test_networks_on_the_machine(compile_pool, arch):
    assert_no_faults(compile_pool, join_checks.machine_faults, machine_jobs(arch))


@ARCHITECTURES
def test_every_tile_on_the_machine(compile_pool, arch):
    """2x2 whole tiles: no conflict, and of memory just h, x's pixels, the filters and y."""
    jobs = []
    for tile in TILES[arch]:
        for kind in cases.KINDS:
            depth = tile.BLOCK_K
            spec = of(
                join_cases.join(
                    1, tile.BLOCK_M // 8, 16, 2 * depth, 3 * depth, 2 * tile.BLOCK_N, stride=(2, 2)
                ),
                *kind,
            )
            if FAMILY.refusal(spec, tile, _hardware.GPUS[arch]) is None:
                jobs.append(Job(spec, tile, arch))
    assert_no_faults(compile_pool, join_checks.machine_faults, jobs)


@ARCHITECTURES
def test_odd_on_the_machine(compile_pool, arch):
    jobs = [Job(spec, MACHINE_TILES[arch], arch) for spec in join_cases.ODD.values()]
    options = (("sliced", True),), (("misaligned", True),), (("params", torch.bfloat16),)
    jobs += [Job(SMALL, MACHINE_TILES[arch], arch, option) for option in options]
    assert_no_faults(compile_pool, join_checks.machine_faults, jobs)


@ARCHITECTURES
def test_scales_on_the_machine(compile_pool, arch):
    jobs = [
        Job(SMALL, MACHINE_TILES[arch], arch, (("factors", factors),))
        for factors in join_cases.FACTORS.values()
    ]
    assert_no_faults(compile_pool, join_checks.machine_faults, jobs)


@ARCHITECTURES
def test_a_wrong_norm_is_seen_on_the_machine(compile_pool, arch):
    jobs = [Job(SMALL, MACHINE_TILES[arch], arch)]
    assert_no_faults(compile_pool, join_checks.norm_faults, jobs)


@ARCHITECTURES
def test_beyond_32_bits_on_the_machine(compile_pool, arch):
    faults = compile_pool.submit(join_checks.beyond_32_bits_faults, arch).result()
    assert not faults, "\n".join(faults)


# ---- what a launch is built from


def operands_of(spec: JoinSpec) -> conv_bn_join.Operands:
    strides = [(s.h * s.w * s.c, s.w * s.c, s.c) for s in join_checks.parts(spec)]
    return conv_bn_join.Operands(*strides, (torch.float32,) * 4, (torch.float32,) * 4, True)


@pytest.mark.parametrize(
    "spec, wide",
    [
        (join_cases.join(8, 28, 28, 128, 256, 512, stride=(2, 2)), False),
        (join_cases.join(2**13, 32, 32, 16, 64, 16, stride=(2, 2)), True),
        (join_cases.join(2**13, 64, 64, 64, 8, 8), True),
        (join_cases.join(2**13, 64, 64, 8, 8, 64), True),
    ],
    ids=["small", "x", "h", "y"],
)
def test_index_width(spec, wide):
    (launch,) = conv_bn_join.launches(spec, TILE, operands_of(spec))
    assert launch.constants["INDEX64"] is wide


def test_refusals_say_why():
    assert "float64" in conv_bn_join.refusal(of(SMALL, "float64"))
    wide = join_cases.join(1, 8, 8, 8, 8, 8, r=17, s=1)
    assert "filter 17x1" in conv_bn_join.refusal(wide)
