# SPDX-License-Identifier: Apache-2.0
"""The backend `cuda`: the C++ kernels of csrc/cuda, through `torch.ops.resnet_fast._*_cuda`.

What is refused here is what csrc/cuda/conv_call.h would reject with an error. The kernels allocate
nothing: y and the shares of a split sum are made here. The ops are told a tile's row in the table.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resnet_fast.dispatch import gemm, tiles
from resnet_fast.dispatch.problem import (
    Binder,
    ConvProblem,
    JoinProblem,
    MaskProblem,
    StemProblem,
    SumProblem,
    binder,
    layout_refusal,
    new_output,
    new_pooled,
    on_device_of,
    sum_binder,
    sum_refusal,
)
from resnet_fast.dispatch.row import Row
from resnet_fast.spec import ELEMENT_SIZE, ConvSpec, JoinSpec, StemSpec, StemTile, TileConfig

DTYPES = ("float16", "bfloat16", "float32")
CHANNELS = 8  # C and K are multiples of it: 16 bytes of half precision, and whole fragments
MAX_TAPS = 15  # along an axis: the kernel keeps what lies outside of x in masks of 16 bits
MAX_EXTENT = 2**15 - 1  # of stride, padding and dilation
MAX_PIXELS = 2**31 - 1 - 256  # of the output: with a tile's overhang they are counted in 31 bits
MAX_WEIGHT = 2**31 - 1  # bytes, addressed in 31 bits
MAX_SPAN = 2**32 - 1  # bytes of x between the first and the last that a block's rows read
MAX_REACH = 2**31 - 1  # elements of x between a filter's taps, through which the kernel counts
MAX_STEM_BLOCKS = 2**31
BLOCK_ROWS = max(tile.BLOCK_M for tile in tiles.CUDA_TILES[ConvSpec])
IEEE = (
    "float32 in IEEE precision: the CUDA kernel multiplies in TF32 "
    "(torch.backends.cudnn.conv.fp32_precision)"
)


def missing(arch: int) -> str | None:
    """Why the extension cannot be used here, or on a GPU of that architecture; or None."""
    from resnet_fast.kernels import cuda as kernel

    return kernel.missing() or kernel.architecture_refusal(arch)


def _private(op: str):
    """The extension's implementation of an op, which its import registers."""
    from resnet_fast.kernels import cuda as kernel

    kernel.module()
    return getattr(torch.ops.resnet_fast, f"_{op.removeprefix('_')}_cuda").default


# ---- a convolution


def kernel_refusal(problem: ConvProblem) -> str | None:
    """Why no C++ GEMM can take `problem`, whatever its tiles; or None."""
    spec, size = problem.spec, ELEMENT_SIZE[problem.spec.dtype]
    if reason := layout_refusal(problem) or spec_refusal(spec):
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
    if gemm.is_ieee(spec):
        return IEEE
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


def _strides(problem: ConvProblem) -> tuple[int, ...]:
    """Of x along (n, h, w); 0 along an axis of one, where it says nothing."""
    spec = problem.spec
    sizes = zip((spec.n, spec.h, spec.w), problem.x_strides, strict=True)
    return tuple(stride if size > 1 else 0 for size, stride in sizes)


def _span(problem: ConvProblem) -> int:
    """Elements of x from the first to the last that the rows of one block reach."""
    spec = problem.spec
    images = min(spec.n, 2 + (BLOCK_ROWS - 2) // max(spec.p * spec.q, 1))
    lengths = (images, spec.h + spec.padding[0], spec.w + spec.padding[1])
    steps = zip(lengths, _strides(problem), strict=True)
    return spec.c + sum((length - 1) * stride for length, stride in steps if length)


def _reach(problem: ConvProblem) -> int:
    """Elements of x from a filter's first tap to its last."""
    spec = problem.spec
    _, down, across = _strides(problem)
    rows, columns = (spec.r - 1) * spec.dilation[0], (spec.s - 1) * spec.dilation[1]
    return rows * down + columns * across + spec.c


def conv_build(problem: ConvProblem, tile: TileConfig) -> Binder:
    run, spec = _private(problem.op), problem.spec
    geometry = (spec.stride, spec.padding, spec.dilation, spec.activation == "relu")
    cut = (tiles.cuda_index(spec, tile), tile.SPLIT_K)
    shares = (tile.SPLIT_K, spec.m, spec.k) if tile.SPLIT_K > 1 else None

    def launch(
        weight, scale, shift, mean, var, eps, x, residual, inplace=False, finite=False
    ) -> Tensor:
        y = residual if inplace else new_output(x, spec)
        workspace = shares and torch.empty(shares, dtype=torch.float32, device=x.device)
        vectors = (scale, shift, mean, var, eps)
        with on_device_of(x):
            run(x, weight.to(x.dtype), *vectors, residual, *geometry, *cut, workspace, y)
        return y

    return binder(launch)


# ---- a join


def join_refusal(problem: JoinProblem) -> str | None:
    """The kernel must take both convolutions."""
    for name, part in (("main", problem.main), ("projection", problem.projection)):
        reason = kernel_refusal(part)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def join_build(problem: JoinProblem, tile: TileConfig) -> Binder:
    run, spec = _private(problem.op), problem.spec
    index, stride = tiles.cuda_index(spec, tile), list(spec.projection.stride)

    def launch(
        weight, scale, shift, mean, var, eps,
        proj_weight, proj_scale, proj_shift, proj_mean, proj_var, proj_eps, h, x, *_,
    ) -> Tensor:  # fmt: skip
        y = new_output(h, spec.main)
        with on_device_of(h):
            run(
                h, weight.to(h.dtype), scale, shift, mean, var, eps,
                x, proj_weight.to(x.dtype), proj_scale, proj_shift, proj_mean, proj_var, proj_eps,
                stride, index, y,
            )  # fmt: skip
        return y

    return binder(launch)


# ---- a stem


def stem_refusal(problem: StemProblem) -> str | None:
    conv, spec = problem.conv, problem.conv.spec
    if spec.dtype not in DTYPES:
        return f"dtype {spec.dtype}: the CUDA kernel takes {', '.join(DTYPES)}"
    if gemm.is_ieee(spec):
        return IEEE
    if conv.weight != "channels_last":
        return f"weight is {conv.weight}, not channels_last"
    if not conv.vectors:
        return "scale, shift, mean or var is not contiguous"
    if spec.k % CHANNELS:
        return f"K {spec.k}: the CUDA kernel takes multiples of {CHANNELS}"
    if not conv.aligned:
        return "weight or a vector does not start at a multiple of 16 bytes"
    if max(tile.blocks(problem.spec) for tile in tiles.CUDA_TILES[StemSpec]) >= MAX_STEM_BLOCKS:
        return "so many images that the CUDA kernel's tiles do not count in 32 bits"
    return None


def stem_build(problem: StemProblem, tile: StemTile) -> Binder:
    run, spec = _private(problem.op), problem.spec
    index = tiles.cuda_index(spec, tile)

    def launch(weight, scale, shift, mean, var, eps, image_mean, image_std, x, *_) -> Tensor:
        y = new_pooled(spec, x.device)
        with on_device_of(x):
            run(x, weight, scale, shift, mean, var, eps, image_mean, image_std, index, y)
        return y

    return binder(launch)


# ---- relu(x + y), and its gradient


def sum_build(problem: SumProblem, tile: None = None) -> Binder:
    return sum_binder(_private(problem.op))


_row = functools.partial(
    Row, backend="cuda", device="cuda", missing=missing, fuses=True, tried=True
)
ROWS = (
    _row(ConvProblem.op, build=conv_build, refusal=kernel_refusal, family=tiles.CUDA[ConvSpec]),
    _row(JoinProblem.op, build=join_build, refusal=join_refusal, family=tiles.CUDA[JoinSpec]),
    _row(StemProblem.op, build=stem_build, refusal=stem_refusal, family=tiles.CUDA[StemSpec],
         any_layout=True),
    _row(SumProblem.op, build=sum_build, refusal=sum_refusal),
    _row(MaskProblem.op, build=sum_build, refusal=sum_refusal),
)  # fmt: skip
