# SPDX-License-Identifier: Apache-2.0
"""Calibration: Triton's compiled kernels for sm_80 and sm_90 against float64."""

import numpy as np
import pytest
from ptx_helpers import assert_close, conv64, kernel
from ptx_triton_kernels import POINTERS, bound

from softgpu import ptx
from softgpu.ptx.values import bf16_to_f32, f32_to_bf16, f32_to_tf32

ARCHITECTURES = pytest.mark.parametrize("arch", [80, 90], ids=["sm_80", "sm_90"])

EPSILON = {np.float16: 2.0**-10, np.uint16: 2.0**-7, np.float32: 2.0**-23}


def normal(shape, dtype, seed=0):
    """Standard normal values; uint16 stands for bfloat16."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return f32_to_bf16(x) if dtype == np.uint16 else x.astype(dtype)


def wide(x):
    return bf16_to_f32(x).astype(np.float64) if x.dtype == np.uint16 else x.astype(np.float64)


@ARCHITECTURES
@pytest.mark.parametrize("dtype", [np.float16, np.uint16, np.float32], ids=["f16", "bf16", "f32"])
def test_add_relu(arch, dtype):
    n = 2900
    x, y, out = normal(n, dtype), normal(n, dtype, 1), normal(n + 8, dtype, 2)
    before = out.copy()
    run = bound("add_relu", arch, POINTERS[dtype], BLOCK=1024)(3, [x, y, out[:n], n])
    total = wide(x) + wide(y)
    if dtype == np.uint16:
        exact = bf16_to_f32(f32_to_bf16(total.astype(np.float32)))
    else:
        exact = total.astype(dtype)
    np.testing.assert_array_equal(wide(out[:n]), np.maximum(exact, 0))
    np.testing.assert_array_equal(out[n:], before[n:])
    assert run.counters.global_bytes == {"load": 2 * n * x.itemsize, "store": n * x.itemsize}
    sectors = -(-n * x.itemsize // 32)
    assert run.counters.unique_sectors == {"load": 2 * sectors, "store": sectors}


@ARCHITECTURES
def test_softmax(arch):
    rows, columns, stride = 10, 781, 1024
    x = normal((rows, stride), np.float32)
    out = np.full_like(x, np.nan)
    launch = bound("softmax", arch, "*fp32", ("row_stride",), BLOCK=1024)
    launch(4, [x, out, stride, rows, columns])
    power = np.exp(x[:, :columns].astype(np.float64))
    reference = power / power.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out[:, :columns], reference, rtol=2e-6)
    assert np.isnan(out[:, columns:]).all()


@ARCHITECTURES
@pytest.mark.parametrize("dtype", [np.float16, np.uint16, np.float32], ids=["f16", "bf16", "tf32"])
def test_matmul(arch, dtype):
    m, n, k = 200, 144, 80
    a, b = normal((m, k), dtype), normal((k, n), dtype, 1)
    out = np.full((m, n), 0xFFFF if dtype == np.uint16 else np.nan, dtype)  # NaN
    block_n = 64 if dtype == np.float32 else 128
    launch = bound(
        *("matmul", arch, POINTERS[dtype], ("n", "k")),
        BLOCK_M=128,
        BLOCK_N=block_n,
        BLOCK_K=32,
        GROUP=8,
        NUM_STAGES=3,
    )
    run = launch(-(-m // 128) * -(-n // block_n), [a, b, out, m, n, k])
    if dtype == np.float32:  # the tensor cores ignore the low 13 bits of tf32
        a, b = f32_to_tf32(a, "rz"), f32_to_tf32(b, "rz")
    assert_close(wide(out), wide(a) @ wide(b), EPSILON[dtype], k)
    if dtype != np.float32:
        assert run.counters.bank_conflicts == 0


@ARCHITECTURES
@pytest.mark.parametrize("stride", [1, 2])
def test_conv(arch, stride):
    n, h, w, c, k = 1, 12, 11, 64, 96
    x, weight = normal((n, h, w, c), np.float16), normal((k, 3, 3, c), np.float16, 1)
    reference = np.maximum(conv64(x, weight, stride, 1), 0)
    y = np.full(reference.shape, np.nan, np.float16)
    _, p, q, _ = y.shape
    launch = bound(
        *("conv", arch, "*fp16", ("c", "k")),
        R=3,
        S=3,
        BLOCK_M=128,
        BLOCK_N=128,
        BLOCK_K=64,
        NUM_STAGES=3,
    )
    run = launch(-(-n * p * q // 128), [x, weight, y, n, h, w, c, k, p, q, stride, 1])
    assert_close(y, reference, EPSILON[np.float16], 9 * c)
    assert run.counters.bank_conflicts == 0
    assert run.counters.tensor_macs == -(-n * p * q // 128) * 128 * 128 * 9 * c


def test_matmul_with_tensor_descriptors():
    m, n, k = 200, 160, 176
    a, b = normal((m, k), np.float16), normal((n, k), np.float16, 1)
    out = np.full((m, n), np.nan, np.float16)

    def descriptor(x, box):  # Triton passes the map, the shape, and the strides in elements
        return [ptx.TensorMap(x, box, swizzle=128), *x.shape, x.strides[0] // x.itemsize, 1]

    tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
    args = [*descriptor(a, (128, 64)), *descriptor(b, (128, 64)), *descriptor(out, (128, 64)), k]
    run = bound("matmul_tma", 90, "*fp16", **tile)((2, 2, 1), args)
    assert_close(out, wide(a) @ wide(b).T, EPSILON[np.float16], k)
    assert run.counters.bank_conflicts == 0


@ARCHITECTURES
@pytest.mark.parametrize("bins", [16, 256])
def test_histogram(arch, bins):
    """Of few bins every warp clears each."""
    x = np.random.default_rng(0).integers(0, bins, 1024).astype(np.int32)
    out = np.full(bins, -1, np.int32)
    bound("histogram", arch, "*i32", BLOCK=1024, BINS=bins)(1, [x, out])
    np.testing.assert_array_equal(out, np.bincount(x, minlength=bins))


def test_more_than_two_to_the_31_elements():
    """Blocks at the far end of a tensor of more than 2^31 elements, which takes no memory."""
    rows, columns = (1 << 21) + 2, 1024
    x, out = (ptx.sparse_array((rows, columns), np.float32) for _ in range(2))
    x[-1, :4] = 1, 2, 3, 4
    body = kernel(
        """mov.u32 %r1, %ctaid.x;
        mul.wide.u32 %rd10, %r1, 4096;
        add.s64 %rd11, %rd1, %rd10;
        add.s64 %rd12, %rd0, %rd10;
        ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%rd11];
        st.global.v4.f32 [%rd12], {%f0, %f1, %f2, %f3};""",
        ("out", "x"),
    )
    run = body.launch(rows + 1, 1, [out, x], blocks=[rows - 1])
    assert out[-1, :4].tolist() == [1, 2, 3, 4]
    assert run.counters.unique_sectors == {"load": 1, "store": 1}
    with pytest.raises(ptx.PtxError, match="out-of-bounds"):
        body.launch(rows + 1, 1, [out, x], blocks=[rows])
    narrow = kernel(
        "add.u32 %r1, %r0, 2097151; mul.lo.s32 %r1, %r1, 4096; cvt.s64.s32 %rd2, %r1;"
        "add.s64 %rd3, %rd0, %rd2; st.global.u32 [%rd3], %r0;"
    )
    with pytest.raises(ptx.PtxError, match="bytes before"):  # a 32-bit offset turned negative
        narrow.launch(1, 1, [out])
