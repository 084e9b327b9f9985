# SPDX-License-Identifier: Apache-2.0
"""What the interpreting processes run; a failed assertion comes back to the test that sent it."""

from __future__ import annotations

import torch

from resnet_fast.kernels import add_relu, conv_bn_act
from resnet_fast.spec import ConvSpec, TileConfig
from tests.support.cases import ConvTensors, conv_tensors
from tests.support.tolerance import assert_within

ARCH = 80  # only a compiled kernel is of an architecture; what is interpreted is the same for all


def launch_conv(tensors: ConvTensors, tile: TileConfig) -> None:
    """Run the kernel on `tensors`, as the op does."""
    t = tensors
    operands = conv_bn_act.operands(
        t.x, t.weight, t.scale, t.shift, t.mean, t.var, t.residual, t.out
    )
    launch = conv_bn_act.build(t.spec, tile, operands, arch=ARCH)
    launch(t.x, t.weight, t.scale, t.shift, t.mean, t.var, t.eps, t.residual, t.out)


def conv(spec: ConvSpec, tile: TileConfig, **options) -> None:
    """The kernel is within the tolerance rule, wrote all of `out` and nothing beside it."""
    tensors = conv_tensors(spec, **options)
    launch_conv(tensors, tile)
    label = f"{spec}, {tile}"
    assert_within(tensors.out, tensors.eager(), tensors.reference(), spec.k_gemm, label)
    for guard in tensors.out_guard:
        assert guard.isnan().all(), f"{label}: wrote outside of out"


def conv_passes_nan(spec: ConvSpec, tile: TileConfig) -> None:
    """A NaN in x reaches exactly the outputs that torch's reach, through the activation."""
    tensors = conv_tensors(spec)
    tensors.x[0, 1, 2, 2] = float("nan")
    launch_conv(tensors, tile)
    reference = tensors.reference()
    assert reference.isnan().any() and not reference.isnan().all()
    assert torch.equal(tensors.out.isnan(), reference.isnan()), f"{spec}: NaN was moved or lost"


def conv_is_deterministic(spec: ConvSpec, tile: TileConfig) -> None:
    """Two runs give the same bits."""
    first, second = conv_tensors(spec), conv_tensors(spec)
    launch_conv(first, tile)
    launch_conv(second, tile)
    assert torch.equal(first.out, second.out), f"{spec}, {tile}: two runs differ"


def conv_beyond_32_bits(tile: TileConfig) -> None:
    """The third image of x lies 2^31 elements after the first, each stride within 32 bits."""
    spec = ConvSpec(3, 5, 5, 32, 32, 3, 3, (1, 1), (1, 1), residual=True, norm=True)
    tensors = conv_tensors(spec)
    stride_n = 2**30 + 64
    memory = torch.empty(2 * stride_n + spec.h * spec.w * spec.c, dtype=torch.float16)
    x = memory.as_strided(tensors.x.shape, (stride_n, *tensors.x.stride()[1:]))
    x.copy_(tensors.x)  # the memory between is never touched, so never there
    tensors.x = x
    launch_conv(tensors, tile)
    tensors.x = x.contiguous(memory_format=torch.channels_last)
    assert_within(tensors.out, tensors.eager(), tensors.reference(), spec.k_gemm, "64-bit")


def add(shape: tuple[int, ...], dtype: torch.dtype, misaligned: bool) -> None:
    """relu(x + y) equals eager's, bit for bit, NaN included, and stays inside `out`."""
    generator = torch.Generator().manual_seed(0)
    count = torch.Size(shape).numel()
    start = 16 + (1 if misaligned else 0)
    x, y, out = (torch.full((count + 2 * start,), float("nan"), dtype=dtype) for _ in range(3))
    x, y = (
        t[start : start + count].copy_(torch.randn(count, generator=generator)).view(shape)
        for t in (x, y)
    )
    if count > 2:
        x.view(-1)[count // 2] = float("nan")
    inner = out[start : start + count].view(shape)
    add_relu.build(count, dtype, add_relu.is_aligned(x, y, inner), arch=ARCH)(x, y, inner)
    torch.testing.assert_close(inner, torch.relu(x + y), rtol=0, atol=0, equal_nan=True)
    assert out[:start].isnan().all() and out[start + count :].isnan().all(), "wrote outside of out"


def add_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The mask equals torch's, bit for bit: zeros, negative zeros and NaN included."""
    generator = torch.Generator().manual_seed(1)
    grad, y = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    y.view(-1)[:4] = torch.tensor([0.0, -0.0, float("nan"), -1.0])
    out = torch.full_like(y, float("nan"))
    aligned = add_relu.is_aligned(grad, y, out)
    add_relu.build(y.numel(), dtype, aligned, arch=ARCH, gradient=True)(grad, y, out)
    assert torch.equal(out, torch.ops.aten.threshold_backward(grad, y, 0))
