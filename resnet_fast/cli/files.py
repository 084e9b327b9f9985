# SPDX-License-Identifier: Apache-2.0
"""What the commands write: JSON and CSV, into files or to stdout."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from resnet_fast.cli.arguments import STDOUT
from resnet_fast.cli.status import BadInput


def takes_stdout(options: argparse.Namespace) -> bool:
    """Whether a file's text goes to stdout, so that everything for people must go to stderr.

    Raises:
        BadInput: two files would go there.
    """
    asked = [name for name in ("json", "csv") if getattr(options, name, None) == STDOUT]
    if len(asked) > 1:
        raise BadInput("--json and --csv cannot both be written to stdout; name a file for one")
    return bool(asked)


def write(options: argparse.Namespace, data: object, rows: Sequence[dict] = ()) -> None:
    """Write the files of --json and --csv: before the tables, whose reader may close the pipe."""
    if options.json is not None:
        text = json.dumps(plain(data), indent=2, allow_nan=False) + "\n"
        _put(options.json, text)
    if getattr(options, "csv", None) is not None:
        columns = dict.fromkeys(name for row in rows for name in row)
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        _put(options.csv, buffer.getvalue())


def plain(value: object) -> object:
    """JSON has no NaN and no infinity: such a number is written as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _put(file: Path, text: str) -> None:
    if file == STDOUT:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        file.write_text(text)
