# SPDX-License-Identifier: Apache-2.0
"""The max-pool of a ResNet's stem: out = max_pool2d(x, 3, stride=2, padding=1), NHWC.

    out[n, i, j, k] = max of x[n, 2i - 1 : 2i + 2, 2j - 1 : 2j + 2, k], a NaN winning as in torch

torch's own pool also writes an int64 index beside every value, for a gradient that inference does
not need: four times the bytes of a half precision result. x is read about once: a program's pixels
share eight of nine loads in the L1 cache.

x, out: dense channels_last. The kernel checks nothing: that is the op's business
(`resnet_fast/ops/stem_pool.py`). The convolution before it is `conv_bn_act.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from resnet_fast.kernels.launch import TRITON_TYPE, Bind, Launch

NUM_WARPS = 4
BYTES_PER_THREAD = 16  # of out; of x nine times as many are in flight
LIMIT_32BIT = 2**31 - 2**16  # elements of x that a 32-bit index reaches, less what overhangs


@triton.jit
def max_pool_3x3_2_kernel(
    x,  # [N, P, Q, K]
    out,  # [N, PP, PQ, K]
    p,
    q,
    pool_p,
    pool_q,
    numel,  # of out
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX64: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64) if INDEX64 else tl.program_id(0)
    index = pid * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    k = index % K
    column = index // K % pool_q
    row = index // (K * pool_q) % pool_p
    n = index // (K * pool_q * pool_p)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for r in tl.static_range(3):
        for s in tl.static_range(3):
            i = 2 * row + (r - 1)
            j = 2 * column + (s - 1)
            mask = inside & (i >= 0) & (i < p) & (j >= 0) & (j < q)
            place = ((n * p + i) * q + j) * K + k
            v = tl.load(x + place, mask=mask, other=float("-inf")).to(tl.float32)
            best = tl.where((v > best) | (v != v), v, best)
    tl.store(out + index, best.to(out.dtype.element_ty), mask=inside)


def max_pool_launch(
    shape: tuple[int, int, int, int],  # of x: (N, P, Q, K)
    dtype: torch.dtype,
    aligned: bool,
) -> Launch:
    """The launch of a pool; its leading arguments are (x, out)."""
    n, p, q, k = shape
    pool_p, pool_q = (p + 1) // 2, (q + 1) // 2
    numel = n * pool_p * pool_q * k
    block = NUM_WARPS * 32 * BYTES_PER_THREAD // dtype.itemsize
    index64 = n * p * q * k > LIMIT_32BIT
    # No access may be wider than what divides K: neighbours in memory are neighbours in a pixel.
    divisor = math.gcd(k, 16)
    divisors = {"numel": divisor}
    if aligned:
        divisors |= dict.fromkeys(("x", "out"), min(16, divisor * dtype.itemsize))
    return Launch(
        max_pool_3x3_2_kernel,
        (triton.cdiv(numel, block), 1, 1),
        dict.fromkeys(("x", "out"), f"*{TRITON_TYPE[str(dtype).removeprefix('torch.')]}"),
        {"p": p, "q": q, "pool_p": pool_p, "pool_q": pool_q, "numel": numel},
        {"K": k, "BLOCK": block, "INDEX64": index64},
        divisors,
        frozenset({"numel"} if index64 else ()),
        NUM_WARPS,
    )


def build_max_pool(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    aligned: bool,
    *,
    arch: int,
    bind: Bind = Launch.bind,
) -> Callable[..., None]:
    """All that can be decided before the pointers are known.

    Args:
        shape: of x in memory, (N, P, Q, K), none of them 0.
        dtype: of both: float16, bfloat16 or float32.
        aligned: whether both start at multiples of 16 bytes.
        arch: compute capability of the current device times ten.
        bind: turns a launch into a function; tests without a GPU pass their own.

    Returns:
        launch(x, out): runs on the current stream of the current device, and checks nothing.
    """
    return bind(max_pool_launch(shape, dtype, aligned), arch)
