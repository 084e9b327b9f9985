# SPDX-License-Identifier: Apache-2.0
"""Tensor maps: what a bulk tensor copy reads, as Python objects that a launch passes.

CUtensorMap's bytes are opaque, so the 128 bytes that a kernel gets hold a number that names the
object here.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field

import numpy as np

from .errors import Fault
from .memory import interval

_MAGIC = b"PTXMAP\0\0"
_live: weakref.WeakValueDictionary[int, TensorMap] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


@dataclass(eq=False)
class TensorMap:
    """A tiled view of an array, for kernels that copy with TMA.

    Args:
        array: the tensor; its last dimension is contiguous, the other strides multiples of 16
            bytes, its address a multiple of 16.
        box: extents of one copy, in the order of the array's shape. For im2col (pixels, channels).
        swizzle: 0, 32, 64 or 128 bytes.
        fill: value of elements outside, 0 or nan.
        lower, upper: im2col only: corners (h, w) of the box of base pixels, as offsets from the
            first and the last pixel; for a convolution -padding and padding - dilation * (R - 1).
        stride: im2col only: steps (h, w) of the base pixels.
    Raises: ValueError where the hardware would refuse.
    Example: ptx.TensorMap(weight.reshape(K, -1), box=(128, 64), swizzle=128)
    Source: CUDA driver API, cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col.
    """

    array: object
    box: tuple[int, ...]
    swizzle: int = 0
    fill: float = 0.0
    lower: tuple[int, int] | None = None
    upper: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    number: int = field(init=False)

    def __post_init__(self):
        place = interval(self.array)
        array = self.array
        self.address, self.interval = place.low, place
        tensor = hasattr(array, "untyped_storage")
        self.size = array.element_size() if tensor else array.itemsize
        strides = array.stride() if tensor else [s // array.itemsize for s in array.strides]
        self.shape = tuple(int(n) for n in reversed(array.shape))  # innermost first, as in PTX
        self.strides = tuple(int(s) * self.size for s in reversed(strides))
        self.im2col = self.lower is not None
        self.inner = tuple(reversed(self.box))
        row = self.inner[0] * self.size
        problems = [
            (self.address % 16, f"address 0x{self.address:x} is not a multiple of 16"),
            (self.strides[0] != self.size, "the last dimension must be contiguous"),
            (
                any(s % 16 for s in self.strides[1:]),
                f"strides {self.strides} are not multiples of 16",
            ),
            (row % 16, f"a box row of {row} bytes is not a multiple of 16"),
            (self.swizzle and row > self.swizzle, f"a box row of {row} bytes exceeds the swizzle"),
            (max(self.box) > (1024 if self.im2col else 256), f"box {self.box} is too large"),
            (self.swizzle not in (0, 32, 64, 128), f"swizzle {self.swizzle}"),
            (
                not self.im2col and len(self.box) != len(self.shape),
                f"box {self.box} has another rank",
            ),
            (self.im2col and len(self.box) != 2, "an im2col box is (pixels, channels)"),
        ]
        for bad, text in problems:
            if bad:
                raise ValueError(f"TensorMap: {text}")
        self.number = next(_numbers)
        _live[self.number] = self

    def encode(self) -> bytes:
        """The 128 bytes of the kernel's parameter."""
        return (_MAGIC + self.number.to_bytes(8, "little")).ljust(128, b"\0")

    @property
    def bytes(self) -> int:
        """Bytes that one copy moves, those outside included."""
        return int(np.prod(self.box)) * self.size

    def elements(self, coordinates, offsets=()) -> tuple[np.ndarray, np.ndarray]:
        """(addresses, inside) of the box at the coordinates, innermost first, box order."""
        if self.im2col:
            return self._im2col(coordinates, offsets)
        rank = len(self.shape)
        address = np.int64(self.address)
        inside = np.bool_(True)
        for axis in range(rank):
            index = int(coordinates[axis]) + np.arange(self.inner[axis])
            shape = [1] * rank
            shape[rank - 1 - axis] = -1
            inside = inside & ((index >= 0) & (index < self.shape[axis])).reshape(shape)
            address = address + (index * self.strides[axis]).reshape(shape)
        return address.reshape(-1), np.broadcast_to(inside, address.shape).reshape(-1)

    def _im2col(self, coordinates, offsets):
        """Pixels follow one another through the box of base pixels: along w, then h, then n."""
        c, w, h, n = (int(x) for x in coordinates)
        channels, pixels = self.inner
        size_c, size_w, size_h, size_n = self.shape
        (low_h, low_w), (up_h, up_w) = self.lower, self.upper
        step_h, step_w = self.stride
        count_w = -(-(size_w + up_w - low_w) // step_w)
        count_h = -(-(size_h + up_h - low_h) // step_h)
        start = (n * count_h + (h - low_h) // step_h) * count_w + (w - low_w) // step_w
        at = start + np.arange(pixels)
        w_at = at % count_w * step_w + low_w + int(offsets[0])
        h_at = at // count_w % count_h * step_h + low_h + int(offsets[1])
        n_at = at // (count_w * count_h)
        c_at = c + np.arange(channels)
        inside = (w_at >= 0) & (w_at < size_w) & (h_at >= 0) & (h_at < size_h)
        inside &= (n_at >= 0) & (n_at < size_n)
        s = self.strides
        pixel = n_at * s[3] + h_at * s[2] + w_at * s[1] + self.address
        address = pixel[:, None] + c_at * s[0]
        inside = inside[:, None] & ((c_at >= 0) & (c_at < size_c))
        return address.reshape(-1), inside.reshape(-1)

    def fill_bytes(self) -> np.ndarray:
        if self.fill == 0:
            return np.zeros(self.size, np.uint8)
        kinds = {2: np.uint16(0x7FFF), 4: np.uint32(0x7FFFFFFF), 8: np.float64("nan")}
        return np.frombuffer(kinds[self.size].tobytes(), np.uint8)


def decode(raw: bytes, thread: int) -> TensorMap:
    """The object that 128 bytes of a kernel's parameter name."""
    number = int.from_bytes(raw[8:16], "little")
    if raw[:8] != _MAGIC or number not in _live:
        raise Fault("the tensor map is not one that the launch passed", thread)
    return _live[number]
