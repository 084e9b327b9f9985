# SPDX-License-Identifier: Apache-2.0
"""Constants in PTX text: 12, 0x1F, -1, 0f3F800000, 0d3FF0000000000000, 1.5."""

from __future__ import annotations

import re
import struct

from .errors import PtxError
from .syntax import SIZES

NUMBER = re.compile(
    r"[-+]?(0[xX][\da-fA-F]+U?|0[fF][\da-fA-F]{8}|0[dD][\da-fA-F]{16}|\d[\d.eE+-]*U?)$"
)


def initial_bytes(text: str, kind: str, size: int, line: int) -> bytes:
    values = text.strip().strip("{}").split(",")
    out = b""
    for value in values:
        value = value.strip()
        if not NUMBER.match(value):
            raise PtxError(f"initial value {value!r} is not a number", line)
        out += immediate_bits(value, kind).to_bytes(SIZES[kind], "little")
    return out.ljust(size, b"\0")


def immediate_bits(text: str, kind: str) -> int:
    """The bit pattern of an immediate, as the type `kind` of the instruction reads it."""
    bits = 8 * SIZES[kind]
    lowered = text.lower().rstrip("u")
    if lowered.startswith("0f") and len(lowered) == 10:
        value = int(lowered[2:], 16)
        if kind == "f64":
            return struct.unpack(
                "<Q", struct.pack("<d", struct.unpack("<f", value.to_bytes(4, "little"))[0])
            )[0]
        return value
    if lowered.startswith("0d") and len(lowered) == 18:
        value = int(lowered[2:], 16)
        if kind == "f32":
            return struct.unpack(
                "<I", struct.pack("<f", struct.unpack("<d", value.to_bytes(8, "little"))[0])
            )[0]
        return value
    if any(c in lowered for c in ".e") and not lowered.startswith(("0x", "-0x")):
        code, whole = ("d", "Q") if kind == "f64" else ("f", "I")
        return struct.unpack(f"<{whole}", struct.pack(f"<{code}", float(lowered)))[0]
    return int(lowered, 0) & ((1 << bits) - 1)
