# SPDX-License-Identifier: Apache-2.0
"""The backend `cuda`: the C++ kernels of csrc/cuda, through `torch.ops.resnet_fast._*_cuda`.

What is refused here is what csrc/cuda/conv_call.h would reject with an error. The kernels allocate
nothing: y and the shares of a split sum are made here. Which tile is used is `heuristics.choose`
with the family `CUDA`; the op is told its row in the table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import _hardware
from resnet_fast.dispatch import heuristics
from resnet_fast.dispatch.problem import (
    Bind,
    Direct,
    Problem,
    layout_refusal,
    new_output,
    on_device_of,
)
from resnet_fast.spec import ELEMENT_SIZE, ConvSpec, TileConfig

DTYPES = ("float16", "bfloat16", "float32")
CHANNELS = 8  # C and K are multiples of it: 16 bytes of half precision, and whole fragments
MAX_TAPS = 15  # along an axis: the kernel keeps what lies outside of x in masks of 16 bits
MAX_EXTENT = 2**15 - 1  # of stride, padding and dilation
MAX_PIXELS = 2**31 - 1 - 256  # of the output: with a tile's overhang they are counted in 31 bits
MAX_WEIGHT = 2**31 - 1  # bytes, addressed in 31 bits
MAX_SPAN = 2**32 - 1  # bytes of x between the first and the last that a block's rows read
MAX_REACH = 2**31 - 1  # elements of x between a filter's taps, through which the kernel counts
BLOCK_ROWS = max(tile.BLOCK_M for tile in heuristics.CUDA_TILES)


def missing() -> str | None:
    """Why the extension cannot be used on this machine, or None."""
    from resnet_fast.kernels import cuda as kernel

    return kernel.missing()


def refusal(problem: Problem) -> str | None:
    """Why the C++ convolution cannot or should not take `problem`, or None."""
    if reason := kernel_refusal(problem):
        return reason
    try:
        choose(problem)
    except ValueError as error:
        return str(error)
    return None


def kernel_refusal(problem: Problem) -> str | None:
    """Why no C++ kernel can take `problem`, whatever its tiles; or None."""
    from resnet_fast.kernels import cuda as kernel

    spec, size = problem.spec, ELEMENT_SIZE[problem.spec.dtype]
    reason = kernel.architecture_refusal(problem.arch) or layout_refusal(problem)
    if reason := reason or spec_refusal(spec):
        return reason
    if (span := _span(problem) * size) > MAX_SPAN:
        return f"{span} bytes of x under one tile: the CUDA kernel addresses them in 32 bits"
    if (reach := _reach(problem)) > MAX_REACH:
        return f"{reach} elements of x between the filter's taps: the CUDA kernel counts in 31 bits"
    if not problem.aligned:
        return "a tensor does not start at a multiple of 16 bytes"
    if any(stride * size % 16 for stride in _strides(problem)):
        return f"x has strides {problem.x_strides}, which are no multiples of 16 bytes"
    return None


def spec_refusal(spec: ConvSpec) -> str | None:
    """Why the C++ kernel cannot take `spec`, wherever and however its tensors lie; or None."""
    if spec.dtype not in DTYPES:
        return f"dtype {spec.dtype}: the CUDA kernel takes {', '.join(DTYPES)}"
    if heuristics.is_ieee(spec):
        return (
            "float32 in IEEE precision: the CUDA kernel multiplies in TF32 "
            "(torch.backends.cudnn.conv.fp32_precision)"
        )
    if spec.groups != 1:
        return f"groups {spec.groups}: the CUDA kernel takes 1"
    for name, channels in (("C", spec.c), ("K", spec.k)):
        if channels % CHANNELS:
            return f"{name} {channels}: the CUDA kernel takes multiples of {CHANNELS}"
    if max(spec.r, spec.s) > MAX_TAPS:
        return f"filter {spec.r}x{spec.s}: the CUDA kernel takes at most {MAX_TAPS}x{MAX_TAPS}"
    if max(*spec.stride, *spec.padding, *spec.dilation) > MAX_EXTENT:
        return f"stride, padding or dilation above {MAX_EXTENT}"
    if spec.m > MAX_PIXELS:
        return f"{spec.m} output pixels: the CUDA kernel counts them in 32 bits"
    if (weight := spec.k * spec.k_gemm * ELEMENT_SIZE[spec.dtype]) > MAX_WEIGHT:
        return f"{weight} bytes of weight: the CUDA kernel addresses them in 32 bits"
    return None


def _strides(problem: Problem) -> tuple[int, ...]:
    """Of x along (n, h, w); 0 along an axis of one, where it says nothing."""
    spec = problem.spec
    sizes = zip((spec.n, spec.h, spec.w), problem.x_strides, strict=True)
    return tuple(stride if size > 1 else 0 for size, stride in sizes)


def _span(problem: Problem) -> int:
    """Elements of x from the first to the last that the rows of one block reach."""
    spec = problem.spec
    images = min(spec.n, 2 + (BLOCK_ROWS - 2) // max(spec.p * spec.q, 1))
    lengths = (images, spec.h + spec.padding[0], spec.w + spec.padding[1])
    steps = zip(lengths, _strides(problem), strict=True)
    return spec.c + sum((length - 1) * stride for length, stride in steps if length)


def _reach(problem: Problem) -> int:
    """Elements of x from a filter's first tap to its last."""
    spec = problem.spec
    _, down, across = _strides(problem)
    rows, columns = (spec.r - 1) * spec.dilation[0], (spec.s - 1) * spec.dilation[1]
    return rows * down + columns * across + spec.c


def choose(problem: Problem) -> TileConfig:
    """The tile for `problem`, in the elements of its dtype.

    Raises:
        ValueError: none of the table is legal.
    """
    return heuristics.choose(problem.spec, problem.target, heuristics.CUDA)


def build(problem: Problem, tile: TileConfig | None = None) -> Bind:
    """Prepare `problem`, whose `refusal` is None."""
    from resnet_fast.kernels import cuda as kernel

    kernel.module()  # registers the op's implementation
    spec = problem.spec
    tile = tile or choose(problem)
    run = torch.ops.resnet_fast._conv_bn_act_cuda.default
    geometry = (spec.stride, spec.padding, spec.dilation, spec.activation == "relu")
    cut = (heuristics.cuda_index(spec, tile), tile.SPLIT_K)
    shares = (tile.SPLIT_K, spec.m, spec.k) if tile.SPLIT_K > 1 else None

    def launch(x, residual, inplace, weight, *vectors) -> Tensor:  # vectors: scale, ..., eps
        y = residual if inplace else new_output(x, spec)
        workspace = shares and torch.empty(shares, dtype=torch.float32, device=x.device)
        with on_device_of(x):
            run(x, weight.to(x.dtype), *vectors, residual, *geometry, *cut, workspace, y)
        return y

    return lambda *tensors: Direct(launch, *tensors)


def add_relu_missing(device: str) -> str | None:
    """Why `add_relu` cannot run on that device, or None."""
    from resnet_fast.kernels import cuda as kernel

    reason = kernel.missing()
    return reason or kernel.architecture_refusal(_hardware.capability_of(torch.device(device)))


def add_relu(x: Tensor, y: Tensor) -> Tensor:
    """relu(x + y) of dense tensors of one layout."""
    out = torch.empty_like(x)
    with on_device_of(x):
        torch.ops.resnet_fast._add_relu_cuda.default(x, y, out)
    return out
