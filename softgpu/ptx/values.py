# SPDX-License-Identifier: Apache-2.0
"""Number formats: bf16 and tf32 in NumPy, directed rounding, the exactly rounded fma.

Narrow formats are computed in float64 and rounded once. Where float64 itself would round, the sum
is rounded to odd first (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008):
a second rounding to any format of at most 51 bits is then exact.
"""

from __future__ import annotations

import numpy as np

DTYPES = {
    **{f"b{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)},
    **{f"u{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)},
    **{f"s{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)},
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "bf16": np.dtype("u2"),
    "tf32": np.dtype("u4"),
    "pred": np.dtype(bool),
}
PACKED = {
    "f16x2": "f16",
    "bf16x2": "bf16",
    "u16x2": "u16",
    "s16x2": "s16",
    "f32x2": "f32",
}
MAX_FINITE = {"f16": 65504.0, "bf16": 3.3895313892515355e38, "f32": 3.4028234663852886e38}


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns -> float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bit patterns, round to nearest even, NaN -> 0x7fff."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def f32_to_tf32(x: np.ndarray, mode: str = "rna") -> np.ndarray:
    """float32 -> float32 with 10 mantissa bits: to nearest (ties away or to even), or truncated."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    if mode == "rna":
        bits2 = bits + np.uint32(0x1000)
    elif mode == "rn":
        bits2 = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    else:
        bits2 = bits
    return np.where(special, bits, bits2 & np.uint32(0xFFFFE000)).view(np.float32)


def _toward_odd(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """The odd one of the float64 numbers around value + error, where value is its nearest."""
    bits = np.ascontiguousarray(value).view(np.int64)
    move = (error != 0) & ((bits & 1) == 0) & np.isfinite(value) & np.isfinite(error)
    step = np.where((error > 0) == (value > 0), 1, -1)
    return np.where(move, bits + step, bits).view(np.float64)


def add_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64 rounded to odd."""
    s = a + b
    bb = s - a
    error = (a - (s - bb)) + (b - bb)
    return _toward_odd(s, error)


def fma_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c rounded to odd; the product of formats of up to 26 bits is exact in float64."""
    return add_odd(a * b, c)


def to_f64(kind: str, x: np.ndarray) -> np.ndarray:
    return (bf16_to_f32(x) if kind == "bf16" else x).astype(np.float64)


def from_f64(kind: str, x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """Round exact (or odd-rounded) float64 values to a format, in its storage dtype."""
    if kind == "f64":
        return x
    if kind == "bf16":
        single = x.astype(np.float32)  # to odd, so that the second rounding is the only one
        error = x - single.astype(np.float64)
        bits = np.ascontiguousarray(single).view(np.int32)
        move = (error != 0) & ((bits & 1) == 0) & np.isfinite(single)
        bits = np.where(move, bits + np.where((error > 0) == (single > 0), 1, -1), bits)
        nearest = f32_to_bf16(bits.astype(np.int32).view(np.float32))
    else:
        nearest = x.astype(DTYPES[kind])
    if mode == "rn":
        return canonical_nan(kind, nearest)
    return canonical_nan(kind, _directed(kind, x, nearest, mode))


def _directed(kind: str, x: np.ndarray, nearest: np.ndarray, mode: str) -> np.ndarray:
    """Move the nearest value one step where it lies on the wrong side of x."""
    value = to_f64(kind, nearest)
    up, down = value < x, value > x
    if mode == "rz":
        wrong_low, wrong_high = up & (x < 0), down & (x > 0)
    elif mode == "rm":
        wrong_low, wrong_high = np.zeros_like(up), down
    else:  # rp
        wrong_low, wrong_high = up, np.zeros_like(up)
    size = nearest.dtype.itemsize
    bits = np.ascontiguousarray(nearest).view(f"i{size}").astype(np.int64)
    ordered = np.where(bits < 0, -(bits & ((1 << (8 * size - 1)) - 1)), bits)
    ordered = ordered + wrong_low - wrong_high
    sign = (ordered < 0) | ((ordered == 0) & np.signbit(value))
    back = np.where(sign, (-ordered) | (1 << (8 * size - 1)), ordered)
    return back.astype(np.uint64).astype(f"u{size}").view(nearest.dtype)


def canonical_nan(kind: str, x: np.ndarray) -> np.ndarray:
    """Results that are NaN have the bits 0x7fff (half formats) or 0x7fffffff (single)."""
    if kind == "bf16":
        return np.where((x & np.uint16(0x7FFF)) > np.uint16(0x7F80), np.uint16(0x7FFF), x)
    nan = np.isnan(x)
    if kind == "f64" or not nan.any():
        return x
    whole = np.uint16(0x7FFF) if kind == "f16" else np.uint32(0x7FFFFFFF)
    return np.where(nan, whole, np.ascontiguousarray(x).view(whole.dtype)).view(x.dtype)


def flush(x: np.ndarray) -> np.ndarray:
    """float32 subnormals -> zeros of the same sign (.ftz)."""
    tiny = np.abs(x) < np.float32(1.1754943508222875e-38)
    return np.where(tiny, np.copysign(np.float32(0), x), x) if tiny.any() else x


def saturate(x: np.ndarray) -> np.ndarray:
    """To [0, 1], NaN -> 0 (.sat)."""
    return np.where(np.isnan(x), 0, np.clip(x, 0, 1)).astype(x.dtype)
