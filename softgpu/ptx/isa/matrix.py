# SPDX-License-Identifier: Apache-2.0
"""mma.sync, ldmatrix, stmatrix, movmatrix.

With g = lane / 4, t = lane % 4 and p elements in a register, every shape has one layout:
  A: register r holds row g + 8 * (r % 2), columns 4 * p * (r / 2) + t * p ...
  B: register r holds rows 4 * p * r + t * p ..., column g
  C: register r holds row g + 8 * (r / 2), column 2 * t + r % 2
"""

from __future__ import annotations

import functools
import re

import numpy as np

from ..errors import PtxError
from ..syntax import SIZES, Vector
from ..values import bf16_to_f32, f32_to_tf32, from_f64
from .registry import instruction

ELEMENTS = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1, "f64": 8}


def element_values(kind: str, raw: np.ndarray) -> np.ndarray:
    """Raw bytes (last axis) -> numbers in which products are exact: float32, or float64."""
    raw = np.ascontiguousarray(raw)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float32)
    if kind == "bf16":
        return bf16_to_f32(raw.view(np.uint16))
    if kind == "tf32":  # the low 13 bits are ignored
        return f32_to_tf32(raw.view(np.float32), "rz")
    if kind == "f64":
        return raw.view(np.float64)
    return raw.view(np.int8 if kind == "s8" else np.uint8).astype(np.float32)


@functools.cache
def fragment(rows: int, columns: int, per: int, which: str) -> np.ndarray:
    """Flat position in the matrix of every (lane, register, element)."""
    lane = np.arange(32)[:, None, None]
    g, t = lane // 4, lane % 4
    registers = rows * columns // (32 * per)
    r, e = np.arange(registers)[None, :, None], np.arange(per)[None, None, :]
    if which == "A":
        high = (r % 2) if rows == 16 else 0 * r
        row, column = g + 8 * high, 4 * per * (r // (2 if rows == 16 else 1)) + t * per + e
    elif which == "B":
        row, column = 4 * per * r + t * per + e, g
    else:  # C: per elements are neighbours in a row
        flat = r * per + e
        row, column = g + 8 * (flat // 2), 2 * t + flat % 2
    row, column = np.broadcast_arrays(row, column)
    return (row * columns + column).reshape(-1)


@functools.cache
def _inverse(*key) -> np.ndarray:
    return np.argsort(fragment(*key), kind="stable")


def gather(rows_of: list, lanes, shape: tuple[int, int], kind: str, which: str) -> np.ndarray:
    """Registers of whole warps -> [warps, rows, columns] numbers. lanes: [warps, 32] or None."""
    size = ELEMENTS[kind]
    per = max(rows_of[0].dtype.itemsize // size, 1)
    if lanes is None:
        stacked = np.stack(rows_of, axis=1)
        warps = len(stacked) // 32
    else:
        stacked = np.stack([r[lanes] for r in rows_of], axis=2)
        warps = len(lanes)
    numbers = element_values(kind, stacked.reshape(warps, -1))
    order = _inverse(*shape, per, which)
    return numbers.reshape(warps, -1)[:, order].reshape(warps, *shape)


@instruction("mma.sync", kind="mma", together="warp")
def mma(batch, ins):
    found = re.search(r"\.m(\d+)n(\d+)k(\d+)\.", ins.opcode + ".")
    m_size, n, k = (int(x) for x in found.groups())
    types = [x for x in ins.modifiers if x in SIZES]
    d_type, a_type, b_type, c_type = types
    if a_type not in ELEMENTS or b_type not in ELEMENTS or n != 8 or c_type != d_type:
        raise PtxError(f"unsupported form {ins.opcode}", ins.line)
    known = {"sync", "aligned", "row", "col", "satfinite", found.group()[1:-1], *types}
    extra = set(ins.modifiers) - known
    if extra or ins.modifiers[3:5] != ["row", "col"]:
        raise PtxError(f"unsupported form {ins.opcode}", ins.line)

    def rows(operand):
        items = operand.items if isinstance(operand, Vector) else (operand,)
        return [batch.read(o, f"b{8 * _register(a_type)}", ins.line) for o in items]

    a, b = rows(ins.operands[1]), rows(ins.operands[2])
    c, d = _accumulators(batch, ins, c_type, 3), _accumulators(batch, ins, d_type, 0)
    per = 2 if d_type == "f16" else 1
    place, order = fragment(m_size, n, per, "C"), _inverse(m_size, n, per, "C")
    saturate = "satfinite" in ins.modifiers
    if any(
        len(x) * 32 * _register(a_type) // ELEMENTS[a_type] != s
        for x, s in ((a, m_size * k), (b, n * k))
    ):
        raise PtxError(f"{ins.opcode}: wrong number of registers", ins.line)

    def run(m):
        lanes = batch.whole_warps(m, ins.opcode)
        pick = None if m is None else lanes
        left = gather(a, pick, (m_size, k), a_type, "A")
        right = gather(b, pick, (k, n), b_type, "B")
        total = np.matmul(left, right)
        threads = slice(None) if m is None else lanes.reshape(-1)
        old = np.stack([x[threads] for x in c], axis=1)
        old = old.reshape(len(lanes), -1)[:, order].reshape(total.shape)
        result = finish(total, old, d_type, saturate).reshape(len(lanes), -1)[:, place]
        result = result.reshape(len(lanes) * 32, len(d) * per)
        for i, row in enumerate(d):
            if per == 2:
                row[threads] = result[:, 2 * i : 2 * i + 2]
            else:
                row[threads] = result[:, i]
        batch.counters.tensor_macs += len(lanes) * m_size * n * k

    return run


def finish(total, old, kind: str, saturate: bool) -> np.ndarray:
    """Products' sum plus the accumulator, in the accumulator's type."""
    if kind == "s32":  # the sum of products is an integer below 2^24, exact in float32
        exact = total.astype(np.int64) + old
        if saturate:
            exact = np.clip(exact, -(1 << 31), (1 << 31) - 1)
        return exact.astype(np.int32)
    if kind == "f16":
        return from_f64("f16", total.astype(np.float64) + old)
    return total + old


def _register(kind: str) -> int:
    return 8 if kind == "f64" else 4


def _accumulators(batch, ins, kind: str, which: int) -> list:
    items = ins.operands[which].items
    read = batch.write if which == 0 else batch.read
    return [read(o, "f16x2" if kind == "f16" else kind, ins.line) for o in items]


# --- 8x8 matrices in shared memory ------------------------------------------------------------


def _matrices(ins) -> tuple[int, bool]:
    mods = set(ins.modifiers)
    count = next((int(x[1]) for x in ("x1", "x2", "x4") if x in mods), 0)
    known = {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16"}
    if not count or mods - known or "m8n8" not in mods:
        raise PtxError(f"unsupported form {ins.opcode}", ins.line)
    return count, "trans" in mods


@instruction("ldmatrix", kind="load matrix", together="warp")
def load_matrix(batch, ins):
    """Lanes 8i .. 8i+7 give the rows of matrix i; lane l gets row l/4, columns 2(l%4) and next."""
    count, transpose = _matrices(ins)
    items = ins.operands[0].items if isinstance(ins.operands[0], Vector) else ins.operands[:1]
    outs = [batch.write(o, "b32", ins.line) for o in items]
    address = batch.shared_address(ins.operands[1], ins.modifiers, ins.line)

    def run(m):
        lanes = batch.whole_warps(m, ins.opcode)
        givers = lanes[:, : 8 * count]
        where = address(m).reshape(-1, 32)[:, : 8 * count].ravel()
        data = batch.shared.load(where, givers.ravel(), 2, 8, "ldmatrix")
        data = data.reshape(len(lanes), count, 8, 8)
        if transpose:
            data = data.swapaxes(2, 3)
        words = np.ascontiguousarray(data).view(np.uint32).reshape(len(lanes), count, 32)
        for i, out in enumerate(outs):
            out[lanes] = words[:, i]

    return run


@instruction("stmatrix", kind="store matrix", writes=(), together="warp")
def store_matrix(batch, ins):
    count, transpose = _matrices(ins)
    operand = ins.operands[1]
    items = operand.items if isinstance(operand, Vector) else (operand,)
    sources = [batch.read(o, "b32", ins.line) for o in items]
    address = batch.shared_address(ins.operands[0], ins.modifiers, ins.line)

    def run(m):
        lanes = batch.whole_warps(m, ins.opcode)
        words = np.stack([s[lanes] for s in sources], axis=1)  # [warps, count, 32]
        data = np.ascontiguousarray(words).view(np.uint16).reshape(len(lanes), count, 8, 8)
        if transpose:
            data = data.swapaxes(2, 3)
        givers = lanes[:, : 8 * count].ravel()
        where = address(m).reshape(-1, 32)[:, : 8 * count].ravel()
        batch.shared.store(where, givers, np.ascontiguousarray(data).reshape(-1, 8), "stmatrix")

    return run


@instruction("movmatrix", kind="shuffle", together="warp")
def move_matrix(batch, ins):
    out = batch.write(ins.operands[0], "b32", ins.line)
    a = batch.read(ins.operands[1], "b32", ins.line)

    def run(m):
        lanes = batch.whole_warps(m, ins.opcode)
        data = np.ascontiguousarray(a[lanes]).view(np.uint16).reshape(-1, 8, 8).swapaxes(1, 2)
        out[lanes] = np.ascontiguousarray(data).reshape(len(lanes), 64).view(np.uint32)

    return run
