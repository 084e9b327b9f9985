# SPDX-License-Identifier: Apache-2.0
"""Tables of text that fit a terminal: numbers are never cut and words never broken.

What does not fit is left out by rank, whole columns at a time, and named below the table; the last
column may wrap at its words. Plain text, so every command works without `rich`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

GAP = "  "
NARROWEST = 20  # columns that wrapped text gets at least


class Line(NamedTuple):
    """A line, and its style on a terminal: "bold", "yellow", "red" or "" for none."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A heading and the alignment of its cells.

    Args:
        name: the heading.
        right: whether cells are aligned to the right, as numbers are.
        rank: 0 for a column that is always shown; the highest rank is left out first.
    """

    name: str
    right: bool = True
    rank: int = 0


@dataclass(frozen=True, slots=True)
class _Row:
    cells: tuple[str, ...]
    style: str
    text: str = ""  # instead of the cells behind those that are given


@dataclass(slots=True)
class Table:
    """Rows under headings.

    Args:
        title: a line above; "" for none.
        columns: see `Column`.
        notes: lines below.
        elsewhere: where to find columns that are left out, for the note that names them.
    """

    title: str
    columns: Sequence[Column]
    notes: list[str] = field(default_factory=list)
    elsewhere: str = ""
    rows: list[_Row] = field(default_factory=list)

    def add(self, *cells: str, style: str = "", text: str = "") -> None:
        """Add a row; `text` fills the room behind its cells and wraps at words."""
        self.rows.append(_Row(cells, style, text))

    def lines(self, width: int | None = None) -> list[Line]:
        """The table for a terminal of `width` columns; None: any width."""
        used = [i for i in range(len(self.columns)) if self._filled(i)]
        while width is not None and self._width(used) > width:
            highest = max(self.columns[i].rank for i in used)
            if not highest:
                break
            used = [i for i in used if self.columns[i].rank != highest]
        widths = {i: self._widest(i) for i in used}
        found = [*(Line(line, "bold") for line in wrapped(self.title, width))] if self.title else []
        head = self._join(used, widths, [self.columns[i].name for i in range(len(self.columns))])
        if head:
            found += [Line(head), Line("-" * max(len(head), self._width(used)))]
        for row in self.rows:
            found += self._row(row, used, widths, width)
        absent = [c.name for i, c in enumerate(self.columns) if i not in used and self._filled(i)]
        notes = list(self.notes)
        if absent:
            where = f"; {self.elsewhere}" if self.elsewhere else ""
            notes.append(f"left out at {width} columns: {', '.join(absent)}{where}")
        return found + [Line(line) for note in notes for line in wrapped(note, width)]

    def __str__(self) -> str:
        return "\n".join(line.text for line in self.lines())

    def _row(self, row: _Row, used, widths, width: int | None) -> Iterable[Line]:
        shown = [i for i in used if i < len(row.cells)]
        start = self._join(shown, widths, row.cells, row.text == "")
        if not row.text:
            return [Line(start, row.style)]
        indent = sum(widths[i] + len(GAP) for i in shown)
        room = None if width is None else max(NARROWEST, width - indent)
        first, *more = wrapped(row.text, room, indent="") or [""]
        start = f"{start}{GAP}" if shown else ""
        return [Line(f"{start}{first}", row.style)] + [
            Line(" " * indent + line, row.style) for line in more
        ]

    def _join(self, used, widths, cells: Sequence[str], strip: bool = True) -> str:
        parts = [
            cells[i].rjust(widths[i]) if self.columns[i].right else cells[i].ljust(widths[i])
            for i in used
        ]
        return GAP.join(parts).rstrip() if strip else GAP.join(parts)

    def _filled(self, i: int) -> bool:
        return not i or any(len(row.cells) > i and row.cells[i] for row in self.rows)

    def _widest(self, i: int) -> int:
        cells = [row.cells[i] for row in self.rows if len(row.cells) > i]
        return max(map(len, [self.columns[i].name, *cells]))

    def _width(self, used: Sequence[int]) -> int:
        return sum(map(self._widest, used)) + len(GAP) * (len(used) - 1)


def wrapped(text: str, width: int | None, indent: str = "  ") -> list[str]:
    """Text in lines of at most `width`, broken between words alone; later lines are indented."""
    if width is None:
        return text.splitlines()
    return [
        line
        for part in text.splitlines()
        for line in textwrap.wrap(
            part, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        or [""]
    ]
