# SPDX-License-Identifier: Apache-2.0
"""A `Profile` as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from resnet_fast._table import Column, Table, wrapped
from resnet_fast.measuring.steadiness import is_stable, marked, ratio_text
from resnet_fast.profiling.findings import Findings
from resnet_fast.profiling.parts import REMAINDER, Part

PAUSED = 0.05  # of the whole: more than a machine to itself shows
# What is left out of a narrow terminal, the highest first.
RANKS = {"tile": 5, "MFLOP": 4, "MB": 4, "TFLOP/s": 3, "GB/s": 3, "host ms": 2, "share": 1}


def render(profile: Findings, layers: bool, top: int, width: int | None = None) -> str:
    """The stages, the layers (all in order, or the slowest), and what to try.

    Args:
        profile: what was found.
        layers: all of them, instead of the slowest.
        top: how many are the slowest.
        width: of the terminal; None for as wide as it gets.
    """
    parts = ["\n".join(_fitted(line, width) for line in [heading(profile), *profile.warnings])]
    parts.append(_table("stage", [*profile.stages, *profile.sums], profile, width))
    if layers:
        parts.append(_table("layer", [*profile.rows, *profile.sums], profile, width))
    else:
        slowest = sorted(profile.layers, key=lambda row: -row.seconds)[:top]
        first = f"slowest {len(slowest)} of {len(profile.layers)}"
        parts.append(_table(first, slowest, profile, width))
    if profile.suggestions:
        tips = "\n".join(["What to try:", *(f"- {line}" for line in profile.suggestions)])
        parts.append(_fitted(tips, width))
    return "\n\n".join(parts)


def _fitted(text: str, width: int | None) -> str:
    return "\n".join(wrapped(text, width))


def heading(profile: Findings) -> str:
    """What was measured, on what, and how."""
    machine = ", ".join(f"{name} {value}" for name, value in profile.machine.items())
    kind = "device time" if profile.device_apart else "wall time"
    lines = [
        f"{profile.model}, {profile.dtype}, {'x'.join(map(str, profile.shape))}, {profile.device}",
        f"on {machine}",
        f"measured: {kind}, medians of {profile.rounds} runs; marking the layers costs "
        f"{profile.marking}; unmarked runs take {profile.unmarked * 1e3:.2f} ms",
    ]
    if profile.roofline is None:
        lines.append("roofline: none is known for this device and dtype")
    else:
        lines.append(f"roofline: {profile.roofline}")
        lines += [f"  {note}" for note in profile.roofline.notes]
    if profile.peer:
        lines.append(f"{profile.peer}: the same layers there, norms and ReLUs with them")
    paused = sum(row.share for row in profile.gaps if row.name == REMAINDER)
    if paused > PAUSED:
        lines.append(
            f"{paused:.0%} of the time is interruptions: something else keeps this machine busy"
        )
    if profile.interrupted:
        lines.append("interrupted: these are the rounds that were complete")
    return "\n".join(lines)


def columns(profile: Findings) -> tuple[str, ...]:
    """The headings behind the first."""
    host = ("host ms",) if profile.device_apart else ()
    peer = (f"{profile.peer} ms", "ratio") if profile.peer else ()
    return (
        "ms", *host, "share", "MFLOP", "MB", "TFLOP/s", "GB/s", "of roof", "bound by", "backend",
        "tile", *peer,
    )  # fmt: skip


def obtained(column: str) -> str:
    """How a column's numbers were obtained; "" where it has none."""
    if column in ("MFLOP", "MB"):
        return "counted"
    if column in ("TFLOP/s", "GB/s", "of roof"):
        return "counted / measured"
    return "" if column in ("bound by", "backend", "tile") else "measured"


def cells(row: Part, profile: Findings) -> tuple[str, ...]:
    """A row's cells, as `columns` has them; empty where there is nothing to say."""
    worked = bool(row.bytes)
    host = (_or("{:.3f}", row.host and row.host * 1e3),) if profile.device_apart else ()
    peer: tuple[str, ...] = ()
    if profile.peer:
        stable = is_stable(row.peer_spread, profile.busy)
        theirs = marked(_or("{:.3f}", row.peer and row.peer * 1e3), stable)
        peer = (theirs, ratio_text(row.ratio, stable and profile.stable(row)) if row.peer else "")
    return (
        _time(row, profile), *host, f"{row.share:.1%}",
        _or("{:.1f}", row.flops / 1e6 or None), _or("{:.2f}", row.bytes / 1e6 if worked else None),
        _or("{:.3f}", row.tflops or None), _or("{:.1f}", row.bandwidth_gbs if worked else None),
        _or("{:.0%}", row.roof if worked and profile.roofline else None),
        row.bound, row.backend, row.tile, *peer,
    )  # fmt: skip


def _time(row: Part, profile: Findings) -> str:
    if row.kind == "gap" and not row.seconds:  # less than nothing: the sum's noise
        return "noise"
    return marked(f"{row.seconds * 1e3:.3f}", profile.stable(row))


def _or(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _table(first: str, rows: Sequence[Part], profile: Findings, width: int | None) -> str:
    left = (first, "bound by", "backend", "tile")
    names = (first, *columns(profile))
    table = Table("", [Column(name, name not in left, RANKS.get(name, 0)) for name in names])
    table.elsewhere = "they are in --json and --csv"
    for row in rows:
        table.add(row.name, *cells(row, profile))
    return "\n".join(line.text for line in table.lines(width))
