# SPDX-License-Identifier: Apache-2.0
"""What the tests of the ops share: arguments that lie inside larger tensors, and two references."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from resnet_fast.ops import Call
from resnet_fast.spec import ConvSpec


@pytest.fixture(autouse=True)
def without_gradient():
    """The ops have no gradient; tests that need the mode switch it on themselves."""
    with torch.no_grad():
        yield


@pytest.fixture
def inside():
    """inside(values) -> the same values as the middle of a tensor of NaN: a stray read shows."""
    return _inside


@pytest.fixture
def arguments():
    """arguments(spec, ...) -> a Call whose tensors are all slices of larger ones."""
    return _arguments


@pytest.fixture
def definition():
    """definition(call) -> y in float64, from the formula in the docstring and nothing of ours."""
    return _definition


@pytest.fixture
def eager():
    """eager(call) -> y as a torch user gets it at the call's dtype: conv2d, batch_norm, +, relu."""
    return _eager


def _inside(values: torch.Tensor) -> torch.Tensor:
    shape = (values.shape[0] + 2, *values.shape[1:])
    layout = torch.channels_last if values.dim() == 4 else torch.contiguous_format
    larger = torch.full(shape, math.nan, dtype=values.dtype).to(memory_format=layout)
    larger[1:-1] = values
    return larger[1:-1]


def _arguments(
    spec: ConvSpec, *, seed: int = 0, vector_dtype: torch.dtype | None = torch.float32
) -> Call:
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, spec.dtype)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def positive(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5

    weight = normal(spec.k, spec.c // spec.groups, spec.r, spec.s) / math.sqrt(spec.k_gemm)
    maps = {"x": normal(spec.n, spec.c, spec.h, spec.w), "weight": weight}
    vectors = {"scale": positive(spec.k), "shift": normal(spec.k)}
    if spec.residual:
        maps["residual"] = normal(spec.n, spec.k, spec.p, spec.q)
    if spec.norm:
        vectors |= {"mean": normal(spec.k) / 4, "var": positive(spec.k)}
    return Call(
        **{name: _inside(tensor.to(dtype)) for name, tensor in maps.items()},
        **{name: _inside(tensor.to(vector_dtype or dtype)) for name, tensor in vectors.items()},
        stride=spec.stride,
        padding=spec.padding,
        dilation=spec.dilation,
        groups=spec.groups,
        activation=spec.activation,
    )


def _definition(call: Call) -> torch.Tensor:
    def column(vector):
        return vector.double()[:, None, None]

    geometry = (call.stride, call.padding, call.dilation, call.groups)
    y = F.conv2d(call.x.double(), call.weight.double(), None, *geometry)
    if call.mean is not None:
        y = (y - column(call.mean)) / (column(call.var) + call.eps).sqrt()
    y = y * column(call.scale) + column(call.shift)
    if call.residual is not None:
        y = y + call.residual.double()
    if call.activation == "none":
        return y
    return torch.where(y < 0, 0.0, y)


def _eager(call: Call) -> torch.Tensor:
    geometry = (call.stride, call.padding, call.dilation, call.groups)
    y = F.conv2d(call.x, call.weight, None, *geometry)
    wide = torch.promote_types(call.x.dtype, torch.float32)
    scale, shift = call.scale.to(wide), call.shift.to(wide)
    if call.mean is None:
        y = F.batch_norm(y, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, eps=0.0)
    else:
        y = F.batch_norm(y, call.mean.to(wide), call.var.to(wide), scale, shift, eps=call.eps)
    if call.residual is not None:
        y = y + call.residual
    return F.relu(y) if call.activation == "relu" else y
