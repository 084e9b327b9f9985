# SPDX-License-Identifier: Apache-2.0
"""What the tests of the PTX machine share: small kernels, convolution in float64."""

from __future__ import annotations

import numpy as np
import pytest

from softgpu import ptx

HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<32>; .reg .b16 %h<32>; .reg .b32 %r<128>; .reg .b64 %rd<64>;
    .reg .f32 %f<64>; .reg .f64 %fd<32>;
"""
SHARED = ".shared .align 1024 .b8 tile[8192];"


def kernel(body: str, params=("out",), shared: str = "") -> ptx.Kernel:
    """A kernel `k` of pointer parameters; %rd0, %rd1 ... hold them, %r0 is %tid.x."""
    declared = ", ".join(f".param .u64 {p}" for p in params)
    loads = "".join(f"ld.param.u64 %rd{i}, [{p}];\n" for i, p in enumerate(params))
    text = (
        f"{HEAD}{shared}\n.visible .entry k({declared})\n{{{REGISTERS}{loads}"
        f"mov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    )
    return ptx.Module(text).kernel("k")


def run(body, *arrays, params=None, threads=64, shared=SHARED):
    """Launch one block of `threads` on the body and arrays: `out`, `x`, `y`."""
    arrays = arrays or (np.zeros(4096, np.uint32),)
    names = params or ("out", "x", "y")[: len(arrays)]
    return kernel(body, names, shared).launch(1, threads, list(arrays))


def fails(match, body, *arrays, **options):
    """`run` that the machine stops with this message, and with the line; gives the error."""
    with pytest.raises(ptx.PtxError, match=match) as error:
        run(body, *arrays, **options)
    assert error.value.line is not None and error.value.kernel == "k"
    return error.value


def elementwise(instructions: str, inputs, out_dtype, kinds, out_kind: str) -> np.ndarray:
    """Run instructions on %a, %b, %c (threads' elements of the inputs) into %d; 32 a warp."""
    names = "abc"[: len(inputs)]
    count = len(inputs[0])
    size = {k: np.dtype(x.dtype).itemsize for k, x in zip(names, inputs, strict=True)}
    out = np.zeros(count, out_dtype)
    declare = "".join(f".reg .{k} %{n};\n" for n, k in zip(names, kinds, strict=True))
    load = ""
    for i, n in enumerate(names):
        load += f"mad.wide.u32 %rd{20 + i}, %r0, {size[n]}, %rd{i + 1};\n"
        load += f"ld.global.b{8 * size[n]} %{n}, [%rd{20 + i}];\n"
    body = (
        f"{declare}.reg .{out_kind} %d;\n{load}{instructions}\n"
        f"mad.wide.u32 %rd30, %r0, {out.itemsize}, %rd0;\n"
        f"st.global.b{8 * out.itemsize} [%rd30], %d;"
    )
    k = kernel(body, ("out", *names))
    k.launch(1, count, [out, *inputs])
    return out


def conv64(x, weight, stride: int, padding: int) -> np.ndarray:
    """[N, H, W, C] * [K, R, S, C] -> [N, P, Q, K] in float64."""
    _, h, w, _ = x.shape
    k, r, s, _ = weight.shape
    p, q = (h + 2 * padding - r) // stride + 1, (w + 2 * padding - s) // stride + 1
    padded = np.pad(x.astype(np.float64), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    y = np.zeros((len(x), p, q, k))
    for i in range(r):
        for j in range(s):
            part = padded[:, i : i + stride * p : stride, j : j + stride * q : stride]
            y += part[:, :p, :q] @ weight[:, i, j].astype(np.float64).T
    return y


def assert_close(y, reference, epsilon: float, k_gemm: int) -> None:
    """fp32 accumulation and one rounding to a format of epsilon; no NaN of the poison is left."""
    y = y.astype(np.float64)
    scale = np.abs(reference).max()
    bound = epsilon / 2 + 2 * np.sqrt(k_gemm) * np.finfo(np.float32).eps
    assert not np.isnan(y).any()
    assert np.abs(y - reference).max() / scale <= bound
