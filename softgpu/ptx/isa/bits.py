# SPDX-License-Identifier: Apache-2.0
"""Bit fields, counting, byte permutation, integer dot products."""

from __future__ import annotations

import numpy as np

from ..syntax import SIZES
from ..values import DTYPES
from .registry import at, instruction, put


@instruction("popc", kind="integer")
def popc(batch, ins):
    kind = ins.modifiers[-1]
    out, a = batch.write(ins.operands[0], "u32"), batch.read(ins.operands[1], kind, ins.line)
    return lambda m: put(out, m, np.bitwise_count(at(a, m)))


def _bit_length(x):
    """Position of the highest set bit plus one, for unsigned arrays."""
    x = x.astype(np.uint64)
    for step in (1, 2, 4, 8, 16, 32):
        x = x | (x >> np.uint64(step))
    return np.bitwise_count(x).astype(np.int64)


@instruction("clz", kind="integer")
def clz(batch, ins):
    kind = ins.modifiers[-1]
    bits = 8 * SIZES[kind]
    out, a = batch.write(ins.operands[0], "u32"), batch.read(ins.operands[1], kind, ins.line)
    return lambda m: put(out, m, bits - _bit_length(at(a, m)))


@instruction("bfind", kind="integer")
def bfind(batch, ins):
    """Highest bit that differs from the sign (s) or is set (u); all ones where there is none."""
    kind, bits = ins.modifiers[-1], 8 * SIZES[ins.modifiers[-1]]
    out, a = batch.write(ins.operands[0], "u32"), batch.read(ins.operands[1], kind, ins.line)
    shift_amount = "shiftamt" in ins.modifiers

    def run(m):
        x = at(a, m)
        x = np.where(x < 0, ~x, x).astype(x.dtype) if kind[0] == "s" else x
        top = _bit_length(np.ascontiguousarray(x).view(f"u{bits // 8}")) - 1
        value = np.where(top >= 0, bits - 1 - top if shift_amount else top, -1)
        put(out, m, value.astype(np.uint32))

    return run


@instruction("brev", kind="integer")
def brev(batch, ins):
    kind, size = ins.modifiers[-1], SIZES[ins.modifiers[-1]]
    out, a = batch.write(ins.operands[0], kind), batch.read(ins.operands[1], kind, ins.line)

    def run(m):
        raw = np.ascontiguousarray(at(a, m)).view(np.uint8).reshape(-1, size)
        flipped = np.packbits(
            np.unpackbits(raw, axis=1, bitorder="little")[:, ::-1], axis=1, bitorder="little"
        )
        put(out, m, np.ascontiguousarray(flipped).view(out.dtype)[:, 0])

    return run


@instruction("bfe", kind="integer")
def bfe(batch, ins):
    """Extract len bits from pos (both modulo 256); .s extends the field's, or the value's, sign."""
    kind = ins.modifiers[-1]
    bits, signed = 8 * SIZES[kind], kind[0] == "s"
    out, a = batch.write(ins.operands[0], kind), batch.read(ins.operands[1], kind, ins.line)
    pos, length = (batch.read(o, "u32", ins.line) for o in ins.operands[2:4])
    unsigned = DTYPES[f"u{bits}"]
    one = unsigned.type(1)

    def run(m):
        x = np.ascontiguousarray(at(a, m)).view(unsigned)
        p = at(pos, m).astype(np.int64) & 0xFF
        n = at(length, m).astype(np.int64) & 0xFF
        shifted = np.where(
            p < bits, x >> np.minimum(p, bits - 1).astype(unsigned), unsigned.type(0)
        )
        mask = np.where(
            n < bits, (one << np.minimum(n, bits - 1).astype(unsigned)) - one, ~(one - one)
        )
        field = shifted & mask
        if signed:
            last = np.minimum(p + n - 1, bits - 1)
            sign = (x >> np.maximum(last, 0).astype(unsigned)) & one
            sign = np.where(n == 0, unsigned.type(0), sign)
            # Bits of the field that lie beyond the value take the sign too.
            have = np.clip(np.minimum(n, bits - p), 0, bits)
            keep = np.where(
                have < bits,
                (one << np.minimum(have, bits - 1).astype(unsigned)) - one,
                ~(one - one),
            )
            field = np.where(sign == 1, (field & keep) | ~keep, field)
        put(out, m, field.view(out.dtype))

    return run


@instruction("bfi", kind="integer")
def bfi(batch, ins):
    """Insert the low len bits of a into b at pos."""
    kind, bits = ins.modifiers[-1], 8 * SIZES[ins.modifiers[-1]]
    out = batch.write(ins.operands[0], kind)
    a, b = (batch.read(o, kind, ins.line) for o in ins.operands[1:3])
    pos, length = (batch.read(o, "u32", ins.line) for o in ins.operands[3:5])
    unsigned = DTYPES[f"u{bits}"]
    one = unsigned.type(1)

    def run(m):
        p = at(pos, m).astype(np.int64) & 0xFF
        n = np.minimum(at(length, m).astype(np.int64) & 0xFF, bits)
        ones = np.where(
            n < bits, (one << np.minimum(n, bits - 1).astype(unsigned)) - one, ~(one - one)
        )
        place = np.minimum(p, bits - 1).astype(unsigned)
        mask = np.where(p < bits, ones << place, unsigned.type(0))
        put(out, m, (at(b, m) & ~mask) | ((at(a, m) << place) & mask))

    return run


@instruction("prmt", kind="integer")
def prmt(batch, ins):
    """Pick four bytes of b:a; a selector's high bit replicates the byte's sign."""
    mode = next((x for x in ins.modifiers if x != "b32"), None)
    out = batch.write(ins.operands[0], "b32")
    a, b, c = (batch.read(o, "b32", ins.line) for o in ins.operands[1:4])

    def selectors(c):
        if mode is None:
            return [(c >> np.uint32(4 * i)) & np.uint32(0xF) for i in range(4)]
        s = (c & np.uint32(3)).astype(np.int64)
        if mode == "f4e":
            return [s + i for i in range(4)]
        if mode == "b4e":
            return [(s - i) & 7 for i in range(4)]
        if mode == "rc8":
            return [s] * 4
        if mode == "ecl":
            return [np.maximum(s, i) for i in range(4)]
        if mode == "ecr":
            return [np.minimum(s, i) for i in range(4)]
        return [2 * (s & 1) + (i & 1) for i in range(4)]  # rc16

    def run(m):
        pool = np.stack([at(a, m), at(b, m)], axis=1).view(np.uint8)
        rows = np.arange(len(pool))
        bytes_ = []
        for s in selectors(at(c, m)):
            s = s.astype(np.int64)
            byte = pool[rows, s & 7]
            if mode is None:
                byte = np.where(s & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint8)
            bytes_.append(byte)
        put(out, m, np.stack(bytes_, axis=1).view(np.uint32)[:, 0])

    return run


@instruction("bmsk", kind="integer")
def bit_mask(batch, ins):
    out = batch.write(ins.operands[0], "b32")
    a, b = (batch.read(o, "u32", ins.line) for o in ins.operands[1:3])
    clamp = "clamp" in ins.modifiers

    def run(m):
        p, n = at(a, m).astype(np.uint64), at(b, m).astype(np.uint64)
        if clamp:
            p, n = np.minimum(p, 32), np.minimum(n, 32)
        else:
            p, n = p & np.uint64(31), n & np.uint64(31)
        ones = (np.uint64(1) << n.astype(np.uint64)) - np.uint64(1)
        put(out, m, ((ones << p.astype(np.uint64)) & np.uint64(0xFFFFFFFF)).astype(np.uint32))

    return run


@instruction("szext", kind="integer")
def sign_zero_extend(batch, ins):
    kind = ins.modifiers[-1]
    out = batch.write(ins.operands[0], kind)
    a, b = (
        batch.read(ins.operands[1], "u32", ins.line),
        batch.read(ins.operands[2], "u32", ins.line),
    )
    clamp, signed = "clamp" in ins.modifiers, kind == "s32"

    def run(m):
        n = np.minimum(at(b, m), 32) if clamp else at(b, m) & np.uint32(31)
        n = n.astype(np.int64)
        x = at(a, m).astype(np.int64) & ((1 << n) - 1)
        if signed:
            x = np.where((n > 0) & ((x >> np.maximum(n - 1, 0)) & 1 == 1), x - (1 << n), x)
        put(out, m, x.astype(np.int64).astype(out.dtype))

    return run


@instruction("dp4a", "dp2a", kind="integer")
def dot_product(batch, ins):
    """c plus the products of four bytes, or of two halves with two bytes."""
    types = [x for x in ins.modifiers if x in ("u32", "s32")]
    a_type, b_type = types
    a, b, c = (batch.read(o, "b32", ins.line) for o in ins.operands[1:4])
    out = batch.write(ins.operands[0], "b32")

    def parts(x, kind, width):
        dtype = np.dtype(f"{'i' if kind == 's32' else 'u'}{width}")
        x = np.ascontiguousarray(x)
        return x.view(dtype).reshape(len(x), -1).astype(np.int64)

    def run(m):
        y = parts(at(b, m), b_type, 1)
        if ins.name == "dp4a":
            products = parts(at(a, m), a_type, 1) * y
        else:
            high = "hi" in ins.modifiers
            products = parts(at(a, m), a_type, 2) * (y[:, 2:] if high else y[:, :2])
        total = products.sum(axis=1) + at(c, m).astype(np.int64)
        put(out, m, (total & 0xFFFFFFFF).astype(np.uint32))

    return run
