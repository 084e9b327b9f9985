# SPDX-License-Identifier: Apache-2.0
"""The end of a projection block as one kernel: two convolutions, their BatchNorms, sum and ReLU.

    y = relu(norm(conv(h, weight)) * scale + shift
             + norm'(conv1x1(x, proj_weight)) * proj_scale + proj_shift)

    h [N, P, Q, C] * weight [K, R, S, C]      -> [N, P, Q, K]        (memory order)
    x [N, H, W, D] * proj_weight [K, 1, 1, D] -> [N, P, Q, K], at every stride-th pixel

Both are sums over the same output tile, so one program makes the one after the other, and the
shortcut never exists in memory: it is not written, read, or rounded.

                R*S*C products      D products
               +---------------+  +-----------+         held = norm(sums of h)
      BLOCK_M  | h at (r, s)   |  | x sampled |         acc  = sums of x
      pixels   +---------------+  +-----------+         y    = relu(held + norm'(acc))

The two sums have different factors, so they stay apart, in two fp32 tiles in registers. A single
sum, scaled by scale / proj_scale between the products, would need half the registers, but would
lose everything if a scale is zero or tiny; scaling the filters would round them a second time.

Two loops, one after the other. A single one, which sets the first sum aside by a branch, keeps the
pipeline of loads full between them; but a branch that touches the accumulator makes the compiler
wait for each wgmma of sm_90 (8 waits a step at 128x64x64, not 1), and it saves no instruction on
sm_80. Both facts come from machine code. Other blocks of the SM hide the wait between the loops.

The main convolution keeps the map's size: stride 1, an odd filter, padding of half its size. It is
1x1 in a Bottleneck and 3x3 in a BasicBlock.

Preconditions: the channel strides of h and x are 1; the weights and y are dense in NHWC order.
Reference: `resnet_fast/ops/conv_bn_join.py`. He et al. 2015, equation 2 and option B.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import cdiv

from resnet_fast.kernels import conv_bn_act
from resnet_fast.kernels.conv_bn_act import needs_64_bits, used_strides
from resnet_fast.kernels.conv_tile import grouped_tile, normalise, tile_sums
from resnet_fast.kernels.filter_walk import filter_walk
from resnet_fast.kernels.launch import TRITON_TYPE, Bind, Launch
from resnet_fast.spec import JoinSpec, TileConfig

Params = tuple[torch.dtype, torch.dtype, torch.dtype | None, torch.dtype | None]
VECTORS = ("scale", "shift", "mean", "var")


@triton.jit
def conv_bn_join_kernel(
    h,  # [N, P, Q, C], strides (h_stride_n, h_stride_h, h_stride_w, 1)
    weight,  # [K, R, S, C]
    x,  # [N, H, W, D], strides (x_stride_n, x_stride_h, x_stride_w, 1)
    proj_weight,  # [K, 1, 1, D]
    y,  # [N, P, Q, K]
    scale,  # [K]
    shift,  # [K]
    mean,  # [K] or None
    var,  # [K] or None
    proj_scale,  # [K]
    proj_shift,  # [K]
    proj_mean,  # [K] or None
    proj_var,  # [K] or None
    eps,
    proj_eps,
    c,
    d,
    k,
    p,
    q,
    m,
    h_stride_n,
    h_stride_h,
    h_stride_w,
    x_stride_n,
    x_stride_h,
    x_stride_w,
    conv_stride_h,
    conv_stride_w,
    R: tl.constexpr,
    S: tl.constexpr,
    POINTWISE: tl.constexpr,  # the main convolution is 1x1
    FLAT: tl.constexpr,  # and row i of the GEMM is at i * h_stride_w in h
    MERGE_S: tl.constexpr,  # a filter row of S*C elements is one tap
    EVEN_C: tl.constexpr,  # every step of h is full
    EVEN_D: tl.constexpr,  # every step of x is full
    INDEX64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = grouped_tile(m, k, BLOCK_M, BLOCK_N, GROUP_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < k

    acc = tile_sums(
        h, weight, rows, cols, p, q, c, k, p, q, m, h_stride_n, h_stride_h, h_stride_w,
        1, 1, R // 2, S // 2, 1, 1,
        R, S, POINTWISE, FLAT, MERGE_S, EVEN_C, INDEX64, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, 1,
    )  # fmt: skip
    held = normalise(acc, cols, in_cols, scale, shift, mean, var, eps)
    acc = tile_sums(
        x, proj_weight, rows, cols, p, q, d, k, p, q, m, x_stride_n, x_stride_h, x_stride_w,
        conv_stride_h, conv_stride_w, 0, 0, 1, 1,
        1, 1, True, False, False, EVEN_D, INDEX64, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, 1,
    )  # fmt: skip
    acc = normalise(acc, cols, in_cols, proj_scale, proj_shift, proj_mean, proj_var, proj_eps)
    acc += held
    acc = tl.where(acc < 0, 0.0, acc)  # a NaN compares false and passes, as in torch
    index = rows.to(tl.int64) if INDEX64 else rows
    y_ptrs = y + (index[:, None] * k + cols[None, :])
    tl.store(y_ptrs, acc.to(y.dtype.element_ty), mask=(rows < m)[:, None] & in_cols[None, :])


class Operands(NamedTuple):
    """What a launch depends on besides its `JoinSpec` and the device, as part of its key.

    Args:
        h_strides, x_strides: along (n, h, w), in elements.
        params, proj_params: the torch dtypes of scale, shift, mean and var; None for one absent.
        aligned: whether every tensor of the call starts at a multiple of 16 bytes.
    """

    h_strides: tuple[int, int, int]
    x_strides: tuple[int, int, int]
    params: Params
    proj_params: Params
    aligned: bool


def refusal(spec: JoinSpec) -> str | None:
    """Why this kernel cannot take `spec`, or None."""
    return conv_bn_act.refusal(spec.main) or conv_bn_act.refusal(spec.projection)


def launches(spec: JoinSpec, tile: TileConfig, operands: Operands) -> tuple[Launch, ...]:
    """The one launch of a call.

    Its leading arguments are (h, weight, x, proj_weight, y, scale, shift, mean, var, proj_scale,
    proj_shift, proj_mean, proj_var, eps, proj_eps).
    """
    main, projection = spec.main, spec.projection
    element = f"*{TRITON_TYPE[main.dtype]}"
    h_strides = used_strides(main, operands.h_strides)
    x_strides = used_strides(projection, operands.x_strides)
    index64 = needs_64_bits(main, tile, h_strides) or needs_64_bits(projection, tile, x_strides)
    walk = filter_walk(main, h_strides[2])
    one_pitch = h_strides[1] == main.w * h_strides[2] and h_strides[0] == main.h * h_strides[1]
    strides = {
        f"{tensor}_stride_{axis}": stride
        for tensor, along in (("h", h_strides), ("x", x_strides))
        for axis, stride in zip("nhw", along, strict=True)
    }
    sizes = {
        "c": main.c, "d": projection.c, "k": main.k, "p": main.p, "q": main.q, "m": main.m,
        **strides,
        "conv_stride_h": projection.stride[0], "conv_stride_w": projection.stride[1],
    }  # fmt: skip
    leading = dict.fromkeys(("h", "weight", "x", "proj_weight", "y"), element)
    for prefix, params in (("", operands.params), ("proj_", operands.proj_params)):
        for name, dtype in zip(VECTORS, params, strict=True):
            kind = dtype and f"*{TRITON_TYPE[str(dtype).removeprefix('torch.')]}"
            leading[prefix + name] = kind
    divisors = dict.fromkeys(leading, 16) if operands.aligned else {}
    leading |= {"eps": "fp32", "proj_eps": "fp32"}
    divisors |= {name: math.gcd(sizes[name], 16) for name in ("c", "d", "k", *strides)}
    launch = Launch(
        kernel=conv_bn_join_kernel,
        grid=(cdiv(main.m, tile.BLOCK_M) * cdiv(main.k, tile.BLOCK_N), 1, 1),
        leading=leading,
        sizes=sizes,
        constants={
            "R": main.r,
            "S": main.s,
            "POINTWISE": main.is_pointwise,
            "FLAT": main.is_pointwise and one_pitch,
            "MERGE_S": walk.merged,
            "EVEN_C": walk.is_even(tile.BLOCK_K),
            "EVEN_D": projection.c % tile.BLOCK_K == 0,
            "INDEX64": index64,
            "PRECISION": main.precision if main.dtype == "float32" else "tf32",
            "BLOCK_M": tile.BLOCK_M,
            "BLOCK_N": tile.BLOCK_N,
            "BLOCK_K": tile.BLOCK_K,
            "GROUP_M": tile.GROUP_M,
        },
        divisors=divisors,
        wide=frozenset(strides if index64 else ()),
        num_warps=tile.NUM_WARPS,
        num_stages=tile.NUM_STAGES,
    )
    return (launch,)


def build(
    spec: JoinSpec, tile: TileConfig, operands: Operands, *, arch: int, bind: Bind = Launch.bind
) -> Callable[..., None]:
    """All that can be decided before the pointers are known; returns the function that launches.

    Args:
        spec: the two products; `refusal(spec)` is None.
        tile: how they are cut, from `dispatch.heuristics.choose`.
        operands: of the call at hand.
        arch: compute capability of the current device times ten.
        bind: turns a launch into a function; tests without a GPU pass their own.

    Returns:
        launch(h, weight, scale, shift, mean, var, eps, x, proj_weight, proj_scale, proj_shift,
        proj_mean, proj_var, proj_eps, out): runs on the current stream of the current device. It
        is valid as long as `spec`, `operands` and the device are the same; it checks nothing.
    """
    (launch,) = launches(spec, tile, operands)
    run = bind(launch, arch)

    def join(
        h, weight, scale, shift, mean, var, eps,
        x, proj_weight, proj_scale, proj_shift, proj_mean, proj_var, proj_eps, out,
    ):  # fmt: skip
        run(
            h, weight, x, proj_weight, out, scale, shift, mean, var,
            proj_scale, proj_shift, proj_mean, proj_var, eps, proj_eps,
        )  # fmt: skip

    return join
