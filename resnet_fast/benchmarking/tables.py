# SPDX-License-Identifier: Apache-2.0
"""Results as tables for a terminal. A table's title says how its numbers were obtained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from resnet_fast._table import Column, Table
from resnet_fast.benchmarking.changes import NO_TIME, SAME, SLOWER, Change
from resnet_fast.benchmarking.providers import EAGER
from resnet_fast.benchmarking.rows import Measurement, Results
from resnet_fast.measuring.peers import OURS
from resnet_fast.measuring.steadiness import marked, ratio_text

# What is left out of a narrow terminal, the highest first.
RANKS = {"tile": 6, "MB": 5, "p99": 4, "first ms": 4, "eager's": 3, "p20": 2, "p80": 2, "error": 1}


def render(results: Results) -> Iterator[Table | str]:
    """What `resnet-fast bench` prints."""
    if results.rows:
        yield str(results.rows[0].environment)
    for suite in ("models", "ops"):
        found = [row for row in results.rows if row.suite == suite]
        if found:
            yield ""
            yield times(suite, found)
            yield f"inputs: {inputs_of(found)}"
    yield from results.warnings
    reasons: dict[str, list[str]] = {}
    for name, why in results.left_out.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        yield f"not asked: {'; '.join(names)}: {why}"
    if not results.complete:
        yield "interrupted: the rows above are what was measured until then"


def times(suite: str, found: list[Measurement]) -> Table:
    """The rows of a suite, a group per case."""
    device = any(row.device_ms is not None for row in found)
    ratio = f"ratio: {clock_used(found)} time over {EAGER[suite]}'s; below 1 is faster"
    names = ["provider", "backend", "tile", "wall ms", "p20", "p80", "p99"]
    names += ["device ms"] * device + ["first ms", "MB", "error", "eager's", "ratio"]
    names += ["roof"] * (suite == "ops")
    texts = ("provider", "backend", "tile")
    columns = [Column(name, name not in texts, RANKS.get(name, 0)) for name in names]
    table = Table(f"{suite}: measured ({ratio})", columns, elsewhere="rows.csv has them")
    last = None
    for row in shortened(found):
        if row.case != last:
            table.add(text=row.label)
        last = row.case
        if not row.measured:
            reason = f"{row.status}: {row.reason}" if row.reason else row.status
            table.add(f"  {row.provider}", text=reason, style="yellow")
            continue
        cells = [f"  {row.provider}", row.backend, str(row.tile or ""), median_cell(row, "wall")]
        cells += map(milliseconds, (row.wall_p20_ms, row.wall_p80_ms, row.wall_p99_ms))
        cells += [median_cell(row, "device")] * device
        cells += [milliseconds(row.first_ms), number(row.peak_memory_mb, ".1f")]
        cells += [number(row.error, ".1e"), number(row.eager_error, ".1e")]
        cells += [ratio_cell(row, found)]
        cells += [number(row.roof_share, ".0%")] * (suite == "ops")
        table.add(*cells, style="bold" if row.provider == OURS and row.stable else "")
        if row.reason:
            table.add(text=f"    {row.provider}: {row.reason}", style="yellow")
    return table


def shortened(found: list[Measurement]) -> list[Measurement]:
    """The rows, with those of a case in one where none has a time and all for the same reason."""
    short = []
    for _, group in itertools.groupby(found, key=lambda row: row.case):
        of_case = list(group)
        why = {(row.status, row.reason) for row in of_case}
        if len(of_case) > 1 and len(why) == 1 and not of_case[0].measured:
            of_case = [replace(of_case[0], provider=f"all {len(of_case)}")]
        short += of_case
    return short


def inputs_of(found: list[Measurement]) -> str:
    """How the rows' inputs met the caches, in a line."""
    texts = list(dict.fromkeys(row.inputs for row in found if row.inputs))
    if not texts:
        return "none were made"
    others = {1: "", 2: "; another way is in the rows"}
    return texts[0] + others.get(len(texts), f"; {len(texts) - 1} other ways are in the rows")


def number(value: float | None, form: str) -> str:
    """A number, or nothing where it is not known."""
    return "" if value is None else format(value, form)


def clock_used(found: list[Measurement]) -> str:
    """Which clock the ratios of a suite's rows are by: "device" or "wall"."""
    return next((row.clock for row in found if row.measured), "wall")


def median_cell(row: Measurement, clock: str) -> str:
    """A row's median by a clock in milliseconds; marked where it stands for the row, unstable."""
    return marked(milliseconds(getattr(row, f"{clock}_ms")), row.stable or row.clock != clock)


def ratio_cell(row: Measurement, found: list[Measurement]) -> str:
    """A row's time over eager's of the same case; or that it would say nothing."""
    eager = eager_of(row, found)
    return ratio_text(row.over(eager), row.stable and eager.stable) if eager else ""


def milliseconds(value: float | None) -> str:
    """Three digits, or all before the point; nothing where it is not known."""
    return number(value, ".3g" if value is None or value < 999.5 else ".0f")


def eager_of(row: Measurement, found: list[Measurement]) -> Measurement | None:
    """Eager torch's measured row of the same case."""
    name = EAGER[row.suite]
    same = (r for r in found if r.case == row.case and r.provider == name and r.measured)
    return next(same, None)


def changed(found: list[Change]) -> Iterator[Table | str]:
    """What `resnet-fast bench --compare` prints: all that moved, and how many did not."""
    names = ("provider", "old ms", "new ms", "ratio", "noise")
    title = "old against new: measured; ratio of times over eager's where both have it"
    table = Table(title, [Column(name, name != "provider") for name in names])
    last = None
    for change in found:
        if change.verdict == SAME:
            continue
        if change.row.case != last:
            table.add(text=change.row.label)
        last = change.row.case
        verdict = change.verdict
        if verdict == NO_TIME:
            verdict += f": {change.row.status}: {change.row.reason}"
        table.add(
            f"  {change.row.provider}", milliseconds(change.old_ms), milliseconds(change.new_ms),
            f"{change.ratio:.2f}", f"{change.noise:.0%}", text=verdict,
            style="red" if change.verdict in (SLOWER, NO_TIME) else "",
        )  # fmt: skip
    if table.rows:
        yield table
    same = sum(change.verdict == SAME for change in found)
    yield f"{len(found)} in common, {same} the same within the noise"
