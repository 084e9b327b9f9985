# SPDX-License-Identifier: Apache-2.0
"""`resnet-fast compare`: torchvision's model and ours, on photographs: alike, and how fast."""

from __future__ import annotations

import argparse
import sys

from resnet_fast.cli import arguments, files, terminal
from resnet_fast.cli.status import AGREES, DISAGREES, INTERRUPTED, SKIPPED, BadInput

TEXTS = {
    "help": "compare torchvision's model with ours: same weights, real photographs, one run",
    "description": "Compare torchvision's model with ours: same weights, real photographs, one "
    "run. The answers are held against float64; where they disagree nothing is timed.",
    "epilog": "examples:\n"
    "  resnet-fast compare resnet50\n"
    "  resnet-fast compare resnet18 --batch 1 32 --dtype fp32 bf16 --compile\n"
    "  resnet-fast compare resnet50 --weights DEFAULT --images cat.jpg dog.jpg --json -\n\n"
    "exit status: 0 all agree; 1 they do not; 2 bad input; 3 all agree, but some images "
    "could not be read; 130 interrupted, with the complete settings written",
}


def add(command: argparse.ArgumentParser) -> None:
    """Its options."""
    arguments.add_model(command)
    add = command.add_argument
    add(
        "--batch",
        type=arguments.positive,
        nargs="+",
        default=[1, 8],
        metavar="N",
        help="batch sizes; photographs are repeated to fill them; default: 1 8",
    )
    add(
        "--dtype",
        nargs="+",
        default=["float32", "bfloat16"],
        metavar="DTYPE",
        help=f"{arguments.DTYPES}; default: the first two",
    )
    add(
        "--images",
        nargs="+",
        default=[],
        metavar="FILE",
        help="photographs; default: those that ship with scikit-image and scikit-learn",
    )
    arguments.add_device(command)
    add(
        "--weights",
        metavar="WEIGHTS",
        help="the file of a state_dict, or torchvision's weights (DEFAULT, IMAGENET1K_V1), which "
        "are downloaded; default: random, with the photographs' BatchNorm statistics",
    )
    add(
        "--compile",
        action="append_const",
        const="compile",
        dest="peers",
        help="time torch.compile with freezing too",
    )
    add(
        "--openvino",
        action="append_const",
        const="openvino",
        dest="peers",
        help="time OpenVINO too (pip install openvino)",
    )
    add(
        "--seconds",
        type=arguments.duration,
        default=6.0,
        help="how long each setting (a dtype and a batch) is timed; default: 6",
    )
    arguments.add_outputs(command, "the settings with all that was measured")


def run(options: argparse.Namespace) -> int:
    """What it does."""
    try:
        import torchvision  # noqa: F401
        from PIL import Image  # noqa: F401
    except ImportError as error:
        raise BadInput(f'{error}; pip install "resnet_fast[all]"') from None
    from resnet_fast.comparison import compare, tables
    from resnet_fast.measuring import photographs

    out = sys.stderr if files.takes_stdout(options) else sys.stdout
    with terminal.progress() as tell:
        tell("reading photographs", 0)
        result = compare(
            options.model,
            photographs.load(options.images),
            batches=options.batch,
            dtypes=options.dtype,
            device=options.device,
            weights=options.weights,
            peers=options.peers or (),
            seconds=options.seconds,
            progress=tell,
        )
    files.write(options, result.to_json(), result.to_rows())
    terminal.show(tables.render(result), out)
    for name, reason in result.skipped.items():
        terminal.note(f"skipped {name}: {reason}")
    if result.interrupted:
        return INTERRUPTED
    if not result.agrees:
        return DISAGREES
    return SKIPPED if result.skipped else AGREES
