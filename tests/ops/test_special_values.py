# SPDX-License-Identifier: Apache-2.0
"""NaN, infinities and signed zeros: where torch has them, the ops have them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from resnet_fast.agreement import error
from resnet_fast.ops import add_relu, conv_bn_act, conv_bn_act_
from resnet_fast.spec import ConvSpec

DTYPES = ("float32", "bfloat16", "float16", "float64")
SPECIAL = (math.nan, -math.nan, math.inf, -math.inf, -1.0, -0.0, 0.0, 2.0)
SPEC = ConvSpec(n=2, h=8, w=8, c=16, k=16, r=3, s=3, padding=(1, 1))


def special_values(dtype: str, shape=(2, 16, 8, 8)) -> torch.Tensor:
    """Every special value beside every sort of neighbour, both signs of NaN among them."""
    generator = torch.Generator().manual_seed(0)
    at = torch.randint(len(SPECIAL), shape, generator=generator)
    values = torch.tensor(SPECIAL, dtype=getattr(torch, dtype))
    one = torch.ones((), dtype=values.dtype)
    values[:2] = torch.stack([torch.copysign(values[0], one), torch.copysign(values[0], -one)])
    return values[at].contiguous(memory_format=torch.channels_last)


def test_both_signs_of_nan_are_among_the_values():
    for dtype in DTYPES:
        x = special_values(dtype)
        signs = torch.signbit(x[x.isnan()])
        assert signs.any() and not signs.all()


@pytest.mark.parametrize("backend", ["auto", "aten"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_through_the_convolution(dtype, backend, arguments, definition):
    """A NaN or infinity in one pixel of x reaches the filter's window around it, no further."""
    call = arguments(replace(SPEC, dtype=dtype))
    x = call.x.clone()
    x[0, 3, 2, 2], x[0, 5, 5, 6], x[1, 0, 0, 0], x[1, 9, 7, 7] = (
        math.nan, math.inf, -math.inf, -math.nan,
    )  # fmt: skip
    y = conv_bn_act(x, *call[1:4], padding=1, backend=backend)
    expected = definition(call._replace(x=x))
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert expected.isnan().any() and expected.isposinf().any()
    before = definition(call._replace(x=x, activation="none"))
    assert before.isneginf().any()
    assert (y[before.isneginf()] == 0).all()


@pytest.mark.parametrize("inplace", [False, True], ids=["functional", "inplace"])
@pytest.mark.parametrize("backend", ["auto", "aten"])
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_through_the_residual(dtype, activation, backend, inplace, arguments):
    call = arguments(replace(SPEC, dtype=dtype, residual=True))
    residual = special_values(dtype)
    weight = torch.zeros_like(call.weight)
    expected = residual.relu() if activation == "relu" else residual.clone()
    op = conv_bn_act_ if inplace else conv_bn_act
    y = op(
        call.x, weight, call.scale, torch.zeros(16), residual,
        padding=1, activation=activation, backend=backend,
    )  # fmt: skip
    assert error(y, expected.double()) == 0


@pytest.mark.parametrize("vector", ["scale", "shift", "mean", "var"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_through_the_vectors(vector, dtype, arguments, definition):
    call = arguments(replace(SPEC, dtype=dtype, norm=True))
    getattr(call, vector)[3] = math.nan
    y = conv_bn_act(*call[:10], mean=call.mean, var=call.var)
    expected = torch.zeros(16, dtype=torch.bool)
    expected[3] = True
    assert torch.equal(y.isnan().all(dim=(0, 2, 3)), expected)
    assert torch.equal(y.isnan().any(dim=(0, 2, 3)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_through_add_relu(dtype):
    x = special_values(dtype)
    y = special_values(dtype).flip(0, 1).contiguous(memory_format=torch.channels_last)
    result, expected = add_relu(x, y), torch.relu(x + y)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result[~result.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_relu_on_every_pattern_of_two_bytes(dtype):
    """The CPU's ReLU works on bit patterns: all 65536 are tried."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(getattr(torch, dtype))
    zero = torch.zeros_like(patterns)
    result, expected = add_relu(patterns, zero), torch.relu(patterns)
    assert torch.equal(result.isnan(), patterns.isnan())
    assert torch.equal(result[~patterns.isnan()], expected[~patterns.isnan()])
