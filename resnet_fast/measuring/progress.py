# SPDX-License-Identifier: Apache-2.0
"""Progress while something is measured: a line of text, and how much of the whole is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[str, float], None]  # what is being done; how much of the whole is: 0 to 1


@dataclass(slots=True)
class Rounds:
    """Makes of "round 7" how much of the whole is done: rounds end when `seconds` are up.

    Args:
        label: what stands before each text; "" for nothing.
        number, total: of the loop of rounds, from 0, and how many of them there are.
        seconds: how long a loop goes on.
        progress: receives the text and the share.
    """

    label: str
    number: int
    total: int
    seconds: float
    progress: Progress
    begun: float | None = None

    def __call__(self, text: str) -> None:
        now, part = time.perf_counter(), 0.0
        if text.startswith("round"):
            self.begun = self.begun or now
            part = min(1.0, (now - self.begun) / self.seconds) if self.seconds else 0.0
        line = ": ".join(filter(None, (self.label, text)))
        self.progress(line, (self.number + part) / self.total)
