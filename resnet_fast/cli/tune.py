# SPDX-License-Identifier: Apache-2.0
"""`resnet-fast tune`: measure what is fastest for each op of a model, and keep it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from resnet_fast import _hardware
from resnet_fast._table import Column, Table
from resnet_fast.cli import arguments, files, terminal
from resnet_fast.cli.status import AGREES, DISAGREES, INTERRUPTED, BadInput

TEXTS = {
    "help": "measure which backend and tile is fastest for each op of a model, and keep it",
    "description": "Measure which backend and tile is fastest for each op of a model, and "
    "keep it. The choices are used from the next start on. A GPU is needed, except for "
    "--dry-run.",
    "epilog": "examples:\n"
    "  resnet-fast tune resnet50 --batch 1 32 --dtype fp16 bf16\n"
    "  resnet-fast tune resnet18 --dry-run --arch 9.0\n\n"
    "exit status: 0 done; 1 a kernel was wrong or failed; 2 bad input; 130 interrupted, "
    "with what was measured kept",
}


def add(command: argparse.ArgumentParser) -> None:
    """Its options."""
    arguments.add_model(command, default="resnet50")
    add = command.add_argument
    arguments.add_batches(command, (1, 8))
    arguments.add_dtypes(command, ("float16",))
    add("--backend", nargs="+", default=[], metavar="NAME", help="cuda, triton, aten; default: all")
    arguments.add_seconds(command, "each op", 1.0)
    arguments.add_device(command, default="cuda")
    add("--dry-run", action="store_true", help="print the candidates, modelled; measure nothing")
    add(
        "--arch",
        type=arguments.architecture,
        metavar="X.Y",
        help="for --dry-run: a compute capability, 9.0 or sm_90; default: this GPU's, or 8.0",
    )
    add("--clear", action="store_true", help="forget what was measured, on any GPU, and stop")
    arguments.add_outputs(command, "the candidates and their times")


def run(options: argparse.Namespace) -> int:
    """What it does."""
    from resnet_fast import recording
    from resnet_fast import tune as tuner

    out = sys.stderr if files.takes_stdout(options) else sys.stdout
    if options.clear:
        removed = tuner.clear()
        terminal.show([f"removed {file}" for file in removed] or ["nothing was kept"], out)
        return AGREES
    if options.arch is not None and not options.dry_run:
        raise BadInput("--arch is for --dry-run: a measured GPU has its own architecture")
    tuner.check(options.backend, options.dtype)
    if options.dry_run:
        return _dry_run(options, out)
    device = tuner.gpu(options.device)
    works = recording.works(options.model, options.batch, options.dtype)
    results, interrupted = [], False
    try:
        with terminal.progress() as tell:

            def told(text: str) -> None:
                done, total = len(results), len(works)
                tell(f"{done + 1}/{total}: {text}", done / total)

            for result in tuner.tune(works, device, options.backend, options.seconds, told):
                results.append(result)
    except KeyboardInterrupt:
        interrupted = True
    except OSError as error:
        raise BadInput(f"the choices cannot be kept: {error}") from error
    rows = [row for result in results for row in result.to_rows()]
    files.write(options, rows, rows)
    terminal.show([*_results(results, device), f"kept in {tuner.path_of(device)}"], out)
    for result in results:
        for candidate, fault in result.faults.items():
            terminal.note(f"{result.work}: {candidate}: {fault}")
    if interrupted:
        terminal.note("resnet-fast: interrupted; what is in the table was kept")
        return INTERRUPTED
    return DISAGREES if any(result.faults for result in results) else AGREES


def _dry_run(options: argparse.Namespace, out) -> int:
    from resnet_fast import recording
    from resnet_fast import tune as tuner

    arch = options.arch or tuner.arch_here() or 80
    if arch not in _hardware.GPUS and arch != tuner.arch_here():
        known = ", ".join(str(known / 10) for known in _hardware.GPUS)
        text = f"--arch: nothing is known about compute capability {arch / 10}"
        raise BadInput(f"{text}; known are {known}")
    works = recording.works(options.model, options.batch, options.dtype)
    modelled = {work: tuner.modelled(work, arch, options.backend) for work in works}
    rows = [
        {"op": work.op, "convolution": str(work), "times": works[work], "arch": arch,
         "candidate": str(candidate), "modelled_us": time}
        for work, found in modelled.items()
        for candidate, time in found.items()
    ]  # fmt: skip
    files.write(options, rows, rows)
    title = f"Candidates on sm_{arch}: modelled microseconds, nothing was measured"
    table = Table(title, [Column("candidate", right=False), Column("modelled us")])
    for work, found in modelled.items():
        table.add(text=f"{work} ({works[work]} x)")
        for candidate, time in found.items() or [("aten", None)]:
            table.add(f"  {candidate}", "" if time is None else f"{time:.1f}")
    terminal.show([table], out)
    return AGREES


def _results(results, device) -> Iterator[Table | str]:
    from resnet_fast import tune as tuner

    title = f"Measured on {tuner.name_of(device)}: medians in microseconds, L2 flushed"
    names = ("", "candidate", "us", "ratio")
    table = Table(title, [Column(name, name in ("us", "ratio")) for name in names])
    for result in results:
        table.add(text=str(result.work))
        if not result.choices:
            why = "none was right" if result.faults else "no other"
            table.add("  usual", str(result.usual), why)
            continue
        best, usual = result.choices[0], result.timings.get(result.usual)
        ratio = f"{best.microseconds / usual.median:.2f}" if usual else ""
        table.add("  chosen", str(best), f"{best.microseconds:.1f}", ratio, style="bold")
        table.add("  usual", str(result.usual), f"{usual.median:.1f}" if usual else "", "")
    yield table
