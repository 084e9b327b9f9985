# SPDX-License-Identifier: Apache-2.0
"""What one launch did, counted exactly."""

from __future__ import annotations

from dataclasses import dataclass, field


def _pair() -> dict[str, int]:
    return {"load": 0, "store": 0}


@dataclass
class Counters:
    """Counts of one launch over the blocks that ran.

    instructions: warp instructions by class (an instruction of a warp counts once, whatever its
        active lanes and its guard).
    tensor_macs: multiply-adds of mma and wgmma.
    global_bytes, global_requests, global_sectors: by "load" and "store"; bytes that threads asked
        for, warp requests, 32-byte sectors summed over the requests. Asynchronous copies count; a
        bulk copy is one request.
    unique_sectors: distinct sectors over the whole launch: the DRAM traffic of a perfect cache.
    shared_wavefronts, shared_wavefronts_minimum: passes over the 32 banks, as addressed and without
        any bank conflict, by "load" and "store".
    barriers: completed block barriers.
    local_bytes: bytes that threads moved to or from local memory.
    """

    instructions: dict[str, int] = field(default_factory=dict)
    tensor_macs: int = 0
    global_bytes: dict[str, int] = field(default_factory=_pair)
    global_requests: dict[str, int] = field(default_factory=_pair)
    global_sectors: dict[str, int] = field(default_factory=_pair)
    unique_sectors: dict[str, int] = field(default_factory=_pair)
    shared_wavefronts: dict[str, int] = field(default_factory=_pair)
    shared_wavefronts_minimum: dict[str, int] = field(default_factory=_pair)
    barriers: int = 0
    local_bytes: int = 0

    def global_access(self, kind: str, size: int, requests: int, sectors: int) -> None:
        self.global_bytes[kind] += size
        self.global_requests[kind] += requests
        self.global_sectors[kind] += sectors

    def shared_access(self, kind: str, wavefronts: int, minimum: int) -> None:
        self.shared_wavefronts[kind] += wavefronts
        self.shared_wavefronts_minimum[kind] += minimum

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts beyond the conflict-free minimum."""
        return sum(self.shared_wavefronts.values()) - sum(self.shared_wavefronts_minimum.values())
