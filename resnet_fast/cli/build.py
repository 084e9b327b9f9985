# SPDX-License-Identifier: Apache-2.0
"""`resnet-fast build`: compile the CUDA C++ kernels for the torch that is installed."""

from __future__ import annotations

import argparse
import sysconfig
from dataclasses import asdict
from pathlib import Path

from resnet_fast.cli import arguments, files, ptxas, terminal
from resnet_fast.cli.status import AGREES, BadInput

TEXTS = {
    "help": "compile the CUDA C++ kernels for the torch that is installed; no GPU is needed",
    "description": "Compile the CUDA C++ kernels for the torch that is installed; no GPU is "
    "needed. It needs nvcc (of torch's CUDA major), g++, ninja and pybind11: pip install "
    "'resnet_fast[build]'.",
    "epilog": "examples:\n"
    "  resnet-fast build\n"
    "  resnet-fast build --arch 9.0 --jobs 4 --verbose\n\n"
    "exit status: 0 built; 2 not, and why",
}


def add(command: argparse.ArgumentParser) -> None:
    """Its options."""
    add = command.add_argument
    add(
        "--arch",
        nargs="+",
        metavar="X.Y",
        type=arguments.architecture,
        help="compute capabilities, 9.0 or sm_90; default: 8.0 8.6 8.9 9.0 10.0 12.0; newer GPUs "
        "run the PTX of the first",
    )
    add(
        "--jobs",
        type=arguments.positive,
        metavar="N",
        help="processes at a time; default: the usable cores",
    )
    add(
        "--into",
        type=Path,
        metavar="FOLDER",
        help="put the module there; default: the package, with which pip uninstall removes it",
    )
    add("--verbose", action="store_true", help="print commands, and every kernel's registers")
    arguments.add_outputs(command, "the architectures and every kernel's registers", csv=False)


def run(options: argparse.Namespace) -> int:
    """What it does."""
    from resnet_fast import build as recipe

    output = None
    if options.into is not None:
        output = options.into / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    quiet = files.takes_stdout(options)
    try:
        with terminal.progress() as tell:
            report = recipe.build(
                recipe.find(),
                architectures=options.arch,
                jobs=options.jobs,
                output=output,
                progress=lambda done, total, text: tell(f"{done}/{total} {text}", done / total),
                verbose=terminal.note if options.verbose else None,
            )
    except (recipe.BuildError, OSError) as error:
        raise BadInput(f"not built: {error}") from None
    usage = ptxas.usage_of(report)
    data = asdict(report) | {"path": str(report.path), "usage": list(map(asdict, usage))}
    del data["logs"]
    data["toolchain"] = {name: str(value) for name, value in data["toolchain"].items()}
    files.write(options, data)
    if not quiet:
        terminal.show(ptxas.describe(report, usage, every_kernel=options.verbose))
    return AGREES
