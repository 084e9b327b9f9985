# SPDX-License-Identifier: Apache-2.0
"""The parts of one output tile of a convolution: which it is, what it may read, how it ends.

Device functions, inlined into the kernels of `conv_bn_act.py`, which has the whole picture.
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
        factor = tl.load(scale + cols, mask=in_cols, other=0.0).to(tl.float32)
        offset = tl.load(shift + cols, mask=in_cols, other=0.0).to(tl.float32)
        if mean is not None:
            variance = tl.load(var + cols, mask=in_cols, other=1.0).to(tl.float32)
            factor *= tl.rsqrt(variance + eps)
            offset -= tl.load(mean + cols, mask=in_cols, other=0.0).to(tl.float32) * factor
        acc = acc * factor[None, :] + offset[None, :]
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
