# SPDX-License-Identifier: Apache-2.0
"""relu(x + y), element by element: the join of a residual block; and the mask of its gradient.

    out[i] = max(x[i] + y[i], 0), a NaN staying NaN
    out[i] = y[i] <= 0 ? 0 : x[i]      with GRADIENT: x the gradient of the result, y the result

x, y, out: any shape, dense, all three in the same memory order, so that one index serves them all.

This is the smallest kernel of the package and the template for the next one. Every kernel file has:
  1. a docstring with the formula, the layout of each tensor and what the caller must have checked;
  2. the kernel: pointers first, then sizes (snake_case: known at the launch), then constants
     (UPPER: known to the compiler), every tensor with its shape;
  3. one function that describes the launch as a value (`launches`), used by the GPU, by the
     interpreter and by the tests that compile for GPUs that are not present;
  4. `build`, which does everything that is the same for all calls, and returns the launch function.
The kernel checks nothing: shapes, dtypes and layouts are the op's business
(`resnet_fast/ops/add_relu.py`, which has the reference as well).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from resnet_fast.kernels.launch import TRITON_TYPE, Bind, Launch

# Two accesses of 16 bytes for each thread and tensor: enough bytes in flight for DRAM's latency
# at full occupancy, few enough elements that small maps still fill the machine.
NUM_WARPS = 4
BYTES_PER_THREAD = 32
LIMIT_32BIT = 2**31 - 2**16  # elements that a 32-bit index reaches, less one block's overhang


@triton.jit
def add_relu_kernel(
    x,  # [numel]
    y,  # [numel]
    out,  # [numel]
    numel,
    BLOCK: tl.constexpr,
    INDEX64: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    # One program per BLOCK elements. The index is 32 bits wide where that is enough: 64-bit
    # arithmetic costs two instructions for one.
    pid = tl.program_id(0).to(tl.int64) if INDEX64 else tl.program_id(0)
    index = pid * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    # Neighbouring threads take neighbouring vectors: `numel` and the pointers are declared to be
    # multiples of what they are, and the compiler then forms 16-byte accesses by itself.
    a = tl.load(x + index, mask=mask).to(tl.float32)
    b = tl.load(y + index, mask=mask).to(tl.float32)
    # Not tl.maximum: it would turn NaN into 0, and torch's relu does not.
    result = tl.where(b <= 0, 0.0, a) if GRADIENT else tl.where(a + b < 0, 0.0, a + b)
    # fp32 until here: one rounding, at the store.
    tl.store(out + index, result.to(out.dtype.element_ty), mask=mask)


def is_aligned(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether all three start at a multiple of 16 bytes; part of the key of a kept launch."""
    return (x.data_ptr() | y.data_ptr() | out.data_ptr()) % 16 == 0


def launches(
    numel: int, dtype: torch.dtype, aligned: bool, gradient: bool = False
) -> tuple[Launch, ...]:
    """The one launch of a call; its leading arguments are (x, y, out)."""
    element = TRITON_TYPE[str(dtype).removeprefix("torch.")]
    block = NUM_WARPS * 32 * BYTES_PER_THREAD // dtype.itemsize
    index64 = numel > LIMIT_32BIT
    # The mask ends at numel, so no access may be wider than what divides numel. The pointers say
    # no more: otherwise a thread would still hold 16 adjacent bytes, but read them one by
    # one, with its neighbours 16 bytes away, which touches eight times the sectors.
    divisor = math.gcd(numel, 16)
    pointer = min(16, divisor * dtype.itemsize)
    divisors = dict.fromkeys(("x", "y", "out"), pointer) if aligned else {}
    divisors["numel"] = divisor
    return (
        Launch(
            add_relu_kernel,
            (triton.cdiv(numel, block), 1, 1),
            dict.fromkeys(("x", "y", "out"), f"*{element}"),
            {"numel": numel},
            {"BLOCK": block, "INDEX64": index64, "GRADIENT": gradient},
            divisors,
            frozenset({"numel"} if index64 else ()),
            NUM_WARPS,
        ),
    )


def build(
    numel: int,
    dtype: torch.dtype,
    aligned: bool,
    *,
    arch: int,
    bind: Bind = Launch.bind,
    gradient: bool = False,
) -> Callable[..., None]:
    """All that can be decided before the pointers are known.

    Args:
        numel: elements of each tensor, at least one.
        dtype: of all three: float16, bfloat16 or float32.
        aligned: `is_aligned(x, y, out)`.
        arch: compute capability of the current device times ten.
        bind: turns a launch into a function; tests without a GPU pass their own.
        gradient: the mask instead of the sum.

    Returns:
        launch(x, y, out): runs on the current stream of the current device, and checks nothing.
    """
    return bind(launches(numel, dtype, aligned, gradient)[0], arch)
