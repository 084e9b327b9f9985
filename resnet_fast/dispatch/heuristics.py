# SPDX-License-Identifier: Apache-2.0
"""Which tile for which problem: candidates -> legality with a reason -> cost.

The candidates are the rows of one table per architecture, each tried with every split of the
products where the kernel can split them. A candidate is refused with a reason or given an estimate
of its time, and the least time wins. Nothing is measured or compiled here: `explain` shows every
candidate, and `resnet-fast tune` replaces the estimate by measurements.

A `Family` is one backend's kernel of one op: its table, its rules and its cost (`tiles.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from resnet_fast import _hardware
from resnet_fast.spec import Spec, Tile

LAUNCH_US = 2.5  # from one kernel's end to the next one's first instruction
BLOCK_US = 1.0  # first loads in, last stores out
LOAD_US = 0.6  # one load from DRAM or a busy L2

Target = _hardware.Gpu | int  # a GPU; or a compute capability, for which a product stands


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tile and either why it is refused or its estimated time.

    Args:
        tile: the tile, split included.
        refusal: why it cannot or should not be used; None where its time was estimated.
        microseconds: estimated time; infinite where it was refused.
        limited_by: what sets the estimate: "tensor", "DRAM", "L2", "latency" or "idle SMs".
    """

    tile: Tile
    refusal: str | None = None
    microseconds: float = float("inf")
    limited_by: str = ""

    def __str__(self) -> str:
        verdict = self.refusal or f"{self.microseconds:.1f} us, limited by {self.limited_by}"
        return f"{self.tile}: {verdict}"


Rule = Callable[[Spec, Tile, _hardware.Gpu], str | None]


def _allowed(spec: Spec, tile: Tile, gpu: _hardware.Gpu) -> None:
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """The tiles of one backend's kernel of one op, and how one of them is chosen.

    Args:
        name: of the kernels, for messages.
        tiles: (arch, dtype) -> the rows of the table, in the elements of dtype.
        cost: the estimated time of a legal tile, split included.
        refusal: why a tile cannot or should not cut a spec on a GPU, its split aside; else None.
        splits: shares into which a tile's products may be split.
        split_refusal: why a tile's split should not be used, else None.
    """

    name: str
    tiles: Callable[[int, str], tuple[Tile, ...]]
    cost: Callable[[Spec, Tile, _hardware.Gpu], Candidate]
    refusal: Rule = _allowed
    splits: tuple[int, ...] = (1,)
    split_refusal: Rule = _allowed

    def of(self, part: Callable[[Spec], Spec]) -> Family:
        """The same tiles for an op of which this family's kernel computes a part."""
        return replace(
            self,
            refusal=lambda spec, tile, gpu: self.refusal(part(spec), tile, gpu),
            cost=lambda spec, tile, gpu: self.cost(part(spec), tile, gpu),
            split_refusal=lambda spec, tile, gpu: self.split_refusal(part(spec), tile, gpu),
        )


def choose(spec: Spec, target: Target, family: Family) -> Tile:
    """The tile for `spec` on a GPU, or on compute capability `target` (90 for 9.0).

    Raises:
        ValueError: no tile of the table is legal, or the architecture is older than sm_80.
    """
    best = min(explain(spec, target, family), key=lambda candidate: candidate.microseconds)
    if best.refusal:
        arch = target if isinstance(target, int) else target.capability
        raise ValueError(f"no {family.name} tile for {spec} on sm_{arch}: {best}")
    return best.tile


@functools.lru_cache(maxsize=1024)
def explain(spec: Spec, target: Target, family: Family) -> tuple[Candidate, ...]:
    """Every candidate for `spec` on a target, in table order, refused with a reason or scored."""
    gpu = _hardware.described(target)
    if gpu is None:
        needed = f"the {family.name} kernels need 8.0 or newer"
        raise ValueError(f"compute capability {target / 10}: {needed}")
    known = _hardware.nearest_architecture(gpu.capability)
    candidates = []
    for row in family.tiles(known, spec.dtype):
        if refused := family.refusal(spec, row, gpu):
            candidates.append(Candidate(row, refused))
            continue
        for split in family.splits:
            tile = row if split == 1 else replace(row, SPLIT_K=split)
            refused = family.split_refusal(spec, tile, gpu)
            candidates.append(Candidate(tile, refused) if refused else family.cost(spec, tile, gpu))
    return tuple(candidates)
