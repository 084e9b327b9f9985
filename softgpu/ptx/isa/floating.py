# SPDX-License-Identifier: Apache-2.0
"""Floating point: f32, f64, f16, bf16 and their packed forms, each rounded once.

The approximate functions (ex2, rcp, sin, ...) are computed in float64 and rounded: hardware may
differ from them in the last bits, within the ISA's bounds.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from ..errors import PtxError
from ..values import (
    PACKED,
    add_odd,
    bf16_to_f32,
    canonical_nan,
    flush,
    fma_odd,
    from_f64,
    saturate,
    to_f64,
)
from . import integer
from .registry import at, instruction, only, put

_FLOATS = {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2"}
_ROUNDING = ("rn", "rz", "rm", "rp")


def counter_class(ins) -> str:
    kind = ins.modifiers[-1]
    if kind not in _FLOATS:
        return "integer"
    return "half" if "16" in kind else "float"


def _parse(ins, known=()):
    """(packed type, element type, rounding, ftz, sat)."""
    only(ins, {*_FLOATS, *_ROUNDING, "ftz", "sat", *known})
    kind = ins.modifiers[-1]
    mode = next((x for x in ins.modifiers if x in _ROUNDING), "rn")
    return kind, PACKED.get(kind, kind), mode, "ftz" in ins.modifiers, "sat" in ins.modifiers


def _bind(batch, ins, kind: str, sources: int, compute, ftz: bool = False, sat: bool = False):
    """run(m) for out = compute(operands...) in the storage dtype of the element type."""
    out = batch.write(ins.operands[0], kind, ins.line)
    args = [batch.read(o, kind, ins.line) for o in ins.operands[1 : 1 + sources]]

    def run(m):
        values = [at(a, m) for a in args]
        if ftz and values[0].dtype == np.float32:
            values = [flush(v) for v in values]
        result = compute(*values)
        if ftz and result.dtype == np.float32:
            result = flush(result)
        put(out, m, saturate(result) if sat else result)

    return run


@instruction("add", "sub", kind=counter_class)
def add_sub(batch, ins):
    if ins.modifiers[-1] not in _FLOATS:
        return integer.add_sub(batch, ins)
    kind, element, mode, ftz, sat = _parse(ins)
    subtract = ins.name == "sub"
    if element in ("f32", "f64") and mode == "rn" and not (ftz or sat):
        return integer.binary(batch, ins, np.subtract if subtract else np.add, kind)
    if element == "f64" and mode != "rn":
        raise PtxError(f"rounding .{mode} of .f64 is not supported", ins.line)

    def compute(a, b):
        if element == "f64" or (element == "f32" and mode == "rn"):
            return a - b if subtract else a + b
        a, b = to_f64(element, a), to_f64(element, b)
        return from_f64(element, add_odd(a, -b if subtract else b), mode)

    return _bind(batch, ins, kind, 2, compute, ftz, sat)


@instruction("mul", kind=counter_class)
def mul(batch, ins):
    if ins.modifiers[-1] not in _FLOATS:
        return integer.mul(batch, ins)
    kind, element, mode, ftz, sat = _parse(ins)
    if element in ("f32", "f64") and mode == "rn" and not (ftz or sat):
        return integer.binary(batch, ins, np.multiply, kind)
    if element == "f64":
        raise PtxError(f"rounding .{mode} of .f64 is not supported", ins.line)

    def compute(a, b):  # products of up to 24 bits are exact in float64
        return from_f64(element, to_f64(element, a) * to_f64(element, b), mode)

    return _bind(batch, ins, kind, 2, compute, ftz, sat)


@instruction("fma", "mad", kind=counter_class)
def fma(batch, ins):
    if ins.modifiers[-1] not in _FLOATS:
        return integer.mad(batch, ins)
    kind, element, mode, ftz, sat = _parse(ins, {"relu", "oob"})
    relu = "relu" in ins.modifiers
    if "oob" in ins.modifiers:
        raise PtxError("fma.oob is not supported", ins.line)

    def compute(a, b, c):
        if element == "f64":
            return _fma64(a, b, c)
        x = fma_odd(to_f64(element, a), to_f64(element, b), to_f64(element, c))
        if relu:
            x = np.where(x < 0, 0.0, x)
        return from_f64(element, x, mode)

    return _bind(batch, ins, kind, 3, compute, ftz, sat)


def _fma64(a, b, c):
    """One thread at a time with exact fractions: rare, and float64 has no wider home in NumPy."""
    rough = a * b + c
    out = rough.copy()
    for i in np.flatnonzero(np.isfinite(rough)):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        try:
            out[i] = exact.numerator / exact.denominator if exact else rough[i]
        except OverflowError:
            out[i] = math.copysign(math.inf, exact)
    return out


@instruction("div", kind=counter_class)
def div(batch, ins):
    if ins.modifiers[-1] not in _FLOATS:
        return integer.div(batch, ins)
    kind, _, mode, ftz, sat = _parse(ins, {"approx", "full"})
    if mode != "rn":
        raise PtxError(f"div.{mode} is not supported", ins.line)
    return _bind(batch, ins, kind, 2, np.divide, ftz, sat)


_FUNCTIONS = {
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@instruction(*_FUNCTIONS, kind="special function")
def function(batch, ins):
    kind, element, mode, ftz, sat = _parse(ins, {"approx"})
    if mode != "rn":
        raise PtxError(f"{ins.name}.{mode} is not supported", ins.line)
    of = _FUNCTIONS[ins.name]
    return _bind(batch, ins, kind, 1, lambda a: from_f64(element, of(to_f64(element, a))), ftz, sat)


@instruction("min", "max", kind=counter_class)
def min_max(batch, ins):
    if ins.modifiers[-1] not in _FLOATS:
        return integer.min_max(batch, ins)
    kind, element, _, ftz, _ = _parse(ins, {"NaN", "xorsign", "abs"})
    smaller, nan_wins = ins.name == "min", "NaN" in ins.modifiers
    xorsign = "xorsign" in ins.modifiers
    if "abs" in ins.modifiers and not xorsign:
        raise PtxError(f"{ins.opcode} is not supported", ins.line)

    def compute(*values):
        """-0 is less than +0; NaN loses, or wins with .NaN."""
        wide = [bf16_to_f32(v) if element == "bf16" else v for v in values]
        bits, sign = values, None
        if xorsign:
            sign = np.signbit(wide[0]) ^ np.signbit(wide[1])
            wide = [np.abs(w) for w in wide]
            bits = [_magnitude(v) for v in values]
        best, best_bits = wide[0], bits[0]
        for x, raw in zip(wide[1:], bits[1:], strict=True):
            less = (x < best) | ((x == best) & np.signbit(x) & ~np.signbit(best))
            more = (x > best) | ((x == best) & ~np.signbit(x) & np.signbit(best))
            take = less if smaller else more
            take = np.where(np.isnan(best), ~np.isnan(x), take)
            if nan_wins:
                take = np.where(np.isnan(x), True, np.where(np.isnan(best), False, take))
            best, best_bits = np.where(take, x, best), np.where(take, raw, best_bits)
        if xorsign:
            best_bits = _with_sign(best_bits, sign)
        return canonical_nan(element, best_bits)

    return _bind(batch, ins, kind, len(ins.operands) - 1, compute, ftz)


def _magnitude(x):
    raw = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")
    return (raw & raw.dtype.type((1 << 8 * raw.itemsize - 1) - 1)).view(x.dtype)


def _with_sign(x, negative):
    raw = np.ascontiguousarray(_magnitude(x)).view(f"u{x.dtype.itemsize}")
    top = raw.dtype.type(1 << (8 * raw.itemsize - 1))
    return np.where(negative, raw | top, raw).view(x.dtype)


@instruction("abs", "neg", kind=counter_class)
def abs_neg(batch, ins):
    if ins.modifiers[-1] not in _FLOATS:
        return integer.abs_neg(batch, ins)
    kind, _, _, ftz, _ = _parse(ins)

    def compute(a):
        if ins.name == "abs":
            return _magnitude(a)
        raw = np.ascontiguousarray(a).view(f"u{a.dtype.itemsize}")
        return (raw ^ raw.dtype.type(1 << (8 * raw.itemsize - 1))).view(a.dtype)

    return _bind(batch, ins, kind, 1, compute, ftz)


@instruction("copysign", kind=counter_class)
def copysign(batch, ins):
    """The magnitude of the second operand with the sign of the first."""
    kind, *_ = _parse(ins)
    return _bind(batch, ins, kind, 2, lambda a, b: np.copysign(b, a))


@instruction("testp", kind="compare")
def test_property(batch, ins):
    kind = ins.modifiers[-1]
    smallest = np.finfo(np.float32 if kind == "f32" else np.float64).tiny
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "notanumber": np.isnan,
        "number": lambda x: ~np.isnan(x),
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= smallest),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < smallest),
    }
    test = tests[ins.modifiers[0]]
    out = batch.write(ins.operands[0], "pred")
    a = batch.read(ins.operands[1], kind, ins.line)
    return lambda m: put(out, m, test(at(a, m)))
