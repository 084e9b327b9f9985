# SPDX-License-Identifier: Apache-2.0
"""Two runs of the suite held against each other: what became slower by more than the noise.

A machine drifts: the same code an hour later may be slower by a tenth, all of it. So a provider is
judged by its time over eager's in the same rounds, where both runs have that ratio; what drift is
left in a ratio is small beside what the rounds themselves scatter:

    noise = 2 * sqrt(sum of the variances of the medians' relative scatter), at least 8 %

with each scatter taken from p20 and p80 (see `measuring.steadiness`). Eager itself has no ratio:
how its time moved is called drift, and does not count as a regression.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from resnet_fast.benchmarking.providers import EAGER
from resnet_fast.benchmarking.rows import Result, Results
from resnet_fast.measuring import steadiness

FLOOR = 0.08

SLOWER, FASTER, SAME, DRIFT, NO_TIME = "slower", "faster", "same", "drift", "no time any more"


@dataclass(frozen=True, slots=True)
class Change:
    """One case and provider in both runs.

    Args:
        row: of the new run.
        old_ms, new_ms: medians.
        ratio: new over old; of the times over eager's where `relative`.
        noise: how far from 1 the ratio may be without meaning anything.
        verdict: "slower", "faster", "same", "drift" (of eager itself), or "no time any more".
    """

    row: Result
    old_ms: float
    new_ms: float | None
    ratio: float
    noise: float
    relative: bool
    verdict: str


def to_row(change: Change) -> dict:
    """A flat row, as for a CSV file."""
    row = change.row
    case = {"suite": row.suite, "subject": row.subject, "shape": row.shape, "dtype": row.dtype}
    return {
        **case, "batch": row.batch, "provider": row.provider, "old_ms": change.old_ms,
        "new_ms": change.new_ms, "ratio": change.ratio, "noise": change.noise,
        "relative": change.relative, "verdict": change.verdict,
    }  # fmt: skip


def changes(old: Results, new: Results) -> list[Change]:
    """Every case and provider that the old run has a time of and the new run has a row of."""
    before = {_key(row): row for row in old.rows if row.measured}
    after = {_key(row): row for row in new.rows}
    return [_change(before, after, key) for key in before if key in after]


def differences(old: Results, new: Results) -> dict[str, tuple[str, str]]:
    """What differs between the runs' machines: a change may come from that."""
    found = {}
    for name in ("device", "threads", "driver", "torch", "triton", "cudnn"):
        sides = [sorted({str(getattr(row.environment, name)) for row in run.rows})
                 for run in (old, new)]  # fmt: skip
        if sides[0] != sides[1]:
            found[name] = tuple(", ".join(values) or "unknown" for values in sides)
    return found


def lost(old: Results, new: Results) -> int:
    """How many times of the old run the new one has not even a row for."""
    after = {_key(row) for row in new.rows}
    return sum(row.measured and _key(row) not in after for row in old.rows)


def regressions(found: list[Change]) -> list[Change]:
    """Those that are slower, or have lost their time."""
    return [change for change in found if change.verdict in (SLOWER, NO_TIME)]


def _key(row: Result) -> tuple:
    return (*row.case, row.provider, row.environment.kind)


def _change(before: dict[tuple, Result], after: dict[tuple, Result], key: tuple) -> Change:
    old, new = before[key], after[key]
    if not new.measured:
        return Change(new, old.time_ms, None, math.nan, math.nan, False, NO_TIME)
    eager = (*old.case, EAGER[old.suite], old.environment.kind)
    rows = [old, new]
    ratio, relative = new.time_ms / old.time_ms, False
    is_eager = old.provider == EAGER[old.suite]
    has_eager = eager in before and eager in after and after[eager].measured
    if has_eager and not is_eager:
        rows += [before[eager], after[eager]]
        ratio, relative = ratio * before[eager].time_ms / after[eager].time_ms, True
    noise = max(FLOOR, steadiness.noise(row.timing.scatter for row in rows))
    if is_eager:
        verdict = DRIFT if abs(ratio - 1) > noise else SAME
    else:
        verdict = SLOWER if ratio > 1 + noise else FASTER if ratio < 1 / (1 + noise) else SAME
    return Change(new, old.time_ms, new.time_ms, ratio, noise, relative, verdict)
