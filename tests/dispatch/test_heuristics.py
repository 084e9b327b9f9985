# SPDX-License-Identifier: Apache-2.0
"""The choice of tiles: legal, explained, and sensible where sense is beyond doubt."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from resnet_fast import _hardware
from resnet_fast.dispatch import heuristics, tiles
from resnet_fast.kernels.filter_walk import filter_walk
from resnet_fast.spec import ConvSpec, TileConfig
from tests.support import cases

FAMILY, TILES = tiles.TRITON[ConvSpec], tiles.TRITON_TILES[ConvSpec]
ARCHS = list(TILES)
STAGE4 = ConvSpec(1, 7, 7, 512, 512, 3, 3, (1, 1), (1, 1))
STEM = ConvSpec(8, 224, 224, 3, 64, 7, 7, (2, 2), (3, 3))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", [("float16", "tf32"), ("float32", "tf32"), ("float32", "ieee")])
@pytest.mark.parametrize("n", [1, 8, 128])
def test_every_resnet_convolution_has_a_tile(arch, kind, n):
    dtype, precision = kind
    for depth in (18, 50):
        specs = cases.resnet_convs(depth, n, dtype=dtype, precision=precision)
        for spec in specs.values():
            tile = heuristics.choose(spec, arch, FAMILY)
            assert FAMILY.refusal(spec, tile, _hardware.GPUS[arch]) is None
            assert FAMILY.split_refusal(spec, tile, _hardware.GPUS[arch]) is None


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", cases.ODD)
def test_every_odd_convolution_has_a_tile(arch, name):
    for dtype, precision in (("bfloat16", "tf32"), ("float32", "tf32"), ("float32", "ieee")):
        spec = replace(cases.ODD[name], dtype=dtype, precision=precision)
        assert heuristics.choose(spec, arch, FAMILY)


@pytest.mark.parametrize("arch", ARCHS)
def test_small_maps_split_their_products(arch):
    assert heuristics.choose(STAGE4, arch, FAMILY).SPLIT_K > 1


@pytest.mark.parametrize("arch", ARCHS)
def test_large_batches_take_large_tiles_and_no_split(arch):
    tile = heuristics.choose(replace(STAGE4, n=256, h=28, w=28), arch, FAMILY)
    assert tile.SPLIT_K == 1
    assert tile.BLOCK_M * tile.BLOCK_N >= 128 * 128


def test_an_unknown_architecture_takes_the_table_before_it():
    assert heuristics.choose(STAGE4, 87, FAMILY) == heuristics.choose(STAGE4, 86, FAMILY)
    assert heuristics.choose(STAGE4, 121, FAMILY) == heuristics.choose(STAGE4, 120, FAMILY)


def test_an_old_architecture_is_refused():
    with pytest.raises(ValueError, match=r"7\.5.*8\.0"):
        heuristics.choose(STAGE4, 75, FAMILY)


def test_explain_gives_each_candidate_a_reason_or_a_time():
    rows = heuristics.explain(STAGE4, 90, FAMILY)
    assert len({row.tile for row in rows}) == len(rows) > len(TILES[90])
    assert all((row.refusal is None) == (row.microseconds < float("inf")) for row in rows)
    assert any(row.refusal for row in rows) and any("limited by" in str(row) for row in rows)
    assert min(rows, key=lambda row: row.microseconds).tile == heuristics.choose(STAGE4, 90, FAMILY)


@pytest.mark.parametrize(
    "spec, tile, reason",
    [
        (STAGE4, TileConfig(128, 256, 64, 3, 8), "shared memory"),
        (replace(STAGE4, dtype="float32"), TileConfig(64, 64, 64, 3, 4), "bytes a row"),
        (STAGE4, TileConfig(128, 64, 64, 3, 1), "accumulators"),
        (STEM, TileConfig(128, 64, 32, 3, 4), "gathered"),
        (replace(STAGE4, c=24), TileConfig(64, 64, 64, 3, 4), "padding"),
        (STAGE4, TileConfig(32, 64, 16, 3, 4), "longer rows"),
    ],
    ids=["shared", "rows", "accumulators", "gathered", "long-steps", "short-steps"],
)
def test_refusals_say_why(spec, tile, reason):
    assert reason in FAMILY.refusal(spec, tile, _hardware.GPUS[86])


@pytest.mark.parametrize(
    "spec, tile, reason",
    [
        (STAGE4, TileConfig(64, 64, 64, 4, 4, SPLIT_K=24), "stages"),
        (replace(STAGE4, c=640), TileConfig(64, 64, 64, 4, 4, SPLIT_K=16), "empty"),
        (replace(STAGE4, n=512), TileConfig(64, 64, 64, 4, 4, SPLIT_K=2), "without a split"),
        (replace(STAGE4, n=32, c=1024), TileConfig(256, 256, 64, 4, 8, SPLIT_K=16), "workspace"),
    ],
    ids=["stages", "empty", "occupied", "workspace"],
)
def test_split_refusals_say_why(spec, tile, reason):
    assert reason in FAMILY.split_refusal(spec, tile, _hardware.GPUS[80])


@pytest.mark.parametrize(
    "spec, taps, products",
    [
        (STEM, 7, 21),
        (STAGE4, 9, 512),
        (ConvSpec(1, 9, 9, 24, 24, 3, 3), 9, 24),
        (ConvSpec(1, 9, 9, 20, 24, 3, 3, dtype="float32"), 9, 20),
        (ConvSpec(1, 9, 9, 20, 24, 3, 3), 3, 60),
        (ConvSpec(1, 9, 9, 3, 24, 3, 3, dilation=(2, 2)), 9, 3),
        (ConvSpec(1, 9, 9, 3, 24, 1, 1), 1, 3),
    ],
)
def test_filter_walk(spec, taps, products):
    walk = filter_walk(spec)
    assert (walk.taps, walk.products) == (taps, products)


def test_the_stem_wastes_at_most_a_third():
    walk = filter_walk(STEM)
    for arch in ARCHS:
        block_k = heuristics.choose(STEM, arch, FAMILY).BLOCK_K
        assert STEM.k_gemm / (walk.steps(block_k) * block_k) >= 0.65


def test_choosing_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from resnet_fast.dispatch import heuristics, tiles\n"
        "from resnet_fast.spec import ConvSpec\n"
        "heuristics.choose(ConvSpec(1, 7, 7, 512, 512, 3, 3), 90, tiles.TRITON[ConvSpec])\n"
        "try:\n    import resnet_fast.kernels.conv_bn_act\n"
        "except ImportError:\n    print('ImportError')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "ImportError"
