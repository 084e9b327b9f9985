# SPDX-License-Identifier: Apache-2.0
"""Bytes of global memory that a launch must not write because of how it reads them.

Bytes read by ld.global.nc must not change until the kernel ends: they may come from a cache that
stores do not reach. Bytes read by an asynchronous copy must not change until its wait.
"""

from __future__ import annotations

import numpy as np

from .errors import Fault
from .syntax import Function

STORED, CONSTANT = 1, 2  # bits of each byte's shadow


class Aliases:
    """For one launch; `shadow_of(size)` makes an array of `size` zero bytes."""

    def __init__(self, functions: list[Function], shadow_of):
        bodies = (ins for function in functions for ins in function.body)
        self.watched = any("nc" in ins.modifiers for ins in bodies if ins.name == "ld")
        self.readers: list = []  # copies under way; sources() is a list of (addresses, lengths)
        self._shadow_of, self._shadows = shadow_of, {}

    def forget(self, batch) -> None:
        """Forget the copies under way: the blocks that started them have ended."""
        self.readers = [reader for reader in self.readers if reader.batch is not batch]

    def load_constant(self, buffer, address, size: int, threads) -> None:
        """ld.global.nc of `size` bytes at each address."""
        shadow, index = self._shadow(buffer, size), (address - buffer.base) // size
        stored = (shadow[index] & _pattern(shadow, STORED)).any(axis=1)
        if stored.any():
            raise Fault(
                "ld.global.nc of bytes that this launch has stored: they must not change in it",
                _first(stored, threads),
            )
        shadow[index] |= _pattern(shadow, CONSTANT)

    def store(self, buffer, address, size: int, threads, what: str) -> None:
        """A store or an atomic of `size` bytes at each address."""
        self._check_readers(address, size, threads, what)
        if not self.watched:
            return
        shadow, index = self._shadow(buffer, size), (address - buffer.base) // size
        constant = (shadow[index] & _pattern(shadow, CONSTANT)).any(axis=1)
        if constant.any():
            raise Fault(
                f"{what} over bytes that this launch has read by ld.global.nc: they must not "
                "change in it",
                _first(constant, threads),
            )
        shadow[index] |= _pattern(shadow, STORED)

    def _check_readers(self, address, size: int, threads, what: str) -> None:
        for reader in self.readers:
            for start, length in reader.sources():
                meets = (address < (start + length).max(initial=0)) & (
                    address + size > start.min(initial=1 << 62)
                )
                for i in np.flatnonzero(meets):
                    if ((start < address[i] + size) & (start + length > address[i])).any():
                        raise Fault(
                            f"{what} over bytes that an asynchronous copy still reads: its wait "
                            "is missing",
                            int(i if threads is None else threads[i]),
                        )

    def _shadow(self, buffer, size: int):
        """[count, lanes] of unsigned numbers, a row for `size` bytes."""
        if buffer.base not in self._shadows:
            self._shadows[buffer.base] = self._shadow_of(buffer.size)
        unit = min(size, 8)
        shadow = self._shadows[buffer.base]
        return shadow[: len(shadow) // size * size].view(f"u{unit}").reshape(-1, size // unit)


def _pattern(shadow, bit: int):
    """The bit in every byte of the shadow's numbers."""
    return shadow.dtype.type(bit * 0x0101010101010101 & (1 << 8 * shadow.itemsize) - 1)


def _first(bad, threads) -> int:
    i = int(np.flatnonzero(bad)[0])
    return i if threads is None else int(threads[i])
