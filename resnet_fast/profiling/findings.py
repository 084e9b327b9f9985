# SPDX-License-Identifier: Apache-2.0
"""What a profile found: plain data, which text.py, page.py, picture.py and trace.py show."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from resnet_fast.measuring import steadiness
from resnet_fast.profiling import parts
from resnet_fast.profiling.parts import Part
from resnet_fast.profiling.roofline import Roofline


@dataclass(slots=True)
class Findings:
    """What was measured of a model, and on what.

    Args:
        model: its class, and its parameters' number where that tells more.
        device, dtype, batch, shape: of the example.
        machine: versions and processor.
        roofline: what the device can do; None where that is not known.
        rows: per layer in execution order, then the gaps: they add up to `seconds`.
        seconds: median of the marked runs; on a GPU of the unmarked ones, from call to completion;
            the sum of the layers' medians where noise makes that larger.
        unmarked: median of the runs that were not marked.
        spread: of those, from p20 to p80, as a part of the median.
        overhead: what marking costs: the quickest marked run over the quickest unmarked one, less
            one; of the device's time where that is apart, else of the CPU's time in the calling
            thread, in which other processes count only as far as it spins for its own threads.
        overhead_noise: how far from nothing that may be without meaning anything.
        busy: the share of the CPU time that others took meanwhile; None where it is not known.
        rounds: how many there were.
        interrupted: whether Ctrl-C ended them early.
        device_apart: whether host and device have times of their own.
        peer: the model compared with; "" for none.
        peer_seconds, peer_spread: median of its unmarked runs, and their spread.
        peer_whole: what `seconds` is of ours.
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
    rows: list[Part]
    seconds: float
    unmarked: float
    overhead: float
    rounds: int
    spread: float = 0.0
    overhead_noise: float = 0.0
    busy: float | None = None
    interrupted: bool = False
    device_apart: bool = False
    peer: str = ""
    peer_seconds: float | None = None
    peer_spread: float = 0.0
    peer_whole: float | None = None
    unoptimized: bool = False
    contiguous_weights: int = 0
    suggestions: list[str] = field(default_factory=list)

    @property
    def layers(self) -> list[Part]:
        """The rows that are layers, in execution order."""
        return [row for row in self.rows if row.kind != "gap"]

    @property
    def gaps(self) -> list[Part]:
        """The rows that are the time between."""
        return [row for row in self.rows if row.kind == "gap"]

    @property
    def stages(self) -> list[Part]:
        """A sum per stage, in the order in which they begin, then the gaps."""
        by_stage: dict[str, list[Part]] = {}
        for row in self.layers:
            by_stage.setdefault(row.stage, []).append(row)
        sums = [parts.total(rows, name, self.seconds) for name, rows in by_stage.items()]
        return [*sums, *self.gaps]

    @property
    def total(self) -> Part:
        """The sum of all rows, and of all of the peer's, measured as they were."""
        total = parts.total(self.rows, "total", self.seconds)
        spreads = {"spread": self.spread, "peer_spread": self.peer_spread}
        return replace(total, peer=self.peer_whole, **spreads)

    @property
    def run(self) -> Part:
        """A run that was not marked, of both models: what a user waits for."""
        total, slower = self.total, self.unmarked / self.seconds if self.seconds > 0 else 1.0
        return replace(
            total, name="unmarked run", seconds=self.unmarked, host=None, share=slower,
            roof=total.roof / slower if slower else 0.0, peer=self.peer_seconds,
        )  # fmt: skip

    @property
    def sums(self) -> list[Part]:
        """What stands below a table: on a GPU the rows add up to a run that was not marked."""
        return [self.total] if self.device_apart else [self.total, self.run]

    @property
    def marking(self) -> str:
        """What marking the layers costs, if that can be told from the noise."""
        if self.overhead <= self.overhead_noise:
            return "less than the noise"
        return f"{self.overhead:+.1%}"

    def stable(self, row: Part) -> bool:
        """Whether the row's time may be taken as a fact."""
        return steadiness.is_stable(row.spread, self.busy)

    @property
    def warnings(self) -> list[str]:
        """What to know before the times are taken as facts; nothing where all of them may be."""
        times = [*self.layers, self.run]
        loose = sum(not self.stable(time) for time in times)
        return [*steadiness.too_busy(self.busy), *steadiness.unstable(loose, len(times))]
