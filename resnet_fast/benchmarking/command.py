# SPDX-License-Identifier: Apache-2.0
"""What `resnet-fast bench` does between reading its options and printing."""

from __future__ import annotations

import shlex
import tempfile
import time
from pathlib import Path

from resnet_fast.benchmarking import cases, changes, plan, rows, suite, tables
from resnet_fast.benchmarking.plan import Request
from resnet_fast.benchmarking.rows import Results
from resnet_fast.measuring import protocol
from resnet_fast.measuring.machine import environment, machine_name
from resnet_fast.measuring.progress import Progress

RESULTS = Path("benchmarks") / "results"

render, announced = tables.render, plan.announced


def writable_folder(folder: Path | None, request: Request) -> Path:
    """The folder for results, made and tried before any work.

    Raises:
        ValueError: nothing can be written there.
    """
    if folder is None:
        folder = RESULTS / machine_name(environment(request.place))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"--out: {folder} cannot be written: {reason}") from None
    return folder


def measure(
    request: Request, folder: Path, progress: Progress = lambda text, share: None
) -> tuple[Results, list[Path]]:
    """Run the suite and write its rows; Ctrl-C leaves what was measured there."""
    start = time.perf_counter()
    text = said(request)

    def keep(results: Results) -> None:
        results.command, results.seconds = text, time.perf_counter() - start
        rows.write(results, folder)

    results = suite.run(request, progress=progress, keep=keep)
    keep(results)
    return results, rows.write(results, folder)


def said(request: Request) -> str:
    """The command line that asks for this."""
    words = ["resnet-fast", "bench"]
    if len(request.suites) == 1:
        words += request.suites
    if request.extent != cases.USUAL:
        words.append(f"--{request.extent}")
    for name in ("providers", "models", "batches", "dtypes"):
        values = getattr(request, name)
        if values:
            option = {"batches": "batch", "dtypes": "dtype"}.get(name, name)
            words += [f"--{option}", *map(str, values)]
    return shlex.join(words)


def hold_against(old: Path, new: Path) -> tuple[list, list[dict], bool]:
    """What to print of two results, its rows, and whether anything of the new one is slower.

    Raises:
        ValueError: they have no measured case and provider in common, or one cannot be read.
    """
    before, after = rows.read(old), rows.read(new)
    found = changes.changes(before, after)
    if not found:
        raise ValueError(f"{old} and {new} have no measured case and provider in common")
    notes = [
        f"{name} differs: old {a}, new {b}"
        for name, (a, b) in changes.differences(before, after).items()
    ]
    if lost := changes.lost(before, after):
        notes.append(f"{lost} of the old run's times have no row in the new run")
    plain = [changes.to_row(change) for change in found]
    return [*notes, *tables.changed(found)], plain, bool(changes.regressions(found))


def untimed(results: Results, request: Request) -> list[str]:
    """Rows that were to have a time and have none: how many, why, and what to do.

    Not those that were never to have one: left out by `--quick`, or of a library that is not
    installed and was not named. `failed` tells of answers that failed their check.
    """
    reasons: dict[str, int] = {}
    for row in results.rows:
        named = row.status == protocol.MISSING and row.provider in request.providers
        late = not row.measured and row.reason == protocol.TIME_IS_UP
        if row.status in (protocol.THREW, protocol.MEMORY) or named or late:
            why = f"{row.status}: {row.reason}"
            reasons[why] = reasons.get(why, 0) + 1
    if not reasons:
        return []
    found = [f"{sum(reasons.values())} of {len(results.rows)} rows have no time:"]
    found += [f"  {count} {why}" for why, count in reasons.items()]
    if any(protocol.TIME_IS_UP in why for why in reasons):
        found.append("  run without --quick, close what else runs, or name fewer --models, "
                     "--batch or --providers")  # fmt: skip
    return found


def failed(results: Results) -> bool:
    """Whether any answer failed its check."""
    return any(row.status == protocol.FAILED for row in results.rows)
