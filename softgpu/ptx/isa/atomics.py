# SPDX-License-Identifier: Apache-2.0
"""atom and red: threads that hit one address take turns in thread order."""

from __future__ import annotations

import numpy as np

from ..errors import PtxError
from ..syntax import SIZES
from ..values import DTYPES, PACKED, from_f64, to_f64
from .load_store import WINDOWS
from .registry import instruction, put

_SPACES = ("global", "shared")
_ORDER = {
    "relaxed",
    "acquire",
    "release",
    "acq_rel",
    "cta",
    "cluster",
    "gpu",
    "sys",
    "noftz",
    "L2::cache_hint",
}
_OPERATIONS = ("add", "min", "max", "and", "or", "xor", "inc", "dec", "exch", "cas")


def _function(operation: str, kind: str):
    """new(old, b, c) on arrays of the type."""
    if operation in ("min", "max") and kind[0] in "us":
        function = np.minimum if operation == "min" else np.maximum
        return lambda old, b, c: function(old, b)
    if operation in ("add", "min", "max"):
        element = PACKED.get(kind, kind)
        wide = {"add": np.add, "min": np.fmin, "max": np.fmax}[operation]
        if element in ("f16", "bf16"):
            return lambda old, b, c: from_f64(
                element, wide(to_f64(element, old), to_f64(element, b))
            )
        return lambda old, b, c: wide(old, b)
    return {
        "and": lambda old, b, c: old & b,
        "or": lambda old, b, c: old | b,
        "xor": lambda old, b, c: old ^ b,
        "exch": lambda old, b, c: b,
        "cas": lambda old, b, c: np.where(old == b, c, old),
        "inc": lambda old, b, c: np.where(old >= b, 0, old + 1).astype(old.dtype),
        "dec": lambda old, b, c: np.where((old == 0) | (old > b), b, old - 1).astype(old.dtype),
    }[operation]


@instruction("atom", kind="atomic")
def atom(batch, ins):
    return _bind(batch, ins, ins.operands[0], ins.operands[1], ins.operands[2:])


@instruction("red", kind="atomic", writes=())
def red(batch, ins):
    return _bind(batch, ins, None, ins.operands[0], ins.operands[1:])


def _bind(batch, ins, target, place, arguments):
    space = operation = kind = None
    lanes = 1
    for modifier in ins.modifiers:
        base = modifier.split("::")[0]
        if base in _SPACES:
            space = base
        elif modifier in _OPERATIONS:
            operation = modifier
        elif modifier in ("v2", "v4", "v8"):
            lanes = int(modifier[1])
        elif modifier in SIZES:
            kind = modifier
        elif modifier not in _ORDER:
            raise PtxError(f"unknown modifier .{modifier} of {ins.opcode}", ins.line)
    _, address = batch.address(place, ins.line)
    element = DTYPES[PACKED.get(kind, kind)]
    unit = SIZES[kind]
    values = arguments[0].items if lanes > 1 else (arguments[0],)
    b = [batch.read(o, kind, ins.line) for o in values]
    c = batch.read(arguments[1], kind, ins.line) if operation == "cas" else None
    outs = []
    if target is not None:
        items = target.items if lanes > 1 else (target,)
        outs = [batch.write(o, kind, ins.line) for o in items]
    new = _function(operation, kind)

    def typed(raw):
        return (
            np.ascontiguousarray(raw)
            .view(element)
            .reshape((len(raw), -1) if kind in PACKED else len(raw))
        )

    def run(m):
        threads, where = batch.indices(m), address(m)
        memory = _memory(batch, space, where)
        if memory is batch.shared:
            where = where - (0 if space else WINDOWS["shared"])
        get, set_, turns = memory.atomic(where, threads, unit, lanes, target is not None)
        olds = np.empty((len(threads), lanes), f"u{unit}")
        for pick in turns:
            olds[pick] = get(pick)
            fresh = np.empty((len(pick), lanes), f"u{unit}")
            for lane in range(lanes):
                third = None if c is None else c[threads[pick]]
                value = new(typed(olds[pick, lane]), b[lane][threads[pick]], third)
                fresh[:, lane] = np.ascontiguousarray(value, element).view(f"u{unit}").ravel()
            set_(pick, fresh)
        for lane, out in enumerate(outs):
            put(out, m, typed(olds[:, lane]))
        batch.progress += 1

    return run


def _memory(batch, space, where):
    shared = (where >> 32 == WINDOWS["shared"] >> 32).all() if space is None else space == "shared"
    return batch.shared if shared else batch.globals
