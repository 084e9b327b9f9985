# SPDX-License-Identifier: Apache-2.0
"""mov, selp, setp, set, slct and the bitwise operations, predicates included."""

from __future__ import annotations

import numpy as np

from ..errors import PtxError
from ..syntax import SIZES, Pair, Sink, Vector
from ..values import DTYPES, PACKED, bf16_to_f32, flush
from .registry import at, instruction, only, put

_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_FLOATS = {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2"}


@instruction("mov", kind="move")
def move(batch, ins):
    kind = ins.modifiers[-1]
    target, source = ins.operands
    if isinstance(target, Vector):
        return _unpack(batch, target.items, source, kind, ins.line)
    if isinstance(source, Vector):
        return _pack(batch, target, source.items, kind, ins.line)
    if kind == "b128":
        out, value = batch.row(target), batch.row(source)
        return lambda m: put(out, m, at(value, m))
    out, value = batch.write(target, kind, ins.line), batch.read(source, kind, ins.line)
    return lambda m: put(out, m, at(value, m))


def _pieces(batch, kind: str, count: int) -> str:
    bits = 8 * SIZES[kind] // count
    return {4: "b4", 8: "b8", 16: "b16", 32: "b32", 64: "b64"}[bits]


def _unpack(batch, items, source, kind, line):
    piece = _pieces(batch, kind, len(items))
    unit = np.dtype(DTYPES[piece])
    whole = batch.row(source) if kind == "b128" else batch.read(source, kind, line)
    outs = [None if isinstance(o, Sink) else batch.write(o, piece, line) for o in items]

    def run(m):
        parts = np.ascontiguousarray(at(whole, m)).view(unit).reshape(-1, len(items))
        for i, out in enumerate(outs):
            if out is not None:
                put(out, m, parts[:, i])

    return run


def _pack(batch, target, items, kind, line):
    piece = _pieces(batch, kind, len(items))
    sources = [batch.read(o, piece, line) for o in items]
    row = batch.row(target)
    out = row if kind == "b128" else batch.write(target, kind, line)

    def run(m):
        packed = np.stack([at(s, m) for s in sources], axis=1)
        put(out, m, packed.view(out.dtype)[:, 0])

    return run


@instruction("selp", kind="move")
def select(batch, ins):
    kind = ins.modifiers[-1]
    out = batch.write(ins.operands[0], kind, ins.line)
    a, b = (batch.read(o, kind, ins.line) for o in ins.operands[1:3])
    p = batch.predicate(ins.operands[3], ins.line)
    return lambda m: put(out, m, np.where(p(m), at(a, m), at(b, m)))


@instruction("slct", kind="move")
def select_by_sign(batch, ins):
    kind, by = ins.modifiers[-2:]
    out = batch.write(ins.operands[0], kind, ins.line)
    a, b = (batch.read(o, kind, ins.line) for o in ins.operands[1:3])
    c = batch.read(ins.operands[3], by, ins.line)
    return lambda m: put(out, m, np.where(at(c, m) >= 0, at(a, m), at(b, m)))


def _compare(name: str, kind: str, ftz: bool):
    """compare(a, b) as the comparison `name` of type `kind` defines it."""
    floating = kind in _FLOATS

    def values(x):
        x = bf16_to_f32(x) if kind.startswith("bf16") else x
        return flush(x) if ftz and x.dtype == np.float32 else x

    if name in ("num", "nan"):
        if not floating:
            raise PtxError(f"comparison .{name} of .{kind}")

        def run(a, b):
            nan = np.isnan(values(a)) | np.isnan(values(b))
            return nan if name == "nan" else ~nan

        return run
    if floating and len(name) == 3 and name.endswith("u"):
        base = _ORDERED[name[:2]]

        def unordered(a, b):
            a, b = values(a), values(b)
            return base(a, b) | np.isnan(a) | np.isnan(b)

        return unordered
    if floating and name == "ne":  # ordered: false where either is NaN

        def ordered_ne(a, b):
            a, b = values(a), values(b)
            return (a != b) & ~np.isnan(a) & ~np.isnan(b)

        return ordered_ne
    base = _ORDERED[name]
    if name in ("lo", "ls", "hi", "hs") and kind[0] != "u":
        raise PtxError(f"comparison .{name} of .{kind}")
    return (lambda a, b: base(values(a), values(b))) if floating else base


@instruction("setp", kind="compare")
def set_predicate(batch, ins):
    only(
        ins,
        {
            *_ORDERED,
            "equ",
            "neu",
            "ltu",
            "leu",
            "gtu",
            "geu",
            "num",
            "nan",
            "ftz",
            *_COMBINE,
            *SIZES,
        },
    )
    kind, name = ins.modifiers[-1], ins.modifiers[0]
    compare = _compare(name, kind, "ftz" in ins.modifiers)
    a, b = (batch.read(o, kind, ins.line) for o in ins.operands[1:3])
    combine = next((_COMBINE[x] for x in ins.modifiers[1:] if x in _COMBINE), None)
    c = batch.predicate(ins.operands[3], ins.line) if combine else None
    target = ins.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, Sink())
    p, q = batch.write(first, "pred", ins.line), batch.write(second, "pred", ins.line)
    paired = isinstance(target, Pair)

    def run(m):
        result = compare(at(a, m), at(b, m))
        if kind in PACKED:  # one predicate for each half
            low, high = result[:, 0], result[:, 1]
        else:
            low, high = result, (~result if paired else None)
        if combine:
            c_now = c(m).copy()
            low = combine(low, c_now)
            high = combine(high, c_now) if paired else None
        put(p, m, low)
        if paired:
            put(q, m, high)

    return run


@instruction("set", kind="compare")
def set_value(batch, ins):
    """All ones (integers) or 1.0 (floats) where the comparison holds."""
    out_kind, kind = ins.modifiers[-2:]
    compare = _compare(ins.modifiers[0], kind, "ftz" in ins.modifiers)
    combine = next((_COMBINE[x] for x in ins.modifiers[1:] if x in _COMBINE), None)
    a, b = (batch.read(o, kind, ins.line) for o in ins.operands[1:3])
    c = batch.predicate(ins.operands[3], ins.line) if combine else None
    out = batch.write(ins.operands[0], out_kind, ins.line)
    element = PACKED.get(out_kind, out_kind)
    one = 0x3F80 if element == "bf16" else 1
    true = one if element in _FLOATS else DTYPES[element].type(0) - DTYPES[element].type(1)

    def run(m):
        result = compare(at(a, m), at(b, m))
        if combine:
            result = combine(result, c(m))
        put(out, m, np.where(result, true, 0).astype(out.dtype))

    return run


_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@instruction("and", "or", "xor", kind="integer")
def bitwise(batch, ins):
    kind = ins.modifiers[-1]
    only(ins, {"pred", "b16", "b32", "b64"})
    function = _BITWISE[ins.name]
    out = batch.write(ins.operands[0], kind, ins.line)
    if kind == "pred":
        p, q = (batch.predicate(o, ins.line) for o in ins.operands[1:3])
        return lambda m: put(out, m, function(p(m), q(m)))
    a, b = (batch.read(o, kind, ins.line) for o in ins.operands[1:3])

    def run(m):
        if m is None:
            function(a, b, out=out)
        else:
            out[m] = function(a[m], b[m])

    return run


@instruction("not", "cnot", kind="integer")
def bitwise_not(batch, ins):
    kind = ins.modifiers[-1]
    out = batch.write(ins.operands[0], kind, ins.line)
    if kind == "pred":
        p = batch.predicate(ins.operands[1], ins.line)
        return lambda m: put(out, m, ~p(m))
    a = batch.read(ins.operands[1], kind, ins.line)
    if ins.name == "cnot":
        return lambda m: put(out, m, at(a, m) == 0)
    return lambda m: put(out, m, ~at(a, m))


@instruction("lop3", kind="integer")
def lop3(batch, ins):
    """Any function of three bits: the immediate is its truth table over a=0xF0, b=0xCC, c=0xAA."""
    target = ins.operands[0]
    combine = next((x for x in ins.modifiers if x in ("or", "and")), None)
    result = target.first if isinstance(target, Pair) else target
    out = batch.write(result, "b32", ins.line)
    p = batch.write(target.second, "pred", ins.line) if combine else None
    a, b, c = (batch.read(o, "b32", ins.line) for o in ins.operands[1:4])
    table = int(batch.read(ins.operands[4], "b32", ins.line)[0])
    q = batch.predicate(ins.operands[5], ins.line) if combine else None

    def run(m):
        x, y, z = at(a, m), at(b, m), at(c, m)
        total = np.zeros_like(x)
        for i in range(8):
            if table >> i & 1:
                term = x if i & 4 else ~x
                term = term & (y if i & 2 else ~y)
                total = total | (term & (z if i & 1 else ~z))
        if combine:
            put(p, m, _COMBINE[combine](total != 0, q(m)))
        put(out, m, total)

    return run
