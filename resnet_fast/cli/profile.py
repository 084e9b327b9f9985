# SPDX-License-Identifier: Apache-2.0
"""`resnet-fast profile`: where a model's time goes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys

from resnet_fast._table import Line
from resnet_fast.cli import arguments, files, terminal
from resnet_fast.cli.status import AGREES, INTERRUPTED, BadInput

TEXTS = {
    "help": "where a model's time goes: its layers, what bounds them, and what to try",
    "description": "Tell where a model's time goes: its layers, what bounds them, and what to try. "
    "The weights are random and so is the image.",
    "epilog": "examples:\n"
    "  resnet-fast profile resnet50\n"
    "  resnet-fast profile resnet18 --batch 8 --dtype bf16 --compare torchvision\n"
    "  resnet-fast profile resnet50 --layers --html profile.html --csv layers.csv\n\n"
    "exit status: 0 done; 2 bad input; 130 interrupted, with the complete rounds shown",
}


def add(command: argparse.ArgumentParser) -> None:
    """Its options."""
    arguments.add_model(command)
    add = command.add_argument
    add("--batch", type=arguments.positive, default=1, metavar="N", help="default: 1")
    add("--dtype", default="float32", help=f"{arguments.DTYPES}; default: float32")
    arguments.add_device(command)
    add(
        "--layers",
        action="store_true",
        help="show every layer in the order in which they run, not only the slowest twelve",
    )
    add(
        "--compare",
        metavar="WHO",
        help="time the same layers of another model too, and show a ratio to each; WHO is "
        "torchvision: its model with the same weights",
    )
    add(
        "--seconds",
        type=arguments.duration_or_none,
        default=4.0,
        help="how long to time; there are at least seven rounds; default: 4",
    )
    add(
        "--trace",
        type=arguments.writable(),
        metavar="FILE",
        help="write a Chrome trace, which https://ui.perfetto.dev opens",
    )
    add(
        "--html",
        type=arguments.writable(".html", ".htm"),
        metavar="FILE",
        help="write a page with the tables and the flame picture",
    )
    add(
        "--png",
        type=arguments.writable(".png"),
        metavar="FILE",
        help="write the flame picture: width is time, colour the share of the roofline",
    )
    arguments.add_outputs(command, "the layers and all that is known of them")


def run(options: argparse.Namespace) -> int:
    """What it does."""
    if options.png is not None and importlib.util.find_spec("matplotlib") is None:
        raise BadInput('--png needs matplotlib; pip install "resnet_fast[bench]"')
    from resnet_fast.profiling import command

    out = sys.stderr if files.takes_stdout(options) else sys.stdout
    with terminal.progress() as tell:
        found = command.profile_by_name(
            options.model,
            options.batch,
            options.dtype,
            options.device,
            options.compare,
            options.seconds,
            tell,
        )
    if options.trace is not None:  # files first: a reader of the table may close the pipe
        options.trace.write_text(json.dumps(found.trace()))
    if options.html is not None:
        options.html.write_text(found.html())
    if options.png is not None:
        found.png(options.png)
    files.write(options, found.to_json(), found.to_rows())
    text = found.table(layers=options.layers, width=terminal.width_of(out))
    terminal.print_lines(map(Line, text.splitlines()), out)
    return INTERRUPTED if found.interrupted else AGREES
