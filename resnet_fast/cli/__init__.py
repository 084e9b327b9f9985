# SPDX-License-Identifier: Apache-2.0
"""The command `resnet-fast`: check this machine, compare, profile, bench, tune, build.

A file per command: `add` describes its options, `run` does what they ask. What the commands share
is in `arguments.py` (options and their types), `terminal.py` (what is shown) and `files.py` (what
is written). argparse is used because click and typer do not support options with several values
(`--batch 1 8`).
"""

from __future__ import annotations

import argparse
import platform
import re
import sys

import torch

import resnet_fast
from resnet_fast import _env, _names, ops
from resnet_fast.cli import bench, build, check, compare, profile, tune
from resnet_fast.cli.arguments import Parser
from resnet_fast.cli.status import (
    AGREES,
    BAD_INPUT,
    DISAGREES,
    INTERRUPTED,
    SKIPPED,
    BadInput,
)

__all__ = ["AGREES", "BAD_INPUT", "DISAGREES", "INTERRUPTED", "SKIPPED", "BadInput", "main"]

COMMANDS = {
    "check": check,
    "compare": compare,
    "profile": profile,
    "bench": bench,
    "tune": tune,
    "build": build,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parse(given)
        if not hasattr(options, "run"):
            _parser().print_help(sys.stderr)
            return BAD_INPUT
        _check_environment()
        return options.run(options)
    except (BadInput, ValueError, OSError, ImportError, MemoryError) as error:
        # Errors of the package begin with its name, which the command prints itself.
        words = re.sub(r"^resnet_fast(\.\w+)*: ", "", str(error))
        print(f"resnet-fast: {words}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("resnet-fast: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parse(given: list[str]) -> argparse.Namespace:
    if given and not given[0].startswith("-"):
        given = [_names.choose("command", given[0], COMMANDS), *given[1:]]
    parser = _parser()
    options, unknown = parser.parse_known_args(given)
    if unknown:
        usage = getattr(options, "usage", parser.format_usage())
        known = re.findall(r"--[\w-]+", usage)
        raise BadInput(_names.unknown("argument", unknown[0], dict.fromkeys(known)))
    return options


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="resnet-fast",
        description="Drop-in ResNets that run fused.",
        epilog="resnet-fast COMMAND --help shows a command's options, with an example.",
    )
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    parser.add_argument(
        "--version", action="version", version=f"resnet-fast {resnet_fast.__version__} ({versions})"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, **module.TEXTS)
        module.add(command)
        command.set_defaults(run=module.run, usage=command.format_usage())
    return parser


def _check_environment() -> None:
    """Refuse an environment variable with a value that is not known."""
    if name := _env.backend():
        try:
            ops.check_backend(name)
        except ValueError as error:
            raise BadInput(f"RESNET_FAST_BACKEND: {error}") from None
