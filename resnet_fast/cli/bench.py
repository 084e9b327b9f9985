# SPDX-License-Identifier: Apache-2.0
"""`resnet-fast bench`: the benchmark suite, and two of its results held against each other."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from resnet_fast.cli import arguments, files, terminal
from resnet_fast.cli.status import AGREES, DISAGREES, INTERRUPTED, SKIPPED, BadInput

TEXTS = {
    "help": "time our ops and models beside torch, cuDNN and other compilers",
    "description": "Time our ops and models beside torch, cuDNN and other compilers: answers are "
    "checked against float64 first, then all take turns. The rows are printed, and written as JSON "
    "and CSV; in a checkout `python -m benchmarks.report FOLDER` draws a page of them.",
    "epilog": "examples:\n"
    "  resnet-fast bench --quick\n"
    "  resnet-fast bench models --models resnet50 --batch 1 8 --dtype fp32 bf16\n"
    "  resnet-fast bench --compare results/before results/after\n\n"
    "exit status: 0 done, or nothing slower; 1 an answer failed its check, or something is "
    "slower by more than the noise; 2 bad input; 3 some rows have no time, as it says; 130 "
    "interrupted, with what was measured written",
}


def add(command: argparse.ArgumentParser) -> None:
    """Its options."""
    add = command.add_argument
    add("suite", nargs="?", default="all", metavar="SUITE", help="ops, models or all; default: all")
    extent = command.add_mutually_exclusive_group()
    extent.add_argument(
        "--quick",
        dest="extent",
        action="store_const",
        const="quick",
        default="usual",
        help="few cases: under three minutes on two cores",
    )
    extent.add_argument(
        "--full",
        dest="extent",
        action="store_const",
        const="full",
        help="all models, layers, batches and dtypes, autotuned: days on a GPU",
    )
    arguments.add_device(command)
    add(
        "--providers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="what is timed; default: all that the device has",
    )
    add(
        "--models",
        nargs="+",
        default=[],
        metavar="NAME",
        help="the models, and the shapes of ops; default: two, or all with --full",
    )
    add(
        "--batch",
        type=arguments.positive,
        nargs="+",
        default=[],
        metavar="N",
        help="default: 1 8 32, or 1 8 32 128 256 with --full",
    )
    add(
        "--dtype",
        nargs="+",
        default=[],
        metavar="DTYPE",
        help="float32 (fp32), tf32, float16 (fp16, half), bfloat16 (bf16); default: two, or all of "
        "the device with --full",
    )
    add(
        "--seconds",
        type=arguments.duration,
        help="how long each case is timed; default: 4 for models and 1 for ops, less with --quick",
    )
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="of rows.json and rows.csv; default: benchmarks/results/MACHINE",
    )
    add(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("OLD", "NEW"),
        help="measure nothing: hold two results (rows.json, rows.csv or their folders) "
        "against each other",
    )
    arguments.add_outputs(command, "the rows, beside those in --out,")


def run(options: argparse.Namespace) -> int:
    """What it does."""
    if importlib.util.find_spec("torchvision") is None:
        raise BadInput('torchvision is not installed; pip install "resnet_fast[all]"')
    from resnet_fast import _names, benchmarking
    from resnet_fast.benchmarking import cases, command, rows

    out = sys.stderr if files.takes_stdout(options) else sys.stdout
    if options.compare is not None:
        parts, changes, slower = command.hold_against(*options.compare)
        files.write(options, changes, changes)
        terminal.show(parts, out)
        return DISAGREES if slower else AGREES
    suite = _names.choose("suite", options.suite, (*cases.SUITES, "all"))
    request = benchmarking.Request(
        suites=cases.SUITES if suite == "all" else (suite,),
        device=options.device,
        extent=options.extent,
        providers=options.providers,
        models=options.models,
        batches=options.batch,
        dtypes=options.dtype,
        seconds=options.seconds,
    )
    folder = command.writable_folder(options.out, request)
    for line in command.announced(request):
        terminal.note(line)
    with terminal.progress() as tell:
        results, written = command.measure(request, folder, tell)
    files.write(options, rows.to_json(results), rows.to_rows(results))
    terminal.show(command.render(results), out)
    terminal.note("written: " + ", ".join(map(str, written)))
    untimed = command.untimed(results, request)
    for line in untimed:
        terminal.note(line)
    if not results.complete:
        return INTERRUPTED
    if command.failed(results):
        return DISAGREES
    return SKIPPED if untimed else AGREES
