# SPDX-License-Identifier: Apache-2.0
"""A `Profile` as a Chrome trace: one run of the model with the median time of each layer.

Source: "Trace Event Format", the Chromium project; https://ui.perfetto.dev opens it.
"""

from __future__ import annotations

from itertools import groupby

from resnet_fast.profiling.findings import Findings
from resnet_fast.profiling.parts import Part

MODEL, STAGES, BLOCKS, LAYERS, HOST = range(1, 6)
TRACKS = {MODEL: "model", STAGES: "stages", BLOCKS: "blocks", LAYERS: "layers", HOST: "host"}


def block_of(row: Part) -> str:
    """The block of a stage that a layer is in, "layer1.0"; "" for one that is in none."""
    rest = row.name.removeprefix(f"{row.stage}.")
    number = rest.partition(".")[0]
    return f"{row.stage}.{number}" if rest != row.name and number.isdigit() else ""


def trace_of(profile: Findings) -> dict:
    """The trace; gaps stand at its end, as it is not known which of them was how long."""
    tracks = {k: v for k, v in TRACKS.items() if k != HOST or profile.device_apart}
    events = [_named("process_name", 0, f"{profile.model} on {profile.device}")]
    events += [_named("thread_name", track, name) for track, name in tracks.items()]
    events.append(_slice(profile.model, MODEL, 0.0, profile.seconds, {}))
    starts, at, host_at = [], 0.0, 0.0
    for row in profile.rows:
        starts.append(at)
        events.append(_slice(row.name, LAYERS, at, row.seconds, _facts(row)))
        if row.host is not None:
            events.append(_slice(row.name, HOST, host_at, row.host, {}))
            host_at += row.host
        at += row.seconds
    placed = list(zip(profile.rows, starts, strict=True))
    for track, group in ((STAGES, lambda pair: pair[0].stage), (BLOCKS, _block)):
        for name, pairs in groupby(placed, group):
            pairs = list(pairs)
            seconds = sum(row.seconds for row, _ in pairs)
            if name:
                events.append(_slice(name, track, pairs[0][1], seconds, {}))
    facts = {"device": profile.device, "dtype": profile.dtype, "shape": list(profile.shape)}
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {**facts, **profile.machine},
    }


def _block(pair: tuple[Part, float]) -> str:
    return block_of(pair[0])


def _named(what: str, track: int, name: str) -> dict:
    return {"ph": "M", "pid": 1, "tid": track, "name": what, "args": {"name": name}}


def _slice(name: str, track: int, start: float, seconds: float, facts: dict) -> dict:
    return {
        "ph": "X", "pid": 1, "tid": track, "name": name, "ts": start * 1e6, "dur": seconds * 1e6,
        "args": facts,
    }  # fmt: skip


def _facts(row: Part) -> dict:
    facts = {
        "kind": row.kind, "backend": row.backend, "tile": row.tile, "bound by": row.bound,
        "share": round(row.share, 4), "flops": row.flops, "bytes": row.bytes,
        "TFLOP/s": round(row.tflops, 4), "GB/s": round(row.bandwidth_gbs, 2),
        "of roofline": round(row.roof, 4),
    }  # fmt: skip
    return {name: value for name, value in facts.items() if value not in ("", 0)}
