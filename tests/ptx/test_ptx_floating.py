# SPDX-License-Identifier: Apache-2.0
"""Floating-point instructions against exact rational arithmetic, rounded as the ISA says."""

import math
from fractions import Fraction

import numpy as np
import pytest
from ptx_helpers import elementwise

from softgpu.ptx.values import bf16_to_f32, f32_to_bf16

pytestmark = pytest.mark.usefixtures("place")

FORMATS = {
    "f16": (11, -14, 15),
    "bf16": (8, -126, 127),
    "f32": (24, -126, 127),
    "f64": (53, -1022, 1023),
}
STORAGE = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64}
BITS = {"f16": "b16", "bf16": "b16", "f32": "b32", "f64": "b64"}


def rounded(exact: Fraction, kind: str, mode: str = "rn") -> float:
    """The nearest value of a format (ties to even), or the one on the side that the mode names."""
    precision, low, high = FORMATS[kind]
    if exact == 0:
        return 0.0
    magnitude = abs(exact)
    exponent = math.frexp(float(magnitude))[1] - 1 if float(magnitude) else low
    while Fraction(2) ** exponent > magnitude:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= magnitude:
        exponent += 1
    unit = Fraction(2) ** (max(exponent, low) - precision + 1)
    count, rest = divmod(magnitude, unit)
    up = {
        "rn": rest * 2 > unit or (rest * 2 == unit and count % 2 == 1),
        "rz": False, "rm": exact < 0 and rest > 0, "rp": exact > 0 and rest > 0,
    }[mode]  # fmt: skip
    value = (count + up) * unit
    largest = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** high
    if value > largest:
        away = mode == "rn" or (mode == "rm" and exact < 0) or (mode == "rp" and exact > 0)
        return math.copysign(math.inf if away else float(largest), exact)
    return math.copysign(float(value), exact)


def numbers(kind, seed=0, count=96):
    """Values of a format over a wide range of exponents, with corners; in storage and as floats."""
    rng = np.random.default_rng(seed)
    spread = 12 if kind == "f16" else 30
    x = rng.standard_normal(count) * 2.0 ** rng.integers(-spread, spread, count)
    x[:6] = [0.0, -0.0, 1.0, -1.0, 2.0**-14, 65504.0]
    x[6:40] = np.sign(x[6:40]) * 2.0 ** rng.integers(-3, 3, 34) * rng.integers(1, 64, 34)  # ties
    if kind == "bf16":
        stored = f32_to_bf16(x.astype(np.float32))
        return stored, bf16_to_f32(stored).astype(np.float64)
    stored = x.astype(STORAGE[kind])
    return stored, stored.astype(np.float64)


def value_of(kind, stored):
    return bf16_to_f32(stored).astype(np.float64) if kind == "bf16" else stored.astype(np.float64)


def compute(text, inputs, kind, out_kind=None):
    out_kind = out_kind or kind
    kinds = [BITS[kind]] * len(inputs)
    out = elementwise(text, inputs, STORAGE[out_kind], kinds, BITS[out_kind])
    return value_of(out_kind, out)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_add_mul_fma_round_once(kind):
    (a, x), (b, y), (c, z) = (numbers(kind, seed) for seed in range(3))
    exact = {
        f"add.rn.{kind} %d, %a, %b;": lambda p, q, r: p + q,
        f"sub.rn.{kind} %d, %a, %b;": lambda p, q, r: p - q,
        f"mul.rn.{kind} %d, %a, %b;": lambda p, q, r: p * q,
        f"fma.rn.{kind} %d, %a, %b, %c;": lambda p, q, r: p * q + r,
    }
    for text, function in exact.items():
        got = compute(text, [a, b, c], kind)
        for g, *row in zip(got, x, y, z, strict=True):
            assert g == rounded(function(*(Fraction(v) for v in row)), kind), (text, row)


def test_fma_where_two_roundings_differ():
    """The exact result lies just beside a tie of the narrow format, closer than float64 can see."""
    a = np.array([1 + 2.0**-10, 1 + 2.0**-10], np.float16)  # a * a = 1 + 2^-9 + 2^-20
    tiny = np.array([2.0**-24, -(2.0**-24)], np.float16)
    got = compute("fma.rn.f16 %d, %a, %a, %c;", [a, a, tiny], "f16")
    want = [rounded(Fraction(float(a[0])) ** 2 + Fraction(float(t)), "f16") for t in tiny]
    assert got.tolist() == want
    one, half = np.float32(1 + 2.0**-12), np.float32(2.0**-24)
    x, c = np.array([one] * 2, np.float32), np.array([2.0**-100, -(2.0**-100)], np.float32)
    text = f"fma.rn.f32 %d, %a, 0f{np.float32(half).view(np.uint32):08X}, %c;"
    got = compute(f"add.f32 %c, %c, %c; {text}", [x, x, c], "f32")
    assert got.tolist() == [
        rounded(Fraction(float(one)) * Fraction(float(half)) + 2 * Fraction(float(v)), "f32")
        for v in c
    ]


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode):
    (a, x), (b, y), (c, z) = (numbers("f32", seed) for seed in range(3))
    for text, function in {
        "add": lambda p, q, r: p + q,
        "mul": lambda p, q, r: p * q,
        "fma": lambda p, q, r: p * q + r,
    }.items():
        operands = "%a, %b, %c" if text == "fma" else "%a, %b"
        got = compute(f"{text}.{mode}.f32 %d, {operands};", [a, b, c], "f32")
        for g, *row in zip(got, x, y, z, strict=True):
            assert g == rounded(function(*(Fraction(v) for v in row)), "f32", mode)


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_narrowing(kind, mode):
    a, x = numbers("f32", 3)
    got = compute(f"cvt.{mode}.{kind}.f32 %d, %a;", [a], "f32", kind)
    assert got.tolist() == [rounded(Fraction(v), kind, mode) for v in x]


def test_packed_conversion_puts_the_first_operand_high():
    a, b = np.float32([1, 2, 70000]), np.float32([3, -4, 1])
    out = elementwise("cvt.rn.f16x2.f32 %d, %a, %b;", [a, b], np.uint32, ["b32"] * 2, "b32")
    np.testing.assert_array_equal(
        out.view(np.float16).reshape(-1, 2), [[3, 1], [-4, 2], [1, np.inf]]
    )
    for target in ("%a", "%b"):  # a target that is a source too is read before it is written
        text = f"cvt.rn.f16x2.f32 {target}, %a, %b; mov.b32 %d, {target};"
        again = elementwise(text, [a, b], np.uint32, ["b32"] * 2, "b32")
        np.testing.assert_array_equal(again, out)
    out = elementwise("cvt.rn.satfinite.relu.f16x2.f32 %d, %a, %b;", [a, b], np.uint32,
                      ["b32"] * 2, "b32")  # fmt: skip
    np.testing.assert_array_equal(out.view(np.float16).reshape(-1, 2), [[3, 1], [0, 2], [1, 65504]])


def test_tf32_rounds_ties_away():
    x = np.float32([1 + 2.0**-11, 1 + 2.0**-11 - 2.0**-23, -(1 + 3 * 2.0**-11), np.inf])
    got = compute("cvt.rna.tf32.f32 %d, %a;", [x], "f32")
    assert got.tolist() == [1 + 2.0**-10, 1.0, -(1 + 2 * 2.0**-10), math.inf]


@pytest.mark.parametrize(
    ("rounding", "function"),
    [("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)],
)
def test_float_to_integer(rounding, function):
    x = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -7.25, 3e9, -3e9, np.nan, np.inf])
    out = elementwise(f"cvt.{rounding}.s32.f32 %d, %a;", [x], np.int32, ["b32"], "b32")
    low, high = -(1 << 31), (1 << 31) - 1
    want = [
        0 if math.isnan(v) else high if v > high else low if v < low else function(float(v))
        for v in x
    ]
    assert out.tolist() == want
    out = elementwise(f"cvt.{rounding}.u32.f32 %d, %a;", [x], np.uint32, ["b32"], "b32")
    high = (1 << 32) - 1
    want = [0 if math.isnan(v) else high if v > high else max(0, function(float(v))) for v in x]
    assert out.tolist() == want


def test_integer_to_float():
    x = np.random.default_rng(0).integers(-(1 << 63), (1 << 63) - 1, 64)
    out = elementwise("cvt.rn.f32.s64 %d, %a;", [x], np.float32, ["b64"], "b32")
    assert out.tolist() == [rounded(Fraction(int(v)), "f32") for v in x]
    y = x.astype(np.int32)
    out = elementwise("cvt.rz.f32.s32 %d, %a;", [y], np.float32, ["b32"], "b32")
    assert out.tolist() == [rounded(Fraction(int(v)), "f32", "rz") for v in y]
    out = elementwise("cvt.rn.f16.u32 %d, %a;", [y.view(np.uint32)], np.float16, ["b32"], "b16")
    assert [float(v) for v in out] == [rounded(Fraction(int(v)), "f16") for v in y.view(np.uint32)]


def test_integer_to_integer():
    x = np.int32([-1, 0, 127, 128, 255, 256, -129, 70000])
    for text, want in {
        "cvt.s8.s32 %d, %a;": x.astype(np.int8),
        "cvt.u8.u32 %d, %a;": x.astype(np.uint8),
        "cvt.sat.s8.s32 %d, %a;": np.clip(x, -128, 127),
        "cvt.sat.u8.s32 %d, %a;": np.clip(x, 0, 255),
        "cvt.s32.s16 %d, %a;": x.astype(np.int16),
    }.items():
        out = elementwise(text, [x], np.int32, ["b32"], "b32")
        assert out.tolist() == want.astype(np.int32).tolist(), text


def test_minimum_and_maximum():
    nan = float("nan")
    a = np.float32([0.0, -0.0, nan, 1.0, nan, -2.0])
    b = np.float32([-0.0, 0.0, 1.0, nan, nan, 5.0])

    def bits(text):
        return elementwise(text, [a, b], np.uint32, ["b32"] * 2, "b32").tolist()

    zero, minus, one, two, five = 0, 1 << 31, 0x3F800000, 0xC0000000, 0x40A00000
    not_a_number = 0x7FFFFFFF
    assert bits("min.f32 %d, %a, %b;") == [minus, minus, one, one, not_a_number, two]
    assert bits("max.f32 %d, %a, %b;") == [zero, zero, one, one, not_a_number, five]
    assert bits("max.NaN.f32 %d, %a, %b;") == [zero, zero, *[not_a_number] * 3, five]
    h, k = a.astype(np.float16), b.astype(np.float16)
    out = elementwise("max.NaN.f16 %d, %a, %b;", [h, k], np.uint16, ["b16"] * 2, "b16")
    assert out.tolist() == [0, 0, 0x7FFF, 0x7FFF, 0x7FFF, 0x4500]


def test_comparisons_with_nan():
    nan = float("nan")
    a, b = np.float32([1, nan, 2, nan]), np.float32([1, 1, 1, nan])
    for name, want in {
        "eq": [1, 0, 0, 0], "ne": [0, 0, 1, 0], "lt": [0, 0, 0, 0], "gt": [0, 0, 1, 0],
        "equ": [1, 1, 0, 1], "neu": [0, 1, 1, 1], "ltu": [0, 1, 0, 1], "geu": [1, 1, 1, 1],
        "num": [1, 0, 1, 0], "nan": [0, 1, 0, 1],
    }.items():  # fmt: skip
        text = f"setp.{name}.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;"
        got = elementwise(text, [a, b], np.uint32, ["b32"] * 2, "b32")
        assert got.tolist() == want, name


def test_saturation_flush_and_relu():
    x = np.float32([-1, 0.25, 2, np.nan, 1e-40])
    got = compute("add.sat.f32 %d, %a, 0f00000000;", [x], "f32")
    np.testing.assert_array_equal(got, np.float32([0, 0.25, 1, 0, 1e-40]))
    got = compute("mul.ftz.f32 %d, %a, 0f3F800000;", [x], "f32")
    np.testing.assert_array_equal(got, np.float32([-1, 0.25, 2, np.nan, 0]))
    h = np.float16([-3, 3, np.nan])
    got = compute("fma.rn.relu.f16 %d, %a, %a, %b;", [h, np.float16([-20, 1, 1])], "f16")
    np.testing.assert_array_equal(got, [0, 10, np.nan])


def test_packed_arithmetic_is_two_halves():
    a, b = np.float16([[1, 2], [3, np.inf]]), np.float16([[0.5, -2], [7, 1]])
    pair = [a.view(np.uint32)[:, 0], b.view(np.uint32)[:, 0]]
    for name, want in {"add": a + b, "mul": a * b, "max": np.maximum(a, b)}.items():
        out = elementwise(f"{name}.f16x2 %d, %a, %b;", pair, np.uint32, ["b32"] * 2, "b32")
        np.testing.assert_array_equal(out.view(np.float16).reshape(-1, 2), want)
    text = "setp.gt.f16x2 %p1|%p2, %a, %b; selp.b32 %d, 1, 0, %p1; @%p2 add.u32 %d, %d, 2;"
    out = elementwise(text, pair, np.uint32, ["b32"] * 2, "b32")
    assert out.tolist() == [1 + 2, 2]


APPROXIMATE = {
    "ex2.approx.f32": np.exp2, "lg2.approx.f32": np.log2, "sqrt.approx.f32": np.sqrt,
    "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x), "rcp.approx.ftz.f32": lambda x: 1 / x,
    "sin.approx.f32": np.sin, "cos.approx.f32": np.cos, "tanh.approx.f32": np.tanh,
    "sqrt.rn.f32": np.sqrt, "rcp.rn.f32": lambda x: 1 / x,
}  # fmt: skip


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_functions(name):
    x = np.float32([0.1, 0.5, 0.9, 1.7, 2.5])
    got = compute(f"{name} %d, %a;", [x], "f32")
    # The widest bound of the ISA here is 2^-10.9 relative, of tanh.approx.
    np.testing.assert_allclose(
        got, APPROXIMATE[name](x.astype(np.float64)), rtol=2.0**-10, atol=1e-6
    )


def test_division():
    (a, _), (b, _) = numbers("f32", 1), numbers("f32", 2)
    b = np.where(b == 0, np.float32(3), b)
    got = compute("div.rn.f32 %d, %a, %b;", [a, b], "f32")
    for g, p, q in zip(got, a, b, strict=True):
        assert g == rounded(Fraction(float(p)) / Fraction(float(q)), "f32")
    np.testing.assert_allclose(
        compute("div.full.f32 %d, %a, %b;", [a, b], "f32"), got, rtol=2.0**-22
    )


def test_signs_and_properties():
    x = np.float32([-1.5, 0.0, -0.0, np.nan, 1e-40, np.inf])
    bits = elementwise("neg.f32 %d, %a;", [x], np.uint32, ["b32"], "b32")
    np.testing.assert_array_equal(bits, x.view(np.uint32) ^ np.uint32(1 << 31))
    got = compute("copysign.f32 %d, %a, %b;", [x, np.float32([3] * 6)], "f32")
    np.testing.assert_array_equal(got, np.copysign(3, x))
    for name, want in {
        "finite": [1, 1, 1, 0, 1, 0], "notanumber": [0, 0, 0, 1, 0, 0],
        "subnormal": [0, 0, 0, 0, 1, 0], "infinite": [0, 0, 0, 0, 0, 1],
    }.items():  # fmt: skip
        text = f"testp.{name}.f32 %p1, %a; selp.b32 %d, 1, 0, %p1;"
        assert elementwise(text, [x], np.uint32, ["b32"], "b32").tolist() == want
