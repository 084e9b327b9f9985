# SPDX-License-Identifier: Apache-2.0
"""Triton kernels that calibrate the machine, compiled for an architecture without a GPU.

softmax and matmul do what Triton's tutorials 02 and 03 do; conv is an implicit GEMM.
"""

from __future__ import annotations

import functools

import numpy as np
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from softgpu import ptx

POINTERS = {np.float16: "*fp16", np.uint16: "*bf16", np.float32: "*fp32"}


@triton.jit
def add_relu(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + at, mask=at < n) + tl.load(y + at, mask=at < n)
    tl.store(out + at, tl.where(total < 0, 0.0, total), mask=at < n)


@triton.jit
def softmax(x, out, row_stride, rows, columns, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=2):
        inside = column < columns
        value = tl.load(x + row * row_stride + column, mask=inside, other=-float("inf"))
        power = tl.exp(value - tl.max(value, axis=0))
        tl.store(out + row * row_stride + column, power / tl.sum(power, axis=0), mask=inside)


@triton.jit
def matmul(
    a,  # [m, k]
    b,  # [k, n]
    out,  # [m, n]
    m,
    n,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # Programs of GROUP rows of tiles follow one another, so that they share columns in L2.
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    tile_m = first + program % (GROUP * tiles_n) % height
    tile_n = program % (GROUP * tiles_n) // height
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, tl.cdiv(k, BLOCK_K), num_stages=NUM_STAGES):
        at = step * BLOCK_K + inner
        left = tl.load(
            a + row[:, None] * k + at[None, :],
            mask=(row[:, None] < m) & (at[None, :] < k),
            other=0.0,
        )
        right = tl.load(
            b + at[:, None] * n + column[None, :],
            mask=(at[:, None] < k) & (column[None, :] < n),
            other=0.0,
        )
        total = tl.dot(left, right, total)
    inside = (row[:, None] < m) & (column[None, :] < n)
    tl.store(out + row[:, None] * n + column[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def matmul_tma(a, b, out, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    # a [m, k], b [n, k] and out [m, n] are tensor descriptors.
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, tl.cdiv(k, BLOCK_K), num_stages=3):
        left, right = a.load([row, step * BLOCK_K]), b.load([column, step * BLOCK_K])
        total = tl.dot(left, right.T, total)
    out.store([row, column], total.to(tl.float16))


@triton.jit
def conv(
    x,  # [n, h, w, c]
    weight,  # [k, R, S, c]
    y,  # [n, p, q, k]
    n,
    h,
    w,
    c,
    k,
    p,
    q,
    stride,
    padding,
    R: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    image = m // (p * q)
    top = m // q % p * stride - padding
    left = m % q * stride - padding
    blocks = tl.cdiv(c, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, R * S * blocks, num_stages=NUM_STAGES):
        at = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        tap = step // blocks
        row, column = top + tap // S, left + tap % S
        inside = (image < n) & (row >= 0) & (row < h) & (column >= 0) & (column < w)
        a = tl.load(
            x + (((image * h + row) * w + column) * c)[:, None] + at[None, :],
            mask=inside[:, None] & (at[None, :] < c),
            other=0.0,
        )
        b = tl.load(
            weight + channel[None, :] * (R * S * c) + tap * c + at[:, None],
            mask=(channel[None, :] < k) & (at[:, None] < c),
            other=0.0,
        )
        total = tl.dot(a, b, total)
    total = tl.where(total < 0, 0.0, total)
    inside = (m[:, None] < n * p * q) & (channel[None, :] < k)
    tl.store(y + m[:, None] * k + channel[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def histogram(x, out, BLOCK: tl.constexpr, BINS: tl.constexpr):
    counts = tl.histogram(tl.load(x + tl.arange(0, BLOCK)), BINS)
    tl.store(out + tl.arange(0, BINS), counts)


KERNELS = {f.fn.__name__: f for f in (add_relu, softmax, matmul, matmul_tma, conv, histogram)}


@functools.cache
def compiled(name: str, arch: int, pointer: str, aligned: tuple = (), **constants):
    """(PTX text, dynamic shared bytes); `aligned` names integers divisible by 16."""
    function = KERNELS[name]
    names = function.arg_names
    integers = {"n", "m", "k", "h", "w", "c", "p", "q", "stride", "padding", "rows", "columns"}
    signature, attributes = {}, {}
    for i, argument in enumerate(names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in integers | {"row_stride"}:
            signature[argument] = "i32"
        else:
            signature[argument] = pointer
        if signature[argument].startswith("*") or argument in aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    if name == "matmul_tma":
        m, n, k = (constants[f"BLOCK_{x}"] for x in "MNK")
        for argument, box in (("a", (m, k)), ("b", (n, k)), ("out", (m, n))):
            signature[argument] = f"tensordesc<fp16[{box[0]},{box[1]}]>"
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(c),): v for c, v in constants.items()},
        attrs=attributes,
    )
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
    return result.asm["ptx"], result.metadata.shared


def bound(name: str, arch: int, pointer: str, aligned: tuple = (), **constants):
    """launch(grid, args, blocks=None) of the compiled kernel on the machine."""
    text, shared = compiled(name, arch, pointer, aligned, **constants)
    return launcher(text, shared)


def launcher(text: str, shared: int):
    kernel = ptx.Module(text, strict=False).kernel("")  # the launch is strict
    return lambda grid, args, **options: kernel.launch(grid, 128, args, shared, **options)
