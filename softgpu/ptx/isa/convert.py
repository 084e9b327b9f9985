# SPDX-License-Identifier: Apache-2.0
"""cvt between integers and floats of every size, scalar and packed."""

from __future__ import annotations

import numpy as np

from ..errors import PtxError
from ..syntax import SIZES
from ..values import (
    DTYPES,
    MAX_FINITE,
    PACKED,
    canonical_nan,
    f32_to_tf32,
    flush,
    from_f64,
    to_f64,
)
from .registry import at, instruction, only, put

_FLOATS = {"f16", "bf16", "f32", "f64", "tf32"}
_INTEGER_ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_KNOWN = {
    *_INTEGER_ROUNDING,
    *SIZES,
    "rn",
    "rz",
    "rm",
    "rp",
    "rna",
    "ftz",
    "sat",
    "satfinite",
    "relu",
}


@instruction("cvt", kind="convert")
def convert(batch, ins):
    only(ins, _KNOWN)
    target, source = ins.modifiers[-2:]
    if target in PACKED:
        return _packed(batch, ins, PACKED[target], source)
    put_result = batch.extending_write(ins.operands[0], target, ins.line)
    a = batch.read(ins.operands[1], source, ins.line)
    compute = _scalar(ins, target, source)
    return lambda m: put_result(m, compute(at(a, m)))


def _packed(batch, ins, element, source):
    """d = {first operand in the high half, second in the low half}."""
    out = batch.write(ins.operands[0], f"{element}x2", ins.line)
    if len(ins.operands) != 3:
        raise PtxError(f"{ins.opcode} is not supported", ins.line)
    high, low = (batch.read(o, source, ins.line) for o in ins.operands[1:3])
    compute = _scalar(ins, element, source)

    def run(m):
        halves = compute(at(low, m)), compute(at(high, m))  # a source may be the target
        for i, half in enumerate(halves):
            put(out[:, i], m, half)

    return run


def _scalar(ins, target: str, source: str):
    mods = set(ins.modifiers)
    if source in _FLOATS and target in _FLOATS:
        return _float_to_float(mods, target, source)
    if source in _FLOATS:
        return _float_to_integer(mods, target, source)
    if target in _FLOATS:
        return _integer_to_float(mods, target)
    return _integer_to_integer(mods, target)


def _float_to_float(mods, target, source):
    mode = next((x for x in ("rn", "rz", "rm", "rp", "rna") if x in mods), "rn")
    whole = next((_INTEGER_ROUNDING[x] for x in mods if x in _INTEGER_ROUNDING), None)
    plain = not mods & {"ftz", "sat", "relu", "satfinite"} and whole is None and mode == "rn"
    if plain and (source, target) in (("f32", "f16"), ("f16", "f32"), ("f32", "f64")):
        dtype = DTYPES[target]
        return lambda a: canonical_nan(target, a.astype(dtype))

    def run(a):
        if "ftz" in mods and source == "f32":
            a = flush(a)
        x = to_f64(source, a)
        if whole is not None:
            x = whole(x)
        if "sat" in mods:
            x = np.where(np.isnan(x), 0.0, np.clip(x, 0.0, 1.0))
        if "relu" in mods:
            x = np.where(x < 0, 0.0, x)
        if "satfinite" in mods and target in MAX_FINITE:
            x = np.clip(x, -MAX_FINITE[target], MAX_FINITE[target])
        if target == "tf32":
            return f32_to_tf32(x.astype(np.float32), mode).view(np.uint32)
        result = from_f64(target, x, mode)
        return flush(result) if "ftz" in mods and target == "f32" else result

    return run


def _float_to_integer(mods, target, source):
    """Out of range clamps; NaN gives 0 (0x8000000000000000 for 64 bits, as the hardware)."""
    rounding = next((_INTEGER_ROUNDING[x] for x in mods if x in _INTEGER_ROUNDING), None)
    if rounding is None:
        raise PtxError("a conversion from float to integer needs a rounding")
    dtype = DTYPES[target]
    limits = np.iinfo(dtype)

    def run(a):
        if "ftz" in mods and source == "f32":
            a = flush(a)
        x = rounding(to_f64(source, a))
        low, high = x <= float(limits.min), x >= float(limits.max)
        inside = np.where(low | high | np.isnan(x), 0.0, x).astype(dtype)
        out = np.where(high, limits.max, np.where(low, limits.min, inside)).astype(dtype)
        nan = np.isnan(x)
        if nan.any():
            bits = dtype.itemsize * 8
            missing = np.uint64(1 << 63).astype(np.uint64).view(np.int64) if bits == 64 else 0
            out = np.where(nan, np.array(missing).astype(dtype), out)
        return out

    return run


def _integer_to_float(mods, target):
    mode = next((x for x in ("rn", "rz", "rm", "rp") if x in mods), "rn")

    def run(a):
        if a.dtype.itemsize == 8:  # 64 bits do not fit float64: round to odd by hand
            x = a.astype(np.float64)
            if target == "f64" and mode == "rn":
                return x
            low = (a & a.dtype.type(0x7FF)) != 0
            top = (a & ~a.dtype.type(0x7FF)) | low.astype(a.dtype) << a.dtype.type(11)
            large = np.abs(x) >= 2.0**52
            x = np.where(large, top.astype(np.float64), x)
        else:
            x = a.astype(np.float64)
        if "sat" in mods:
            x = np.clip(x, 0.0, 1.0)
        return from_f64(target, x, mode)

    return run


def _integer_to_integer(mods, target):
    dtype = DTYPES[target]
    if "sat" not in mods:
        return lambda a: a.astype(dtype)
    limits = np.iinfo(dtype)

    def run(a):
        own = np.iinfo(a.dtype)
        low, high = max(limits.min, own.min), min(limits.max, own.max)
        return np.clip(a, a.dtype.type(low), a.dtype.type(high)).astype(dtype)

    return run


@instruction("cvt.pack", kind="convert")
def convert_pack(batch, ins):
    """Two s32 saturated into the low halves or bytes, the rest from c."""
    target, source = ins.modifiers[2], ins.modifiers[3]
    limits = np.iinfo(DTYPES[target])
    out = batch.write(ins.operands[0], "b32", ins.line)
    a, b = (batch.read(o, source, ins.line) for o in ins.operands[1:3])
    bits = 8 * SIZES[target]
    c = batch.read(ins.operands[3], "b32", ins.line) if len(ins.operands) > 3 else None

    def run(m):
        low, high = (
            np.clip(at(x, m), limits.min, limits.max).astype(np.int64) & ((1 << bits) - 1)
            for x in (b, a)
        )
        value = low | high << bits
        if c is not None:
            value |= at(c, m).astype(np.int64) << (2 * bits)
        put(out, m, (value & 0xFFFFFFFF).astype(np.uint32))

    return run
