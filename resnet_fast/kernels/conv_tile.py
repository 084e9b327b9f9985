# SPDX-License-Identifier: Apache-2.0
"""The parts of one output tile of a convolution: which it is, what it may read, how it ends.

Device functions, inlined into the kernel of `conv_bn_act.py`, which has the whole picture, and into
that of the join of two convolutions.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped_tile(m, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The (row, column) tile of this program: GROUP_M row tiles are walked together.

    Programs that run at the same time then share both their rows of x and their filters in L2.
    """
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(k, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_m = tl.minimum(tl.cdiv(m, BLOCK_M) - first_m, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first_m + within % group_m, within // group_m


@triton.jit
def tile_sums(
    x,  # [N, H, W, C], strides (stride_n, stride_h, stride_w, 1)
    weight,  # [K, R, S, C]
    rows,  # [BLOCK_M] output pixels
    cols,  # [BLOCK_N] output channels
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """The sums over all products, or over this program's share: [BLOCK_M, BLOCK_N] fp32."""
    ks = tl.arange(0, BLOCK_K)

    # rows and columns past the end compute something that is never stored: they read tile 0's
    index = tl.where(rows < m, rows, 0)
    if INDEX64:
        index = index.to(tl.int64)
    if FLAT:
        row_offsets = index * stride_w
    else:
        image = index // (p * q)
        first_h = (index // q % p) * conv_stride_h - padding_h
        first_w = (index % q) * conv_stride_w - padding_w
        row_offsets = image * stride_n + first_h * stride_h + first_w * stride_w
    x_offsets = row_offsets[:, None] + ks[None, :]
    filters = tl.where(cols < k, cols, 0)
    if INDEX64:
        filters = filters.to(tl.int64)
    w_offsets = filters[None, :] * (R * S * c) + ks[:, None]

    TAPS_S: tl.constexpr = 1 if MERGE_S else S
    tap_c = S * c if MERGE_S else c
    outside = tl.zeros((BLOCK_M,), dtype=tl.int32)
    x_elements = None
    if not POINTWISE:
        # bits 0..14: outside in height at tap r; bits 16..30: outside in width at tap s
        outside |= outside_bits(first_h, dilation_h, h, R).to(tl.int32)
        if MERGE_S:
            x_elements = (first_w * c).to(tl.int32)[:, None] + ks[None, :]
        else:
            outside |= outside_bits(first_w, dilation_w, w, S).to(tl.int32) << 16

    steps_per_tap = tl.cdiv(tap_c, BLOCK_K)
    steps = R * TAPS_S * steps_per_tap
    first_step = 0
    if SPLIT_K > 1:
        share = tl.cdiv(steps, SPLIT_K)
        first_step = tl.program_id(1) * share
        steps = tl.minimum(share, steps - first_step)
    tap = first_step // steps_per_tap
    r = tap // TAPS_S
    s = tap % TAPS_S
    c0 = (first_step % steps_per_tap) * BLOCK_K

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(steps):
        x_ptrs = x + (x_offsets + (r * dilation_h * stride_h + s * dilation_w * stride_w + c0))
        w_ptrs = weight + (w_offsets + ((r * TAPS_S + s) * tap_c + c0))
        if EVEN_C:
            w_tile = tl.load(w_ptrs)
        else:
            w_tile = tl.load(w_ptrs, mask=(ks < tap_c - c0)[:, None], other=0.0)
        if POINTWISE and EVEN_C:
            x_tile = tl.load(x_ptrs)
        else:
            mask = inside_mask(outside, x_elements, ks, r, s, c0, tap_c, w * c, MERGE_S, EVEN_C)
            x_tile = tl.load(x_ptrs, mask=mask, other=0.0)
        if x_tile.dtype == tl.float32 and PRECISION == "tf32":
            x_tile, w_tile = round_to_tf32(x_tile), round_to_tf32(w_tile)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)

        c0 += BLOCK_K
        if not POINTWISE:
            end_of_tap = c0 >= tap_c
            c0 = tl.where(end_of_tap, 0, c0)
            s = tl.where(end_of_tap, s + 1, s)
            end_of_row = s == TAPS_S
            s = tl.where(end_of_row, 0, s)
            r = tl.where(end_of_row, r + 1, r)
    return acc


@triton.jit
def outside_bits(
    first,  # [BLOCK_M], position of the first tap
    step,
    size,
    TAPS: tl.constexpr,
):
    """Bit i of a row is set where its tap i lies outside [0, size): in the padding."""
    bits = tl.zeros_like(first)
    for i in tl.static_range(TAPS):
        position = first + i * step
        bits |= tl.where((position < 0) | (position >= size), 1 << i, 0)
    return bits


@triton.jit
def normalise(
    acc,  # [BLOCK_M, BLOCK_N] fp32
    cols,  # [BLOCK_N] output channels
    in_cols,  # [BLOCK_N] whether the channel exists
    scale,  # [K]
    shift,  # [K]
    mean,  # [K] or None
    var,  # [K] or None
    eps,
):
    """BatchNorm in inference, as one multiplication and one addition: [BLOCK_M, BLOCK_N] fp32."""
    factor = tl.load(scale + cols, mask=in_cols, other=0.0).to(tl.float32)
    offset = tl.load(shift + cols, mask=in_cols, other=0.0).to(tl.float32)
    if mean is not None:
        variance = tl.load(var + cols, mask=in_cols, other=1.0).to(tl.float32)
        factor *= tl.rsqrt(variance + eps)
        offset -= tl.load(mean + cols, mask=in_cols, other=0.0).to(tl.float32) * factor
    return acc * factor[None, :] + offset[None, :]


@triton.jit
def finish_tile(
    acc,  # [BLOCK_M, BLOCK_N] fp32
    rows,  # [BLOCK_M] output pixels
    cols,  # [BLOCK_N] output channels
    y,  # [N, P, Q, K]
    residual,  # [N, P, Q, K] or None
    scale,  # [K]
    shift,  # [K]
    mean,  # [K] or None
    var,  # [K] or None
    eps,
    m,
    k,
    ACTIVATION: tl.constexpr,
    PARTIAL: tl.constexpr,
    INDEX64: tl.constexpr,
):
    """Normalise, add, activate, round once and store; the PARTIAL sum of a split only stores."""
    in_cols = cols < k
    index = rows.to(tl.int64) if INDEX64 else rows
    offsets = index[:, None] * k + cols[None, :]
    mask = (rows < m)[:, None] & in_cols[None, :]
    if not PARTIAL:
        acc = normalise(acc, cols, in_cols, scale, shift, mean, var, eps)
        if residual is not None:
            acc += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION == "relu":
            acc = tl.where(acc < 0, 0.0, acc)  # a NaN compares false and passes, as in torch
    tl.store(y + offsets, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def inside_mask(
    outside,  # [BLOCK_M], from outside_bits
    x_elements,  # [BLOCK_M, BLOCK_K], place in a row of x; only with MERGE_S
    ks,  # [BLOCK_K]
    r,
    s,
    c0,
    tap_c,
    row_elements,
    MERGE_S: tl.constexpr,
    EVEN_C: tl.constexpr,
):
    """Which elements of a step lie inside the image and inside the tap: [BLOCK_M, 1 or BLOCK_K]."""
    mask = ((outside & ((1 << r) | (1 << (s + 16)))) == 0)[:, None]
    if not EVEN_C:
        mask &= (ks < tap_c - c0)[None, :]
    if MERGE_S:
        # as unsigned numbers, the elements before the row are beyond its end
        mask &= (x_elements + c0).to(tl.uint32) < row_elements.to(tl.uint32)
    return mask


@triton.jit
def round_to_tf32(x):
    """fp32 rounded to nearest; tensor cores would truncate, which costs three times the error."""
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )
