# SPDX-License-Identifier: Apache-2.0
"""From marked replays to a part per layer: times from the marks, work from the layer list.

What ran between two marked layers is matched by order: if the layer list has an addition between
`bn2` and `relu`, the time between the two is the addition's; if it has nothing there, it is the
host's. So no time is lost, and none is counted twice.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from resnet_fast.measuring import steadiness
from resnet_fast.profiling.layers import Layer
from resnet_fast.profiling.roofline import Roofline
from resnet_fast.profiling.timeline import POOL, RANGE_CHECK, Edge, Replay

GAP = "between layers"  # the host, and on a GPU the launches that the device waits for
# The whole's median less the sum of the layers' medians; nothing where noise makes that the larger.
# What hits a few layers of every run, other ones each time, is in the median of no layer: other
# processes, as a rule.
REMAINDER = "interruptions"
LAUNCHES = "host and launches"  # of a GPU's wall time, what the device's layers are not


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a run's time: a layer, a sum of layers, or a gap.

    Args:
        name, stage, kind: see `layers.Layer`; a gap is of the kind "gap".
        seconds: median over the replays: on the device of a GPU, else wall time.
        host: seconds that the host needed to queue it; None where that is not apart.
        flops, bytes, weight_bytes: of `layers.Layer`.
        share: of the whole.
        roof: how close to its floor it runs: floor / seconds; 0 where nothing is computed.
        bound: "memory", "arithmetic" or "launch"; "" for a gap.
        backend: what ran it: a backend's name, or "torch".
        tile: the kernel's tile, where the backend tells it.
        peer: seconds of the same layer in the model compared with; None where there is none.
        spread, peer_spread: of the two, from p20 to p80 as a part of the median.
        why: why no fused kernel took it, if none did.
    """

    name: str
    stage: str
    kind: str
    seconds: float
    host: float | None = None
    flops: int = 0
    bytes: int = 0
    weight_bytes: int = 0
    share: float = 0.0
    roof: float = 0.0
    bound: str = ""
    backend: str = ""
    tile: str = ""
    peer: float | None = None
    spread: float = 0.0
    peer_spread: float = 0.0
    why: str = ""

    @property
    def ratio(self) -> float | None:
        """The time over the peer's; None where there is none, or where it would say nothing."""
        if self.peer is None:
            return None
        ours, theirs = (
            steadiness.scatter(s, steadiness.MIN_ROUNDS) for s in (self.spread, self.peer_spread)
        )
        return steadiness.ratio(self.seconds, ours, self.peer, theirs)

    @property
    def tflops(self) -> float:
        """Achieved TFLOP/s."""
        return self.flops / self.seconds / 1e12 if self.seconds > 0 else 0.0

    @property
    def bandwidth_gbs(self) -> float:
        """Achieved GB/s, by the bytes that had to move."""
        return self.bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0


class Place(NamedTuple):
    """Where a row's time is found in a replay: a span, or what lies before one (or before the end).

    Args:
        index: of the span.
        before: whether it is the time before the span.
        layers: what runs there; none for a module that does nothing.
        name: the span's, or the layers'.
    """

    index: int
    before: bool
    layers: list[Layer]
    name: str


def places(layers: Sequence[Layer], names: Sequence[str]) -> list[Place]:
    """Match the layer list with the names of the spans, both in execution order."""
    found: list[Place] = []
    at = 0
    for index, name in enumerate(names):
        match = next((i for i in range(at, len(layers)) if _is_of(name, layers[i])), None)
        if match is None:
            found.append(Place(index, False, [], name))
            continue
        if match > at:
            found.append(_between(index, layers[at:match]))
            if names[index - 1] == RANGE_CHECK:  # it looks at the result of what is in between
                found[-2:] = _between(index - 1, layers[at:match]), found[-2]
        at = match + 1
        while at < len(layers) and layers[at].name.startswith(f"{name}."):
            at += 1  # one more of its ops
        found.append(Place(index, False, list(layers[match:at]), _name_of(name, layers[match])))
    if at < len(layers):
        found.append(_between(len(names), layers[at:]))
    return found


def _is_of(name: str, layer: Layer) -> bool:
    if name == POOL:
        return layer.kind == "pool"
    # What calls no module may have children all the same, and then its ops are named one by one.
    return layer.name == name or layer.name.startswith(f"{name}.")


def _name_of(name: str, layer: Layer) -> str:
    return layer.name if name == POOL else name


def _between(index: int, skipped: Sequence[Layer]) -> Place:
    return Place(index, True, list(skipped), " + ".join(layer.name for layer in skipped))


def rows_of(layers: Sequence[Layer], replays: Sequence[Replay], device_apart: bool) -> list[Part]:
    """Rows in execution order, not yet held against anything, and the gap between the layers.

    Args:
        layers: `layers.as_run` of the model.
        replays: that ran the same layers.
        device_apart: whether the host has times of its own.
    """
    found: list[Part] = []
    taken = set()
    for place in places(layers, replays[0].names):
        edge = 2 * place.index + (0 if place.before else 1)
        taken.add(edge)
        edges = [replay.edges[edge] for replay in replays]
        row = replace(_row(place, *_medians(edges, device_apart), found), spread=_spread(edges))
        ours = not place.before and replays[0].names[place.index] in (POOL, RANGE_CHECK)
        found.append(replace(row, backend="cpu") if ours else row)
    rest = [
        Edge(*map(sum, zip(*(e for n, e in enumerate(r.edges) if n not in taken), strict=True)))
        for r in replays
    ]
    gap = Part(GAP, "", "gap", *_medians(rest, device_apart), spread=_spread(rest))
    return [*found, gap]


def _medians(edges: Sequence[Edge], device_apart: bool) -> tuple[float, float | None]:
    host = statistics.median(edge.host for edge in edges) if device_apart else None
    return statistics.median(edge.device for edge in edges), host


def _spread(edges: Sequence[Edge]) -> float:
    return steadiness.spread_of([edge.device for edge in edges])


def _row(place: Place, device: float, host: float | None, before: list[Part]) -> Part:
    if not place.layers:
        stage = before[-1].stage if before else "stem"
        return Part(place.name, stage, "other", device, host)
    first = max(place.layers, key=lambda layer: (layer.flops, layer.bytes))
    total = {
        name: sum(getattr(layer, name) for layer in place.layers)
        for name in ("flops", "bytes", "weight_bytes")
    }
    return Part(place.name, first.stage, first.kind, device, host, **total)


def against(row: Part, roofline: Roofline | None, whole: float, device_apart: bool) -> Part:
    """The row with its share of the whole and of the roofline, and what binds it."""
    share = row.seconds / whole if whole > 0 else 0.0
    if roofline is None or not row.bytes or row.seconds <= 0:
        return replace(row, share=share)
    floor = roofline.time_floor(row.flops, row.bytes)
    bound = floor.bound
    if device_apart and row.host is not None and row.host > row.seconds:
        bound = "launch"  # the device is done before the host has queued the next
    return replace(row, share=share, roof=floor.seconds / row.seconds, bound=bound)


def total(rows: Sequence[Part], name: str, whole: float) -> Part:
    """The sum of rows: their times add, and so do their floors."""
    seconds = sum(row.seconds for row in rows)
    floor = sum(row.roof * row.seconds for row in rows)
    bounds: dict[str, float] = {}
    for row in rows:
        bounds[row.bound] = bounds.get(row.bound, 0.0) + row.seconds
    bounds.pop("", None)
    hosts = [row.host for row in rows if row.host is not None]
    peers = [row for row in rows if row.peer is not None]
    peer = sum(row.peer for row in peers)
    # As if all layers became slower together: what hits one of them alone evens out.
    width = sum(row.spread * row.seconds for row in rows)
    peer_width = sum(row.peer_spread * row.peer for row in peers)
    return Part(
        name, name, "sum", seconds, sum(hosts) if hosts else None,
        sum(row.flops for row in rows), sum(row.bytes for row in rows),
        sum(row.weight_bytes for row in rows),
        share=seconds / whole if whole > 0 else 0.0,
        roof=floor / seconds if seconds > 0 else 0.0,
        bound=max(bounds, key=bounds.get) if bounds else "",
        peer=peer if peers else None,
        spread=width / seconds if seconds > 0 else 0.0,
        peer_spread=peer_width / peer if peer > 0 else 0.0,
    )  # fmt: skip


def peer_rows(rows: Sequence[Part]) -> dict[str, Part]:
    """An unfused model's rows, summed by the names that its layers have where they run fused.

    Norms and ReLUs count as the convolution before them, an addition as the last convolution of its
    block; the ReLU behind it follows it there.
    """
    found: dict[str, list[Part]] = {}
    last_of_block: dict[str, str] = {}
    current = ""
    for row in rows:
        block = row.name.rpartition(".")[0]
        if row.kind == "conv":
            current = last_of_block[block] = row.name
        elif row.kind == "add":
            current = last_of_block.get(block, row.name)
        elif row.kind not in ("norm", "relu") or not current:
            current = ""
            found.setdefault(row.name, []).append(row)
            continue
        found.setdefault(current, []).append(row)
    return {name: total(parts, name, 0.0) for name, parts in found.items()}
