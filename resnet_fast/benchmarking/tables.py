# SPDX-License-Identifier: Apache-2.0
"""Results as tables for a terminal. A table's title says how its numbers were obtained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from resnet_fast._table import Column, Table
from resnet_fast.benchmarking.compare import NO_TIME, SAME, SLOWER, Change
from resnet_fast.benchmarking.providers import EAGER, OURS
from resnet_fast.benchmarking.rows import Results, Row
from resnet_fast.comparison.steadiness import MARK, NO_RATIO, NOTE, marked, ratio_text

MODELLED_SHOWN = 12  # rows of the terminal's table; the file has all
# What is left out of a narrow terminal, the highest first.
RANKS = {"tile": 6, "MB": 5, "p99": 4, "first ms": 4, "eager's": 3, "p20": 2, "p80": 2, "error": 1}


def render(results: Results) -> Iterator[Table | str]:
    """What `resnet-fast bench` prints."""
    if results.rows:
        facts = results.rows[0].environment
        yield ", ".join(
            f"{name} {value}"
            for name, value in (
                ("device", facts.device), ("threads", facts.threads), ("clocks", facts.clocks),
                ("driver", facts.driver), ("torch", facts.torch), ("triton", facts.triton),
                ("cuDNN", facts.cudnn), ("resnet_fast", facts.resnet_fast),
                ("commit", facts.commit),
            )
            if value
        )  # fmt: skip
    for suite in ("models", "ops"):
        found = [row for row in results.rows if row.suite == suite]
        if found:
            yield ""
            yield _times(suite, found)
            yield f"inputs: {inputs_of(found)}"
    yield from results.warnings
    if results.modelled:
        yield ""
        yield _modelled(results)
    reasons: dict[str, list[str]] = {}
    for name, why in results.left_out.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        yield f"not asked: {'; '.join(names)}: {why}"
    if not results.complete:
        yield "interrupted: the rows above are what was measured until then"


def _times(suite: str, found: list[Row]) -> Table:
    device = any(row.device_ms is not None for row in found)
    ratio = f"ratio: {clock_of(found)} time over {EAGER[suite]}'s; below 1 is faster"
    names = ["provider", "backend", "tile", "wall ms", "p20", "p80", "p99"]
    names += ["device ms"] * device + ["first ms", "MB", "error", "eager's", "ratio"]
    names += ["roof"] * (suite == "ops")
    texts = ("provider", "backend", "tile")
    columns = [Column(name, name not in texts, RANKS.get(name, 0)) for name in names]
    table = Table(f"{suite}: measured ({ratio})", columns, elsewhere="rows.csv has them")
    last = None
    for row in shortened(found):
        if row.case != last:
            table.add(text=case_text(row))
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
    return table


def shortened(found: list[Row]) -> list[Row]:
    """The rows, with those of a case in one where none has a time and all for the same reason."""
    short = []
    for _, group in itertools.groupby(found, key=lambda row: row.case):
        of_case = list(group)
        why = {(row.status, row.reason) for row in of_case}
        if len(of_case) > 1 and len(why) == 1 and not of_case[0].measured:
            of_case = [replace(of_case[0], provider=f"all {len(of_case)}")]
        short += of_case
    return short


def inputs_of(found: list[Row]) -> str:
    """How the rows' inputs met the caches, in a line."""
    texts = list(dict.fromkeys(row.inputs for row in found if row.inputs))
    if not texts:
        return "none were made"
    others = {1: "", 2: "; another way is in the rows"}
    return texts[0] + others.get(len(texts), f"; {len(texts) - 1} other ways are in the rows")


def number(value: float | None, form: str) -> str:
    """A number, or nothing where it is not known."""
    return "" if value is None else format(value, form)


def clock_of(found: list[Row]) -> str:
    """Whose time the ratios of a suite's rows are of: "device" or "wall"."""
    return next((row.clock for row in found if row.measured), "wall")


def median_cell(row: Row, clock: str) -> str:
    """A row's median by a clock in milliseconds; marked where it stands for the row, unstable."""
    return marked(milliseconds(getattr(row, f"{clock}_ms")), row.stable or row.clock != clock)


def ratio_cell(row: Row, found: list[Row]) -> str:
    """A row's time over eager's of the same case; or that it would say nothing."""
    eager = eager_of(row, found)
    return ratio_text(row.over(eager), row.stable and eager.stable) if eager else ""


def milliseconds(value: float | None) -> str:
    """Three digits, or all before the point; nothing where it is not known."""
    return number(value, ".3g" if value is None or value < 999.5 else ".0f")


def case_text(row: Row) -> str:
    """A case in a few words."""
    if row.suite == "models":
        return f"{row.subject}, {row.dtype}, batch {row.batch}"
    return f"{row.subject} {row.shape}" + (" (tf32)" if row.dtype == "tf32" else "")


def eager_of(row: Row, found: list[Row]) -> Row | None:
    """Eager torch's measured row of the same case."""
    name = EAGER[row.suite]
    same = (r for r in found if r.case == row.case and r.provider == name and r.measured)
    return next(same, None)


def _modelled(results: Results) -> Table:
    gpus = list(results.modelled[0].modelled_ms)
    title = (
        "GPU kernels, not run: MB and sectors (over the least) counted on the PTX machine, "
        "microseconds modelled by rooflines from the counts, or from the shape"
    )
    columns = [
        Column("kernel", False), Column("MB"), Column("sectors"), Column("from", rank=99),
        *(Column(gpu, rank=number) for number, gpu in enumerate(gpus)),
    ]  # fmt: skip
    table = Table(title, columns, elsewhere="modelled.csv has them")
    listed = sorted(results.modelled, key=lambda m: m.modelled_from != "counted")
    first = {(m.shape, m.kernel): m for m in reversed(listed)}  # of the tiles of a layer
    shown = [m for m in listed if first[m.shape, m.kernel] is m][:MODELLED_SHOWN]
    last = ""
    for m in shown:
        if m.shape != last:
            table.add(text=m.shape)
        last = m.shape
        kernel = f"{m.kernel} {m.tile} sm_{m.arch}" if m.kernel else ""
        moved = None if m.counted_dram_bytes is None else m.counted_dram_bytes / 1e6
        table.add(
            f"  {kernel}", number(moved, ".2f"), number(m.counted_sectors, ".2f"),
            m.modelled_from, *(f"{ms * 1e3:.2g}" for ms in m.modelled_ms.values()),
        )  # fmt: skip
    if len(listed) > len(shown):
        more = f"{len(listed) - len(shown)} more, of other layers and tiles"
        table.notes.append(f"{more}, in modelled.csv and on the page")
    return table


def markdown(results: Results) -> str:
    """The models' times as a README's table: eager's in milliseconds, the others over it.

    Only what was measured stands in it; below it, on what and by which command.
    """
    found = [row for row in results.rows if row.suite == "models" and row.measured]
    names = [n for n in dict.fromkeys(row.provider for row in found) if n != EAGER["models"]]
    head = ["model", "dtype", "batch", f"{EAGER['models']} (ms)", *names]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in found:
        if row.provider != EAGER["models"]:
            continue
        cells = [row.subject, row.dtype, str(row.batch), marked(f"{row.time_ms:.1f}", row.stable)]
        for name in names:
            same = (r for r in found if r.case == row.case and r.provider == name)
            other = next(same, None)
            cells.append(ratio_cell(other, found) if other else "-")
        lines.append("| " + " | ".join(cells) + " |")
    if not found:
        return "No model was measured."
    e = found[0].environment
    note = f" {NOTE}." if any(mark in line for line in lines for mark in (MARK, NO_RATIO)) else ""
    return "\n".join(lines) + (
        "\n\nThe others as ratios to the first column's time, below 1 is faster; a dash: no time, "
        f"and the page says why.{note} Measured by `{results.command}` on: {e.device}, "
        f"threads {e.threads}, torch {e.torch}, resnet_fast {e.resnet_fast}, commit {e.commit}."
    )


def changes(found: list[Change]) -> Iterator[Table | str]:
    """What `resnet-fast bench --compare` prints: all that moved, and how many did not."""
    names = ("provider", "old ms", "new ms", "ratio", "noise")
    title = "old against new: measured; ratio of times over eager's where both have it"
    table = Table(title, [Column(name, name != "provider") for name in names])
    last = None
    for change in found:
        if change.verdict == SAME:
            continue
        if change.row.case != last:
            table.add(text=case_text(change.row))
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
