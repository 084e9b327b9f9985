# SPDX-License-Identifier: Apache-2.0
"""What the commands show: tables that fit, notes, and progress.

With `rich`, progress is a bar on a terminal; otherwise it is a line now and then. Everything else
is plain text.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO

from resnet_fast._table import Line, Table, wrapped
from resnet_fast.measuring.progress import Progress

PIPED_WIDTH = 160  # of tables in logs and pipes, which have no width; texts do not wrap there
LINE_SECONDS = 10.0  # between two lines of progress
STYLES = {"bold": "1", "yellow": "33", "red": "1;31"}


def width_of(stream: TextIO) -> int | None:
    """The width of a terminal in columns; None for a log or a pipe."""
    if stream.isatty() or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size().columns
    return None


def show(parts: Iterable[Table | str], stream: TextIO | None = None) -> None:
    """Print tables and texts; on a terminal, texts wrap at words."""
    stream = stream or sys.stdout
    width = width_of(stream)
    for part in parts:
        if isinstance(part, Table):
            print_lines(part.lines(width or PIPED_WIDTH), stream)
        else:
            print_lines(map(Line, wrapped(part, width) or [""]), stream)


def print_lines(lines: Iterable[Line], stream: TextIO) -> None:
    """Print lines as they are; a closed pipe ends the output quietly."""
    coloured = stream.isatty() and "NO_COLOR" not in os.environ
    try:
        for line in lines:
            code = STYLES.get(line.style) if coloured else None
            print(f"\x1b[{code}m{line.text}\x1b[0m" if code else line.text, file=stream)
        stream.flush()
    except BrokenPipeError:
        # Otherwise Python reports the closed pipe again when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def note(text: str) -> None:
    """A remark beside the result, on stderr."""
    show([text], sys.stderr)


@contextlib.contextmanager
def progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """Gives a function to report progress: tell(what is being done, share done)."""
    stream = stream or sys.stderr
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
        from rich.table import Column
    except ImportError:
        Progress = None
    if Progress is None or not stream.isatty():
        yield Lines(stream)
        return
    words = TextColumn(
        "{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)
    )
    parts = (SpinnerColumn(), words, BarColumn(20), TextColumn("{task.fields[left]}"))
    with Progress(*parts, console=Console(file=stream), transient=True, expand=True) as bar:
        task, begun = bar.add_task("", total=None, left=""), time.monotonic()

        def tell(text: str, share: float) -> None:
            left = time_left(share, time.monotonic() - begun)
            bar.update(task, description=text, completed=share, total=1 if share else None,
left=left)  # fmt: skip

        yield tell


class Lines:
    """Reports progress by a line now and then."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.begun = stream, time.monotonic()
        self.told = self.begun

    def __call__(self, text: str, share: float) -> None:
        now = time.monotonic()
        if now - self.told < LINE_SECONDS:
            return
        self.told = now
        parts = (f"[{share:4.0%}] {text}", time_left(share, now - self.begun))
        print(", ".join(filter(None, parts)), file=self.stream, flush=True)


def time_left(share: float, elapsed: float) -> str:
    """In words, how long the rest will take at this speed; "" if that is not known."""
    if not 0 < share < 1:
        return ""
    seconds = elapsed * (1 - share) / share
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"
