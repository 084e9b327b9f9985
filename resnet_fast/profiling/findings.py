# SPDX-License-Identifier: Apache-2.0
"""What a profile knows: data without a word on how it is shown, which is what the writers read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from resnet_fast.profiling import rows as _rows
from resnet_fast.profiling.roofline import Roofline
from resnet_fast.profiling.rows import Row


@dataclass(slots=True)
class Findings:
    """What was measured of a model, and on what.

    Args:
        model: its class, and its parameters' number where that tells more.
        device, dtype, batch, shape: of the example.
        machine: versions and processor.
        roofline: what the device can do; None where that is not known.
        rows: per layer in execution order, then the gaps: they add up to `seconds`.
        seconds: median of the marked runs; on a GPU of the unmarked ones, from call to completion.
        unmarked: median of the runs that were not marked.
        overhead: what marking costs: the quickest marked run over the quickest unmarked one, less
            one; of the device's time where that is apart, else of the CPU's time in the calling
            thread, in which other processes count only as far as it spins for its own threads.
        rounds: how many there were.
        interrupted: whether Ctrl-C ended them early.
        device_apart: whether host and device have times of their own.
        peer: who is compared with; "" for nobody.
        peer_seconds: median of its unmarked runs.
        unoptimized: whether `resnet_fast.optimize` would fuse what is not fused.
        contiguous_weights: how many convolutions' weights are not channels_last.
    """

    model: str
    device: str
    dtype: str
    batch: int
    shape: tuple[int, ...]
    machine: dict[str, str]
    roofline: Roofline | None
    rows: list[Row]
    seconds: float
    unmarked: float
    overhead: float
    rounds: int
    interrupted: bool = False
    device_apart: bool = False
    peer: str = ""
    peer_seconds: float | None = None
    unoptimized: bool = False
    contiguous_weights: int = 0
    suggestions: list[str] = field(default_factory=list)

    @property
    def layers(self) -> list[Row]:
        """The rows that are layers, in execution order."""
        return [row for row in self.rows if row.kind != "gap"]

    @property
    def gaps(self) -> list[Row]:
        """The rows that are the time between."""
        return [row for row in self.rows if row.kind == "gap"]

    @property
    def stages(self) -> list[Row]:
        """A sum per stage, in the order in which they begin, then the gaps."""
        by_stage: dict[str, list[Row]] = {}
        for row in self.layers:
            by_stage.setdefault(row.stage, []).append(row)
        sums = [_rows.total(rows, name, self.seconds) for name, rows in by_stage.items()]
        return [*sums, *self.gaps]

    @property
    def total(self) -> Row:
        """The sum of all rows; its peer time is that of the whole model compared with."""
        return replace(_rows.total(self.rows, "total", self.seconds), peer=self.peer_seconds)
