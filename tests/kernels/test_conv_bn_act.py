# SPDX-License-Identifier: Apache-2.0
"""The convolution kernel, interpreted on the CPU, against fp64 under the tolerance rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet_fast.dispatch import heuristics
from resnet_fast.kernels import conv_bn_act
from resnet_fast.spec import ConvSpec, TileConfig
from tests.kernels import checks
from tests.support import cases

# Small, so that odd cases have several tiles in both directions and a last one that is cut.
TILE = TileConfig(32, 32, 32, 3, 4, GROUP_M=2)
RESNET18 = cases.resnet_convs(18, n=1, size=48)
RESNET50 = cases.resnet_convs(50, n=1, size=48)
CONV3X3 = ConvSpec(2, 7, 9, 64, 48, 3, 3, (1, 1), (1, 1), residual=True, norm=True)


@pytest.mark.parametrize("name", RESNET18)
def test_resnet18(interpret, name):
    spec = RESNET18[name]
    interpret(checks.conv, spec, heuristics.choose(spec, 80, cases.TRITON))


@pytest.mark.parametrize("name", RESNET50)
def test_resnet50(interpret, name):
    spec = replace(RESNET50[name], dtype="bfloat16")
    interpret(checks.conv, spec, heuristics.choose(spec, 90, cases.TRITON), params=torch.bfloat16)


@pytest.mark.parametrize("name", cases.ODD)
def test_odd(interpret, name):
    interpret(checks.conv, cases.ODD[name], TILE)


@pytest.mark.parametrize("name", cases.ODD)
def test_odd_on_sliced_input(interpret, name):
    interpret(checks.conv, cases.ODD[name], TILE, sliced=True)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("name", ["height-is-not-width", "three-channels-7x7", "k-24", "c-20"])
def test_float32(interpret, name, precision):
    spec = replace(cases.ODD[name], dtype="float32", precision=precision)
    interpret(checks.conv, spec, TILE)


@pytest.mark.parametrize("name", ["height-is-not-width", "three-channels-7x7", "k-24", "c-20"])
def test_bfloat16(interpret, name):
    interpret(checks.conv, replace(cases.ODD[name], dtype="bfloat16"), TILE)


@pytest.mark.parametrize("name", ["height-is-not-width", "stride-3-pointwise", "map-1x1"])
def test_misaligned(interpret, name):
    interpret(checks.conv, cases.ODD[name], TILE, misaligned=True)


@pytest.mark.parametrize(
    "tile",
    [
        TileConfig(16, 128, 64, 3, 4, reason="wide: finished by halves"),
        TileConfig(128, 256, 64, 3, 8, reason="one tile covers all"),
        TileConfig(64, 16, 128, 3, 4, reason="BLOCK_K above C"),
        TileConfig(16, 16, 16, 3, 4, GROUP_M=1, reason="no groups"),
        TileConfig(16, 16, 16, 3, 4, GROUP_M=64, reason="one group"),
    ],
    ids=lambda tile: tile.reason,
)
def test_tile_shapes(interpret, tile):
    interpret(checks.conv, CONV3X3, tile)


@pytest.mark.parametrize("split", [2, 3, 5, 18])
def test_split_k(interpret, split):
    interpret(checks.conv, CONV3X3, replace(TILE, SPLIT_K=split))


@pytest.mark.parametrize(
    "name", ["c-72-uneven-steps", "three-channels-7x7", "c-100-pointwise", "k-24"]
)
def test_split_k_odd(interpret, name):
    interpret(checks.conv, cases.ODD[name], replace(TILE, SPLIT_K=2))


def test_split_k_wide(interpret):
    interpret(checks.conv, CONV3X3, TileConfig(16, 128, 64, 3, 4, SPLIT_K=3))


def test_split_k_is_deterministic(interpret):
    interpret(checks.conv_is_deterministic, CONV3X3, replace(TILE, SPLIT_K=4))


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_nan_passes(interpret, activation, split):
    spec = replace(CONV3X3, activation=activation)
    interpret(checks.conv_passes_nan, spec, replace(TILE, SPLIT_K=split))


@pytest.mark.parametrize("split", [1, 2])
def test_beyond_32_bits(interpret, split):
    interpret(checks.conv_beyond_32_bits, replace(TILE, SPLIT_K=split))


def operands_of(spec: ConvSpec) -> conv_bn_act.Operands:
    params = (torch.float32,) * 2
    params += (torch.float32,) * 2 if spec.norm else (None,) * 2
    return conv_bn_act.Operands((spec.h * spec.w * spec.c, spec.w * spec.c, spec.c), params, True)


@pytest.mark.parametrize(
    "spec, wide",
    [
        (ConvSpec(8, 56, 56, 64, 64, 3, 3, (1, 1), (1, 1)), False),
        (ConvSpec(2**13, 64, 64, 63, 8, 1, 1), False),
        (ConvSpec(2**13, 64, 64, 64, 8, 1, 1), True),
        (ConvSpec(2**13, 64, 64, 8, 64, 1, 1), True),
        (ConvSpec(1, 1, 1, 2**16, 2**15, 1, 1), True),
    ],
    ids=["small", "below", "x", "y", "weight"],
)
def test_index_width(spec, wide):
    (gemm,) = conv_bn_act.launches(spec, TILE, operands_of(spec))
    assert gemm.constants["INDEX64"] is wide


def test_workspace_counts_for_index_width():
    spec = ConvSpec(2**13, 32, 32, 64, 64, 1, 1)
    gemm, reduction = conv_bn_act.launches(spec, replace(TILE, SPLIT_K=4), operands_of(spec))
    assert gemm.constants["INDEX64"] and reduction.constants["INDEX64"]


def test_strides_of_single_elements_are_ignored():
    spec = ConvSpec(1, 4, 4, 64, 64, 1, 1)
    dense = operands_of(spec)
    odd = dense._replace(x_strides=(3, *dense.x_strides[1:]))
    assert conv_bn_act.launches(spec, TILE, odd) == conv_bn_act.launches(spec, TILE, dense)


@pytest.mark.parametrize(
    "spec, reason",
    [
        (ConvSpec(1, 8, 8, 64, 64, 3, 3, groups=2), "groups 2"),
        (ConvSpec(1, 8, 8, 64, 64, 3, 3, dtype="float64"), "float64"),
        (ConvSpec(1, 32, 32, 8, 8, 16, 16), "filter 16x16"),
        (ConvSpec(2**17, 128, 128, 8, 8, 1, 1), "output pixels"),
    ],
)
def test_refusals_say_why(spec, reason):
    assert reason in conv_bn_act.refusal(spec)


@pytest.mark.parametrize("specs", [RESNET18, RESNET50, cases.ODD], ids=["18", "50", "odd"])
def test_accepts(specs):
    assert {name: conv_bn_act.refusal(spec) for name, spec in specs.items()} == dict.fromkeys(specs)
