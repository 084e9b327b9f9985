# SPDX-License-Identifier: Apache-2.0
"""How the implicit GEMM walks a filter: in taps, each a run of products adjacent in memory.

Usually a tap is one (r, s) with its C channels. Where C is no whole number of 16-byte accesses (the
7x7 stem has C = 3), a tap is a whole filter row r: its S*C products lie side by side in x as they
do in the filter, and padding them to a step wastes a third instead of nine tenths.

The heuristics score by this what the kernel then does; no Triton is needed to know it.
"""

from __future__ import annotations

from dataclasses import dataclass

from resnet_fast.spec import ELEMENT_SIZE, ConvSpec


@dataclass(frozen=True, slots=True)
class FilterWalk:
    """The taps of one filter.

    Args:
        taps: how many taps there are: R * S, or R where rows are merged.
        products: how many products each has: C, or S * C.
        merged: whether a filter row is one tap.
    """

    taps: int
    products: int
    merged: bool

    def steps(self, block_k: int) -> int:
        """Steps of `block_k` products; no step crosses from one tap into the next."""
        return self.taps * -(-self.products // block_k)

    def is_even(self, block_k: int) -> bool:
        """Whether every step is full."""
        return self.products % block_k == 0


def filter_walk(spec: ConvSpec, stride_w: int | None = None) -> FilterWalk:
    """The walk of `spec`, where neighbours along W are `stride_w` elements apart (None: dense)."""
    dense = stride_w is None or stride_w == spec.c
    odd_channels = spec.c * ELEMENT_SIZE[spec.dtype] % 16 != 0
    if dense and odd_channels and spec.s > 1 and spec.dilation[1] == 1:
        return FilterWalk(spec.r, spec.s * spec.c, True)
    return FilterWalk(spec.r * spec.s, spec.c, False)
