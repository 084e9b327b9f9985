# SPDX-License-Identifier: Apache-2.0
"""Happens-before between the warps of a block, as vector clocks.

Row g of `known` belongs to warp g of the batch: known[g, VIEW, s] is the latest time of slot s (a
warp of the same block, or an agent that lands asynchronous copies) whose writes warp g may see.
VIEW is GENERIC for ordinary accesses and ASYNC for those of the async proxy (wgmma, bulk copies),
which see ordinary writes only behind a fence.proxy.async.
"""

from __future__ import annotations

import numpy as np

GENERIC, ASYNC = 0, 1


class Clocks:
    def __init__(self, blocks: int, warps: int):
        self.blocks, self.warps, self.slots = blocks, warps, warps
        self.known = np.zeros((blocks * warps, 2, warps), np.int32)
        self.now = np.ones(blocks * warps, np.int32)  # each warp's own time
        self._stamp(np.arange(blocks * warps))

    def _stamp(self, rows) -> None:
        self.known[rows, GENERIC, rows % self.warps] = self.now[rows]

    def tick(self, rows) -> None:
        """What these warps do from here on is not covered by what they released before."""
        self.now[rows] += 1
        self._stamp(rows)

    def agent(self, index: int) -> int:
        """The slot of an agent; each mbarrier of a block has its own."""
        while self.warps + index >= self.slots:
            self.known = np.concatenate([self.known, np.zeros_like(self.known[..., :8])], axis=2)
            self.slots = self.known.shape[2]
        return self.warps + index

    def join_blocks(self) -> None:
        """A barrier of all warps in every block of the batch."""
        shape = (self.blocks, self.warps, 2, self.slots)
        joined = self.known.reshape(shape).max(axis=1, keepdims=True)
        self.known[:] = np.broadcast_to(joined, shape).reshape(self.known.shape)
        self.tick(np.arange(self.blocks * self.warps))

    def join(self, givers: np.ndarray, takers: np.ndarray) -> None:
        """A barrier of one block: some warps only arrive, others also wait and see it all."""
        joined = self.known[givers].max(axis=0)
        self.known[takers] = np.maximum(self.known[takers], joined)
        self.tick(givers)

    def release(self, row: int, into: np.ndarray) -> np.ndarray:
        """What the warp knows, added to a barrier object's knowledge; both are [2, slots]."""
        merged = self.known[row].copy()
        merged[:, : into.shape[1]] = np.maximum(merged[:, : into.shape[1]], into)
        self.tick(np.array([row]))
        return merged

    def acquire(self, rows: np.ndarray, knowledge: np.ndarray) -> None:
        n = knowledge.shape[1]
        self.known[rows, :, :n] = np.maximum(self.known[rows, :, :n], knowledge)

    def fence_async(self, rows: np.ndarray) -> None:
        """fence.proxy.async: what the warp sees, the async proxy sees after it."""
        self.known[rows, ASYNC] = np.maximum(self.known[rows, ASYNC], self.known[rows, GENERIC])
        self.tick(rows)
