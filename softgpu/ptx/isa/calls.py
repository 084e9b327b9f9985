# SPDX-License-Identifier: Apache-2.0
"""call, of two functions of the CUDA runtime: printf prints, a failed assertion is a fault.

Arguments and results are variables of the .param space, which a call's braces declare: bytes by
thread and name.
"""

from __future__ import annotations

import re

import numpy as np

from ..errors import Fault, PtxError
from ..memory import LOCAL_WINDOW
from ..syntax import SIZES, Symbol, Vector
from .registry import at, instruction

_CONVERSION = re.compile(r"%[-+ #0]*\d*(?:\.\d+)?(hh|h|ll|l|z|j|t)?([diuoxXcsfFeEgGp%])")


def argument(batch, name: str, size: int) -> np.ndarray:
    """[threads, at least `size`] bytes of a call's variable; zeros at first."""
    held = batch.devices.setdefault("arguments", {})
    if name not in held or held[name].shape[1] < size:
        held[name] = np.zeros((batch.size, size), np.uint8)
    return held[name]


def is_argument(batch, space, base) -> bool:
    """Whether a load or store goes to a variable of a call, not to a parameter of the kernel."""
    return space == "param" and isinstance(base, Symbol) and base.name in batch.function.variables


def store_argument(batch, place, sources):
    """run(m) of st.param: the sources, as unsigned rows, one behind the other."""
    size = sum(row.itemsize for row in sources)
    space = argument(batch, place.base.name, place.offset + size)

    def run(m):
        values = np.stack([at(row, m) for row in sources], axis=1)
        space[batch.indices(m), place.offset : place.offset + size] = values.view(np.uint8)

    return run


def load_argument(batch, place, unit: int, lanes: int):
    """read(m) of ld.param: [n, lanes] of unsigned `unit` bytes."""
    size = unit * lanes

    def read(m):
        space = argument(batch, place.base.name, place.offset + size)
        raw = space[batch.indices(m), place.offset : place.offset + size]
        return np.ascontiguousarray(raw).view(f"u{unit}")

    return read


@instruction("call", kind="branch", writes=(), control=True)
def call(batch, ins):
    names = [o.name for o in ins.operands if isinstance(o, Symbol)]
    if names[0] == "__assertfail":
        return lambda m: _failed(int(batch.indices(m)[0]))
    if names[0] != "vprintf":
        raise PtxError(f"a call of {names[0]} is not supported", ins.line)
    result, passed = (o for o in ins.operands if isinstance(o, Vector))
    text, values = (argument(batch, symbol.name, 8) for symbol in passed.items)
    done = argument(batch, result.items[0].name, SIZES["b32"])

    def run(m):
        for thread in batch.indices(m):
            addresses = (int(space[thread, :8].view(np.uint64)[0]) for space in (text, values))
            print(_formatted(batch, int(thread), *addresses), end="")
            done[thread, :4] = np.array([1], np.uint32).view(np.uint8)

    return run


def _failed(thread: int):
    raise Fault("a device assertion failed", thread)


def _formatted(batch, thread: int, text: int, values: int) -> str:
    """What C's printf makes of a format and of arguments that lie as in a struct, in local
    memory."""
    offset = values - LOCAL_WINDOW

    def value(match) -> str:
        nonlocal offset
        length, kind = match.groups()
        if kind == "%":
            return "%"
        wide = kind in "fFeEgGsp" or length in ("ll", "l", "z", "j", "t")
        size = 8 if wide else 4
        offset = -(-offset // size) * size
        raw = batch.local[thread, offset : offset + size]
        offset += size
        sign = "f" if kind in "fFeEgG" else "i" if kind in "di" else "u"
        number = raw.view(f"{sign}{size}")[0].item()
        pattern = match[0].replace(length, "") if length else match[0]
        if kind == "s":
            return pattern % batch.globals.string(number, thread)
        return f"{number:#x}" if kind == "p" else pattern % number

    return _CONVERSION.sub(value, batch.globals.string(text, thread))
