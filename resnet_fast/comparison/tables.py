# SPDX-License-Identifier: Apache-2.0
"""A `Comparison` as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from resnet_fast._table import Column, Table
from resnet_fast.comparison.measure import Comparison, Setting
from resnet_fast.measuring.peers import OURS
from resnet_fast.measuring.steadiness import marked, ratio_text


def render(result: Comparison) -> Iterator[Table | str]:
    """What `resnet-fast compare` prints."""
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    yield f"{result.model} on {result.device}: {machine}"
    yield f"weights: {result.weights}; photographs: {', '.join(result.photographs)}"
    yield ""
    yield _agreement(result)
    if any(setting.timings or setting.untimed for setting in result.settings):
        yield ""
        yield _times(result)
    yield from result.warnings
    if result.interrupted:
        yield "interrupted: these are the settings that were complete"


def _agreement(result: Comparison) -> Table:
    names = ("dtype", "ours", "eager", "limit", "top-1", "eager's", "fused", "")
    left = ("dtype", "fused", "")
    title = "Do they agree? Errors of the logits against float64, and classes kept"
    table = Table(title, [Column(name, name not in left) for name in names])
    seen = set()
    for s in result.settings:
        if s.dtype in seen:
            continue
        seen.add(s.dtype)
        table.add(
            s.dtype,
            f"{s.verdict.ours:.2e}",
            f"{s.verdict.eager:.2e}",
            f"{s.verdict.limit:.2e}",
            f"{s.top1_ours}/{s.photographs}",
            f"{s.top1_eager}/{s.photographs}",
            f"{s.fused[0]} of {s.fused[1]}",
            "agree" if s.agrees else "DISAGREE: not timed",
            style="" if s.agrees else "red",
        )
    return table


def _times(result: Comparison) -> Table:
    title = "Wall time per batch, measured in this run (ratio: to eager at its best)"
    names = ("", "median ms", "p20", "p80", "images/s", "ratio")
    table = Table(title, [Column(name, name != "") for name in names])
    for s in result.settings:
        if s.timings or s.untimed:
            table.add(text=f"{s.dtype}, batch {s.batch}")
        for name in s.timings:
            style = "bold" if name == OURS and s.stable(name) else ""
            table.add(f"  {name}", *_numbers(s, name), style=style)
        for name, reason in s.untimed.items():
            table.add(f"  {name}", text=reason, style="yellow")
    return table


def _numbers(setting: Setting, name: str) -> tuple[str, ...]:
    timing = setting.timings[name]
    return (
        marked(f"{timing.median:.1f}", timing.stable),
        f"{timing.p20:.1f}",
        f"{timing.p80:.1f}",
        marked(f"{setting.batch / timing.median * 1e3:.1f}", timing.stable),
        ratio_text(setting.ratio(name), setting.stable(name)),
    )
