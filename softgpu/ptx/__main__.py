# SPDX-License-Identifier: Apache-2.0
"""python -m softgpu.ptx FILE.ptx ...: kernels, parameters, unsupported instructions.

Exits with 1 if a file contains something that the machine does not know, 2 if one is unreadable.
"""

from __future__ import annotations

import collections
import sys

from .errors import PtxError
from .launch import Module


def describe(path: str) -> int:
    """Print one file's kernels; returns the exit status."""
    try:
        with open(path) as file:
            module = Module(file.read(), strict=False)
    except (OSError, UnicodeDecodeError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    except PtxError as error:
        print(f"{path}: {error}")
        return 1
    print(f"{path}: {module.target}, {len(module.kernels)} kernels")
    for name, function in module.kernels.items():
        print(f"  {name}: {len(function.body)} instructions {_directives(function)}".rstrip())
        for p in function.params:
            size = f"{p.size} bytes, aligned to {p.align}" if p.type == "b8" else p.type
            print(f"    {p.name}: {size}")
    problems = list(module.problems())
    for reason, lines in _grouped(problems).items():
        print(f"  unsupported, line {', '.join(map(str, lines))}: {reason}")
    return 1 if problems else 0


def _directives(function) -> str:
    return " ".join(f"{name} {value}".strip() for name, value in function.directives.items())


def _grouped(problems) -> dict[str, list[int]]:
    grouped = collections.defaultdict(list)
    for _, error in problems:
        grouped[error.reason].append(error.line)
    return grouped


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if arguments else 2
    return max(describe(path) for path in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
