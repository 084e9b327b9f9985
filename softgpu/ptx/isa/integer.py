# SPDX-License-Identifier: Apache-2.0
"""Integer arithmetic, shifts, bit fields, byte permutation, dot products."""

from __future__ import annotations

import numpy as np

from ..errors import PtxError
from ..syntax import SIZES
from ..values import DTYPES
from .registry import at, instruction, only, put

_INTEGERS = {f"{s}{n}" for s in "us" for n in (16, 32, 64)} | {"u16x2", "s16x2", "b32", "b64"}
_WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def binary(batch, ins, function, kind: str, out_kind: str | None = None):
    """run(m) for out = function(a, b) in one type."""
    out = batch.write(ins.operands[0], out_kind or kind, ins.line)
    a, b = (batch.read(o, kind, ins.line) for o in ins.operands[1:3])
    if isinstance(function, np.ufunc):

        def run(m):
            if m is None:
                function(a, b, out=out)
            else:
                out[m] = function(a[m], b[m])

        return run
    return lambda m: put(out, m, function(at(a, m), at(b, m)))


def _saturating(sign: int):
    limits = np.iinfo(np.int32)

    def run(a, b):
        return np.clip(a.astype(np.int64) + sign * b.astype(np.int64), limits.min, limits.max)

    return run


def add_sub(batch, ins):
    """Integer add and sub; floats are registered by their own family."""
    kind, subtract = ins.modifiers[-1], ins.name == "sub"
    only(ins, {*_INTEGERS, "sat", "cc"})
    if "sat" in ins.modifiers:
        return binary(batch, ins, _saturating(-1 if subtract else 1), "s32")
    if "cc" not in ins.modifiers:
        return binary(batch, ins, np.subtract if subtract else np.add, kind)
    return _with_carry(batch, ins, subtract, carry_in=False)


def _with_carry(batch, ins, subtract: bool, carry_in: bool):
    kind = "u64" if SIZES[ins.modifiers[-1]] == 8 else "u32"
    out = batch.write(ins.operands[0], kind, ins.line)
    a, b = (batch.read(o, kind, ins.line) for o in ins.operands[1:3])
    carry, keep = batch.carry, "cc" in ins.modifiers

    def run(m):
        x, y = at(a, m), at(b, m)
        c = at(carry, m).astype(x.dtype) if carry_in else x.dtype.type(0)
        if subtract:  # the carry flag holds the borrow
            partial = x - y
            total = partial - c
            flag = (x < y) | (partial < c)
        else:
            partial = x + y
            total = partial + c
            flag = (partial < x) | (total < partial)
        put(out, m, total)
        if keep:
            put(carry, m, flag)

    return run


@instruction("addc", "subc", kind="integer")
def add_with_carry(batch, ins):
    return _with_carry(batch, ins, ins.name == "subc", carry_in=True)


def multiply(kind: str, part: str):
    """product(a, b): lo, hi or wide part of an integer product."""
    if part == "lo":
        return np.multiply
    if part == "wide":
        wide = DTYPES[_WIDER[kind]]
        return lambda a, b: a.astype(wide) * b.astype(wide)
    bits = 8 * SIZES[kind]
    if bits < 64:
        wide = DTYPES[_WIDER[kind]]
        return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> bits).astype(DTYPES[kind])
    return lambda a, b: _high64(a, b, kind == "s64")


def _high64(a, b, signed: bool):
    x, y = a.view(np.uint64), b.view(np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> shift, y & low, y >> shift
    middle = x1 * y0 + ((x0 * y0) >> shift)
    other = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> shift) + (other >> shift)
    if signed:
        zero = np.uint64(0)
        high = high - np.where(a < 0, y, zero) - np.where(b < 0, x, zero)
    return high.view(a.dtype)


def mul(batch, ins):
    only(ins, {*_INTEGERS, "lo", "hi", "wide"})
    kind = ins.modifiers[-1]
    part = next(x for x in ins.modifiers if x in ("lo", "hi", "wide"))
    out = _WIDER[kind] if part == "wide" else kind
    return binary(batch, ins, multiply(kind, part), kind, out)


def mad(batch, ins):
    only(ins, {*_INTEGERS, "lo", "hi", "wide", "cc", "sat"})
    kind = ins.modifiers[-1]
    part = next(x for x in ins.modifiers if x in ("lo", "hi", "wide"))
    wide = _WIDER[kind] if part == "wide" else kind
    if "sat" in ins.modifiers or "cc" in ins.modifiers:
        return _mad_special(batch, ins, kind, part, carry_in=False)
    product = multiply(kind, part)
    out = batch.write(ins.operands[0], wide, ins.line)
    a, b = (batch.read(o, kind, ins.line) for o in ins.operands[1:3])
    c = batch.read(ins.operands[3], wide, ins.line)
    return lambda m: put(out, m, product(at(a, m), at(b, m)) + at(c, m))


def _mad_special(batch, ins, kind, part, carry_in):
    if "sat" in ins.modifiers:
        raise PtxError("mad.sat is not supported", ins.line)
    product = multiply(kind, part)
    out = batch.write(ins.operands[0], kind, ins.line)
    a, b, c = (batch.read(o, kind, ins.line) for o in ins.operands[1:4])
    keep, unsigned = "cc" in ins.modifiers, f"u{8 * SIZES[kind]}"

    def run(m):
        p = np.ascontiguousarray(product(at(a, m), at(b, m))).view(DTYPES[unsigned])
        x = np.ascontiguousarray(at(c, m)).view(DTYPES[unsigned])
        extra = at(batch.carry, m).astype(p.dtype) if carry_in else p.dtype.type(0)
        partial = p + x
        total = partial + extra
        put(out, m, total.view(out.dtype))
        if keep:
            put(batch.carry, m, (partial < p) | (total < partial))

    return run


@instruction("madc", kind="integer")
def mad_with_carry(batch, ins):
    part = next(x for x in ins.modifiers if x in ("lo", "hi"))
    return _mad_special(batch, ins, ins.modifiers[-1], part, carry_in=True)


@instruction("mul24", "mad24", kind="integer")
def multiply24(batch, ins):
    kind, part = ins.modifiers[-1], ins.modifiers[0]
    out = batch.write(ins.operands[0], kind, ins.line)
    a, b = (batch.read(o, kind, ins.line) for o in ins.operands[1:3])
    c = batch.read(ins.operands[3], kind, ins.line) if ins.name == "mad24" else None

    def low24(x):
        x = x.astype(np.int64) & 0xFFFFFF
        return np.where(x & 0x800000, x - 0x1000000, x) if kind == "s32" else x

    def run(m):
        product = low24(at(a, m)) * low24(at(b, m))
        value = (product >> 16 if part == "hi" else product).astype(DTYPES[kind])
        put(out, m, value if c is None else value + at(c, m))

    return run


def _divide(a, b):
    """C division; by zero all ones, as the hardware gives."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = (a - np.fmod(a, safe)) // safe
    return np.where(b == 0, ~b.dtype.type(0), quotient)


def _remainder(a, b):
    safe = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, a, np.fmod(a, safe))


def div(batch, ins):
    only(ins, _INTEGERS)
    return binary(batch, ins, _divide, ins.modifiers[-1])


@instruction("rem", kind="integer")
def rem(batch, ins):
    only(ins, _INTEGERS)
    return binary(batch, ins, _remainder, ins.modifiers[-1])


@instruction("sad", kind="integer")
def sad(batch, ins):
    kind = ins.modifiers[-1]
    out = batch.write(ins.operands[0], kind, ins.line)
    a, b, c = (batch.read(o, kind, ins.line) for o in ins.operands[1:4])

    def run(m):
        x, y = at(a, m), at(b, m)
        put(out, m, at(c, m) + np.where(x < y, y - x, x - y))

    return run


def min_max(batch, ins):
    only(ins, {*_INTEGERS, "relu"})
    kind = ins.modifiers[-1]
    function = np.minimum if ins.name == "min" else np.maximum
    if "relu" in ins.modifiers:
        return binary(batch, ins, lambda a, b: np.maximum(function(a, b), 0), kind)
    return binary(batch, ins, function, kind)


def abs_neg(batch, ins):
    kind = ins.modifiers[-1]
    out = batch.write(ins.operands[0], kind, ins.line)
    a = batch.read(ins.operands[1], kind, ins.line)
    function = np.abs if ins.name == "abs" else np.negative
    return lambda m: put(out, m, function(at(a, m)))


# --- shifts -----------------------------------------------------------------------------------


@instruction("shl", "shr", kind="integer")
def shift(batch, ins):
    """The amount is unsigned and clamped to the width."""
    kind = ins.modifiers[-1]
    only(ins, {f"{s}{n}" for s in "bus" for n in (16, 32, 64)})
    bits = 8 * SIZES[kind]
    out = batch.write(ins.operands[0], kind, ins.line)
    a, n = batch.read(ins.operands[1], kind, ins.line), batch.read(ins.operands[2], "u32", ins.line)
    left, signed = ins.name == "shl", kind[0] == "s"
    dtype = DTYPES[kind]

    def run(m):
        x, amount = at(a, m), at(n, m)
        small = np.minimum(amount, bits - 1).astype(dtype)
        value = x << small if left else x >> small
        over = amount >= bits
        if over.any() and not (signed and not left):
            value = np.where(over, dtype.type(0), value)
        put(out, m, value)

    return run


@instruction("shf", kind="integer")
def funnel_shift(batch, ins):
    """Shift the 64 bits b:a; left keeps the upper word, right the lower."""
    left, wrap = ins.modifiers[0] == "l", ins.modifiers[1] == "wrap"
    out = batch.write(ins.operands[0], "b32", ins.line)
    a, b, n = (batch.read(o, "u32", ins.line) for o in ins.operands[1:4])

    def run(m):
        amount = at(n, m) & np.uint32(31) if wrap else np.minimum(at(n, m), 32)
        amount = amount.astype(np.uint64)
        both = at(b, m).astype(np.uint64) << np.uint64(32) | at(a, m)
        value = both << amount >> np.uint64(32) if left else both >> amount
        if left:  # amount 32 gives a
            value = np.where(amount == 32, at(a, m), value)
        put(out, m, value.astype(np.uint32))

    return run
