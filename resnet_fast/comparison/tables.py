# SPDX-License-Identifier: Apache-2.0
"""A `Comparison` as tables for a terminal, and as the Markdown table of the README."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from resnet_fast._table import Column, Table
from resnet_fast.comparison.measure import Comparison, Setting
from resnet_fast.comparison.providers import OURS
from resnet_fast.comparison.steadiness import MARK, NO_RATIO, NOTE, marked, ratio_text
from resnet_fast.comparison.timing import Timing


def render(result: Comparison) -> Iterator[Table | str]:
    """What `resnet-fast compare` prints."""
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    yield f"{result.model} on {result.device}: {machine}"
    yield f"weights: {result.weights}; photographs: {', '.join(result.photographs)}"
    yield ""
    yield _agreement(result)
    if any(setting.timings for setting in result.settings):
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
        if s.timings:
            table.add(text=f"{s.dtype}, batch {s.batch}")
        for name in s.timings:
            style = "bold" if name == OURS and s.stable(name) else ""
            table.add(f"  {name}", *_numbers(s, name), style=style)
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


def markdown(results: list[dict]) -> str:
    """A table for a README: a line per model, dtype and batch, a ratio per provider.

    Args:
        results: as `Comparison.to_json` gives them, with the same providers.
    """
    first = results[0]["settings"][0]
    names = [name for name in first["timings"] if not name.startswith("torchvision")]
    head = ["model", "dtype", "batch", "torchvision at its best (ms)"]
    lines = ["| " + " | ".join(head + names) + " |", "|---" * (len(head) + len(names)) + "|"]
    for result in results:
        for setting in result["settings"]:
            timings = {name: _timing(data) for name, data in setting["timings"].items()}
            eagers = [timing for name, timing in timings.items() if name not in names]
            best = min(eagers, key=lambda timing: timing.median)
            cells = [result["model"], setting["dtype"], str(setting["batch"])]
            cells.append(marked(f"{best.median:.1f}", best.stable))
            for timing in map(timings.get, names):
                cells.append(ratio_text(timing.over(best), timing.stable and best.stable))
            lines.append("| " + " | ".join(cells) + " |")
    if MARK in "".join(lines) or NO_RATIO in "".join(lines):
        lines += ["", f"{NOTE}."]
    return "\n".join(lines)


def _timing(data: dict) -> Timing:
    """As `Comparison.to_json` wrote it, which adds what follows from the rest."""
    return Timing(**{f.name: data[f.name] for f in fields(Timing) if f.name in data})
