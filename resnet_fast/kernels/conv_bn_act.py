# SPDX-License-Identifier: Apache-2.0
"""Convolution, BatchNorm, residual and ReLU as one implicit GEMM.

    y = act((conv(x, weight) - mean) * rsqrt(var + eps) * scale + shift + residual)

    x [N, H, W, C] * weight [K, R, S, C] -> y [N, P, Q, K]           (memory order)

GEMM view: rows are output pixels (M = N*P*Q), columns output channels, and the products run over
(r, s, c), the filter's own memory order. The matrix of rows times products is never formed: a
program gathers a BLOCK_M x BLOCK_K piece of it from x at every step.

                    BLOCK_K products              columns (output channels)
                   +---------------+                  +---------+
      BLOCK_M      | x at (r, s),  |     BLOCK_K      | weight  |
      output       | channels c0.. |                  |         |      acc += x_tile @ weight_tile
      pixels       +---------------+                  +---------+
                                                        BLOCK_N

ONE loop walks all steps: c0 advances by BLOCK_K, then s, then r, by comparison and never by
division. Nested loops would drain the pipeline of loads at every filter tap.

Where C is so small that BLOCK_K products would be mostly padding (the 7x7 stem has C = 3), a whole
filter row is one tap: its S*C elements lie side by side in x as they do in the filter (MERGE_S).

With SPLIT_K programs per tile, each sums a share of the steps into an fp32 workspace, and
a second kernel adds the shares in order and finishes: without atomics, so every run is the same.

TF32 operands are rounded in registers: tensor cores only drop the low bits.

Tiles come by 16-byte asynchronous copies on every architecture, not by tensor descriptors (TMA).
A tiled descriptor cannot gather the pixels of a padded or strided tap; for pointwise convolutions,
which it can serve, sm_90's main loop at 128x128x64 and 8 warps grows from 69 to 84 instructions
for the same wgmma, and the host would have to encode two descriptors at every launch. Both facts
come from compiled code; a measurement on a GPU may overrule them.

Preconditions: the channel stride of x is 1; weight, residual and y are dense in their NHWC order
(a residual is a whole activation of the network, and a strided one would cost two divisions
a row in the epilogue); groups is 1.
Reference: `resnet_fast/ops/conv_bn_act.py`. Implicit GEMM: Chetlur et al., "cuDNN: Efficient
Primitives for Deep Learning", section 3, https://arxiv.org/abs/1410.0759.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import cdiv

from resnet_fast.kernels.conv_tile import finish_tile, grouped_tile, tile_sums
from resnet_fast.kernels.filter_walk import filter_walk
from resnet_fast.kernels.launch import TRITON_TYPE, Bind, Launch
from resnet_fast.spec import ConvSpec, TileConfig

LIMIT_32BIT = 2**31 - 2**16  # elements that 32-bit offsets reach, less one tile's overhang
MAX_TAPS = 15  # filter height or width: a row keeps one bit for each in half an int32
REDUCE_M, REDUCE_N = 8, 128  # tile of the split-K reduction: 16-byte loads for each of 4 warps


@triton.jit
def conv_bn_act_kernel(
    x,  # [N, H, W, C], strides (stride_n, stride_h, stride_w, 1)
    weight,  # [K, R, S, C]
    y,  # [N, P, Q, K]; with SPLIT_K > 1 the workspace, fp32 [SPLIT_K, N, P, Q, K]
    residual,  # [N, P, Q, K] or None
    scale,  # [K]
    shift,  # [K]
    mean,  # [K] or None
    var,  # [K] or None
    eps,
    h,
    w,
    c,
    k,
    p,
    q,
    m,
    stride_n,
    stride_h,
    stride_w,
    conv_stride_h,
    conv_stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    R: tl.constexpr,
    S: tl.constexpr,
    POINTWISE: tl.constexpr,  # 1x1 without padding: every tap lies inside
    FLAT: tl.constexpr,  # pointwise, and row i of the GEMM is at i * stride_w in x
    MERGE_S: tl.constexpr,  # a filter row of S*C elements is one tap
    EVEN_C: tl.constexpr,  # every step is full: the channels of a tap are whole BLOCK_Ks
    INDEX64: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = grouped_tile(m, k, BLOCK_M, BLOCK_N, GROUP_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tile_sums(
        x, weight, rows, cols, h, w, c, k, p, q, m, stride_n, stride_h, stride_w,
        conv_stride_h, conv_stride_w, padding_h, padding_w, dilation_h, dilation_w,
        R, S, POINTWISE, FLAT, MERGE_S, EVEN_C, INDEX64, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        SPLIT_K,
    )  # fmt: skip

    if SPLIT_K > 1:
        y += tl.program_id(1).to(tl.int64) * m * k if INDEX64 else tl.program_id(1) * m * k
    if BLOCK_N >= 128:
        # in halves: the residual of a whole tile and its sums do not both fit the registers
        HALF: tl.constexpr = BLOCK_N // 2
        acc, acc_right = tl.split(acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1))
        cols = pid_n * BLOCK_N + tl.arange(0, HALF)
        finish_tile(
            acc, rows, cols, y, residual, scale, shift, mean, var, eps, m, k,
            ACTIVATION, SPLIT_K > 1, INDEX64,
        )  # fmt: skip
        acc = acc_right
        cols += HALF
    finish_tile(
        acc, rows, cols, y, residual, scale, shift, mean, var, eps, m, k,
        ACTIVATION, SPLIT_K > 1, INDEX64,
    )  # fmt: skip


@triton.jit
def reduce_splits_kernel(
    workspace,  # fp32 [SPLIT_K, N, P, Q, K]
    y,  # [N, P, Q, K]
    residual,  # [N, P, Q, K] or None
    scale,  # [K]
    shift,  # [K]
    mean,  # [K] or None
    var,  # [K] or None
    eps,
    m,
    k,
    SPLIT_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INDEX64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the shares in order, then the same ending as the unsplit kernel."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Four channels at a time, a vector of fp32. With eight, a vector of half precision, a thread
    # would read its eight sums by two loads that each touch only half of every sector.
    cols = tl.program_id(1) * BLOCK_N + tl.max_contiguous(tl.arange(0, BLOCK_N), 4)
    mask = (rows < m)[:, None] & (cols < k)[None, :]
    index = rows.to(tl.int64) if INDEX64 else rows
    offsets = index[:, None] * k + cols[None, :]
    share = m.to(tl.int64) * k if INDEX64 else m * k
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in tl.static_range(SPLIT_K):
        acc += tl.load(workspace + i * share + offsets, mask=mask, other=0.0)
    finish_tile(
        acc, rows, cols, y, residual, scale, shift, mean, var, eps, m, k,
        ACTIVATION, False, INDEX64,
    )  # fmt: skip


class Operands(NamedTuple):
    """What a launch depends on besides its `ConvSpec` and the device, as part of its key.

    Args:
        x_strides: strides of x along (n, h, w), in elements.
        params: the torch dtypes of scale, shift, mean and var; None for one that is absent.
        aligned: whether every tensor of the call starts at a multiple of 16 bytes.
    """

    x_strides: tuple[int, int, int]
    params: tuple[torch.dtype, torch.dtype, torch.dtype | None, torch.dtype | None]
    aligned: bool


def operands(x, weight, scale, shift, mean, var, residual, out) -> Operands:
    """Read the `Operands` of a call; x is [N, C, H, W] in torch's shape."""
    stride_n, _, stride_h, stride_w = x.stride()
    address = (
        x.data_ptr() | weight.data_ptr() | out.data_ptr() | scale.data_ptr() | shift.data_ptr()
    )
    norm = (None, None)
    if mean is not None:
        address |= mean.data_ptr() | var.data_ptr()
        norm = (mean.dtype, var.dtype)
    if residual is not None:
        address |= residual.data_ptr()
    return Operands(
        (stride_n, stride_h, stride_w), (scale.dtype, shift.dtype, *norm), address % 16 == 0
    )


def refusal(spec: ConvSpec) -> str | None:
    """Why this kernel cannot take `spec`, or None."""
    if spec.dtype not in TRITON_TYPE:
        return f"dtype {spec.dtype}: the Triton kernel takes {', '.join(TRITON_TYPE)}"
    if spec.groups != 1:
        return f"groups {spec.groups}: the Triton kernel takes 1"
    if max(spec.r, spec.s) > MAX_TAPS:
        return f"filter {spec.r}x{spec.s}: the Triton kernel takes at most {MAX_TAPS}x{MAX_TAPS}"
    if spec.m > LIMIT_32BIT:
        return f"{spec.m} output pixels: the Triton kernel counts them in 32 bits"
    return None


def launches(spec: ConvSpec, tile: TileConfig, operands: Operands) -> tuple[Launch, ...]:
    """The launches of one call: the implicit GEMM and, with SPLIT_K > 1, its reduction.

    The leading arguments of the first are (x, weight, y or workspace, residual, scale, shift,
    mean, var, eps), those of the second (workspace, y, residual, scale, shift, mean, var, eps).
    """
    split = tile.SPLIT_K > 1
    element = f"*{TRITON_TYPE[spec.dtype]}"
    stride_n, stride_h, stride_w = strides = used_strides(spec, operands.x_strides)
    index64 = needs_64_bits(spec, tile, strides)
    walk = filter_walk(spec, stride_w)
    one_pitch = stride_h == spec.w * stride_w and stride_n == spec.h * stride_h
    sizes = {
        "h": spec.h, "w": spec.w, "c": spec.c, "k": spec.k, "p": spec.p, "q": spec.q, "m": spec.m,
        "stride_n": stride_n, "stride_h": stride_h, "stride_w": stride_w,
        "conv_stride_h": spec.stride[0], "conv_stride_w": spec.stride[1],
        "padding_h": spec.padding[0], "padding_w": spec.padding[1],
        "dilation_h": spec.dilation[0], "dilation_w": spec.dilation[1],
    }  # fmt: skip
    constants = {
        "R": spec.r,
        "S": spec.s,
        "POINTWISE": spec.is_pointwise,
        "FLAT": spec.is_pointwise and spec.stride == (1, 1) and one_pitch,
        "MERGE_S": walk.merged,
        "EVEN_C": walk.is_even(tile.BLOCK_K),
        "INDEX64": index64,
        "PRECISION": spec.precision if spec.dtype == "float32" else "tf32",
        "ACTIVATION": spec.activation,
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_K": tile.BLOCK_K,
        "SPLIT_K": tile.SPLIT_K,
        "GROUP_M": tile.GROUP_M,
    }
    ending = ending_types(spec, operands)
    pointers = ("x", "weight", "y", "workspace", *ending.keys() - {"eps"})
    divisors = dict.fromkeys(pointers, 16) if operands.aligned else {}
    divisors |= {
        name: math.gcd(sizes[name], 16) for name in ("c", "k", "stride_n", "stride_h", "stride_w")
    }
    gemm = Launch(
        kernel=conv_bn_act_kernel,
        grid=(cdiv(spec.m, tile.BLOCK_M) * cdiv(spec.k, tile.BLOCK_N), tile.SPLIT_K, 1),
        leading={"x": element, "weight": element, "y": "*fp32" if split else element, **ending},
        sizes=sizes,
        constants=constants,
        divisors=divisors,
        wide=frozenset(("stride_n", "stride_h", "stride_w") if index64 else ()),
        num_warps=tile.NUM_WARPS,
        num_stages=tile.NUM_STAGES,
    )
    if not split:
        return (gemm,)
    reduced = {"BLOCK_M": REDUCE_M, "BLOCK_N": REDUCE_N}
    reduction = Launch(
        kernel=reduce_splits_kernel,
        grid=(cdiv(spec.m, REDUCE_M), cdiv(spec.k, REDUCE_N), 1),
        leading={"workspace": "*fp32", "y": element, **ending},
        sizes={"m": spec.m, "k": spec.k},
        constants={name: constants[name] for name in ("SPLIT_K", "ACTIVATION", "INDEX64")}
        | reduced,
        divisors=divisors,
    )
    return gemm, reduction


def ending_types(spec: ConvSpec, operands: Operands) -> dict[str, str | None]:
    """The Triton types of what `finish_tile` reads; None for what is absent."""
    types = {"residual": f"*{TRITON_TYPE[spec.dtype]}" if spec.residual else None}
    for name, dtype in zip(("scale", "shift", "mean", "var"), operands.params, strict=True):
        types[name] = dtype and f"*{TRITON_TYPE[str(dtype).removeprefix('torch.')]}"
    return types | {"eps": "fp32"}


def used_strides(spec: ConvSpec, x_strides: tuple[int, int, int]) -> tuple[int, int, int]:
    """The strides of x along (n, h, w); along an axis of size one, where any will do, the dense."""
    stride_n, stride_h, stride_w = x_strides
    stride_w = stride_w if spec.w > 1 else spec.c
    stride_h = stride_h if spec.h > 1 else spec.w * stride_w
    stride_n = stride_n if spec.n > 1 else spec.h * stride_h
    return stride_n, stride_h, stride_w


def needs_64_bits(spec: ConvSpec, tile: TileConfig, strides: tuple[int, int, int]) -> bool:
    """Whether an offset into x, weight, y or the workspace may pass 32 bits."""
    lengths = (spec.n, spec.h, spec.w)
    extent = spec.c + sum((n - 1) * stride for n, stride in zip(lengths, strides, strict=True))
    return max(extent, spec.m * spec.k * tile.SPLIT_K, spec.k * spec.k_gemm) > LIMIT_32BIT


def build(
    spec: ConvSpec, tile: TileConfig, operands: Operands, *, arch: int, bind: Bind = Launch.bind
) -> Callable[..., None]:
    """All that can be decided before the pointers are known; returns the function that launches.

    Args:
        spec: the convolution; `refusal(spec)` is None.
        tile: how it is cut, from `dispatch.heuristics.choose`.
        operands: from `operands(...)` of the call at hand.
        arch: compute capability of the current device times ten.
        bind: turns a launch into a function; tests without a GPU pass their own.

    Returns:
        launch(x, weight, scale, shift, mean, var, eps, residual, out): runs on the current stream
        of the current device. It is valid as long as `spec`, `operands` and the device are the
        same; it checks nothing. eps is a float even where there is no variance.
    """
    gemm, *reduction = launches(spec, tile, operands)
    run = bind(gemm, arch)
    if not reduction:

        def launch(x, weight, scale, shift, mean, var, eps, residual, out) -> None:
            run(x, weight, out, residual, scale, shift, mean, var, eps)

        return launch

    reduce = bind(reduction[0], arch)
    workspace_shape = (tile.SPLIT_K, spec.m, spec.k)

    def launch_split(x, weight, scale, shift, mean, var, eps, residual, out) -> None:
        workspace = torch.empty(workspace_shape, dtype=torch.float32, device=x.device)
        run(x, weight, workspace, residual, scale, shift, mean, var, eps)
        reduce(workspace, out, residual, scale, shift, mean, var, eps)

    return launch_split
