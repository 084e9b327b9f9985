# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have, and the types of their values: spelled alike everywhere."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from resnet_fast._table import wrapped
from resnet_fast.cli.status import BadInput

STDOUT = Path("-")
DTYPES = "float32 (fp32), bfloat16 (bf16), float16 (fp16, half)"
MODELS = "a model's name, resnet18 ... wide_resnet101_2"


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions and examples, and wraps long ones at words."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(
            part
            for line in lines
            for part in wrapped(line, width, "    " if line.startswith(" ") else "") or [""]
        )


class Parser(argparse.ArgumentParser):
    """argparse's parser, but with one-line errors, like all other errors of the command."""

    def __init__(self, **settings) -> None:
        super().__init__(formatter_class=Formatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} ({self.prog} --help)")


def add_model(command: argparse.ArgumentParser, default: str | None = None) -> None:
    """MODEL, needed unless there is a default."""
    if default is None:
        command.add_argument("model", metavar="MODEL", help=MODELS)
    else:
        command.add_argument(
            "model", metavar="MODEL", nargs="?", default=default,
            help=f"{MODELS}; default: {default}",
        )  # fmt: skip


def add_batches(
    command: argparse.ArgumentParser, default: Sequence[int], about: str = "", otherwise: str = ""
) -> None:
    """--batch, several sizes: a remark on them, and how an empty default reads."""
    text = otherwise or " ".join(map(str, default))
    command.add_argument(
        "--batch", type=positive, nargs="+", default=list(default), metavar="N",
        help=f"{about}default: {text}",
    )  # fmt: skip


def add_dtypes(
    command: argparse.ArgumentParser,
    default: Sequence[str],
    otherwise: str = "",
    names: str = DTYPES,
) -> None:
    """--dtype, several names."""
    text = otherwise or " ".join(default)
    command.add_argument(
        "--dtype",
        nargs="+",
        default=list(default),
        metavar="DTYPE",
        help=f"{names}; default: {text}",
    )


def add_seconds(
    command: argparse.ArgumentParser, what: str, default: float | None, otherwise: str = ""
) -> None:
    """--seconds, how long `what` is timed."""
    text = otherwise or f"{default:g}"
    command.add_argument(
        "--seconds", type=duration, default=default,
        help=f"how long {what} is timed; default: {text}",
    )  # fmt: skip


def add_device(command: argparse.ArgumentParser, default: str = "auto") -> None:
    """--device."""
    text = "auto (a GPU if there is one), cpu, cuda, cuda:1, ...; default: auto"
    if default != "auto":
        text = f"cuda, cuda:1, ...; default: {default}"
    command.add_argument("--device", default=default, help=text)


def add_outputs(command: argparse.ArgumentParser, what: str, csv: bool = True) -> None:
    """--json and --csv."""
    command.add_argument(
        "--json", type=file_or_stdout, metavar="FILE", help=f"write {what} as JSON; - is stdout"
    )
    if csv:
        command.add_argument(
            "--csv", type=file_or_stdout, metavar="FILE", help="write the rows as CSV; - is stdout"
        )


def positive(text: str) -> int:
    """A number of things, at least one."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


def duration(text: str) -> float:
    """Seconds: positive and finite."""
    seconds = _seconds(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: seconds must be positive and finite")
    return seconds


def duration_or_none(text: str) -> float:
    """Seconds: finite; 0 means as few rounds as possible."""
    seconds = _seconds(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: seconds must be finite and not negative")
    return seconds


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None


def architecture(text: str) -> int:
    """A compute capability, times ten: 90 for 9.0, sm_90 and 90."""
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a compute capability such as 9.0 or sm_90"
        )
    return int(match[1]) * 10 + int(match[2])


def writable(*suffixes: str) -> Callable[[str], Path]:
    """A file that can be written; others are refused before the work, not after it.

    Args:
        *suffixes: allowed suffixes; without any, every name is allowed.
    """

    def check(text: str) -> Path:
        file = Path(text)
        if file == STDOUT:
            raise argparse.ArgumentTypeError("only --json and --csv can be written to stdout")
        if suffixes and file.suffix.lower() not in suffixes:
            allowed = " or ".join(suffixes)
            raise argparse.ArgumentTypeError(f"{text}: the name must end in {allowed}")
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"{text} cannot be written")
        return file

    return check


def file_or_stdout(text: str) -> Path:
    """A file that can be written, or "-"."""
    return STDOUT if text == "-" else writable()(text)
