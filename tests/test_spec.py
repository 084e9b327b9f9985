# SPDX-License-Identifier: Apache-2.0
"""The vocabulary: a ConvSpec's sizes are torch's, and it can be a key, be printed and pickled."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_fast.spec import ELEMENT_SIZE, ConvSpec, TileConfig, conv_output_size

SPEC = ConvSpec(n=2, h=56, w=40, c=64, k=128, r=3, s=1, stride=(2, 1), padding=(1, 0))


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(1, 40), kernel=st.integers(1, 7), stride=st.integers(1, 4),
    padding=st.integers(0, 4), dilation=st.integers(1, 3),
)  # fmt: skip
def test_output_size_is_torchs(size, kernel, stride, padding, dilation):
    ours = conv_output_size(size, kernel, stride, padding, dilation)
    x = torch.empty(1, 1, size, device="meta")
    weight = torch.empty(1, 1, kernel, device="meta")
    try:
        expected = F.conv1d(x, weight, None, stride, padding, dilation).shape[2]
    except RuntimeError:
        assert ours < 1
    else:
        assert ours == expected


def test_the_gemm_of_a_convolution():
    assert (SPEC.p, SPEC.q) == (28, 40)
    assert SPEC.m == 2 * 28 * 40
    assert SPEC.k_gemm == 3 * 64
    assert SPEC.flops == 2 * SPEC.m * 128 * 3 * 64
    assert replace(SPEC, groups=4).k_gemm == 3 * 16
    assert replace(SPEC, groups=4).flops == SPEC.flops // 4


def test_bytes_count_each_tensor_once():
    x, weight, y = 2 * 56 * 40 * 64, 128 * 3 * 64, 2 * 28 * 40 * 128
    vectors = 2 * 128 * 4
    assert SPEC.bytes_minimum == 2 * (x + weight + y) + vectors
    assert replace(SPEC, residual=True).bytes_minimum == 2 * (x + weight + 2 * y) + vectors
    assert replace(SPEC, dtype="float32").bytes_minimum == 4 * (x + weight + y) + vectors


@pytest.mark.parametrize("dtype", ELEMENT_SIZE)
def test_element_sizes_are_torchs(dtype):
    assert ELEMENT_SIZE[dtype] == getattr(torch, dtype).itemsize


def test_pointwise():
    one = replace(SPEC, r=1, s=1, padding=(0, 0))
    assert one.is_pointwise
    assert not replace(one, padding=(1, 0)).is_pointwise
    assert not replace(one, s=3).is_pointwise
    assert not SPEC.is_pointwise


def test_a_spec_is_a_value():
    assert replace(SPEC) == SPEC and hash(SPEC) == hash(replace(SPEC))
    assert replace(SPEC, residual=not SPEC.residual) != SPEC
    assert pickle.loads(pickle.dumps(SPEC)) == SPEC
    assert eval(repr(SPEC)) == SPEC
    with pytest.raises(FrozenInstanceError):
        SPEC.n = 3


def test_a_spec_prints_what_tells_it_apart():
    assert str(SPEC) == "2x56x40x64 -> 128, 3x1/(2, 1) +relu, float16"
    changed = replace(
        SPEC, stride=(2, 2), dilation=(2, 2), groups=32, residual=True, activation="none",
    )  # fmt: skip
    assert str(changed) == "2x56x40x64 -> 128, 3x1/2 d2 g32 +res, float16"


def test_a_tile_prints_its_numbers():
    tile = TileConfig(128, 64, 32, 3, 4)
    assert str(tile) == "128x64x32 stages 3 warps 4"
    assert str(replace(tile, SPLIT_K=4)) == "128x64x32 stages 3 warps 4 split 4"
    assert pickle.loads(pickle.dumps(tile)) == tile
